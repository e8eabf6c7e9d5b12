"""Conversations as the world writes them -> messages (`Mode` says what a message is), and what makes one valid.

The families of files: role / content (ChatGLM3's with `tool`, OpenAI's with `tool_calls`), from / value, and rounds of
a question and an answer (human / assistant, q / a). What the names of roles mean: `roles`.
Every function raises UserError with the problem; who calls knows the file and the line.
"""

import json
import keyword
from functools import partial
from types import MappingProxyType

from glm_finetune.data.roles import role_of
from glm_finetune.errors import UserError

MAX_DEPTH = 32  # of tools and arguments; far deeper ones would end in a RecursionError
MAX_CHARACTERS = 1 << 24  # of one text; a longer one is a broken file, not a sample
TOOLS_PROMPT = (  # of ChatGLM3's training, word for word
    "Answer the following questions as best as you can. You have access to the following tools:"
)
EMPTY = MappingProxyType({})  # roles that --roles does not name


def text_of(row, name):
    """row[name], which must be a string that can be encoded."""
    value = row.get(name)
    if not isinstance(value, str):
        raise _is_not("a string", row, name)
    if len(value) > MAX_CHARACTERS:
        raise UserError(f"field {name!r} has {len(value):,} characters; {MAX_CHARACTERS:,} are allowed. Split it.")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = value[error.start]
        raise UserError(f"field {name!r} has {half!r}, half of a character, at {error.start}.") from None
    return value


def list_of(row, name):
    """row[name], which must be a list, or the JSON text of one (as a CSV cell holds it)."""
    value = row.get(name)
    if isinstance(value, str):
        value = _json_of(value, f"field {name!r}")
    if not isinstance(value, list):
        raise _is_not("a list", row, name)
    return value


def lines_of(row, name):
    """row[name], a text, or a list of its lines, as ssbuild's chatglm_finetuning joins them: by line breaks."""
    lines = row.get(name)
    if lines and isinstance(lines, list) and all(isinstance(line, str) for line in lines):
        row = {**row, name: "\n".join(lines)}
    return text_of(row, name)


def _is_not(kind, row, name):
    problem = f"is {row[name]!r:.40}, not {kind}" if name in row else "is missing"
    return UserError(f"field {name!r} {problem}; the fields found are {sorted(map(str, row))}.")


def tools_of(row):
    """The tools of a row, a list or an object of any form, or None: they are shown to the model as they are.

    Of a list OpenAI's {"type": "function", "function": tool} is unwrapped.
    """
    tools = row.get("tools")
    if isinstance(tools, str) and tools:
        tools = _json_of(tools, "field 'tools'")
    if tools in (None, "", [], {}):
        return None
    if not isinstance(tools, (list, dict)):
        raise _is_not("a list or an object", row, "tools")
    as_json(tools, "field 'tools'")
    return [_unwrapped(tool) for tool in tools] if isinstance(tools, list) else tools


def _unwrapped(tool):
    function = tool.get("function") if isinstance(tool, dict) else None
    is_wrapped = isinstance(function, dict) and (tool.get("type") == "function" or len(tool) == 1)
    return function if is_wrapped else tool


def as_json(value, what):
    """JSON text of tools or of an observation; raises for a value that is too deep or no JSON."""
    if _depth(value) > MAX_DEPTH:
        raise UserError(f"{what} is nested deeper than {MAX_DEPTH} levels.")
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise UserError(f"{what} is no JSON ({error}).") from None
    return text_of({what: text}, what)


def _depth(value, level=0):
    """How deep lists and objects are nested; counting stops where it is too deep anyway."""
    if not isinstance(value, (list, dict)) or level > MAX_DEPTH:
        return level
    return max((_depth(v, level + 1) for v in (value.values() if isinstance(value, dict) else value)), default=level)


def _json_of(text, what):
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{what}: not JSON ({error}): {text[:40]!r}.") from None


def tool_call(name, arguments):
    """An assistant message in ChatGLM3's form: the tool's name as metadata, the call in a Python code block."""
    if not isinstance(name, str) or not name.strip() or "\n" in text_of({"name": name}, "name"):
        raise UserError(f"the name of a called tool is {name!r:.40}; expected one line of text.")
    if isinstance(arguments, str):
        arguments = _json_of(arguments, f"the arguments of {name!r}")
    if not isinstance(arguments, dict):
        raise UserError(f"the arguments of {name!r} are {arguments!r:.40}, not an object.")
    as_json(arguments, f"the arguments of {name!r}")
    for key in arguments:
        if not key.isidentifier() or keyword.iskeyword(key):
            raise UserError(f"the arguments of {name!r}: {key!r:.40} cannot be the name of an argument in a call.")
    call = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    return {"role": "assistant", "metadata": name, "content": f"```python\ntool_call({call})\n```"}


def from_roles(entry, roles=EMPTY):
    """An entry of role / content (ChatGLM3, OpenAI) -> messages; a tool with its observation is two, as in ChatGLM3.

    roles: `roles.parse_roles`.
    """
    role, loss = role_of(entry.get("role"), roles), _loss_of(entry)
    if role == "function_call":
        return [_written_call(entry, "content") | loss]
    if role == "tool" and any(entry.get(name) is not None for name in ("parameters", "observation")):
        return _with_observation(entry, loss)
    if role == "tool":
        return [{"role": "observation", "content": text_of(entry, "content")}]
    calls = list_of(entry, "tool_calls") if entry.get("tool_calls") else []
    if len(calls) > 1:
        raise UserError(f"field 'tool_calls' has {len(calls)} calls; ChatGLM3 makes one and waits for its result.")
    spoken = [_spoken(entry, role) | loss] if entry.get("content") or not calls else []
    return spoken + [_openai_call(call) | loss for call in calls]


def _with_observation(entry, loss):
    """ChatGLM3's `tool` message: the call, and what came back."""
    observation = entry.get("observation")
    if observation is None:
        raise UserError("field 'observation' is missing: the result of the tool.")
    if not isinstance(observation, str):
        observation = as_json(observation, "field 'observation'")
    call = tool_call(entry.get("name"), entry.get("parameters"))
    return [call | loss, {"role": "observation", "content": text_of({"observation": observation}, "observation")}]


def _spoken(entry, role):
    parts = entry.get("content")
    if parts and isinstance(parts, list) and all(isinstance(p, dict) and p.get("type") == "text" for p in parts):
        entry = {**entry, "content": "".join(text_of(part, "text") for part in parts)}  # as OpenAI has them
    message = {"role": role, "content": text_of(entry, "content")}
    if role == "system" and (tools := tools_of(entry)):
        message["tools"] = tools
    if entry.get("metadata"):
        if role != "assistant" or "\n" in text_of(entry, "metadata"):
            raise UserError("field 'metadata' is the name of a tool, on one line, in an assistant message only.")
        message["metadata"] = entry["metadata"]
    return message


def _loss_of(entry):
    """{"loss": bool} if the entry says whether it is trained: `loss` (ChatGLM3), or `weight` 0 or 1 (OpenAI)."""
    for name, values in (("loss", "true or false"), ("weight", "0 or 1")):
        value = entry.get(name)
        if value is not None:
            if value not in (0, 1) or isinstance(value, bool) != (name == "loss"):
                raise UserError(f"field {name!r} is {value!r:.40}; it must be {values}.")
            return {"loss": bool(value)}
    return {}


def _openai_call(call):
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict):
        raise UserError(f"field 'tool_calls' has {call!r:.60}; expected an object with 'function'.")
    return tool_call(function.get("name"), function.get("arguments") or {})


def from_speakers(entry, roles=EMPTY):
    """An entry of from / value (sharegpt) -> messages. A value may be a list of lines. roles: `roles.parse_roles`."""
    role = role_of(entry.get("from"), roles, "field 'from' is")
    if role == "function_call":
        return [_written_call(entry, "value") | _loss_of(entry)]
    role = "observation" if role == "tool" else role
    return [{"role": role, "content": lines_of(entry, "value")} | _loss_of(entry)]


def _written_call(entry, field):
    """A call of a tool that is a message's JSON text with name and arguments."""
    call = _json_of(text_of(entry, field), "the function call")
    if not isinstance(call, dict):
        raise UserError(f"the function call is {call!r:.40}, not an object with name and arguments.")
    return tool_call(call.get("name"), call.get("arguments") or {})


def from_rounds(question, answer, entry, roles=EMPTY):
    """An entry that is a round -> messages: a question and an answer under these names, both maybe lists of lines.

    Without an answer (none, or null) it is the question to ask. {"role": "system"} beside a text makes it the system's.
    """
    role = role_of(entry.get("role", "user"), roles)
    asked = {"role": "system" if role == "system" else "user", "content": lines_of(entry, question)}
    if entry.get(answer) is None:
        return [asked]
    return [asked, {"role": "assistant", "content": lines_of(entry, answer)} | _loss_of(entry)]


CONVERTERS = {  # a field of the entries -> what makes messages of them
    "role": from_roles,
    "from": from_speakers,
    "human": partial(from_rounds, "human", "assistant"),
    "q": partial(from_rounds, "q", "a"),
}


def converter_of(entries, field):
    """The function for these entries, told from the first object among them. field: the one that it should have."""
    entry = next((entry for entry in entries if isinstance(entry, dict)), {})
    return CONVERTERS[next((name for name in (field, *CONVERTERS) if name in entry), field)]


def with_tags(row, field, tags):
    """The row with `role` and `content` in the entries of its list, in place of the names in `tags`."""
    entries = [
        {**entry, **{name: entry[tag] for name, tag in zip(("role", "content"), tags) if tag in entry}}
        if isinstance(entry, dict)
        else entry
        for entry in list_of(row, field)
    ]
    return {**row, field: entries}


def messages_of(entries, convert, tools=None, field="messages", roles=EMPTY):
    """Entries of a row -> messages; tools come first, in a system message of their own (ChatGLM3's form).

    convert: of CONVERTERS. roles: `roles.parse_roles`. Problems are named with `field` and the place in it, from 1.
    """
    messages = [{"role": "system", "content": TOOLS_PROMPT, "tools": tools}] if tools else []
    for i, entry in enumerate(entries, 1):
        try:
            if not isinstance(entry, dict):
                raise UserError(f"expected an object, found {entry!r:.60}.")
            messages += convert(entry, roles=roles)
        except UserError as error:
            raise UserError(f"field {field!r}, message {i}: {error}") from None
    return messages


def repaired(messages):
    """Messages of --repair_turns: an answer before any question is left out, texts of one role in a row are joined by a
    line break. The last one says "repaired" where something was done.
    """
    # assistant hello, user a, user b, assistant c -> user a\nb, assistant c
    kept = []
    for message in messages:
        before = kept[-1] if kept else {"role": "system"}
        plain = message["role"] in ("user", "assistant") and not (message.get("metadata") or before.get("metadata"))
        if message["role"] == "assistant" and plain and before["role"] == "system":
            continue
        if plain and message["role"] == before["role"]:
            loss = {} if message.get("loss", True) and before.get("loss", True) else {"loss": False}
            kept[-1] = {**before, "content": f"{before['content']}\n{message['content']}"} | loss
        else:
            kept.append(message)
    return kept if len(kept) in (0, len(messages)) else [*kept[:-1], {**kept[-1], "repaired": True}]


def check_order(messages, needs_answer=True):
    """Raise UserError unless roles follow each other as in a conversation.

    system only at the beginning; the user first; an answer after a question or a tool's result (or, as a call, after
    an answer); a result only after a call; an answer at the end (needs_answer=False: it may also be the user's turn).
    """
    if [message["role"] for message in messages] == ["user", "assistant"]:  # most rows: be quick
        return
    before, count = "start", 0
    for message in messages:
        role, has_tools = message["role"], "tools" in message
        count += not has_tools  # a list of tools beside the messages is none of them
        allowed = {
            "system": before == "start" or (has_tools and before == "system"),
            "user": before in ("start", "system", "assistant"),
            "assistant": before in ("user", "observation") or (before == "assistant" and "metadata" in message),
            "observation": before == "call",
        }[role]
        if not allowed:
            raise UserError(f"message {max(1, count)}: {_what(role)} cannot follow {_what(before)}.")
        if has_tools:
            continue
        before = "call" if role == "assistant" and message.get("metadata", "").strip() else role
    if before in ("start", "system"):
        raise UserError("the conversation is empty." if before == "start" else "the conversation is a system message.")
    if needs_answer and before not in ("assistant", "call"):
        raise UserError(f"the conversation ends with {_what(before)}: add the answer, or leave the last message out.")


def _what(role):
    names = {
        "start": "the beginning",
        "call": "the call of a tool (its result must come first)",
        "observation": "the result of a tool",
        "system": "a system message",
    }
    return names.get(role, f"the {role}")
