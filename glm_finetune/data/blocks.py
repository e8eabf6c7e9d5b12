"""What files hold, before anybody parses it: a hash of their bytes, and blocks of rows that any process can work on.

`scan` reads a file of JSON lines once, hashes it and finds blocks of about BLOCK_BYTES that begin and end between
lines. Any of them can be read alone, by any process. Rows of other files are read one after the other and handed on in
blocks.

    for block in blocks_of(data_file, "cache/"): list(block.rows())      # (number, dict or Unreadable)
    fingerprint("a.json:2,b.csv", "cache/")                          # changes with the data
"""

import hashlib
import os
import time
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from glm_finetune.data.files import list_data_files
from glm_finetune.data.lines import BOM, MAX_LINE, lines_in, numbered_rows
from glm_finetune.data.lock import locked
from glm_finetune.errors import UserError
from glm_finetune.weights import read_json, write_json

BLOCK_BYTES = 2**18  # what one block becomes stays in a core's cache: a twelfth faster than 1 MiB
BLOCK_ROWS = 512  # of files that have no blocks of bytes
LARGE_BYTES = 2**28
MIN_AGE_SECS = 2  # a younger file may change once more without its time of change showing it


class Block(NamedTuple):
    """Lines of a file. start, end: bytes. first_row: rows before it (blank lines are none). first_number: its first
    line, from 1.
    """

    path: str
    start: int
    end: int
    first_row: int
    first_number: int

    def rows(self):
        """Yield (line, dict or Unreadable)."""
        with open(self.path, "rb") as file:
            file.seek(self.start)
            size = self.end - self.start
            if size > MAX_LINE:
                yield from lines_in(file, self.first_number, size)
            else:  # no line can be too long: read all at once
                yield from numbered_rows(file.read(size).split(b"\n"), self.first_number)


class RowBlock(NamedTuple):
    """Rows that were read already. entries: [(number, dict or Unreadable)]."""

    first_row: int
    entries: list

    def rows(self):
        return self.entries


class Layout(NamedTuple):
    """A file. sha256: of its bytes. num_rows, blocks: of JSON lines that are not compressed; None and () otherwise."""

    sha256: str
    num_rows: int | None = None
    blocks: tuple = ()


def blocks_of(data_file, cache_dir=None):
    """Yield the rows of a data file in blocks, in their order. Raises UserError for a file that cannot be read on."""
    if data_file.has_blocks:
        yield from layout_of(data_file, data_file.path, cache_dir).blocks
        return
    rows, first = data_file.rows(), 0
    while entries := list(islice(rows, BLOCK_ROWS)):
        yield RowBlock(first, entries)
        first += len(entries)


def content_of(data_file, cache_dir=None):
    """Hash of what a data file holds and is said to hold; None of a data set of the hub: unknown before it is read."""
    parts = [(path.name, layout_of(data_file, path, cache_dir).sha256) for path in data_file.files()]
    if data_file.kind != "datasets":
        sha256, entry = parts[0][1], data_file.entry
        return hashlib.sha256(f"{sha256} {entry}".encode()).hexdigest() if entry else sha256
    split = data_file.path.partition("#")[2]
    return hashlib.sha256(repr((split, parts)).encode()).hexdigest() if parts else None


def fingerprint(text, cache_dir=None):
    """--train_path -> text that changes with the data: of one file its SHA-256; of data sets of the hub their names."""
    parts = [(content_of(one, cache_dir) or one.path, str(one.weight)) for one in list_data_files(text)]
    is_plain = [weight for _, weight in parts] == ["1"]
    return parts[0][0] if is_plain else hashlib.sha256(repr(parts).encode()).hexdigest()


def signature(path):
    """What changes when a file is written to, without reading it."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def signatures(data_files):
    """{path: its signature} of all files that are read."""
    return {path: signature(path) for data_file in data_files for path in data_file.files()}


def check_unchanged(before):
    """Raise UserError unless the files still have these `signatures`."""
    for path, old in before.items():
        if signature(path) != old:
            raise UserError(f"{path}: the file was changed while it was read. Start again when it is complete.")


def layout_of(data_file, path, cache_dir=None):
    """Layout of a data file, as `scan`, remembered in `cache_dir` for as long as the file's `signature` stays."""
    if cache_dir is None:
        return scan(path, data_file.has_blocks)
    name = hashlib.sha256(f"{os.path.abspath(path)} {data_file.has_blocks}".encode()).hexdigest()[:32]
    note = Path(cache_dir) / "files" / f"{name}.json"
    if layout := _noted(note, path):
        return layout
    with locked(note.with_suffix(".lock")):  # one rank reads the file, the others what it found
        return _noted(note, path) or _scan_and_note(note, path, data_file.has_blocks)


def _noted(note, path):
    """The layout in a note; None without one, for another state of the file, or if the note is damaged."""
    try:
        saved = read_json(note)
        blocks = tuple(Block(str(path), *fields) for fields in saved["blocks"])
        return Layout(saved["sha256"], saved["num_rows"], blocks) if saved["signature"] == signature(path) else None
    except (ValueError, KeyError, TypeError):
        return None


def _scan_and_note(note, path, has_blocks):
    """`scan`, and a note of it unless the file is so young that a change might not show in its signature.

    A large file is given the time to get older: without a note every rank would read it.
    """
    status = os.stat(path)
    is_old = time.time() - status.st_ctime > MIN_AGE_SECS
    if not is_old and status.st_size > LARGE_BYTES:
        time.sleep(MIN_AGE_SECS)
        is_old = True
    before, layout = signature(path), scan(path, has_blocks)
    if is_old:
        blocks = [block[1:] for block in layout.blocks]
        write_json({**layout._asdict(), "blocks": blocks, "signature": before}, note)
    return layout


def scan(path, has_blocks=True):
    """Read a file once -> Layout. has_blocks: `DataFile.has_blocks`.

    Raises UserError if it is empty or changes meanwhile.
    """
    before = signature(path)
    with open(path, "rb") as file:
        layout = _scan_lines(str(path), file) if has_blocks else Layout(hashlib.file_digest(file, "sha256").hexdigest())
    if layout.num_rows == 0:
        raise UserError(f"{path}: the file is empty.")
    check_unchanged({path: before})
    return layout


def _scan_lines(path, file):
    # BLOCK_BYTES 10, lines of 7 bytes: read 10, and on to the end of the line: blocks [0, 14) [14, 28) ... of two lines
    digest, blocks = hashlib.sha256(), []
    start, num_rows, number = 0, 0, 1
    while data := file.read(BLOCK_BYTES):
        digest.update(data)
        *lines, last = (data if start else data.removeprefix(BOM)).split(b"\n")
        has_text, end, is_split = last.strip(), start + len(data), not data.endswith(b"\n")
        while not data.endswith(b"\n") and (data := file.readline(BLOCK_BYTES)):  # the rest of the last line
            digest.update(data)
            has_text, end = has_text or data.strip(), end + len(data)
        found = sum(1 for line in lines if line.strip()) + bool(has_text)
        if found:
            blocks.append(Block(path, start, end, num_rows, number))
        start, num_rows, number = end, num_rows + found, number + len(lines) + is_split
    return Layout(digest.hexdigest(), num_rows, tuple(blocks))
