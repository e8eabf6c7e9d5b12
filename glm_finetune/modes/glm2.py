"""ChatGLM2-6B and CodeGeeX2: prompt, positions, stop tokens.

A sample is `[gMASK] sop question answer </s>`, causal throughout; the targets are the answer and </s>. Every answer of
a conversation is a sample of its own: the official chat encodes all rounds as one text, without </s> between them, and
a text that goes on has other ids at the seams than its parts.
"""

from functools import partial

import torch

from glm_finetune.models.glm2 import ChatGLM2Config, ChatGLM2ForConditionalGeneration
from glm_finetune.modes.drafts import ANSWER, FIXED, QUESTION, Draft
from glm_finetune.modes.spec import Mode, finish_pair, split_turns
from glm_finetune.modes.template import Template
from glm_finetune.modes.tokenizer import ChatGLM2Tokenizer


def prompt(history, question, style="train"):
    """The text before the answer, in training and in the official chat alike: rounds from 1, full-width colons."""
    if style == "raw":
        return question
    past = "".join([f"[Round {i}]\n\n问：{old}\n\n答：{answer}\n\n" for i, (old, answer) in enumerate(history, 1)])
    return f"{past}[Round {len(history) + 1}]\n\n问：{question}\n\n答："


def draft(tokenizer, messages, style, trained):
    """See Template.draft."""
    history, question, answer = split_turns(messages[: trained[-1] + 1] if trained else messages, style)
    asked = tuple(tokenizer.begin_ids), prompt(history, question, style)
    if not trained:
        return Draft(messages, trained, asked, (FIXED, QUESTION), (False, False), asks=(1,))
    parts = (*asked, answer, (tokenizer.eos_token_id,))
    return Draft(messages, trained, parts, (FIXED, QUESTION, ANSWER, FIXED), (False, False, True, True), asks=(1,))


def positions(num_tokens, num_prefix):
    """(T,) int64: 0, 1, 2, ..."""
    return torch.arange(num_tokens)


def clean(text):
    """Strip, fill in the training date."""
    return text.strip().replace("[[训练时间]]", "2023年")


def clean_response(text, history=None):
    """See Mode."""
    return clean(text), history


GLM2 = Mode(
    name="glm2",
    config=ChatGLM2Config,
    model=ChatGLM2ForConditionalGeneration,
    tokenizer=ChatGLM2Tokenizer,
    template=Template(
        draft,
        question_tail=4,  # the tokens of "\n\n答：" that the original keeps
        overhead=3,  # [gMASK] sop </s>
    ),
    positions=positions,
    clean=clean,
    clean_response=clean_response,
    finish_turn=partial(finish_pair, clean_response),
    stop_token_ids=lambda tokenizer: [tokenizer.eos_token_id],
    lora_targets=("query_key_value",),
    released=("ChatGLM2-6B", "CodeGeeX2"),
    names=r"chatglm2|codegeex2",
)
