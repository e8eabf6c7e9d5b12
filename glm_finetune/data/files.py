"""Files of rows, read block by block: JSON lines or one JSON array, never whole in memory.

`scan` reads a file once, hashes it and finds blocks of about BLOCK_BYTES that begin and end between rows. Any block can
then be read alone, by any process; a row is known by its place (0, 1, ..., blank lines left out), to users by its line.

    for where, row in read_rows("data/spo_0.json"): ...           # where: "data/spo_0.json, line 7"
    blocks = scan("data/spo_0.json").blocks; rows_of(blocks[3])   # a part of it
"""

import codecs
import hashlib
import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from glm_finetune.data.lock import locked
from glm_finetune.weights import read_json, write_json

BLOCK_BYTES = 2**20
MAX_ROW_BYTES = 2**26  # a longer "row" is a file without line ends, or an array that is not closed
BOM = b"\xef\xbb\xbf"
SEPARATOR = re.compile(r"[\s,\[]*")
LARGE_BYTES = 2**28
MIN_AGE_SECS = 2  # a younger file may change once more without its time of change showing it


@dataclass(frozen=True)
class Block:
    """A part of a file. start, end: bytes. first_row: rows before it. first_number: its first line or entry, from 1."""

    path: str
    unit: str  # "line" or "entry": what its numbers count
    start: int
    end: int
    first_row: int
    first_number: int


@dataclass(frozen=True)
class Layout:
    """What `scan` found. sha256: of the bytes of the file."""

    sha256: str
    num_rows: int
    blocks: tuple


def scan(path):
    """Read a file once -> Layout.

    Raises ValueError naming file and line or byte: not there, empty, not JSON (arrays; lines are parsed when read).
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    before, digest = signature(path), hashlib.sha256()
    with open(path, "rb") as file:
        head = file.read(BLOCK_BYTES).removeprefix(BOM).lstrip()
        file.seek(len(BOM) if _starts_with(file, BOM) else 0)
        is_array, start = head.startswith(b"["), file.tell()
        digest.update(BOM[:start])
        blocks = list((_array_blocks if is_array else _line_blocks)(str(path), file, digest))
    num_rows = blocks[-1][1] if blocks else 0
    if not num_rows:
        raise ValueError(f"{path}: the array is empty." if is_array else f"{path}: the file is empty.")
    if signature(path) != before:
        raise ValueError(f"{path}: the file was changed while it was read. Start again when it is complete.")
    return Layout(digest.hexdigest(), num_rows, tuple(block for block, _ in blocks))


def _starts_with(file, text):
    file.seek(0)
    return file.read(len(text)) == text


def signature(path):
    """What changes when a file is written to, without reading it."""
    status = os.stat(path)
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]


def layout_of(path, cache_dir=None):
    """`scan`, remembered in `cache_dir` for as long as the file's `signature` stays: then it is not read again."""
    if cache_dir is None or not Path(path).is_file():
        return scan(path)
    name = hashlib.sha256(os.path.abspath(path).encode()).hexdigest()[:32]
    note = Path(cache_dir) / "files" / f"{name}.json"
    layout = _noted(note, path)
    if layout is None:
        with locked(note.with_suffix(".lock")):  # one rank reads the file, the others what it found
            layout = _noted(note, path) or _scan_and_note(note, path)
    return layout


def _noted(note, path):
    """The layout in a note; None without one, for another state of the file, or if the note is damaged."""
    try:
        saved = read_json(note)
        blocks = tuple(Block(str(path), *fields) for fields in saved["blocks"])
        return Layout(saved["sha256"], saved["num_rows"], blocks) if saved["signature"] == signature(path) else None
    except (ValueError, KeyError, TypeError):
        return None


def _scan_and_note(note, path):
    """`scan`, and a note of it unless the file is so young that a change might not show in its signature.

    A large file is given the time to get older: without a note every rank would read it.
    """
    is_old = time.time() - os.stat(path).st_ctime > MIN_AGE_SECS
    if not is_old and os.stat(path).st_size > LARGE_BYTES:
        time.sleep(MIN_AGE_SECS)
        is_old = True
    before, layout = signature(path), scan(path)
    if is_old:
        blocks = [list(asdict(block).values())[1:] for block in layout.blocks]
        write_json({**asdict(layout), "blocks": blocks, "signature": before}, note)
    return layout


def read_rows(path):
    """Yield (where, object) of every row of a file; where: file and line, or entry, for messages.

    Raises ValueError naming the file and the line: not there, empty, not UTF-8, not JSON, not an object.
    """
    for block in scan(path).blocks:
        for number, row in rows_of(block):
            yield f"{path}, {block.unit} {number}", row


def rows_of(block):
    """Yield (number of line or entry, object) of a block. Raises ValueError naming file and line."""
    with open(block.path, "rb") as file:
        file.seek(block.start)
        data = file.read(block.end - block.start)
    for number, row in (_entries if block.unit == "entry" else _lines)(data, block):
        if not isinstance(row, dict):
            raise ValueError(f"{block.path}, {block.unit} {number}: expected an object, found {row!r:.60}.")
        yield number, row


def _lines(data, block):
    for number, line in enumerate(data.split(b"\n"), block.first_number):
        if line.strip():
            yield number, parse_line(line, f"{block.path}, line {number}")


def parse_line(line, where):
    """The bytes of a line -> what they say. Raises ValueError naming `where`: not UTF-8, not JSON."""
    try:
        text = line.decode("utf-8")
        return json.loads(text)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{where}: not UTF-8 (byte {error.start} of the line). Convert the file, e.g. iconv -f GBK -t UTF-8."
        ) from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not JSON ({error.msg}): {text[:60]!r}") from None


def _entries(data, block):
    text, number = data.decode("utf-8"), block.first_number
    end = SEPARATOR.match(text).end()
    while end < len(text):
        row, end = json.JSONDecoder().raw_decode(text, end)
        yield number, row
        number, end = number + 1, SEPARATOR.match(text, end).end()


def _line_blocks(path, file, digest):
    """Yield (Block, rows up to its end)."""
    start, num_rows, number = file.tell(), 0, 1
    while data := file.read(BLOCK_BYTES):
        if not data.endswith(b"\n"):
            data += file.readline(MAX_ROW_BYTES)
        if len(data) > MAX_ROW_BYTES and not data.endswith(b"\n"):
            last = number + data.count(b"\n")
            raise ValueError(f"{path}, line {last}: longer than {MAX_ROW_BYTES:,} bytes. Is it JSON lines?")
        digest.update(data)
        end, lines = start + len(data), data.split(b"\n")
        found = sum(1 for line in lines if line.strip())
        if found:
            yield Block(path, "line", start, end, num_rows, number), num_rows + found
        start, num_rows, number = end, num_rows + found, number + len(lines) - 1


class _Window:
    """The part of a JSON text that is looked at. before: (bytes, lines) of the file in front of it."""

    def __init__(self, path, file, digest):
        self.path, self.file, self.digest, self.text = path, file, digest, ""
        self.decoder, self.before = codecs.getincrementaldecoder("utf-8")(), (file.tell(), 1)

    def more(self):
        """Look at more; returns whether there was any."""
        data = self.file.read(BLOCK_BYTES)
        self.digest.update(data)
        try:
            self.text += self.decoder.decode(data, final=not data)
        except UnicodeDecodeError:
            line = self.before[1] + self.text.count("\n")
            raise ValueError(
                f"{self.path}: not UTF-8 (after line {line}). Convert it, e.g. iconv -f GBK -t UTF-8."
            ) from None
        return bool(data)

    def drop(self, count):
        """Forget the first `count` characters; returns the byte at which they began."""
        start, gone, self.text = self.before[0], self.text[:count], self.text[count:]
        self.before = self.before[0] + len(gone.encode()), self.before[1] + gone.count("\n")
        return start

    def at(self, end):
        """(next character that is no white space, its place) from `end` on; ("", place) at the end of the file."""
        while True:
            rest = self.text[end : end + 256].lstrip(" \t\r\n")
            if rest:
                return rest[0], end + len(self.text[end : end + 256]) - len(rest)
            end = min(end + 256, len(self.text))
            if end == len(self.text) and not self.more():
                return "", end

    def value(self, start):
        """Place after the JSON value that begins at `start`."""
        while True:
            try:
                return json.JSONDecoder().raw_decode(self.text, start)[1]
            except json.JSONDecodeError as error:
                if len(self.text) - start > MAX_ROW_BYTES or not self.more():
                    line = self.before[1] + error.lineno - 1
                    raise ValueError(f"{self.path}, line {line}: not JSON ({error.msg}).") from None

    def refuse(self, expected, place):
        line = self.before[1] + self.text.count("\n", 0, place)
        raise ValueError(f"{self.path}, line {line}: not JSON (expected {expected}).")


def _array_blocks(path, file, digest):
    """Yield (Block, rows up to its end). Every entry is parsed, to find its end."""
    window = _Window(path, file, digest)
    separator, place, num_rows, first = *window.at(0), 0, 0
    while separator != "]":
        separator, place = window.at(place + 1)
        if separator == "]" and not num_rows:
            break
        separator, place = window.at(window.value(place))
        num_rows += 1
        if separator not in (",", "]"):
            window.refuse("',' or ']'", place)
        if place >= BLOCK_BYTES or separator == "]":
            start = window.drop(place)
            yield Block(path, "entry", start, window.before[0], first, first + 1), num_rows
            first, place = num_rows, 0
    rest, place = window.at(place + 1)
    if rest:
        window.refuse("the end of the file after ']'", place)
