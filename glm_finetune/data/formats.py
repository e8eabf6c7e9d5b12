"""Rows -> messages: one small record for each format. A new one is a function and a line in FORMATS.

    file_format = detect(rows)                              # or FORMATS["question_answer"]
    messages = file_format.messages(row, prompt_text="")    # checked: see conversation.check_order

What a row of each format looks like is in data/README.md.
"""

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

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

    convert(format, row, prompt_text) -> messages; a last assistant message only where the row has an answer.
    takes_prompt: whether it has a use for prompt_text, the one prompt of all rows, which is "" otherwise.
    """

    name: str
    fields: tuple
    answer: str | None
    convert: Callable
    optional: tuple = ()
    takes_prompt: bool = False
    entry_field: str | None = None  # of the entries in the one list field, where two formats share its name

    @property
    def needed(self):
        """The names of the fields of a row with an answer."""
        return (*self.fields, self.answer) if self.answer else self.fields

    def fits(self, row, needs_answer=True):
        """Whether a row has the fields of this format; what is in them is looked at later."""
        if any(name not in row for name in (self.needed if needs_answer else self.fields)):
            return False
        entries = row[self.fields[0]]
        if self.entry_field and isinstance(entries, str):  # as a CSV cell holds it
            entries = as_list(entries)
        if not self.entry_field or not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
            return self.entry_field != "from"  # nothing to tell them apart: role / content
        return ("from" in entries[0]) == (self.entry_field == "from")

    def messages(self, row, prompt_text="", needs_answer=True):
        """Messages of a row. Raises UserError with the problem: field, what it is, what to do."""
        messages = self.convert(self, row, prompt_text if self.takes_prompt else "")
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


def pair(file_format, row, prompt_text):
    """One question, the texts of the fields with nothing between them, and its answer."""
    question = prompt_text + "".join([text_of(row, name) for name in file_format.fields if row.get(name) != ""])
    answer = file_format.answer
    answers = [{"role": "assistant", "content": text_of(row, answer)}] if answer in row else []
    return [{"role": "user", "content": question}, *answers]


def with_history(file_format, row, prompt_text):
    """`pair` after a history of [question, answer] pairs, as in the official chat training, and a `system` text."""
    if "history" not in row and "system" not in row:
        return pair(file_format, row, prompt_text)
    messages = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": text_of(row, "system")})
    for i, turn in enumerate(list_of(row, "history") if row.get("history") not in (None, "") else [], 1):
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f"field 'history', round {i}: expected [question, answer], found {turn!r:.60}.")
        try:
            for role, text in zip(("user", "assistant"), turn):
                messages.append({"role": role, "content": text_of({"text": text}, "text")})
        except UserError as error:
            raise UserError(f"field 'history', round {i}: {error}") from None
    return messages + pair(file_format, row, prompt_text)


def conversation(file_format, row, prompt_text):
    """A list of messages, with tools where the row has them, and a system text beside it where it has one."""
    (field,) = file_format.fields
    convert = from_speakers if file_format.entry_field == "from" else from_roles
    messages = messages_of(list_of(row, field), convert, tools_of(row), field)
    if row.get("system"):
        at = 1 if messages and "tools" in messages[0] else 0
        messages.insert(at, {"role": "system", "content": text_of(row, "system")})
    return messages


def plain_text(file_format, row, prompt_text):
    """Text to continue training on, with no question. A row with an answer is in the wrong file: it would be lost."""
    if row.get("answer") is not None:
        raise UserError("field 'answer' stands beside 'text': one file is text alone, or text and answer.")
    return [{"role": "text", "content": text_of(row, "text")}]


HISTORY, TALK = ("history", "system"), ("tools", "system")
FORMATS = {
    file_format.name: file_format
    for file_format in (
        Format("instruction", ("instruction", "input"), "output", with_history, HISTORY),
        Format("advertisegen", ("content",), "summary", pair),
        Format("question_answer", ("question",), "answer", pair),
        Format("context_target", ("context",), "target", pair),
        Format("text_answer", ("text",), "answer", pair, takes_prompt=True),
        Format("prompt_response", ("prompt",), "response", with_history, HISTORY),
        Format("conversations", ("conversations",), None, conversation, TALK, entry_field="role"),
        Format("sharegpt", ("conversations",), None, conversation, TALK, entry_field="from"),
        Format("messages", ("messages",), None, conversation, TALK),
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
    return [one for one in found if not any({*one.needed} < {*other.needed} for other in found)]


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
    nearest = max(FORMATS.values(), key=lambda one: sum(name in row for name in one.needed) / len(one.needed))
    lacks, found = [name for name in nearest.needed if name not in row], sorted(map(str, row))
    if len(lacks) == len(nearest.needed):
        return f"the fields {found} are no known format ({', '.join(FORMATS)})."
    field = " and ".join(map(repr, lacks))
    return f"field {field} is missing for the format {nearest.name}; the fields found are {found}."


def parse_columns(text):
    """ "instruction=question,output=reply" -> {"instruction": "question", "output": "reply"}.

    Raises UserError for another form or a field that no format has.
    """
    known, columns = {name for one in FORMATS.values() for name in (*one.needed, *one.optional)}, {}
    for part in filter(None, text.split(",")):
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
