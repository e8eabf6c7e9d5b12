"""ChatGLM-6B: a prefix language model with two-dimensional rotary positions.

Everything before the first <sop> is the prefix (seen from everywhere), the rest is causal. Each token has two
positions: its place in the prefix (frozen at the mask token from <sop> on), and its place after <sop> (0 before).
Parameter names and config fields are the original's; numbers equal the original's in fp32 (tests/test_oracle.py).

Dimension letters: B batch, T query tokens, S key tokens, P prefix-tuning tokens, D hidden, H heads, E head size,
V vocabulary, L layers.

    model = ChatGLMForConditionalGeneration.from_pretrained("ChatGLM-6B/", dtype=torch.bfloat16)
"""

import math
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glm_finetune.errors import UserError
from glm_finetune.models.again import Lean, made_again
from glm_finetune.models.layers import LanguageModelHead, at, attend, for_attention, rotary_angles, visible
from glm_finetune.models.network import Network
from glm_finetune.models.original import OriginalConfig
from glm_finetune.models.prefixes import new_prefix

# The original builds its layers without passing num_layers on, so the residual factor is that of 28 layers for any
# depth.
RESIDUAL_SCALE = math.sqrt(2 * 28)


class ChatGLMConfig(OriginalConfig):
    """Fields of the original config.json, with the original class's defaults (those of the first public revision)."""

    vocab_size: int = 150528
    hidden_size: int = 4096
    num_layers: int = 28
    num_attention_heads: int = 32
    inner_hidden_size: int = 16384
    layernorm_epsilon: float = 1e-5
    max_sequence_length: int = 2048
    position_encoding_2d: bool = True
    bos_token_id: int = 150004
    eos_token_id: int = 150005
    mask_token_id: int = 150000
    gmask_token_id: int = 150001
    pad_token_id: int = 0
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = False
    tie_word_embeddings: bool = True
    required_fields = ("inner_hidden_size", "position_encoding_2d")
    attribute_map = {
        **OriginalConfig.attribute_map,
        "max_positions": "max_sequence_length",
        "num_kv_heads": "num_attention_heads",
        "prefix_embedding_size": "hidden_size",
    }

    def __post_init__(self, **others):
        super().__post_init__(**others)
        if not self.position_encoding_2d:
            raise UserError(
                "config.json: position_encoding_2d must be true; no released ChatGLM-6B has it false, and the "
                "original's code for it contradicts itself between training and generation."
            )

    @property
    def head_size(self):
        return self.hidden_size // self.num_attention_heads


def prefix_layout(input_ids, config, num_padding=None):
    """Which tokens are the prefix, and the two positions of each token.

    input_ids: (B, S) int64. num_padding: (B,) int64, padding tokens on the left (positions start after them).
    Returns is_prefix (B, S) bool and position_ids (B, 2, S) int64.
    Raises ValueError for a row without <sop>, or without [gMASK] and [MASK].
    """
    # tokens     q1 q2 [gMASK] <sop> a1 a2
    # is_prefix   1  1    1      0    0  0
    # place       0  1    2      2    2  2     where it stands in the question; an answer stands at its mask
    # block       0  0    0      1    2  3     where it stands in the answer
    num_padding = input_ids.new_zeros(input_ids.shape[0]) if num_padding is None else num_padding
    start = _first(input_ids, config.bos_token_id)  # (B,)
    gmask, mask = _first(input_ids, config.gmask_token_id), _first(input_ids, config.mask_token_id)
    mask_index = torch.where(gmask < input_ids.shape[1], gmask, mask)
    missing = (start == input_ids.shape[1]) | (mask_index == input_ids.shape[1])
    if missing.any():  # CPU-GPU sync; training passes positions from the collate function and never comes here
        raise ValueError(
            f"row {missing.nonzero()[0].item()} of the batch has no <sop>, or neither [gMASK] nor [MASK]: "
            "build prompts with the tokenizer or with MODE['glm'].render."
        )
    index = torch.arange(input_ids.shape[1], device=input_ids.device)[None]  # (1, S)
    is_prefix = index < start[:, None]
    place = torch.where(is_prefix, (index - num_padding[:, None]).clamp_min(0), (mask_index - num_padding)[:, None])
    block = torch.where(is_prefix, 0, index - start[:, None] + 1)
    return is_prefix, torch.stack((place, block), 1)


def _first(input_ids, token_id):
    """(B,) index of the first `token_id` in each row; the row's length where there is none."""
    found = input_ids == token_id
    return torch.where(found.any(1), found.int().argmax(1), input_ids.shape[1])


def inverse_frequencies(head_size, device=None):
    """10000^(-2i / n) of one position's n = E / 2 dimensions: (E / 4,) fp32, rounded to fp16 as in the original."""
    size = head_size // 2
    exact = 1.0 / 10000 ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)
    return exact.half().float()


def rotate(x, cos, sin):
    """Rotate the first half of each head by the first position and the second half by the second.

    x: (B, T, H, E); cos, sin: (B, T, 1, 2, E / 4) in the dtype of x. Within a half, dimension i pairs with i + E / 4.
    """
    # E = 8, dimensions 0 .. 7: the first position turns the pairs (0, 2) (1, 3), the second (4, 6) (5, 7)
    x = x.unflatten(-1, (2, 2, -1))  # (B, T, H, position, half, E / 4)
    low, high = x[..., 0, :], x[..., 1, :]
    return torch.stack((low * cos - high * sin, high * cos + low * sin), -2).flatten(-3)


class SelfAttention(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.layer_index = layer_index
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size)
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, hidden, mask, cos, sin, prefix, cache, again, rows):
        qkv = self.query_key_value(hidden).unflatten(-1, (self.num_heads, -1))  # (B, T, H, 3E): q|k|v in each head
        query, key, value = qkv.chunk(3, -1)  # (B, T, H, E)
        query, key, value = for_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        if prefix is not None:
            key, value = torch.cat((prefix[0], key), 2), torch.cat((prefix[1], value), 2)  # (B, H, P + S, E)
        # The original divides scores by (layer + 1), multiplies them again in fp32: here the kernel keeps fp32 anyway.
        return self.dense(at(rows, attend(query, key, value, mask, again)))


gelu = partial(F.gelu, approximate="tanh")


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, config.inner_hidden_size)
        self.dense_4h_to_h = nn.Linear(config.inner_hidden_size, config.hidden_size)

    def forward(self, hidden, again):
        return self.dense_4h_to_h(again(gelu, self.dense_h_to_4h(hidden)))


class GLMBlock(Lean, GradientCheckpointingLayer):
    """Two sub-layers whose residual is the scaled output of their own layer norm, not the stream itself."""

    def __init__(self, config, layer_index):
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        self.mlp = MLP(config)

    def forward(self, hidden, mask, cos, sin, prefix=None, cache=None, rows=None):
        """hidden: (B, T, D) -> (B, T, D), or at `rows` only, see `layers.at`. cos, sin: (B, T, 1, 2, E / 4). prefix:
        (key, value), each (B, H, P, E).
        """
        with made_again(self.lean and not self.gradient_checkpointing) as again:
            normed = self.input_layernorm(hidden)
            attended = self.attention(normed, mask, cos, sin, prefix, cache, again, rows)
            hidden = RESIDUAL_SCALE * at(rows, normed) + attended
            normed = self.post_attention_layernorm(hidden)
            return RESIDUAL_SCALE * normed + self.mlp(normed, again)


class ChatGLMModel(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layernorm_epsilon)
        if config.pre_seq_len:
            new_prefix(self, config)


class ChatGLMForConditionalGeneration(Network):
    config_class = ChatGLMConfig
    _tied_weights_keys = {"lm_head.weight": "transformer.word_embeddings.weight"}
    input_embeddings_name = "transformer.word_embeddings"
    output_embeddings_name = "lm_head"

    def __init__(self, config):
        super().__init__(config)
        self.transformer = ChatGLMModel(config)
        self.lm_head = LanguageModelHead(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()
        if config.tie_word_embeddings:
            self.lm_head.weight = self.transformer.word_embeddings.weight

    def tied_names(self):
        return dict(self._tied_weights_keys) if self.config.tie_word_embeddings else {}

    def stored_buffers(self):
        inv_freq = inverse_frequencies(self.config.head_size).half()
        return {
            f"transformer.layers.{i}.attention.rotary_emb.inv_freq": inv_freq.clone()
            for i in range(self.config.num_layers)
        }

    @property
    def layers(self):
        return self.transformer.layers

    def final_norm(self, hidden):
        return self.transformer.final_layernorm(hidden)

    def angles(self, position_ids):
        """(B, 2, T) -> cos, sin (B, T, 2, E / 4) fp32."""
        frequencies = inverse_frequencies(self.config.head_size, position_ids.device)
        return rotary_angles(position_ids.transpose(1, 2), frequencies)

    def layout(self, batch, embedded, num_past):
        """What is left out is derived from the place of <sop> and [gMASK] (or [MASK]), as in the original; with a
        cache, positions must be given (`generate` does), since they depend on the whole text.
        """
        attention_mask, position_ids, is_prefix = map(batch.get, ("attention_mask", "position_ids", "is_prefix"))
        if num_past and position_ids is None:
            raise ValueError("position_ids (B, 2, T) must be given with a cache: they depend on the whole text.")
        needs_prefix = is_prefix is None and not (attention_mask is not None and attention_mask.dim() == 4)
        if not num_past and (position_ids is None or needs_prefix):
            padding = _left_padding(attention_mask)
            derived_prefix, derived_positions = prefix_layout(batch["input_ids"], self.config, padding)
            is_prefix = derived_prefix if is_prefix is None else is_prefix
            position_ids = derived_positions if position_ids is None else position_ids
        return position_ids, _mask(attention_mask, batch.get("segment_ids"), is_prefix, embedded, num_past)

    def generate(self, inputs=None, **kwargs):
        """transformers' generate(); also takes the original tokenizer's (B, 1, T, T) mask and (B, 2, T) positions."""
        mask, positions = kwargs.get("attention_mask"), kwargs.pop("position_ids", None)
        if mask is not None and mask.dim() == 4:  # the last token sees everything but padding
            kwargs["attention_mask"] = (~mask[:, 0, -1].bool()).long()
        return super().generate(inputs, prompt_positions=positions, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids,
        next_sequence_length=None,
        past_key_values=None,
        attention_mask=None,
        prompt_positions=None,
        position_ids=None,
        use_cache=None,
        logits_to_keep=None,
        inputs_embeds=None,
        is_first_iteration=False,
        hides=True,
    ):
        """Positions and mask of the last `next_sequence_length` tokens, from the whole text so far.

        input_ids: (B, S). prompt_positions: (B, 2, S0) of the prompt; tokens after it continue its last column.
        position_ids (from `generate`, one-dimensional) and inputs_embeds are of no use here.
        """
        num_new, attention_mask = next_sequence_length or input_ids.shape[1], attention_mask if hides else None
        is_prefix, positions = prefix_layout(input_ids, self.config, _left_padding(attention_mask))
        if prompt_positions is not None:
            positions = continue_positions(prompt_positions, input_ids.shape[1])
        model_inputs = {
            "input_ids": input_ids[:, -num_new:],
            "position_ids": positions[..., -num_new:],
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep or 0,
        }
        if attention_mask is not None or num_new > 1:
            has_padding = attention_mask is not None
            model_inputs["segment_ids"] = attention_mask.long() - 1 if has_padding else torch.zeros_like(input_ids)
            model_inputs["is_prefix"] = is_prefix
        return model_inputs


def _mask(attention_mask, segment_ids, is_prefix, embedded, num_past):
    """The (B, 1, T, S) bool mask, True = visible, from whichever description was given; None = all is visible."""
    num_rows, num_tokens = embedded.shape[:2]
    if attention_mask is not None and attention_mask.dim() == 4:
        itself = torch.eye(num_tokens, dtype=torch.bool, device=embedded.device)
        return ~attention_mask.bool() | itself  # padding sees itself: an empty row would be nan
    if segment_ids is None and attention_mask is not None:
        segment_ids = attention_mask.long() - 1
    if segment_ids is None and num_tokens == 1:
        return None
    if segment_ids is None:
        segment_ids = torch.zeros(num_rows, num_past + num_tokens, dtype=torch.long, device=embedded.device)
    return visible(segment_ids, is_prefix, num_tokens)


def _left_padding(attention_mask):
    """(B,) padding tokens on the left of a (B, S) mask of ones and zeros; None for anything else."""
    return attention_mask.long().argmax(1) if attention_mask is not None and attention_mask.dim() == 2 else None


def continue_positions(positions, length):
    """Extend positions (B, 2, S0) to `length` tokens: the first stays at the mask token, the second counts on."""
    num_more = length - positions.shape[-1]
    step = torch.arange(1, num_more + 1, device=positions.device)
    more = positions[..., -1:] + torch.stack((torch.zeros_like(step), step))  # (B, 2, num_more)
    return torch.cat((positions, more), -1)
