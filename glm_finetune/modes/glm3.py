"""ChatGLM3-6B: messages with roles, tools, stop tokens.

A sample is `[gMASK] sop <|user|> \\n question <|assistant|> \\n answer </s>`, causal throughout. <|assistant|> and
the line break after it are targets, as in ChatGLM-Finetuning.
"""

import ast
import json
from functools import partial

from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from glm_finetune.modes.glm2 import TINY_CONFIG, positions
from glm_finetune.modes.spec import Mode, Rendered, cut_source
from glm_finetune.modes.tokenizer import ChatGLM3Tokenizer

QUESTION_TAIL = 0  # the original cuts a long question at its end
OVERHEAD = 6  # of the original's arithmetic: [gMASK] sop </s>, and three tokens that stay unused
ROLES = ("system", "user", "assistant", "observation")


def message_ids(tokenizer, message):
    """Role token, `metadata\\n`, content (a system message with `tools` is followed by them as indented JSON)."""
    content = message["content"]
    if message["role"] not in ROLES:
        raise ValueError(f"role {message['role']!r}: ChatGLM3 knows {', '.join(ROLES)}.")
    if message["role"] == "system" and "tools" in message:
        content = content + "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return [
        tokenizer.get_command(f"<|{message['role']}|>"),
        *tokenizer.encode_text(message.get("metadata", "") + "\n"),
        *tokenizer.encode_text(content),
    ]


def render(tokenizer, messages, limits=None, template="train"):
    """See Mode.render. Only the last assistant message is a target."""
    if not messages:
        raise ValueError("an empty conversation.")
    has_answer = messages[-1]["role"] == "assistant"
    source = [i for message in messages[: len(messages) - has_answer] for i in message_ids(tokenizer, message)]
    source_cut = target_cut = False
    if limits:
        source, source_cut = cut_source(source, limits.max_src_len, QUESTION_TAIL)
    ids = tokenizer.prefix_ids + source
    if not has_answer:
        ids = ids + [tokenizer.get_command("<|assistant|>")]
        return Rendered(ids, [-100] * len(ids), 0, source_cut)
    target = message_ids(tokenizer, messages[-1])
    if limits:
        room = max(0, limits.max_len - OVERHEAD - len(source))
        target_cut, target = len(target) > room, target[:room]
    target = target + [tokenizer.eos_token_id]
    return Rendered(ids + target, [-100] * len(ids) + target, 0, source_cut, target_cut)


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
    dataset=partial(InstructionDataset, render, QUESTION_TAIL, OVERHEAD),
    render=render,
    positions=positions,
    clean_response=clean_response,
    finish_turn=finish_turn,
    entries_per_turn=2,
    stop_token_ids=stop_token_ids,
    lora_targets=("query_key_value",),
    other_names=r"chatglm2|codegeex2|chatglm-6b",
    tiny_config=TINY_CONFIG,
)
