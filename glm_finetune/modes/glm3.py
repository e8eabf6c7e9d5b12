"""ChatGLM3-6B: messages with roles, tools, stop tokens.

A sample is `[gMASK] sop <|user|> \\n question <|assistant|> \\n answer </s>`, causal throughout. <|assistant|> and
the line break after it are targets, as in ChatGLM-Finetuning (the official template: the line break only). A
conversation is one sample, without </s> between its messages.
"""

import ast
import json
from functools import partial

from glm_finetune.data.dataset import original_dataset
from glm_finetune.loss import IGNORE
from glm_finetune.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from glm_finetune.modes.glm2 import TINY_CONFIG, positions
from glm_finetune.modes.spec import (
    Mode,
    Rendered,
    cut_source,
    finish_target,
    newest_rounds,
    text_samples,
    trained_turns,
)
from glm_finetune.modes.tokenizer import ChatGLM3Tokenizer

QUESTION_TAIL = 0  # the original cuts a long question at its end
OVERHEAD = 6  # of the original's arithmetic: [gMASK] sop </s>, and three tokens that stay unused
ROLES = ("system", "user", "assistant", "observation")


def message_ids(tokenizer, message):
    """(head, body): role token and `metadata\\n`; the content (after a system message's own its `tools`, as JSON)."""
    content = message["content"]
    if message["role"] not in ROLES:
        raise ValueError(f"role {message['role']!r}: ChatGLM3 knows {', '.join(ROLES)}.")
    if message["role"] == "system" and "tools" in message:
        content = content + "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    role = tokenizer.get_command(f"<|{message['role']}|>")
    return [role, *tokenizer.encode_text(message.get("metadata", "") + "\n")], tokenizer.encode_text(content)


def source_ids(tokenizer, messages, limits):
    """All messages before an answer -> (ids, whether they were cut). What stands before a content is never cut."""

    def join(messages):
        parts = [message_ids(tokenizer, message) for message in messages]
        ids = [i for head, body in parts for i in head + body]
        return ids, [stays for head, body in parts for stays in [True] * len(head) + [False] * len(body)]

    ids, fixed = join(messages)
    if limits is None or len(ids) <= limits.max_src_len:
        return ids, False
    if limits.truncation == "head":
        ids, fixed = join(newest_rounds(messages, lambda kept: len(join(kept)[0]) <= limits.max_src_len))
    return cut_source(ids, limits, fixed), True


def render(tokenizer, messages, limits=None, template="train", end=None):
    """See Mode.render. end: the token that says that the answer is over; default </s>."""
    if not messages:
        raise ValueError("an empty conversation.")
    has_answer = messages[-1]["role"] == "assistant"
    source, source_cut = source_ids(tokenizer, messages[: len(messages) - has_answer], limits)
    ids = tokenizer.prefix_ids + source
    if not has_answer:
        ids = ids + [tokenizer.get_command("<|assistant|>")]
        return Rendered(ids, [IGNORE] * len(ids), 0, source_cut)
    head, body = message_ids(tokenizer, messages[-1])
    room = limits and limits.max_len - OVERHEAD - len(source)
    target, target_cut = finish_target(head + body, room, end or tokenizer.eos_token_id, limits)
    labels = target if template == "train" else [IGNORE, *target[1:]]
    return Rendered(
        ids + target, [IGNORE] * len(ids) + labels, 0, source_cut, target_cut, not messages[-1]["content"], len(source)
    )


def samples(tokenizer, messages, limits=None, template="train", train_on="all"):
    """See Mode.samples. All answers whose prompt and end fit are one sample; each of the others is its own, cut."""
    if messages[0]["role"] == "text":
        ids = tokenizer.encode_text(messages[0]["content"])
        return text_samples(ids, tokenizer.prefix_ids, tokenizer.eos_token_id, limits, num_prefix=0)
    parts = [head + body for head, body in (message_ids(tokenizer, message) for message in messages)]
    trained = trained_turns(messages, train_on)
    num_together = sum(_fits(parts, i, limits) for i in trained)  # the first ones: prompts grow
    together, alone = trained[:num_together], trained[num_together:]
    rows = [_sequence(tokenizer, messages, parts, together, template)] if together else []
    return rows + [render(tokenizer, messages[: i + 1], limits, template, _end(tokenizer, messages, i)) for i in alone]


def _end(tokenizer, messages, i):
    """What follows message i: the role of the next one, or </s>. Before a call it must not be </s>: a model that stops
    there never makes the call."""
    is_last = i + 1 == len(messages)
    return tokenizer.eos_token_id if is_last else tokenizer.get_command(f"<|{messages[i + 1]['role']}|>")


def _fits(parts, i, limits):
    """Whether message i and all before it need no cutting."""
    source = sum(map(len, parts[:i]))
    return limits is None or source <= limits.max_src_len and source + len(parts[i]) <= limits.max_len - OVERHEAD


def _sequence(tokenizer, messages, parts, trained, template):
    """A conversation up to its last message in `trained` as one sample. parts: ids of each message.

    Targets of an answer: metadata, content, and what follows it (the next role, or </s>), which says that it is over;
    its own role token only in the template "train".
    """
    ids, labels, ends = tokenizer.prefix_ids, [IGNORE] * len(tokenizer.prefix_ids), False
    for i, (role, *rest) in enumerate(parts[: trained[-1] + 1]):
        ids = [*ids, role, *rest]
        labels.append(role if ends or (i in trained and template == "train") else IGNORE)
        labels += rest if i in trained else [IGNORE] * len(rest)
        ends = i in trained
    end = _end(tokenizer, messages, trained[-1])
    is_empty = any(not messages[i]["content"] for i in trained)
    num_source = sum(map(len, parts[: trained[-1]]))
    return Rendered([*ids, end], [*labels, end], answer_empty=is_empty, num_source=num_source)


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
    """Keyword arguments of `tool_call(...)` inside a fenced code block; None if it is not a call with literal
    arguments.
    """
    source = "\n".join(content.split("\n")[1:-1])
    try:
        call = ast.parse(source.strip(), mode="eval").body
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and not call.args:
            return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.keywords}
    except (SyntaxError, ValueError):
        pass  # the model wrote something else: it is returned as text
    return None


def stop_token_ids(tokenizer):
    """</s>, or the role of whoever speaks next."""
    return [tokenizer.eos_token_id, tokenizer.get_command("<|user|>"), tokenizer.get_command("<|observation|>")]


GLM3 = Mode(
    name="glm3",
    config=ChatGLM2Config,
    model=ChatGLM2ForConditionalGeneration,
    tokenizer=ChatGLM3Tokenizer,
    dataset=partial(original_dataset, samples, QUESTION_TAIL, OVERHEAD),
    render=render,
    samples=samples,
    question_tail=QUESTION_TAIL,
    overhead=OVERHEAD,
    positions=positions,
    clean_response=clean_response,
    finish_turn=finish_turn,
    entries_per_turn=2,
    stop_token_ids=stop_token_ids,
    lora_targets=("query_key_value",),
    other_names=r"chatglm2|codegeex2|chatglm-6b",
    tiny_config=TINY_CONFIG,
)
