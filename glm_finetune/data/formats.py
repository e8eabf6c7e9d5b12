"""Rows -> messages. One row format for now: instruction / input / output.

for where, row in read_rows("data/spo_0.json"):
    messages = instruction_messages(row, where)
"""

import re

INSTRUCTION_FIELDS = ("instruction", "input", "output")


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
