"""Rows -> messages: one small record for each format. A new one is a function and a line in FORMATS.

    file_format = detect(rows)                              # or FORMATS["question_answer"]
    messages = file_format.messages(row, prompt_text="")    # checked: see conversation.check_order

What a row of each format looks like is in data/README.md.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from glm_finetune.data.conversation import (
    check_order,
    from_roles,
    from_speakers,
    list_of,
    messages_of,
    text_of,
    tools_of,
)
from glm_finetune.errors import UserError, unknown_choice

NUM_DETECTED = 20  # rows that are looked at to tell the format


@dataclass(frozen=True)
class Format:
    """fields: must be in every row. answer: one more, which prediction can do without. optional: read where given.

    convert(row) -> messages; a last assistant message only where the row has an answer. takes_prompt: it has a further
    argument, the one prompt of all rows.
    """

    name: str
    fields: tuple
    answer: str | None
    convert: Callable
    optional: tuple = ()
    takes_prompt: bool = False
    entry_field: str | None = None  # of the entries in the one list field, where two formats share its name

    def fits(self, row, needs_answer=True):
        """Whether a row has the fields of this format; what is in them is looked at later."""
        needed = (*self.fields, *([self.answer] if self.answer and needs_answer else []))
        if any(name not in row for name in needed):
            return False
        entries = row[self.fields[0]]
        if self.entry_field and isinstance(entries, str):  # as a CSV cell holds it
            entries = as_list(entries)
        if not self.entry_field or not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
            return self.entry_field != "from"  # nothing to tell them apart: role / content
        return ("from" in entries[0]) == (self.entry_field == "from")

    def messages(self, row, prompt_text="", needs_answer=True):
        """Messages of a row. Raises UserError with the problem: field, what it is, what to do."""
        messages = self.convert(row, prompt_text) if self.takes_prompt else self.convert(row)
        if messages[:1] and messages[0]["role"] == "text":
            return messages if needs_answer else [{**messages[0], "role": "user"}]
        if needs_answer and self.answer and messages[-1]["role"] != "assistant":
            text_of(row, self.answer)
        check_order(messages, needs_answer)
        return messages


def as_list(text):
    """The value of a JSON text, None if it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def pair(fields, answer, row, prompt_text=""):
    """One question, the texts of `fields` with nothing between them, and its answer."""
    question = prompt_text + "".join([text_of(row, name) for name in fields if row.get(name) != ""])
    answers = [{"role": "assistant", "content": text_of(row, answer)}] if answer in row else []
    return [{"role": "user", "content": question}, *answers]


def with_history(fields, answer, row):
    """`pair` after a history of [question, answer] pairs, as in the official chat training, and a `system` text."""
    if "history" not in row and "system" not in row:
        return pair(fields, answer, row)
    messages = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": text_of(row, "system")})
    for i, turn in enumerate(list_of(row, "history") if row.get("history") not in (None, "") else [], 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"field 'history', round {i}: expected [question, answer], found {turn!r:.60}.")
        question, answered = ({"text": text} for text in turn)
        try:
            messages += [{"role": "user", "content": text_of(question, "text")}]
            messages += [{"role": "assistant", "content": text_of(answered, "text")}]
        except UserError as error:
            raise UserError(f"field 'history', round {i}: {error}") from None
    return messages + pair(fields, answer, row)


def conversation(field, convert, row):
    """A list of messages, with tools where the row has them, and a system text beside it where it has one."""
    entries = list_of(row, field)
    messages = messages_of(entries, convert, tools_of(row), field)
    if row.get("system"):
        at = 1 if messages and "tools" in messages[0] else 0
        messages.insert(at, {"role": "system", "content": text_of(row, "system")})
    return messages


def plain_text(row):
    """Text to continue training on, with no question. A row with an answer is in the wrong file: it would be lost."""
    if row.get("answer") is not None:
        raise UserError("field 'answer' stands beside 'text': one file is text alone, or text and answer.")
    return [{"role": "text", "content": text_of(row, "text")}]


def _pair(name, fields, answer, takes_prompt=False):
    return Format(name, fields, answer, partial(pair, fields, answer), takes_prompt=takes_prompt)


def _history(name, fields, answer):
    return Format(name, fields, answer, partial(with_history, fields, answer), optional=("history", "system"))


def _conversation(name, field, convert, entry_field):
    return Format(name, (field,), None, partial(conversation, field, convert), ("tools", "system"), False, entry_field)


FORMATS = {
    file_format.name: file_format
    for file_format in (
        _history("instruction", ("instruction", "input"), "output"),
        _pair("advertisegen", ("content",), "summary"),
        _pair("question_answer", ("question",), "answer"),
        _pair("context_target", ("context",), "target"),
        _pair("text_answer", ("text",), "answer", takes_prompt=True),
        _history("prompt_response", ("prompt",), "response"),
        _conversation("conversations", "conversations", from_roles, "role"),
        _conversation("sharegpt", "conversations", from_speakers, "from"),
        _conversation("messages", "messages", from_roles, None),
        Format("text", ("text",), None, plain_text),
    )
}


def named(name):
    """The format of --data_format. Raises UserError with the nearest name."""
    if name not in FORMATS:
        raise UserError(*unknown_choice("data_format", name, tuple(FORMATS)))
    return FORMATS[name]


def fitting(row, needs_answer=True):
    """Formats whose fields a row has, without those that need only a part of another's fields."""
    # question and answer beside text: question_answer fits, and text_answer; text alone is a part of text_answer
    found = [file_format for file_format in FORMATS.values() if file_format.fits(row, needs_answer)]
    needed = [{*file_format.fields, file_format.answer} - {None} for file_format in found]
    return [file_format for file_format, mine in zip(found, needed) if not any(mine < other for other in needed)]


def detect(rows, needs_answer=True):
    """The format that most of `rows` (objects) have; without needs_answer also if none of them has an answer.

    In a tie the first row decides. Raises UserError if they have none (naming the nearest and what it lacks) or could
    be two.
    """
    votes = Counter(file_format.name for row in rows for file_format in fitting(row))
    if not needs_answer and votes.keys() <= {"text", "text_answer"}:
        votes = Counter(file_format.name for row in rows for file_format in fitting(row, needs_answer))
    if not votes:
        raise UserError(f"{_nearest(rows[0])} Name other columns with --columns field=column.")
    best = [name for name, count in votes.items() if count == max(votes.values())]
    first = [file_format.name for file_format in fitting(rows[0], needs_answer)]
    best = [name for name in best if name in first] or best
    if len(best) > 1:
        raise UserError(f"its fields {sorted(map(str, rows[0]))} could be {' or '.join(best)}: say --data_format.")
    return FORMATS[best[0]]


def _nearest(row):
    """Why a row has no format: the one with most of its fields, and those it lacks."""
    fields = {
        file_format: [*file_format.fields, *([file_format.answer] if file_format.answer else [])]
        for file_format in FORMATS.values()
    }
    file_format = max(
        fields, key=lambda file_format: sum(name in row for name in fields[file_format]) / len(fields[file_format])
    )
    lacks = [name for name in fields[file_format] if name not in row]
    if len(lacks) == len(fields[file_format]):
        return f"the fields {sorted(map(str, row))} are no known format ({', '.join(FORMATS)})."
    field = " and ".join(map(repr, lacks))
    return f"field {field} is missing for the format {file_format.name}; the fields found are {sorted(map(str, row))}."


def parse_columns(text):
    """ "instruction=question,output=reply" -> {"instruction": "question", "output": "reply"}; None -> {}.

    Raises UserError for another file_format or a field that no format has.
    """
    known = {
        name
        for file_format in FORMATS.values()
        for name in (*file_format.fields, file_format.answer, *file_format.optional)
    } - {None}
    columns = {}
    for part in filter(None, (text or "").split(",")):
        name, equals, column = part.partition("=")
        if not equals or not column or name not in known or name in columns:
            fields = ", ".join(sorted(known))
            raise UserError(f"--columns {text}: {part!r} must be FIELD=COLUMN, each field once, of {fields}.")
        columns[name] = column
    return columns


def renamed(row, columns):
    """The row with its columns under the names of the format's fields; what had such a name before is hidden."""
    if not columns:
        return row
    hidden = {*columns, *columns.values()}
    kept = {name: value for name, value in row.items() if name not in hidden}
    return kept | {name: row[column] for name, column in columns.items() if column in row}
