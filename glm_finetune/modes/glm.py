"""ChatGLM-6B: prompt, positions, stop tokens.

A sample is `question [gMASK] <sop> answer <eop>`; everything before <sop> is the bidirectional prefix. <sop> itself
is a target (predicted from [gMASK]), as in the original. Every answer of a conversation is a sample of its own, with
the rounds before it in the prefix: an earlier answer sees what comes after it there, so it cannot be a target too.
"""

import re
from functools import partial

import torch

from glm_finetune.data.dataset import original_dataset
from glm_finetune.loss import IGNORE
from glm_finetune.models.glm import ChatGLMConfig, ChatGLMForConditionalGeneration
from glm_finetune.modes.spec import (
    Mode,
    Rendered,
    each_turn,
    finish_pair,
    finish_target,
    prompt_ids,
    text_samples,
)
from glm_finetune.modes.tokenizer import ChatGLMTokenizer

QUESTION_TAIL = 3  # 答 ： and what they are worth in tokens in the original
OVERHEAD = 3  # [gMASK] <sop> <eop>
# Full-width forms that the model writes as ASCII (its tokenizer folds them); restored next to Chinese characters.
PUNCTUATION = ((",", "，"), ("!", "！"), (":", "："), (";", "；"), (r"\?", "？"))


def prompt(history, question, template="train"):
    """The text before the answer; its colons are full-width.

    "train" counts rounds from 1 (ChatGLM-Finetuning's single question is [Round 1]), the official templates from 0;
    "official" leaves a question without history bare, as chat() does, "official_rounds" makes it [Round 0].
    """
    if not history and template == "official":
        return question
    first = 1 if template == "train" else 0
    past = "".join(f"[Round {i}]\n问：{old}\n答：{answer}\n" for i, (old, answer) in enumerate(history, first))
    return f"{past}[Round {first + len(history)}]\n问：{question}\n答："


def render(tokenizer, messages, limits=None, template="train"):
    """See Mode.render."""
    source, source_cut = prompt_ids(tokenizer, messages, limits, prompt, template, QUESTION_TAIL)
    context = source + [tokenizer.gmask_token_id]
    ids = context + [tokenizer.bos_token_id]
    if messages[-1]["role"] != "assistant":
        return Rendered(ids, [IGNORE] * len(ids), len(context), source_cut)
    room = limits and limits.max_len - OVERHEAD - len(source)
    target = tokenizer.encode_text(messages[-1]["content"])
    target, target_cut = finish_target(target, room, tokenizer.eos_token_id, limits)
    ids = ids + target
    labels = [IGNORE] * len(context) + ids[len(context) :]
    return Rendered(ids, labels, len(context), source_cut, target_cut, not messages[-1]["content"], len(source))


def samples(tokenizer, messages, limits=None, template="train", train_on="all"):
    """See Mode.samples. Plain text is `[gMASK] <sop> text <eop>`: GLM's generation with nothing before it."""
    if messages[0]["role"] == "text":
        ids, begin = tokenizer.encode_text(messages[0]["content"]), [tokenizer.gmask_token_id, tokenizer.bos_token_id]
        return text_samples(ids, begin, tokenizer.eos_token_id, limits, num_prefix=1)
    return each_turn(render, tokenizer, messages, limits, template, train_on)


def positions(num_tokens, num_prefix):
    """(2, T) int64: the place in the prefix, frozen at [gMASK] (its last token) from <sop> on; the place after
    <sop>.
    """
    index = torch.arange(num_tokens)
    return torch.stack((index.clamp_max(num_prefix - 1), (index - num_prefix + 1).clamp_min(0)))


def clean_response(text, history=None):
    """Strip, fill in the training date, widen punctuation next to Chinese characters. Returns (text, history)."""
    text = text.strip().replace("[[训练时间]]", "2023年")
    for narrow, wide in PUNCTUATION:
        text = re.sub(rf"([\u4e00-\u9fff]){narrow}", rf"\1{wide}", text)
        text = re.sub(rf"{narrow}([\u4e00-\u9fff])", rf"{wide}\1", text)
    return text, history


GLM = Mode(
    name="glm",
    config=ChatGLMConfig,
    model=ChatGLMForConditionalGeneration,
    tokenizer=ChatGLMTokenizer,
    dataset=partial(original_dataset, samples, QUESTION_TAIL, OVERHEAD),
    render=render,
    samples=samples,
    question_tail=QUESTION_TAIL,
    overhead=OVERHEAD,
    positions=positions,
    clean_response=clean_response,
    finish_turn=partial(finish_pair, clean_response),
    entries_per_turn=1,
    stop_token_ids=lambda tokenizer: [tokenizer.eos_token_id],
    lora_targets=("query_key_value",),
    other_names=r"chatglm[23]|codegeex2",
    tiny_config=dict(
        hidden_size=32,
        inner_hidden_size=64,
        num_layers=2,
        num_attention_heads=2,
        layernorm_epsilon=1e-5,
        max_sequence_length=256,
        position_encoding_2d=True,
        model_type="chatglm",
        use_cache=True,
        torch_dtype="float32",
        architectures=["ChatGLMModel"],
    ),
)
