"""Hooks of the golden data's check.py: how this project does what the original did.

python <golden data>/check.py <golden data> --impl tests/oracle_impl.py
"""

import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from glm_finetune import MODE
from glm_finetune.answer.chat import chat as chat_once
from glm_finetune.answer.chat import chat_ids
from glm_finetune.data.dataset import collate
from glm_finetune.models.layers import rotary_angles
from glm_finetune.modes.glm2 import prompt
from glm_finetune.tuning.adapter import load_adapter


def load_model(checkpoint_dir, mode):
    return MODE[mode].model.from_pretrained(checkpoint_dir, dtype=torch.float32)


def load_tokenizer(checkpoint_dir, mode):
    return MODE[mode].tokenizer.from_pretrained(checkpoint_dir)


def load_lora_model(checkpoint_dir, adapter_dir, mode):
    return load_adapter(load_model(checkpoint_dir, mode), adapter_dir).eval()


def forward(model, mode, inputs):
    return model(**inputs, use_cache=False, return_logits=True)


def named_parameters(model, mode):
    return dict(model.named_parameters())


def generate(model, mode, inputs, max_new_tokens, eos_token_id):
    return model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=eos_token_id)


def chat_inputs(model, tokenizer, mode, query, history, role="user"):
    ids = chat_ids(MODE[mode], tokenizer, query, history, role)
    return {name: [values[0]] for name, values in tokenizer.pad([ids]).items()}


def build_prompt(tokenizer, mode, query, history):
    return prompt(history, query)


def chat(model, tokenizer, mode, query, history, max_length):
    # The original ChatGLM3 drops the last token it generated, whatever it is (oracle_exceptions.json); ours keeps it,
    # so it is asked for one token less.
    num_tokens = len(chat_ids(MODE[mode], tokenizer, query, history))
    return chat_once(model, tokenizer, MODE[mode], query, history, max_length - (mode == "glm3") - num_tokens)


def process_response(model, mode, text, history=None):
    response, history = MODE[mode].clean_response(text, history)
    return (response, history) if mode == "glm3" else response


def special_id(tokenizer, mode, token):
    return tokenizer.convert_tokens_to_ids(token)


def build_dataset(path, tokenizer, mode, max_len, max_src_len, is_skip):
    return MODE[mode].dataset(path, tokenizer, max_len=max_len, max_src_len=max_src_len, is_skip=is_skip)


def build_collator(tokenizer, mode):
    return partial(collate, pad_token_id=tokenizer.pad_token_id, positions=MODE[mode].positions)


def rope_table(mode, dim, dtype, positions):
    # dim: the rotated dimensions of a head, for ChatGLM-6B those of one position; both are half a head.
    inverse_frequencies = sys.modules[MODE[mode].model.__module__].inverse_frequencies
    cos, sin = (
        table.to(getattr(torch, dtype)).float() for table in rotary_angles(positions, inverse_frequencies(2 * dim))
    )
    return (torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)) if mode == "glm" else (cos, sin)
