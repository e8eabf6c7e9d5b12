"""Bytes -> rows: JSON lines, and texts with blank lines between them. At most one row is in memory.

with opened(path) as file:
    for number, row in lines_in(file): ...      # row: a dict, or Unreadable
"""

import gzip
import json
import math
import zlib
from dataclasses import dataclass

from glm_finetune.errors import UserError

MAX_LINE = 1 << 24  # bytes of a JSON line; a longer one is a broken file, not a sample
GZIP_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile)
CONVERT = "Convert it, e.g. iconv -f GBK -t UTF-8 (from Windows also -f UTF-16)."
BOM = b"\xef\xbb\xbf"
LIST_ROWS = {"role": "messages", "from": "conversations", "human": "conversation", "q": "paragraph"}
_decode = json.JSONDecoder().raw_decode


@dataclass(frozen=True)
class Unreadable:
    """Instead of a row: why there is none."""

    problem: str


def is_gzip(path):
    return str(path).lower().endswith(".gz")


def opened(path):
    """The bytes of a file, unpacked."""
    return gzip.open(path, "rb") if is_gzip(path) else open(path, "rb")


def not_whole(path, error):
    """The UserError for one of GZIP_ERRORS."""
    return UserError(f"{path}: not a whole gzip file ({error}).")


def as_row(value):
    """The value if it is an object; a list of messages is a conversation; else an Unreadable that says what it is."""
    if isinstance(value, (dict, Unreadable)):
        return value
    first = value[0] if isinstance(value, list) and value else None
    for name, field in LIST_ROWS.items() if isinstance(first, dict) else ():
        if name in first:
            return {field: value}
    return Unreadable(f"expected an object, found {value!r:.60}.")


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
            value = parse(text)
            yield number, value if type(value) is dict else as_row(value)


def parse(line):
    """A JSON line (bytes, stripped) -> its value, or Unreadable."""
    try:
        text = line.decode("utf-8")
        value, end = _decode(text)
        return value if end == len(text) else json.loads(text)  # which says what is wrong
    except UnicodeDecodeError as error:
        return Unreadable(problem_of(error))
    except (RecursionError, ValueError) as error:
        hint = " Is an object spread over several lines? One row is one line." if text in "{[" else ""
        return Unreadable(f"{problem_of(error)}: {text[:60]!r}{hint}")


def problem_of(error):
    """Why bytes are no JSON."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8 (byte {error.start}). {CONVERT}"
    return "nested too deep" if isinstance(error, RecursionError) else f"not JSON ({getattr(error, 'msg', error)})"


def texts_in(file):
    """Yield (number of its first line, {"text": text} or Unreadable) of texts, each of them up to a blank line."""
    lines, first, size = [], 1, 0
    for number, line in enumerate(_bounded_lines(file), 1):
        line = line.removeprefix(BOM) if number == 1 else line
        if line.strip():
            first = first if lines else number
            size += len(line)
            if size <= MAX_LINE or not lines:
                lines.append(line)
        elif lines:
            yield first, _text(lines, size)
            lines, size = [], 0
    if lines:
        yield first, _text(lines, size)


def _bounded_lines(file):
    return iter(lambda: file.readline(MAX_LINE + 1), b"")


def _text(lines, size):
    if size > MAX_LINE:
        return Unreadable(f"longer than {MAX_LINE >> 20} MiB; a blank line ends a text. Put some in.")
    try:
        text = b"".join(lines).decode("utf-8")
    except UnicodeDecodeError as error:
        return Unreadable(problem_of(error))
    return {"text": text.replace("\r\n", "\n").rstrip("\n")}
