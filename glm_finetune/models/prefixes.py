"""P-Tuning inside the models: a prefix of keys and values in front of every layer, or embeddings in front of the text.

Dimension letters: B batch, T tokens, S key tokens, P prefix tokens, D hidden, K kv heads, E head size, L layers.
"""

import torch
import torch.nn.functional as F
from torch import nn

from glm_finetune.models.layers import Segments


class EmbeddingFP32(nn.Embedding):
    """An embedding that gives fp32 also where fp16 training holds the weights in 16 bit."""

    def forward(self, index):
        return super().forward(index).float()


class LinearFP32(nn.Linear):
    """A linear layer that computes in fp32 also where fp16 training holds the weights in 16 bit."""

    def forward(self, x):
        return F.linear(x, self.weight.float(), self.bias.float())


class PrefixEncoder(nn.Module):
    """P-Tuning v2: trainable keys and values in front of every layer (arXiv 2110.07602, the official ChatGLM code).

    `num_values` = 2 * L * K * E numbers for each of the P prefix tokens; with `projection` they come from an
    embedding of size `embedding_size` through Linear -> Tanh -> Linear of inner size `hidden_size`.
    """

    def __init__(self, pre_seq_len, num_values, projection, embedding_size, hidden_size):
        super().__init__()
        self.embedding = EmbeddingFP32(pre_seq_len, embedding_size if projection else num_values)
        if projection:
            self.trans = nn.Sequential(
                LinearFP32(embedding_size, hidden_size), nn.Tanh(), LinearFP32(hidden_size, num_values)
            )
        self.projection = projection

    def forward(self, index):
        """index: (P,) int64 -> (P, num_values) fp32, computed in fp32 whatever the dtype of the weights."""
        return self.trans(self.embedding(index)) if self.projection else self.embedding(index)


class PromptEncoder(nn.Module):
    """P-Tuning v1: P trainable embeddings in front of the text (arXiv 2103.10385, section 3.2).

    With `projection` they come from a two-layer bidirectional LSTM and an MLP over trainable embeddings, as in the
    paper; without it they are the embeddings themselves. What is saved are the P embeddings that come out.
    """

    def __init__(self, prompt_len, size, projection, dropout):
        super().__init__()
        self.embedding = nn.Embedding(prompt_len, size)
        self.projection = projection
        self.dropout = nn.Dropout(dropout)
        if projection:
            self.lstm = nn.LSTM(size, size // 2, num_layers=2, bidirectional=True, batch_first=True)
            self.mlp = nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))

    def forward(self):
        """(P, D), in the dtype of the weights."""
        index = torch.arange(self.embedding.num_embeddings, device=self.embedding.weight.device)
        prompt = self.embedding(index)
        if self.projection:
            prompt = self.mlp(self.lstm(prompt[None])[0])[0]
        return self.dropout(prompt)


def prefix_keys_values(model, embedded):
    """The prefix of `new_prefix` for embedded (B, T, D): a (key, value) of each layer, (B, K, P, E), not rotated."""
    # What the encoder gives of one prefix token, at 2 layers: keys of layer 0, its values, keys of layer 1, its values.
    config, transformer = model.config, model.transformer
    index = torch.arange(config.pre_seq_len, device=embedded.device)
    prefix = transformer.prefix_encoder(index).to(embedded.dtype)  # (P, L * 2 * K * E)
    prefix = prefix.view(config.pre_seq_len, 2 * config.num_layers, config.num_kv_heads, -1)  # (P, 2L, K, E)
    prefix = prefix.permute(1, 2, 0, 3)  # (2L, K, P, E)
    prefix = transformer.dropout(prefix[:, None].expand(-1, len(embedded), -1, -1, -1))  # (2L, B, K, P, E)
    return list(zip(prefix[0::2], prefix[1::2]))


def new_prefix(transformer, config):
    """Add the prefix that `config` describes (pre_seq_len, prefix_projection), with torch's default values."""
    num_values = 2 * config.num_layers * config.num_kv_heads * config.head_size
    sizes = config.prefix_embedding_size or num_values, config.hidden_size
    transformer.prefix_encoder = PrefixEncoder(config.pre_seq_len, num_values, config.prefix_projection, *sizes)
    transformer.dropout = nn.Dropout(0.1)


def add_prefix(model, pre_seq_len, projection, dropout=0.0):
    """Add a new P-Tuning v2 prefix of `pre_seq_len` tokens in fp32 to a model without one.

    The original's config.json fields say so, also in what is saved.
    """
    _set_config(model.config, pre_seq_len=pre_seq_len, prefix_projection=projection)
    new_prefix(model.transformer, model.config)
    model.transformer.prefix_encoder.to(model.device, torch.float32)
    model.transformer.dropout.p = dropout


def add_prompt(model, prompt_len, projection, dropout=0.0):
    """Add a new P-Tuning v1 prompt of `prompt_len` embeddings in fp32 to a model without one."""
    _set_config(model.config, prompt_len=prompt_len)
    size = model.get_input_embeddings().embedding_dim
    model.transformer.prompt_encoder = PromptEncoder(prompt_len, size, projection, dropout).to(model.device)


def _set_config(config, **fields):
    """Set fields of a configuration, also in what is saved."""
    for name, value in fields.items():
        setattr(config, name, value)
    config.source = {**config.source, **fields}


def with_prefix_columns(mask, num_prefix):
    """Put `num_prefix` columns that everyone sees in front of a mask. mask: (B, 1, T, S) bool; None = causal, and
    Segments, need none.
    """
    return F.pad(mask, (num_prefix, 0), value=True) if num_prefix and isinstance(mask, torch.Tensor) else mask


def with_prompt(prompt, num_prompt, embedded, position_ids, mask):
    """Put a prompt of P-Tuning v1 in front of a text, whose positions move up.

    prompt: (P, D), P = num_prompt, or None when it is in the cache already. embedded: (B, T, D), position_ids: (B or 1,
    [2,] T), mask: (B, 1, T, S), Segments or None.
    The prompt is causal in itself and does not see the text, so that it is the same for every sample, also for those
    that share a row and so share its prompt. Returns the three for P + T tokens.
    """
    # P = 2 in front of the text a b: position_ids 0 1 become 0 1 2 3; p0 sees itself, p1 both, a and b see p0 p1 and
    # what they saw before.
    if isinstance(mask, Segments):  # each of them would need a prompt in front of it, not the row one
        mask = mask.as_mask(embedded.shape[0])
    mask = with_prefix_columns(mask, num_prompt)
    place = torch.arange(num_prompt, device=embedded.device)
    if position_ids.dim() == 3:  # ChatGLM-6B's second position counts from <sop>
        place = torch.stack((place, torch.zeros_like(place)))  # (2, P)
        position_ids = position_ids + position_ids.new_tensor([num_prompt, 0])[:, None]
    else:
        position_ids = position_ids + num_prompt
    if prompt is None:
        return embedded, position_ids, mask
    embedded = torch.cat((prompt.expand(embedded.shape[0], -1, -1), embedded), 1)
    position_ids = torch.cat((place.expand(*position_ids.shape[:-1], -1), position_ids), -1)
    if mask is not None:
        rows = torch.ones(num_prompt, mask.shape[-1], dtype=torch.bool, device=mask.device).tril()
        mask = torch.cat((rows.expand(mask.shape[0], 1, -1, -1), mask), 2)  # (B, 1, P + T, P + S)
    return embedded, position_ids, mask
