"""ChatGLM-6B: prompt, positions, stop tokens.

A sample is `question [gMASK] <sop> answer <eop>`; everything before <sop> is the bidirectional prefix. <sop> itself
is a target (predicted from [gMASK]), as in the original. Every answer of a conversation is a sample of its own, with
the rounds before it in the prefix: an earlier answer sees what comes after it there, so it cannot be a target too.
Plain text is `[gMASK] <sop> text <eop>`: GLM's generation with nothing before it.
"""

import re
from functools import partial

import torch

from glm_finetune.models.glm import ChatGLMConfig, ChatGLMForConditionalGeneration
from glm_finetune.modes.drafts import ANSWER, FIXED, QUESTION, Draft
from glm_finetune.modes.spec import Mode, finish_pair, split_turns
from glm_finetune.modes.template import Template
from glm_finetune.modes.tokenizer import ChatGLMTokenizer

# Full-width forms that the model writes as ASCII (its tokenizer folds them); restored next to Chinese characters.
PUNCTUATION = ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？"))


def prompt(history, question, style="train"):
    """The text before the answer; its colons are full-width.

    "train" counts rounds from 1 (ChatGLM-Finetuning's single question is [Round 1]), the official templates from 0;
    "official" leaves a question without history bare, as chat() does (so does "raw"), "official_rounds" makes it
    [Round 0].
    """
    if not history and style in ("official", "raw"):
        return question
    first = 1 if style == "train" else 0
    past = "".join([f"[Round {i}]\n问：{old}\n答：{answer}\n" for i, (old, answer) in enumerate(history, first)])
    return f"{past}[Round {first + len(history)}]\n问：{question}\n答："


def draft(tokenizer, messages, style, trained):
    """See Template.draft."""
    history, question, answer = split_turns(messages[: trained[-1] + 1] if trained else messages, style)
    asked = prompt(history, question, style), (tokenizer.gmask_token_id,), (tokenizer.bos_token_id,)
    if not trained:
        return Draft(messages, trained, asked, (QUESTION, FIXED, FIXED), (False,) * 3, 2, asks=(0,))
    parts = (*asked, answer, (tokenizer.eos_token_id,))
    kinds, is_target = (QUESTION, FIXED, FIXED, ANSWER, FIXED), (False, False, True, True, True)
    return Draft(messages, trained, parts, kinds, is_target, 2, asks=(0,))


def positions(num_tokens, num_prefix):
    """(2, T) int64: row 1 counts through the prefix and stays at [gMASK], its last token; row 2 counts from <sop>."""
    # 问 答 [gMASK] <sop> 好 <eop>, a prefix of 3:  0 1 2 2 2 2
    #                                              0 0 0 1 2 3
    index = torch.arange(num_tokens)
    return torch.stack((index.clamp_max(num_prefix - 1), (index - num_prefix + 1).clamp_min(0)))


def clean(text):
    """Strip, fill in the training date, widen punctuation next to Chinese characters."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for narrow, wide in PUNCTUATION:
        text = re.sub(rf"([\u4e00-\u9fff]){narrow}", rf"\1{wide}", text)
        text = re.sub(rf"{narrow}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text


def clean_response(text, history=None):
    """See Mode."""
    return clean(text), history


GLM = Mode(
    name="glm",
    config=ChatGLMConfig,
    model=ChatGLMForConditionalGeneration,
    tokenizer=ChatGLMTokenizer,
    template=Template(
        draft,
        question_tail=3,  # the tokens of "答：" that the original keeps
        overhead=3,  # [gMASK] <sop> <eop>
        text_prefix=1,
    ),
    positions=positions,
    clean=clean,
    clean_response=clean_response,
    finish_turn=partial(finish_pair, clean_response),
    stop_token_ids=lambda tokenizer: [tokenizer.eos_token_id],
    lora_targets=("query_key_value",),
    released=("ChatGLM-6B",),
    names=r"chatglm-6b",
)
