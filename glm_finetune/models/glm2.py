"""ChatGLM2-6B, ChatGLM3-6B and CodeGeeX2-6B: causal attention with shared kv heads, rotary embedding on half a head.

Parameter names and config fields are the originals'. Numbers equal the originals' in fp32 (tests/test_oracle.py); in
16 bit the rotary angles are computed in fp32, where ChatGLM2's own tables are useless beyond some dozens of tokens.

Dimension letters: B batch, T query tokens, S key tokens, P prefix tokens, D hidden, H query heads, K kv heads, E head
size (kv_channels), F feed-forward size, V vocabulary, L layers.

    model = ChatGLM2ForConditionalGeneration.from_pretrained("ChatGLM3-6B/", dtype=torch.bfloat16)
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from glm_finetune.models.again import Lean, RMSNorm, made_again
from glm_finetune.models.layers import (
    LanguageModelHead,
    Segments,
    at,
    attend,
    for_attention,
    rotary_angles,
    visible,
)
from glm_finetune.models.network import Network
from glm_finetune.models.original import OriginalConfig
from glm_finetune.models.prefixes import new_prefix


class ChatGLM2Config(OriginalConfig):
    """Fields of the original config.json, with the original class's defaults."""

    num_layers: int = 28
    padded_vocab_size: int = 65024
    hidden_size: int = 4096
    ffn_hidden_size: int = 13696
    kv_channels: int = 128
    num_attention_heads: int = 32
    seq_length: int = 2048
    hidden_dropout: float = 0.0
    layernorm_epsilon: float = 1e-5
    rmsnorm: bool = True
    apply_residual_connection_post_layernorm: bool = False
    post_layer_norm: bool = True
    add_bias_linear: bool = False
    add_qkv_bias: bool = False
    multi_query_attention: bool = False
    multi_query_group_num: int = 1
    pre_seq_len: int | None = None
    prefix_projection: bool = False
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_ratio: float = 1.0
    rope_rule: str | None = None
    required_fields = ("padded_vocab_size", "kv_channels", "multi_query_attention")
    attribute_map = {
        **OriginalConfig.attribute_map,
        "vocab_size": "padded_vocab_size",
        "max_positions": "seq_length",
        "head_size": "kv_channels",
    }

    @property
    def num_kv_heads(self):
        return self.multi_query_group_num if self.multi_query_attention else self.num_attention_heads


def new_norm(config):
    norm = RMSNorm if config.rmsnorm else nn.LayerNorm  # fp32 inside
    return norm(config.hidden_size, eps=config.layernorm_epsilon)


def inverse_frequencies(kv_channels, device=None, ratio=1.0):
    """theta_i = (10000 ratio)^(-2i / n) of the n = E / 2 rotated dimensions: (E / 4,) fp32."""
    size = kv_channels // 2
    return 1.0 / (10000 * ratio) ** (torch.arange(0, size, 2, dtype=torch.float32, device=device) / size)


def rotate(x, cos, sin):
    """Rotate the first half of each head in interleaved pairs (x0, x1), (x2, x3), ...; the second half passes through.

    x: (B, T, heads, E); cos, sin: (B, T, 1, E / 4) in the dtype of x.
    """
    # E = 8, dimensions 0 .. 7: the pairs (0, 1) and (2, 3) turn, 4 .. 7 pass through
    rotated, rest = x.chunk(2, -1)
    even, odd = rotated[..., 0::2], rotated[..., 1::2]  # (B, T, heads, E / 4)
    pairs = torch.stack((even * cos - odd * sin, odd * cos + even * sin), -1)  # (B, T, heads, E / 4, 2)
    return torch.cat((pairs.flatten(-2), rest), -1)


class SelfAttention(nn.Module):
    def __init__(self, config, layer_index):
        super().__init__()
        self.layer_index = layer_index
        self.head_size = config.kv_channels
        self.num_heads, self.num_kv_heads = config.num_attention_heads, config.num_kv_heads
        self.interleaved = not config.multi_query_attention  # q|k|v head by head, as in ChatGLM-6B
        size, has_bias = self.head_size * self.num_heads, config.add_bias_linear or config.add_qkv_bias
        self.query_key_value = nn.Linear(config.hidden_size, size + 2 * self.head_size * self.num_kv_heads, has_bias)
        self.dense = nn.Linear(size, config.hidden_size, bias=config.add_bias_linear)

    def split(self, qkv):
        """qkv: (B, T, (H + 2K) * E) -> query (B, T, H, E), key and value (B, T, K, E)."""
        if self.interleaved:
            return qkv.unflatten(-1, (self.num_heads, 3 * self.head_size)).chunk(3, -1)
        sizes = [heads * self.head_size for heads in (self.num_heads, self.num_kv_heads, self.num_kv_heads)]
        return [part.unflatten(-1, (-1, self.head_size)) for part in qkv.split(sizes, -1)]

    def forward(self, hidden, mask, cos, sin, prefix, cache, again, rows):
        query, key, value = self.split(self.query_key_value(hidden))
        query, key, value = for_attention(rotate(query, cos, sin), rotate(key, cos, sin), value)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)
        if prefix is not None:
            key, value = torch.cat((prefix[0], key), 2), torch.cat((prefix[1], value), 2)  # (B, K, P + S, E)
        return self.dense(at(rows, attend(query, key, value, mask, again)))


class MLP(nn.Module):
    """SwiGLU: both halves of one product, silu(first) * second."""

    def __init__(self, config):
        super().__init__()
        self.dense_h_to_4h = nn.Linear(config.hidden_size, 2 * config.ffn_hidden_size, bias=config.add_bias_linear)
        self.dense_4h_to_h = nn.Linear(config.ffn_hidden_size, config.hidden_size, bias=config.add_bias_linear)

    def forward(self, hidden, again):
        gate, up = self.dense_h_to_4h(hidden).chunk(2, -1)  # (B, T, F) each
        return self.dense_4h_to_h(again(torch.mul, again(F.silu, gate), up))


class GLMBlock(Lean, GradientCheckpointingLayer):
    def __init__(self, config, layer_index):
        super().__init__()
        self.norm_is_residual = config.apply_residual_connection_post_layernorm
        self.input_layernorm = new_norm(config)
        self.self_attention = SelfAttention(config, layer_index)
        self.post_attention_layernorm = new_norm(config)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.hidden_dropout) if config.hidden_dropout else nn.Identity()

    def forward(self, hidden, mask, cos, sin, prefix=None, cache=None, rows=None):
        """hidden: (B, T, D) -> (B, T, D), or at `rows` only, see `layers.at`. cos, sin: (B, T, 1, E / 4). prefix: (key,
        value), each (B, K, P, E).
        """
        with made_again(self.lean and not self.gradient_checkpointing) as again:
            normed = self.input_layernorm(hidden)
            residual = at(rows, normed if self.norm_is_residual else hidden)
            hidden = residual + self.dropout(self.self_attention(normed, mask, cos, sin, prefix, cache, again, rows))
            normed = self.post_attention_layernorm(hidden)
            residual = normed if self.norm_is_residual else hidden
            return residual + self.dropout(self.mlp(normed, again))


class ChatGLMModel(nn.Module):
    """Embedding, layers and output layer: the original keeps the head inside `transformer`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.embedding = nn.ModuleDict({"word_embeddings": nn.Embedding(config.padded_vocab_size, config.hidden_size)})
        self.encoder = nn.ModuleDict({"layers": nn.ModuleList(GLMBlock(config, i) for i in range(config.num_layers))})
        if config.post_layer_norm:
            self.encoder["final_layernorm"] = new_norm(config)
        self.output_layer = LanguageModelHead(config.hidden_size, config.padded_vocab_size, bias=False)
        if config.pre_seq_len:
            new_prefix(self, config)


class ChatGLM2ForConditionalGeneration(Network):
    config_class = ChatGLM2Config
    input_embeddings_name = "transformer.embedding.word_embeddings"
    output_embeddings_name = "transformer.output_layer"

    def __init__(self, config):
        super().__init__(config)
        assert (config.rope_ratio == 1) == (config.rope_rule is None), (config.rope_ratio, config.rope_rule)
        self.transformer = ChatGLMModel(config)
        self.post_init()

    def stored_buffers(self):
        dtype = self.get_input_embeddings().weight.dtype
        return {"transformer.rotary_pos_emb.inv_freq": inverse_frequencies(self.config.kv_channels).to(dtype)}

    @property
    def layers(self):
        return self.transformer.encoder.layers

    def final_norm(self, hidden):
        return self.transformer.encoder.final_layernorm(hidden) if self.config.post_layer_norm else hidden

    def angles(self, position_ids):
        """(B, T) -> cos, sin (B, T, E / 4) fp32. rope_ratio: see `rope`."""
        config, ratios = self.config, {self.config.rope_rule: self.config.rope_ratio}
        frequencies = inverse_frequencies(config.kv_channels, position_ids.device, ratios.get("base", 1.0))
        return rotary_angles(position_ids / ratios.get("position", 1.0), frequencies)

    def layout(self, batch, embedded, num_past):
        """Positions count on from the cache. Without padding or segments attention is causal, with padding on the right
        too, and no mask is built.
        """
        num_tokens, position_ids = embedded.shape[1], batch.get("position_ids")
        if position_ids is None:
            position_ids = torch.arange(num_past, num_past + num_tokens, device=embedded.device)[None]
        if batch.get("segment_bounds") is not None:
            return position_ids, Segments(batch["segment_bounds"], batch.get("longest_segment"))
        segment_ids, attention_mask = batch.get("segment_ids"), batch.get("attention_mask")
        if segment_ids is None and attention_mask is not None:
            segment_ids = attention_mask.long() - 1
        mask = None if segment_ids is None else visible(segment_ids, batch.get("is_prefix"), num_tokens)
        return position_ids, mask
