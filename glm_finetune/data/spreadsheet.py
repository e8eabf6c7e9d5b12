"""The one sheet of an .xlsx file that holds something -> rows of texts, as if it had been saved as CSV.

    for number, row in read_spreadsheet("a.xlsx"): ...      # number: the row of the sheet, as the program shows it

Formulas and merged cells are refused: a formula is no text, and a merged cell leaves its neighbours empty.
"""

import datetime
import io
import re
import zipfile
from collections import Counter

from glm_finetune.data.lines import Unreadable, is_gzip, opened
from glm_finetune.errors import UserError

PIECE = 1 << 20
_merged = re.compile(rb'<(?:\w+:)?mergeCell [^>]*?ref="([^"]+)"').search
FORMULA = "Save the sheet with values only (paste them as values), or as .csv."


def read_spreadsheet(path):
    """Yield (number, {column: text} or Unreadable). Raises UserError naming a formula or merged cells."""
    try:
        import openpyxl
    except ImportError:
        raise UserError(f"{path}: reading it needs openpyxl: pip install openpyxl") from None
    with opened(path) as file:
        content = io.BytesIO(file.read()) if is_gzip(path) else file
        try:
            book = openpyxl.load_workbook(content, read_only=True)
            sheet = _only_sheet(path, book)
            _refuse_merged(path, content, sheet)
            sheet.reset_dimensions()  # some programs write wrong ones, and rows would be left out
            yield from _rows(path, sheet)
        except (zipfile.BadZipFile, KeyError, IndexError, ValueError, SyntaxError, OSError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path}: not a readable .xlsx file ({type(error).__name__}: {error}).") from None


def _only_sheet(path, book):
    """The sheet that is not empty, the first if all are. Raises UserError for several: their rows would be lost."""
    filled = [sheet for sheet in book.worksheets if any(any(row) for row in sheet.iter_rows(values_only=True))]
    if len(filled) > 1:
        names = ", ".join(repr(sheet.title) for sheet in filled)
        raise UserError(
            f"{path}: {len(filled)} sheets hold something ({names}). Save the one meant as a file of its own."
        )
    return (filled or book.worksheets)[0]


def _refuse_merged(path, content, sheet):
    """openpyxl does not say it of a sheet that it streams."""
    end = b""
    with zipfile.ZipFile(content).open(sheet._worksheet_path) as file:
        while data := file.read(PIECE):
            if found := _merged(end + data):
                cells = found[1].decode()
                raise UserError(f"{path}, cells {cells}: merged. Unmerge them, and fill in what each row has.")
            end = data[-200:]


def _rows(path, sheet):
    header = None
    for number, cells in enumerate(sheet.iter_rows(), 1):
        values = [_text(path, cell) for cell in cells]
        while values and not values[-1]:
            values.pop()
        if header is None and values:
            header = _header(path, number, values)
        elif values:
            yield number, _row(header, values)


def _header(path, number, names):
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise UserError(f"{path}: two columns are named {twice[0]!r}. Rename one of them.")
    if "" in names:
        raise UserError(f"{path}, row {number}: column {names.index('') + 1} has no name. Give it one, or delete it.")
    return names


def _row(header, values):
    if len(values) > len(header):
        return Unreadable(f"{len(values) - len(header)} more values than the header has; name their columns.")
    return dict.fromkeys(header, "") | dict(zip(header, values))


def _text(path, cell):
    """What a cell shows, without its number format."""
    value = cell.value
    if value is None:
        return ""
    if cell.data_type in ("f", "e"):
        what = "a formula" if cell.data_type == "f" else "an error"
        raise UserError(f"{path}, cell {cell.coordinate}: {what}, {str(value)[:40]!r}. {FORMULA}")
    if isinstance(value, bool):
        return str(value).upper()
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, datetime.datetime) and value.time() == datetime.time():
        return value.date().isoformat()
    return str(value)
