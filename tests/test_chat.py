"""Answers while they are made, and what a ChatGLM3 answer may do to the turn that parses it."""

import pytest
import torch

from glm_finetune import MODE
from glm_finetune.answer.chat import chat
from glm_finetune.modes.glm3 import MAX_CALL, tool_parameters

TOOLS = [{"role": "system", "content": "用工具", "tools": [{"name": "search"}]}]


def call(arguments):
    return f"search\n```python\ntool_call({arguments})\n```"


@pytest.mark.parametrize(
    "arguments",
    [
        "a={[]: 1}",  # TypeError
        'a=1 + "x"',
        "a=" + "-" * (MAX_CALL // 2) + "1",  # MemoryError
        "a=" + "-" * 10 * MAX_CALL + "1",
        "a=" + "1 + " * (MAX_CALL // 5) + "1",  # RecursionError
        "a=" + "(" * 400 + "1" + ")" * 400,  # SyntaxError
        'a="\0"',  # ValueError
        "a=" + "9" * 5000,
        'a="\ud800"',
        "a=f(1)",
        "1, a=2",
    ],
    ids=range(11),
)
def test_whatever_is_no_call_with_literal_arguments_stays_text(arguments):
    content, history = MODE["glm3"].finish_turn(TOOLS, "问", "user", call(arguments))
    assert content == {"name": "search", "content": call(arguments).partition("\n")[2]}
    assert [message["role"] for message in history] == ["system", "user", "assistant"]


def test_a_long_call_is_still_a_call():
    text = "字" * (MAX_CALL - 100)
    assert tool_parameters(call(f"query='{text}', n=-1").partition("\n")[2]) == {"query": text, "n": -1}


@pytest.mark.parametrize("mode", MODE)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_streamed_answer_is_the_whole_answer_also_of_beams(mode, beams, checkpoints):
    model = MODE[mode].model.from_pretrained(checkpoints[mode], dtype=torch.float32)
    tokenizer, pieces = MODE[mode].tokenizer.from_pretrained(checkpoints[mode]), []
    parts = (model, tokenizer, MODE[mode], "风扇不转", [], 12)
    whole, _ = chat(*parts, num_beams=beams)
    streamed, _ = chat(*parts, num_beams=beams, on_text=pieces.append)
    text = whole if isinstance(whole, str) else whole["content"]
    assert streamed == whole and len(pieces) > 2
    assert "".join("".join(pieces).split()).endswith("".join(text.split()))
