"""Files -> rows, one at a time: JSONL, JSON arrays, CSV, TSV, Parquet (each also .gz), folders, and `datasets`.

    for data_file in list_data_files("a.json:2,folder,hf://owner/name#test"):
        for number, row in data_file.rows():        # row: a dict, or Unreadable
            print(data_file.where(number))          # data/spo_0.json, line 1

JSONL, CSV and Parquet are streamed; a JSON array is loaded whole. Not here: hashes, and blocks of a file (`blocks`).
"""

import csv
import gzip
import io
import json
import math
import os
import re
import zlib
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from glm_finetune.errors import UserError

MAX_LINE = 1 << 24  # bytes of a JSON line; a longer one is a broken file, not a sample
SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet")
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
HUB = "hf://"
CONVERT = "Convert it, e.g. iconv -f GBK -t UTF-8 (from Windows also -f UTF-16)."
BOM = b"\xef\xbb\xbf"
_decode = json.JSONDecoder().raw_decode
BATCH_ROWS = 1024  # of Parquet that are in memory at a time


@dataclass(frozen=True)
class Unreadable:
    """Instead of a row: why there is none."""

    problem: str


@dataclass(frozen=True)
class DataFile:
    """A file (or data set of `datasets`). kind: of READERS. weight: how often its rows count in an epoch."""

    path: str
    kind: str
    weight: Fraction = Fraction(1)

    def where(self, number):
        return f"{self.path}, {UNITS[self.kind]} {number}"

    @property
    def has_blocks(self):
        """Whether any part of it can be read alone: JSON lines that are not compressed."""
        return self.kind == "lines" and not _is_gzip(self.path)

    def files(self):
        """The files that it is read from; none of a data set of the hub."""
        return self._files_of_set() if self.kind == "datasets" else [Path(self.path)]

    def _files_of_set(self):
        folder = Path(self.path.partition("#")[0])
        return [] if self.path.startswith(HUB) else sorted(path for path in folder.rglob("*") if path.is_file())

    def rows(self):
        """Yield (number, dict or Unreadable). Raises UserError for a file that cannot be read on."""
        empty = True
        try:
            for number, row in READERS[self.kind](self.path):
                empty = False
                yield number, as_row(row)
        except GZIP_ERRORS as error:
            raise _not_whole(self.path, error) from None
        if empty:
            raise UserError(f"{self.path}: the {'array' if self.kind == 'array' else 'file'} is empty.")


def as_row(value):
    """The value if it is an object, else an Unreadable that says so."""
    return value if isinstance(value, (dict, Unreadable)) else Unreadable(f"expected an object, found {value!r:.60}.")


def occurrences(index, weight):
    """How often row `index` (from 0) of a file counts in an epoch: spread evenly, `weight` times on the average."""
    # weight 2.5: 2 3 2 3 ...    weight 0.5: 0 1 0 1 ...
    return 1 if weight == 1 else math.floor((index + 1) * weight) - math.floor(index * weight)


def list_data_files(text):
    """--train_path -> data files: files, folders and data sets with commas between them, `:weight` behind each.

    Raises UserError for what is not there or cannot be read here.
    """
    parts = [str(text)] if os.path.exists(text) else [part.strip() for part in str(text).split(",")]
    if not all(parts):
        raise UserError(f"{text!r}: a name is missing beside a comma. Take the comma out.")
    return [data_file for part in parts for data_file in _files_of(part)]


def paths_of(*texts):
    """The files and names in --train_path and the like; None is passed over."""
    return [data_file.path for text in texts if text for data_file in list_data_files(text)]


def _files_of(text):
    weight = Fraction(1)
    if (match := re.fullmatch(r"(.+):(-?\d+\.?\d*|-?\.\d+)", text)) and not os.path.exists(text):
        text, weight = match[1], Fraction(match[2])
    if weight <= 0:
        raise UserError(f"{text}:{float(weight):g}: a weight must be above 0; leave the file out.")
    path, saved = Path(text), Path(text.partition("#")[0])
    if text.startswith(HUB) or any((saved / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return [DataFile(text, "datasets", weight)]
    if path.is_dir():
        return _files_in(path, weight)
    if not os.path.isfile(text):
        raise UserError(f"{text}: no such file. (A data set of the Hugging Face hub is {HUB}owner/name.)")
    return [DataFile(str(path), _kind(path), weight)]


def _files_in(path, weight):
    files = [p for p in sorted(path.iterdir()) if p.is_file() and _suffix(p) in SUFFIXES and p.name[0] != "."]
    if not files:
        raise UserError(f"{path}: no file of {', '.join(SUFFIXES)} (or .gz) in this folder.")
    return [DataFile(str(p), _kind(p), weight) for p in files]


def _kind(path):
    kind = _suffix(path)[1:]
    return kind if kind in ("csv", "tsv", "parquet") else "array" if _is_array(path) else "lines"


def _suffix(path):
    """The suffix that says what a file holds, without .gz."""
    return (path.with_suffix("") if _is_gzip(path) else path).suffix.lower()


def _is_gzip(path):
    return str(path).lower().endswith(".gz")


def _open(path):
    return gzip.open(path, "rb") if _is_gzip(path) else open(path, "rb")


def _is_array(path):
    """Whether the first that is no white space or byte-order mark is a [."""
    try:
        with _open(path) as file:
            texts = (block.removeprefix(BOM).lstrip() for block in iter(partial(file.read, 4096), b""))
            return next(filter(None, texts), b"").startswith(b"[")
    except GZIP_ERRORS as error:
        raise _not_whole(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _not_whole(path, error):
    return UserError(f"{path}: not a whole gzip file ({error}).")


def _read_lines(path):
    with _open(path) as file:
        yield from lines_in(file)


def lines_in(file, number=1, num_bytes=math.inf):
    """Yield (number, dict or Unreadable) of JSON lines, of which at most one is in memory.

    file: open where line `number` begins; num_bytes: how far to read, to the end of a line.
    """
    while num_bytes > 0 and (line := file.readline(MAX_LINE)):
        num_bytes -= len(line)
        if len(line) == MAX_LINE and not line.endswith(b"\n"):
            while (rest := file.readline(MAX_LINE)) and not rest.endswith(b"\n"):
                num_bytes -= len(rest)
            num_bytes -= len(rest)
            yield number, Unreadable(f"longer than {MAX_LINE >> 20} MiB; one row is one line. Split it.")
        else:
            yield from numbered_rows([line], number)
        number += 1


def numbered_rows(lines, first):
    """Yield (number, dict or Unreadable) of JSON lines (bytes), without blank ones. first: number of the first."""
    for number, line in enumerate(lines, first):
        if text := (line.removeprefix(BOM) if number == 1 else line).strip():
            value = _parse(text)
            yield number, value if type(value) is dict else as_row(value)


def _parse(line):
    """A JSON line (bytes, stripped) -> its value, or Unreadable."""
    try:
        text = line.decode("utf-8")
        value, end = _decode(text)
        return value if end == len(text) else json.loads(text)  # which says what is wrong
    except UnicodeDecodeError as error:
        return Unreadable(_problem(error))
    except (RecursionError, ValueError) as error:
        hint = " Is an object spread over several lines? One row is one line." if text in "{[" else ""
        return Unreadable(f"{_problem(error)}: {text[:60]!r}{hint}")


def _problem(error):
    """Why bytes are no JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}). {CONVERT}"
    return "nested too deep" if isinstance(error, RecursionError) else f"not JSON ({getattr(error, 'msg', error)})"


def _read_array(path):
    """A JSON array, loaded whole."""
    with _open(path) as file:
        content = file.read()
    try:
        yield from enumerate(json.loads(content.decode("utf-8-sig")), 1)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: {_problem(error)}") from None
    except (RecursionError, ValueError) as error:
        line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        raise UserError(f"{path}{line}: {_problem(error)}.") from None


def _read_table(delimiter, path):
    """CSV or TSV with a header; every value stays the text it is. A number is the row's first line."""
    csv.field_size_limit(MAX_LINE)  # of the whole process; the default is 128 KiB
    kind, start, header = _suffix(Path(path))[1:].upper(), 1, None
    with io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                if header is None and values:
                    header = values
                    if twice := [name for name, count in Counter(values).items() if count > 1]:
                        raise UserError(f"{path}: two columns are named {twice[0]!r}. Rename one of them.")
                elif values:
                    yield start, _table_row(header, values, delimiter)
                start = reader.line_num + 1
        except UnicodeDecodeError as error:
            byte = error.object[error.start : error.start + 1]
            raise UserError(f"{path}, line {start} or later: not UTF-8 (byte {byte!r}). {CONVERT}") from None
        except csv.Error as error:
            raise UserError(f"{path}, line {start}: not {kind} ({error}).") from None


def _table_row(header, values, delimiter):
    """{column: text}, or Unreadable."""
    if more := len(values) - len(header):
        than = "more values than the header has" if more > 0 else "values less than the header has"
        return Unreadable(f"{abs(more)} {than}; quote a {delimiter!r} in text.")
    return dict(zip(header, values))


def _read_parquet(path):
    try:
        import pyarrow.parquet
    except ImportError:
        raise _missing("pyarrow", path) from None
    with _open(path) as file:
        content = io.BytesIO(file.read()) if _is_gzip(path) else file
        number = 0
        try:
            for batch in pyarrow.parquet.ParquetFile(content).iter_batches(batch_size=BATCH_ROWS):
                rows = batch.to_pylist()
                yield from enumerate(rows, number + 1)
                number += len(rows)
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError, OverflowError) as error:
            after = f" after row {number}" if number else ""
            raise UserError(f"{path}: not a readable Parquet file{after} ({str(error).splitlines()[0]}).") from None


def _read_datasets(text):
    """A folder of save_to_disk, or a data set of the hub, streamed. text: hf://owner/name[/config][#split]."""
    try:
        import datasets
    except ImportError:
        raise _missing("datasets", text) from None
    name, _, split = text.partition("#")
    try:
        if name.startswith(HUB):
            owner, title, *config = name.removeprefix(HUB).split("/") + [""]
            rows = datasets.load_dataset(f"{owner}/{title}", config[0] or None, split=split or "train", streaming=True)
        else:
            rows = datasets.load_from_disk(name)
            if isinstance(rows, datasets.DatasetDict):
                rows = rows[split or "train"]
            elif split:
                raise UserError(f"it has no splits; leave #{split} out")
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{text}: `datasets` cannot load it ({type(error).__name__}: {error}).") from None
    yield from enumerate(rows, 1)


def _missing(library, path):
    return UserError(f"{path}: reading it needs {library}: pip install {library}")


READERS = {  # kind -> function: path -> (number, row)
    "lines": _read_lines,
    "array": _read_array,
    "csv": partial(_read_table, ","),
    "tsv": partial(_read_table, "\t"),
    "parquet": _read_parquet,
    "datasets": _read_datasets,
}
UNITS = {"lines": "line", "array": "entry", "csv": "line", "tsv": "line", "parquet": "row", "datasets": "row"}
