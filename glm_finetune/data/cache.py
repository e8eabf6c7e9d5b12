"""Prepared data: token arrays in a folder, memory-mapped, made once and shared by whoever asks for the same thing.

The folder's name is a hash of the files' content, the tokenizer's files, the settings and this package's code, so what
lies there is right whenever it is whole. It is written under another name and renamed: nobody sees a half. Who gets the
lock prepares, others wait for the lock in the file system, not in a collective with a time limit; the kernel gives it
back when a process dies. Folders can be deleted at any time, also while a run has them mapped. Only a data set of the
hub is prepared at every start: what it holds is not known before it is read.

    samples = prepared(list_data_files("data/spo_0.json"), settings, "cache/")    # Samples, see columns.py
"""

import errno
import hashlib
import json
import os
import shutil
import time
import zlib
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import sentencepiece

from glm_finetune.data.blocks import check_unchanged, content_of, signatures
from glm_finetune.data.columns import COLUMNS, Samples
from glm_finetune.data.lock import locked
from glm_finetune.data.prepare import choose_workers, tokenize
from glm_finetune.data.report import Report
from glm_finetune.errors import NotWritten, UserError
from glm_finetune.weights import read_json, write_json

FORMAT = 3
HEADER = "header.json"
CHECKED_BYTES = 2**28  # of an array; reading them takes a fraction of a second
PACKAGE = Path(__file__).parents[1]


def default_cache_dir():
    """Where prepared data lies when --cache_dir does not say."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm_finetune"


def prepared(data_files, settings, cache_dir, overwrite=False, progress=False, num_workers=None, num_threads=None):
    """The samples of files as memory maps, prepared first if need be, or (overwrite) again.

    num_workers: processes; default by the files' size. num_threads: see `prepare.tokenize`.
    Raises UserError for a bad row (file and line), NotWritten naming --cache_dir if nothing can be written there.
    """
    started, before = time.time(), signatures(data_files)
    with naming_the_cache(cache_dir):
        contents = [content_of(data_file, cache_dir) for data_file in data_files]
        folder = Path(cache_dir) / key_of(data_files, contents, settings)
        oldest = started if overwrite or None in contents else 0
        if (samples := read(folder, oldest)) is None:
            samples = _made(folder, oldest, started, before, data_files, settings, progress, num_workers, num_threads)
        return samples


def _made(folder, oldest, started, *given):
    """The samples made by this process, or by another that had the lock before."""
    with locked(folder.with_suffix(".lock")):
        if (samples := read(folder, oldest, say=print)) is None:
            _raise_old_error(folder, started)
            _build(folder, *given)
            samples = read(folder)
        return samples


def key_of(data_files, contents, settings):
    """What the samples follow from, as the name of a folder. contents: `blocks.content_of` of each file."""
    tokenizer = settings.tokenizer
    tokenizer_files = [tokenizer.folder / name for name in (tokenizer.model_file, "tokenizer_config.json")]
    code = (path for room in ("data", "modes", "objectives") for path in PACKAGE.glob(f"{room}/*.py"))
    named = [one.path if content is None else content for one, content in zip(data_files, contents)]
    skips = settings.on_bad_row == "skip"  # the report then names files
    parts = vars(settings) | {
        "format": FORMAT,
        "files": [[name, one.kind, str(one.weight)] for name, one in zip(named, data_files)],
        "paths": [one.path for one in data_files] if skips else [],
        "tokenizer": [type(tokenizer).__qualname__, _sha256(filter(Path.is_file, tokenizer_files))],
        "sentencepiece": sentencepiece.__version__,
        "template": _name(settings.template.draft),
        "drafts": _name(settings.drafts),
        "code": _sha256(sorted(code)),  # a change of it makes no old cache wrong
        "limits": vars(settings.limits),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:32]


def _name(function):
    return f"{function.__module__}.{function.__qualname__}"


def _sha256(paths):
    """One hash of several files."""
    return hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in paths)).hexdigest()


def read(folder, oldest=0, say=None):
    """The samples in a folder; None if it is not there, damaged (`say` is told) or made before `oldest` (Unix time)."""
    if not folder.is_dir():
        return None
    try:
        header = read_json(folder / HEADER)
        if header["format"] != FORMAT:
            raise UserError(f"format {header['format']}, not {FORMAT}")
        columns = {name: _map(folder / name, header["counts"][name], dtype) for name, dtype in COLUMNS.items()}
        if wrong := [name for name in COLUMNS if checksum(folder / name) != header["checksums"][name]]:
            raise UserError(f"{', '.join(wrong)}: not the bytes that were written")
        report = Report.from_json(header["report"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return say(f"{folder}: damaged ({error}); it is prepared again.", flush=True) if say else None
    return Samples(columns, report) if header["made"] >= oldest else None


def checksum(path):
    """CRC-32 of a file, read and not mapped; of a large one, of CHECKED_BYTES in evenly spread pieces of 1 MiB."""
    size, piece, num, crc = path.stat().st_size, 2**20, CHECKED_BYTES // 2**20, 0
    is_large = size > CHECKED_BYTES
    starts = [i * (size - piece) // (num - 1) for i in range(num)] if is_large else range(0, size, piece)
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            crc = zlib.crc32(file.read(piece), crc)
    return crc


def _map(path, count, dtype):
    expected, found = count * np.dtype(dtype).itemsize, path.stat().st_size
    if found != expected:
        raise UserError(f"{path.name} has {found} bytes instead of {expected}")
    return np.memmap(path, dtype, "r", shape=(count,)) if count else np.zeros(0, dtype)


def _build(folder, before, data_files, settings, progress, num_workers, num_threads):
    """before: the signatures of the files when their content was hashed, which must still be theirs."""
    for old in folder.parent.glob(f"tmp-{folder.name}-*"):  # of processes that were killed: the lock is ours
        shutil.rmtree(old)
    temporary = folder.parent / f"tmp-{folder.name}-{os.getpid()}"
    temporary.mkdir()
    try:
        check_unchanged(before)
        counts, report = _write(temporary, data_files, settings, progress, num_workers, num_threads)
        check_unchanged(before)
        header = {"format": FORMAT, "made": time.time(), "counts": counts, "report": vars(report)}
        header["checksums"] = {name: checksum(temporary / name) for name in COLUMNS}
        write_json(header, temporary / HEADER)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
    except UserError as error:
        write_json({"at": time.time(), "error": str(error)}, folder.with_suffix(".error"))
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(folder, data_files, settings, progress, num_workers, num_threads):
    """Write the columns; returns (elements of each, report). Every file is on the disk before this returns."""
    report, counts = Report(settings.too_long), dict.fromkeys(COLUMNS, 0)
    workers = choose_workers(data_files) if num_workers is None else num_workers
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / name, "wb")) for name in COLUMNS}
        for samples in tokenize(data_files, settings, workers, folder.parent, progress, num_threads):
            for name, column in samples.after(counts).items():
                files[name].write(column.data)
                counts[name] += len(column)
            report.add(samples.report)
        for file in files.values():
            file.flush()
            if file.tell():  # most data leaves the columns of special samples empty
                os.fsync(file.fileno())
    return counts, report


def _raise_old_error(folder, started):
    """Raise the UserError that another rank met while this one waited, instead of going the same way to it."""
    path = folder.with_suffix(".error")
    if path.is_file() and (record := read_json(path))["at"] >= started:
        raise UserError(record["error"])


@contextmanager
def naming_the_cache(cache_dir):
    """An OSError says what to do about it."""
    try:
        yield
    except ChildProcessError:
        raise
    except OSError as error:
        raise _not_written(cache_dir, error) from error


def _not_written(cache_dir, error):
    problem = "no space left for the prepared data" if error.errno in (errno.ENOSPC, errno.EDQUOT) else error
    return NotWritten(
        f"--cache_dir {cache_dir}: {problem}. Give a folder on a disk with room (about 5 bytes for each token), or "
        "--streaming to do without."
    )
