"""ChatGLM3-6B: messages with roles, tools, stop tokens.

A sample is `[gMASK] sop <|user|> \\n question <|assistant|> \\n answer </s>`, causal throughout. <|assistant|> and
the line break after it are targets, as in ChatGLM-Finetuning (the official template: the line break only). A
conversation is one sample, without </s> between its messages.
"""

import ast

from glm_finetune.errors import UserError
from glm_finetune.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from glm_finetune.modes.drafts import ANSWER, FIXED, QUESTION, Draft
from glm_finetune.modes.glm2 import clean, positions
from glm_finetune.modes.glm2 import draft as raw_draft
from glm_finetune.modes.spec import Mode, system_text
from glm_finetune.modes.template import Template
from glm_finetune.modes.tokenizer import ChatGLM3Tokenizer

ROLES = ("system", "user", "assistant", "observation")
MAX_CALL = 10_000  # characters of a tool call that are parsed; Python's parser takes memory and depth for every one


def draft(tokenizer, messages, style, trained):
    """See Template.draft.

    Targets of an answer: metadata, content, and what follows it (the next role, or </s>), which says that it is over;
    its own role token only in the style "train".
    """
    # user "1", assistant "2", user "3", with the answer trained; the parts that are targets in brackets:
    # [gMASK] sop  <|user|> \n 1  [<|assistant|>] [\n] [2]  [<|user|>]  the last says that the answer is over
    if style == "raw":
        return raw_draft(tokenizer, messages, style, trained)
    num_messages = trained[-1] + 1 if trained else len(messages)
    parts, kinds, is_target, follows_answer = [tuple(tokenizer.begin_ids)], [FIXED], [False], False
    for i, message in enumerate(messages[:num_messages]):
        learns = i in trained
        parts += message_parts(tokenizer, message)
        kinds += [ANSWER if trained and i == trained[-1] else QUESTION] * 3
        is_target += [follows_answer or (learns and style == "train"), learns, learns]
        follows_answer = learns
    parts.append((_end(tokenizer, messages, num_messages) if trained else tokenizer.get_command("<|assistant|>"),))
    asks = [3 * i for i in trained or [num_messages]]  # the content of the message before
    return Draft(messages, trained, parts, [*kinds, FIXED], [*is_target, bool(trained)], asks=asks)


def message_parts(tokenizer, message):
    """(role token), ids of `metadata\\n`, content: a system message's own and its `tools`, as JSON."""
    role, metadata = message["role"], message.get("metadata")
    if role not in ROLES:
        raise UserError(f"role {role!r}: ChatGLM3 knows {', '.join(ROLES)}.")
    head = tuple(tokenizer.encode_text(metadata + "\n")) if metadata else tokenizer.newline_ids
    return (tokenizer.get_command(f"<|{role}|>"),), head, system_text(message)


def _end(tokenizer, messages, i):
    """What follows when message i is next: its role, or </s> if there is none. Before a call it must not be </s>: a
    model that stops there never makes the call.
    """
    return tokenizer.eos_token_id if i == len(messages) else tokenizer.get_command(f"<|{messages[i]['role']}|>")


def clean_response(text, history=None):
    """Split what the model wrote into assistant messages, as the original's process_response.

    Returns the last message (str, or {"name", "parameters"} for a tool call when history[0] lists tools, {"name",
    "content"} otherwise) and the history with the messages added. A call is parsed, never evaluated.
    """
    history = [dict(message) for message in history or []]
    content = ""
    for response in text.split("<|assistant|>"):
        metadata, content = response.split("\n", maxsplit=1) if "\n" in response else ("", response)
        if not metadata.strip():
            content = content.strip()
            history.append({"role": "assistant", "metadata": metadata, "content": content})
            content = content.replace("[[训练时间]]", "2023年")
            continue
        has_tools = bool(history) and history[0]["role"] == "system" and "tools" in history[0]
        parameters = tool_parameters(content) if has_tools else None
        history.append({"role": "assistant", "metadata": metadata, "content": content})
        content = {"name": metadata.strip(), "content": content}
        if parameters is not None:
            content = {"name": metadata.strip(), "parameters": parameters}
    return content, history


def finish_turn(history, query, role, text):
    """Mode.finish_turn: a history is a list of messages."""
    return clean_response(text, [*history, {"role": role, "content": query}])


def tool_parameters(content):
    """Keyword arguments of `tool_call(...)` inside a fenced code block; None if it is no call with literal arguments.

    Whatever else the model wrote is text: no answer may end the program that reads it.
    """
    source = "\n".join(content.split("\n")[1:-1]).strip()
    if len(source) > MAX_CALL:
        return None
    try:
        call = ast.parse(source, mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):  # of a{}, 1 + "x", ((((..., 1 + 1 + ...
        pass
    return None


def stop_token_ids(tokenizer):
    """</s>, or the role of whoever speaks next."""
    return [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]


GLM3 = Mode(
    name="glm3",
    config=ChatGLM2Config,
    model=ChatGLM2ForConditionalGeneration,
    tokenizer=ChatGLM3Tokenizer,
    template=Template(
        draft,
        question_head=3,  # <|user|> and its line break
        question_tail=0,  # the original cuts a long question at its end
        overhead=6,  # of the original's arithmetic: [gMASK] sop </s>, and three tokens that stay unused
        joins_answers=True,
    ),
    positions=positions,
    clean=clean,
    clean_response=clean_response,
    finish_turn=finish_turn,
    stop_token_ids=stop_token_ids,
    lora_targets=("query_key_value",),
    released=("ChatGLM3-6B",),
    names=r"chatglm3",
    rope_rule="base",
    names_tools=True,
)
