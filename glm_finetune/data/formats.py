"""Files -> rows -> messages. One row format for now: instruction / input / output.

for where, row in read_rows("data/spo_0.json"):
    messages = instruction_messages(row, where)
"""

import json
import re
from pathlib import Path

INSTRUCTION_FIELDS = ("instruction", "input", "output")


def read_rows(path):
    """Yield (where, object) of a JSONL file or a JSON array; where: file and line, or entry, for messages.

    Raises ValueError naming the file and the line: not there, empty, not UTF-8, not JSON, not an object.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 (byte {error.start}). Convert it, e.g. iconv -f GBK -t UTF-8.") from None
    if not text.strip():
        raise ValueError(f"{path}: the file is empty.")
    is_array = text.lstrip().startswith("[")
    for number, row in _array(text, path) if is_array else _lines(text, path):
        where = f"{path}, {'entry' if is_array else 'line'} {number}"
        if not isinstance(row, dict):
            raise ValueError(f"{where}: expected an object, found {row!r:.60}.")
        yield where, row


def _array(text, path):
    try:
        rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg}).") from None
    if not rows:
        raise ValueError(f"{path}: the array is empty.")
    yield from enumerate(rows, 1)


def _lines(text, path):
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error.msg}): {line[:60]!r}") from None
            yield number, row


def instruction_messages(row, where, needs_output=True):
    """instruction / input / output -> user and assistant messages; the question is both texts with nothing between.

    needs_output: without it a row may lack `output` (prediction), and has then no assistant message.
    Raises ValueError naming `where`, the field, and the fields found.
    """
    for name in INSTRUCTION_FIELDS:
        if name == "output" and not needs_output and name not in row:
            continue
        if not isinstance(row.get(name), str):
            problem = f"is {row[name]!r:.40}, not a string" if name in row else "is missing"
            raise ValueError(f"{where}: field {name!r} {problem}; the fields found are {sorted(row)}.")
        if half := re.search("[\ud800-\udfff]", row[name]):
            raise ValueError(f"{where}: field {name!r} has {half[0]!r}, half of a character, at {half.start()}.")
    messages = [{"role": "user", "content": row["instruction"] + row["input"]}]
    if "output" in row:
        messages.append({"role": "assistant", "content": row["output"]})
    return messages
