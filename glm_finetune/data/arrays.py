"""JSON that is no lines: an array of rows, or an object with such an array under `data`; read entry by entry.

    kind_of("a.json")                           # "lines", "array" or "object"
    for number, row in read_array("a.json"): ...

Values, and what is refused, are those of json.loads: it is the standard library's decoder, on a piece of the file that
begins at an entry. ijson (3.6.0, yajl2_c) was tried: a seventh faster, but with it a number above 64 bits, NaN and
1e400 are errors, and half of a character becomes a question mark in silence.
"""

import codecs
import json
import re
from functools import partial

from glm_finetune.data.lines import BOM, MAX_LINE, as_row, opened, parse, problem_of
from glm_finetune.errors import UserError

PIECE = 1 << 20  # bytes read at a time; more, where one entry is longer
LONGEST_ATOM = 16  # characters: \ud83d\ude00, -Infinity; an error so near to the end of a piece may be the cut's
CONVERSATIONS = ("messages", "conversations", "conversation", "paragraph")
_decode = json.JSONDecoder().raw_decode
_blank = re.compile(r"[ \t\n\r]*").match
_after_entry = re.compile(r"[ \t\n\r]*,[ \t\n\r]*").match


class Scanner:
    """Reads a JSON file from left to right, a piece at a time. line: where the piece begins, from 1."""

    def __init__(self, file):
        self.file, self.decoder = file, codecs.getincrementaldecoder("utf-8-sig")()
        self.text, self.at, self.line, self.num_bytes, self.is_whole = "", 0, 1, 0, False

    def read_on(self):
        """Leave what is passed behind, and read as much again as is left, a PIECE at least."""
        data = self.file.read(max(PIECE, len(self.text) - self.at))
        self.num_bytes += len(data)
        self.is_whole = not data
        self.line += self.text.count("\n", 0, self.at)
        try:
            self.text, self.at = self.text[self.at :] + self.decoder.decode(data, self.is_whole), 0
        except UnicodeDecodeError as error:
            error.start += self.num_bytes - len(error.object)
            raise

    def peek(self):
        """The next character that is no white space; "" at the end of the file."""
        while True:
            self.at = _blank(self.text, self.at).end()
            if self.at < len(self.text) or self.is_whole:
                return self.text[self.at : self.at + 1]
            self.read_on()

    def take(self, allowed):
        """Pass the next character, which must be one of `allowed`; returns it."""
        found = self.peek()
        if not found or found not in allowed:
            raise json.JSONDecodeError(f"Expecting {' or '.join(map(repr, allowed))}", self.text, self.at)
        self.at += 1
        return found

    def value(self):
        """Pass white space and a JSON value; returns it."""
        self.peek()
        return self._value()

    def _value(self):
        while True:
            try:
                value, end = _decode(self.text, self.at)
                if end < len(self.text) or self.is_whole:
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos > len(self.text) - LONGEST_ATOM
                if self.is_whole or not is_cut:
                    raise
            self.read_on()

    def entries(self):
        """Pass an array; yields its values."""
        self.take("[")
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self._value()
            if (match := _after_entry(self.text, self.at)) and match.end() < len(self.text):  # most entries: be quick
                self.at = match.end()
            elif self.take(",]") == "]":
                return
            else:
                self.peek()

    def fields(self):
        """Pass an object; yields its names, after each of which the caller passes the value."""
        self.take("{")
        mark = "}" if self.peek() == "}" else ","
        self.at += mark == "}"
        while mark == ",":
            if self.peek() != '"':
                raise json.JSONDecodeError("Expecting a name in double quotes", self.text, self.at)
            name = self.value()
            self.take(":")
            yield name
            mark = self.take(",}")

    def has_rest(self, error):
        """Whether an error is of what is there, not of what is missing at the end of the file."""
        return not self.is_whole or not error.msg.startswith("Unterminated") and bool(self.text[error.pos :].strip())

    def end(self):
        """Raise unless nothing follows."""
        if self.peek():
            raise json.JSONDecodeError("Extra data", self.text, self.at)


def read_array(path):
    """Yield (number, value) of the entries of a JSON array. Raises UserError naming the line that is no JSON."""
    return _numbered(path, Scanner.entries)


def read_object(path):
    """`read_array` of the array under `data` in the one object that a file is."""
    return _numbered(path, _entries_of_data)


def _numbered(path, entries_of):
    with opened(path) as file:
        scanner = Scanner(file)
        try:
            yield from enumerate(entries_of(scanner), 1)
            scanner.end()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}: {problem_of(error)}") from None
        except json.JSONDecodeError as error:
            line = scanner.line + scanner.text.count("\n", 0, error.pos)
            cut = "" if scanner.has_rest(error) else " The file ends here: is it whole?"
            raise UserError(f"{path}, line {line}: {problem_of(error)}.{cut}") from None
        except (RecursionError, ValueError) as error:
            raise UserError(f"{path}: {problem_of(error)}.") from None


def _entries_of_data(scanner):
    for name in scanner.fields():
        if name == "data":
            yield from scanner.entries()
        else:
            scanner.value()


def kind_of(path, otherwise="lines"):
    """What a file holds: "lines", "array", or "object" with its rows under `data`; `otherwise` where it is no JSON.

    Raises UserError for an object over several lines that is one row, or a conversation, or has no list under `data`.
    """
    with opened(path) as file:
        first = next(filter(None, (line.removeprefix(BOM).strip() for line in _lines(file))), b"")
        value = parse(first) if first[:1] + first[-1:] in (b"[]", b"{}") else None
        if type(as_row(value)) is dict and any(map(bytes.strip, _lines(file))):
            return "lines"
    if otherwise != "lines" and not isinstance(value, (dict, list)) and first not in (b"[", b"{"):
        return otherwise
    if first[:1] == b"{":
        return _kind_of_object(path)
    return "array" if first[:1] == b"[" else otherwise


def _lines(file):
    return iter(partial(file.readline, MAX_LINE), b"")


def _kind_of_object(path):
    """`kind_of` a file whose first line is not followed by others, or is no whole object."""
    with opened(path) as file:
        scanner, found = Scanner(file), []
        try:
            scanner.peek()
            start = scanner.line + scanner.text.count("\n", 0, scanner.at)
            for name in scanner.fields():
                found.append(name)
                if name == "data" and scanner.peek() == "[":
                    scanner.at += 1
                    return "object" if scanner.peek() in ("{", "[", "]") else "lines"
                scanner.value()
            end = scanner.line + scanner.text.count("\n", 0, scanner.at)
        except (RecursionError, ValueError):  # told with its line by who reads it
            return "lines"
    if "data" in found and (end > start or len(found) == 1):
        raise UserError(f"{path}: an object whose 'data' is no list. Rows are a list of objects under 'data'.")
    if end > start and found:
        what = "conversation" if {*found} & {*CONVERSATIONS} else "object"
        raise UserError(
            f"{path}: one {what} over {end - start + 1} lines, with the fields {found!r:.100}. One row is one line, or "
            "one entry of an array: write it on one line, or put [ and ] around it (a list under 'data' is read too)."
        )
    return "lines"
