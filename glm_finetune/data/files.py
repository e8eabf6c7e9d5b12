"""Files -> rows, one at a time: JSON, CSV, TSV, Parquet, spreadsheets, texts (each also .gz), folders, `datasets`.

    for data_file in list_data_files("a.json:2,folder,hf://owner/name#test"):
        for number, row in data_file.rows():        # row: a dict, or Unreadable
            print(data_file.where(number))          # data/spo_0.json, line 1

Everything is streamed. Not here: JSON itself (`lines`, `arrays`), .xlsx (`spreadsheet`), what is no data (`foreign`),
hashes, and blocks of a file (`blocks`).
"""

import csv
import io
import math
import os
import re
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path

from glm_finetune.data.arrays import kind_of, read_array, read_object
from glm_finetune.data.foreign import is_no_data, refuse_foreign
from glm_finetune.data.lines import (
    CONVERT,
    GZIP_ERRORS,
    MAX_LINE,
    Unreadable,
    as_row,
    is_gzip,
    lines_in,
    not_whole,
    opened,
    texts_in,
)
from glm_finetune.data.manifest import FILE as DESCRIPTION
from glm_finetune.data.manifest import entry_of
from glm_finetune.data.spreadsheet import read_spreadsheet
from glm_finetune.errors import UserError

SUFFIXES = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".xlsx", ".txt")
HUB = "hf://"
BATCH_ROWS = 1024  # of Parquet that are in memory at a time


@dataclass(frozen=True)
class DataFile:
    """A file (or data set of `datasets`). kind: of READERS. weight: how often its rows count in an epoch. entry: what
    dataset_info.json says of it, see `manifest`.
    """

    path: str
    kind: str
    weight: Fraction = Fraction(1)
    entry: str | None = None

    def where(self, number):
        return f"{self.path}, {UNITS[self.kind]} {number}"

    @property
    def has_blocks(self):
        """Whether any part of it can be read alone: JSON lines that are not compressed."""
        return self.kind == "lines" and not is_gzip(self.path)

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
            raise not_whole(self.path, error) from None
        if empty:
            raise UserError(f"{self.path}: the {'array' if self.kind in ('array', 'object') else 'file'} is empty.")


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
    return [_file(path, weight)]


def _files_in(path, weight):
    files = [p for p in sorted(path.iterdir()) if p.is_file() and _suffix(p) in SUFFIXES and not is_no_data(p)]
    if not files:
        raise UserError(f"{path}: no file of {', '.join(SUFFIXES)} (or .gz) in this folder.")
    return [_file(p, weight) for p in files]


def _file(path, weight):
    is_described = (path.parent / DESCRIPTION).is_file()
    return DataFile(str(path), _kind(path), weight, entry_of(path) if is_described else None)


def _kind(path):
    suffix = _suffix(path)
    try:
        if suffix not in (".parquet", ".xlsx"):
            with opened(path) as file:
                beginning = file.read(64)
            if suffix == ".jsonl" and beginning[:2] == b'{"':  # most files: be quick
                return "lines"
            refuse_foreign(path, suffix, beginning)
        if suffix in (".csv", ".tsv", ".parquet", ".xlsx"):
            return suffix[1:]
        return kind_of(path, "text" if suffix == ".txt" else "lines")
    except GZIP_ERRORS as error:
        raise not_whole(path, error) from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error}).") from None


def _suffix(path):
    """The suffix that says what a file holds, without .gz."""
    return (path.with_suffix("") if is_gzip(path) else path).suffix.lower()


def _read(rows_in, path):
    with opened(path) as file:
        yield from rows_in(file)


def _read_table(delimiter, path):
    """CSV or TSV with a header; every value stays the text it is. A number is the row's first line."""
    csv.field_size_limit(MAX_LINE)  # of the whole process; the default is 128 KiB
    kind, start, header = _suffix(Path(path))[1:].upper(), 1, None
    with io.TextIOWrapper(opened(path), encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            for values in reader:
                if header is None and values:
                    header = values
                    _refuse_other_delimiter(path, kind, header)
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


def _refuse_other_delimiter(path, kind, header):
    """Raise UserError for one column whose name holds what separates columns elsewhere."""
    other = next((name for name in (";", "\t", ",", "|") if name in header[0]), None)
    if len(header) == 1 and other:
        remedy = "Save it with commas" + (", or name it .tsv." if other == "\t" and kind == "CSV" else ".")
        raise UserError(f"{path}: its header is one column, {header[0]!r:.60}: separated by {other!r}? {remedy}")


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
    with opened(path) as file:
        content = io.BytesIO(file.read()) if is_gzip(path) else file
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
    "lines": partial(_read, lines_in),
    "array": read_array,
    "object": read_object,
    "text": partial(_read, texts_in),
    "csv": partial(_read_table, ","),
    "tsv": partial(_read_table, "\t"),
    "parquet": _read_parquet,
    "xlsx": read_spreadsheet,
    "datasets": _read_datasets,
}
UNITS = dict.fromkeys(("lines", "text", "csv", "tsv"), "line") | {"array": "entry", "object": "entry"}
UNITS |= dict.fromkeys(("parquet", "xlsx", "datasets"), "row")
