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
    EMPTY,
    check_order,
    converter_of,
    list_of,
    messages_of,
    repaired,
    text_of,
    tools_of,
)
from glm_finetune.data.flags import unescaped
from glm_finetune.errors import UserError, unknown_choice

NUM_DETECTED = 20  # rows that are looked at to tell the format


@dataclass(frozen=True)
class Format:
    """fields: must be in every row. answer: one more, which prediction can do without. more: of the question too, where
    they are there and not null. optional: read where given.

    convert(format, row, prompt_text, roles) -> messages; a last assistant message only where the row has an answer.
    takes_prompt: whether it has a use for prompt_text, the one prompt of all rows, which is "" otherwise. entry_field:
    of the entries in the one list field. is_newer: told from the fields only where they are those of no older format.
    """

    name: str
    fields: tuple
    answer: str | None
    convert: Callable
    optional: tuple = ()
    more: tuple = ()
    takes_prompt: bool = False
    entry_field: str | None = None
    is_newer: bool = False

    @property
    def needed(self):
        """The names of the fields of a row with an answer."""
        return (*self.fields, self.answer) if self.answer else self.fields

    @property
    def known(self):
        """The names of all fields that are read."""
        return (*self.needed, *self.more, *self.optional)

    def fits(self, row, needs_answer=True):
        """Whether a row has the fields of this format; what is in them is looked at later."""
        if any(name not in row for name in (self.needed if needs_answer else self.fields)):
            return False
        if self.fields != ("conversations",):
            return True
        entries = row["conversations"]
        entries = as_list(entries) if isinstance(entries, str) else entries  # as a CSV cell holds it
        if not isinstance(entries, list) or not entries or not isinstance(entries[0], dict):
            return self.entry_field != "from"  # nothing to tell them apart: role / content
        return ("from" in entries[0]) == (self.entry_field == "from")

    def is_late(self, row):
        """Whether a row that fits is of this format only if it is of no other."""
        return self.is_newer or any(name not in row for name in self.more)

    @property
    def takes_separator(self):
        """Whether its question is made of two texts."""
        return bool(self.more)

    @property
    def has_roles(self):
        """Whether a row of it may hold messages."""
        return self.entry_field is not None or "history" in self.optional

    def glued(self, row, columns):
        """(end of the first, beginning of the second text) of a question where no blank or punctuation is between
        them, or None. columns: field -> column.
        """
        texts = [row.get(columns.get(name, name)) for name in (*self.fields, *self.more)]
        if not all(isinstance(text, str) and text for text in texts):
            return None
        end, begin = texts[0][-12:], texts[1][:12]
        return (end, begin) if end[-1].isalnum() and begin[0].isalnum() else None

    def references(self, row):
        """The answers of a row with a list of several right ones, for prediction; None of any other row."""
        answers = row.get(self.answer)
        return answers if isinstance(answers, list) and answers and all(isinstance(a, str) for a in answers) else None

    def messages(self, row, prompt_text="", needs_answer=True, roles=EMPTY, separator="", repair=False):
        """Messages of a row, in prediction without `references`. roles: `roles.parse_roles`. separator: between two
        texts of a question. repair: as `conversation.repaired`.

        Raises UserError with the problem: field, what it is, what to do.
        """
        if not needs_answer and self.references(row):
            row = {name: value for name, value in row.items() if name != self.answer}
        if separator and self.takes_separator and all(row.get(name) for name in (*self.fields, *self.more)):
            row = {**row, self.more[0]: unescaped(separator) + text_of(row, self.more[0])}
        messages = self.convert(self, row, prompt_text if self.takes_prompt else "", roles)
        if messages[:1] and messages[0]["role"] == "text":
            return messages if needs_answer else [{**messages[0], "role": "user"}]
        if needs_answer and self.answer and messages[-1]["role"] != "assistant":
            text_of(row, self.answer)
        messages = repaired(messages) if repair else messages
        check_order(messages, needs_answer)
        return messages


def as_list(text):
    """The value of a JSON text, None if it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def pair(file_format, row, prompt_text, roles=EMPTY):
    """One question, the texts of the fields with nothing between them, and its answer."""
    question = prompt_text + "".join([text_of(row, name) for name in file_format.fields if row.get(name) != ""])
    for name in file_format.more:
        if row.get(name) not in (None, ""):
            question += text_of(row, name)
    messages, answer = [{"role": "user", "content": question}], file_format.answer
    value = row.get(answer)
    if value is None:
        return messages
    if type(value) is list and file_format.references(row):
        several = f"field {answer!r} is a list of answers, {value!r:.40}; a row is trained on one"
        raise UserError(f"{several}. Take one, or make a row of each. (predict.py scores against all of them.)")
    return [*messages, {"role": "assistant", "content": text_of(row, answer)}]


def with_title(file_format, row, prompt_text, roles=EMPTY):
    """`pair` whose question is a title and the text below it, on a line of its own; or one, where they are the same."""
    (field,) = file_format.fields
    title = text_of(row, "title") if row.get("title") not in (None, "") else ""
    question = "\n".join(dict.fromkeys(filter(None, (title, text_of(row, field)))))
    return pair(file_format, {**row, field: question}, prompt_text)


def with_history(file_format, row, prompt_text, roles=EMPTY):
    """`pair` after a `system` text and a history of rounds: [question, answer] as in the official chat training, or
    messages as ChatGLM3's chat() keeps them.
    """
    if "history" not in row and "system" not in row:
        return pair(file_format, row, prompt_text)
    messages = []
    if row.get("system") not in (None, ""):
        messages.append({"role": "system", "content": text_of(row, "system")})
    turns = list_of(row, "history") if row.get("history") not in (None, "") else []
    if turns and isinstance(turns[0], dict):
        messages += messages_of(turns, converter_of(turns, "role"), None, "history", roles)
    else:
        messages += [message for i, turn in enumerate(turns, 1) for message in _round(i, turn)]
    return messages + pair(file_format, row, prompt_text)


def _round(i, turn):
    if not isinstance(turn, list) or len(turn) != 2:
        raise UserError(f"field 'history', round {i}: expected [question, answer], found {turn!r:.60}.")
    try:
        return [{"role": role, "content": text_of({"text": text}, "text")} for role, text in zip(ROUND, turn)]
    except UserError as error:
        raise UserError(f"field 'history', round {i}: {error}") from None


def conversation(file_format, row, prompt_text, roles=EMPTY):
    """A list of messages, with tools where the row has them, and a system text beside it where it has one."""
    (field,) = file_format.fields
    entries = list_of(row, field)
    messages = messages_of(entries, converter_of(entries, file_format.entry_field), tools_of(row), field, roles)
    if row.get("system"):
        at = 1 if messages and "tools" in messages[0] else 0
        messages.insert(at, {"role": "system", "content": text_of(row, "system")})
    return messages


def plain_text(file_format, row, prompt_text, roles=EMPTY):
    """Text to continue training on, with no question. A row with an answer is in the wrong file: it would be lost."""
    if row.get("answer") is not None:
        raise UserError("field 'answer' stands beside 'text': one file is text alone, or text and answer.")
    return [{"role": "text", "content": text_of(row, "text")}]


ROUND = ("user", "assistant")
HISTORY, TALK = ("history", "system"), ("tools", "system")
FORMATS = {
    file_format.name: file_format
    for file_format in (
        Format("instruction", ("instruction",), "output", with_history, HISTORY, more=("input",)),
        Format("advertisegen", ("content",), "summary", pair),
        Format("question_answer", ("question",), "answer", pair),
        Format("context_target", ("context",), "target", pair),
        Format("text_answer", ("text",), "answer", pair, takes_prompt=True),
        Format("prompt_response", ("prompt",), "response", with_history, HISTORY),
        Format("conversations", ("conversations",), None, conversation, TALK, entry_field="role"),
        Format("sharegpt", ("conversations",), None, conversation, TALK, entry_field="from"),
        Format("messages", ("messages",), None, conversation, TALK, entry_field="role"),
        Format("text", ("text",), None, plain_text),
        Format("query_response", ("query",), "response", with_history, HISTORY, is_newer=True),
        Format("input_output", ("input",), "output", with_history, HISTORY, is_newer=True),
        Format("input_target", ("input",), "target", pair, is_newer=True),
        Format("prompt_completion", ("prompt",), "completion", with_history, HISTORY, is_newer=True),
        Format("ask_answer", ("ask",), "answer", with_title, ("title",), is_newer=True),
        Format("conversation", ("conversation",), None, conversation, TALK, entry_field="human", is_newer=True),
        Format("paragraph", ("paragraph",), None, conversation, TALK, entry_field="q", is_newer=True),
    )
}


def named(name):
    """The format of --data_format. Raises UserError with the nearest name."""
    if name not in FORMATS:
        raise UserError(*unknown_choice("data_format", name, tuple(FORMATS)))
    return FORMATS[name]


def fitting(row, needs_answer=True):
    """Formats whose fields a row has: plain text only if no other, a newer one only if no older."""
    # question and answer beside text: question_answer and text_answer; query and response beside text: query_response
    found = [file_format for file_format in FORMATS.values() if file_format.fits(row, needs_answer)]
    found = [one for one in found if one.name != "text"] or found
    return [one for one in found if not one.is_late(row)] or found


def detect(rows, needs_answer=True):
    """The format that most of `rows` (objects) have; without needs_answer also if none of them has an answer.

    In a tie the first row decides. Raises UserError if they have none (naming the nearest and what it lacks), could be
    two, or are text with further columns, which would be lost.
    """
    votes = Counter(file_format.name for row in rows for file_format in fitting(row))
    if not votes and is_message(rows[0]):
        raise UserError(f"a message alone, {sorted(map(str, rows[0]))}. {ONE_CONVERSATION}")
    if not needs_answer and votes.keys() <= {"text", "text_answer"}:
        votes = Counter(file_format.name for row in rows for file_format in fitting(row, needs_answer))
    if not votes:
        raise UserError(f"{_nearest(rows[0])} Name other columns with --columns field=column.")
    best = [name for name, count in votes.items() if count == max(votes.values())]
    first = [file_format.name for file_format in fitting(rows[0], needs_answer)]
    best = [name for name in best if name in first] or best
    if len({FORMATS[name].fields if not needs_answer else name for name in best}) > 1:
        raise UserError(f"its fields {sorted(map(str, rows[0]))} could be {' or '.join(best)}: say --data_format.")
    if needs_answer and FORMATS[best[0]].is_newer:
        _refuse_other_questions(rows, FORMATS[best[0]])
    if needs_answer and best[0] == "text":
        refuse_further(column for row in rows if "answer" not in row for column in further(row))
    return FORMATS[best[0]]


def _refuse_other_questions(rows, file_format):
    """Raise UserError if rows of a newer format have a column that is a question elsewhere: it would be lost."""
    found = [name for row in rows for name in QUESTIONS if row.get(name) and name not in file_format.known]
    if found:
        problem = f"field {found[0]!r} stands beside {', '.join(map(repr, file_format.needed))}, and would be left out"
        remedy = f"Name the columns (--columns instruction={found[0]},...), or say --data_format {file_format.name}"
        raise UserError(f"{problem}. {remedy} to leave it alone.")


QUESTIONS = ("instruction", "question", "query", "prompt", "content", "context", "ask", "input")
ONE_CONVERSATION = (
    "Is the file one conversation? A whole conversation is one row, one line or one entry of an array: "
    'put it into {"messages": [...]}, on one line, or into one more pair of [ ].'
)


def is_message(row):
    """Whether an object is what a conversation is made of, not a row."""
    return {"role", "content"} <= row.keys() or {"from", "value"} <= row.keys()


def further(row):
    """The columns beside `text` that have a value."""
    return [name for name, value in row.items() if name != "text" and value is not None]


def refuse_further(columns):
    """Raise UserError if plain text that was told from the fields has columns beside it: one may be the answer."""
    if columns := [*dict.fromkeys(map(str, columns))]:
        raise UserError(
            f"field 'text' would be trained as plain text and the columns {columns!r:.200} left out. Name the answer "
            f"(--columns answer={columns[0]}: the format text_answer), or say --data_format text to leave them alone."
        )


def _nearest(row):
    """Why a row has no format: the one with most of its fields, and those it lacks."""
    lower = {str(name).strip().lower() for name in row}
    nearest = max(FORMATS.values(), key=lambda one: sum(name in lower for name in one.needed) / len(one.needed))
    lacks, found = [name for name in nearest.needed if name not in row], sorted(map(str, row))
    cases = {str(name).strip().lower(): str(name) for name in row}
    if lacks and all(name in cases for name in nearest.needed):
        columns = ",".join(f"{name}={cases[name]}" for name in lacks)
        return f"the fields {found} are written otherwise than those of {nearest.name}: --columns {columns}."
    if len(lacks) == len(nearest.needed):
        return f"the fields {found} are no known format ({', '.join(FORMATS)})."
    field = " and ".join(map(repr, lacks))
    return f"field {field} is missing for the format {nearest.name}; the fields found are {found}."


def parse_columns(text):
    """ "instruction=question,output=reply" -> {"instruction": "question", "output": "reply"}.

    Raises UserError for another form or a field that no format has.
    """
    known, columns = {name for one in FORMATS.values() for name in one.known}, {}
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
