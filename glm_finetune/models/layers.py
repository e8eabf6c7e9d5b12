"""What ChatGLM-6B and ChatGLM2/3-6B have in common: attention, the mask rule, rotary tables, the head.

Not here: anything that knows a flag, a tokenizer or DeepSpeed.
Dimension letters: B batch, T query tokens, S key tokens, P prefix tokens, D hidden, H query heads, K kv heads, E head
size, V vocabulary, L layers.
"""

import inspect
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.nn.attention.varlen import varlen_attn

from glm_finetune.models.again import directly
from glm_finetune.models.loss import token_losses, wrapped_head_losses

VARLEN_ASKS_FOR_GQA = "enable_gqa" in inspect.signature(varlen_attn).parameters  # torch 2.11 shares heads unasked


def visible(segment_ids, is_prefix, num_queries):
    """The one mask rule: token i sees token j if both are in the same segment and (j <= i or j is in the prefix).

    segment_ids: (B, S) int64, -1 = padding (padding sees only padding, so that no row of the mask is empty).
    is_prefix: (B, S) bool or None. The queries are the last `num_queries` of the S tokens.
    Returns (B, 1, T, S) bool, True = may be attended to.
    """
    # segment_ids 0 0 0 1 1 -1, is_prefix 1 1 0 0 0 0 (ChatGLM-6B's first sample has a prefix of two tokens):
    # tokens 0 and 1 see 0 1 | token 2 sees 0 1 2 | token 3 sees 3 | token 4 sees 3 4 | the padding sees itself.
    num_keys = segment_ids.shape[1]
    key_index = torch.arange(num_keys, device=segment_ids.device)
    sees = key_index <= key_index[-num_queries:, None]  # (T, S): causal
    if is_prefix is not None:
        sees = sees | is_prefix[:, None, :]  # (B, T, S)
    same_segment = segment_ids[:, -num_queries:, None] == segment_ids[:, None, :]  # (B, T, S)
    return (sees & same_segment)[:, None]


def added_to_scores(mask, dtype):
    """A bool mask as 0 and -inf, made once for all layers: of a bool mask attention makes it in every layer."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


@dataclass(frozen=True)
class Segments:
    """Stands for a mask where attention is causal within segments, so that none is built.

    bounds: (N + 1,) int32, where each segment begins in the B * T tokens laid end to end, and B * T. Every token is in
    a segment (padding in one of its own), none goes over the end of a row. longest: tokens of the longest segment, for
    a kernel that works in proportion to it; None: it is not known.
    """

    bounds: torch.Tensor
    longest: int | None = None

    def as_mask(self, num_rows):
        """The (B, 1, T, T) bool mask that it stands for."""
        # bounds 0 2 3 5 of a row of five tokens -> ids 1 1 2 3 3
        num_tokens = self.bounds[-1]  # CPU-GPU sync
        place = torch.arange(num_tokens, device=self.bounds.device)
        ids = torch.searchsorted(self.bounds, place, right=True).view(num_rows, -1)  # (B, T)
        return visible(ids, None, ids.shape[1])


def for_attention(query, key, value):
    """(B, T, heads, E) -> (B, heads, T, E), where attention leaves its result as the next product reads it."""
    # value is copied: as a view it would make the backward pass keep all of q|k|v
    return query.transpose(1, 2), key.transpose(1, 2), value.contiguous().transpose(1, 2)


def attend(query, key, value, mask, again=directly):
    """Scaled dot-product attention, scale 1 / sqrt(E).

    query: (B, H, T, E); key, value: (B, K, S, E), each kv head serving H / K consecutive query heads.
    mask: (B, 1, T, S) bool, True = visible, or what is added to the scores, 0 or -inf; None = causal, the last query
    seeing all S keys; Segments = causal within each, the S - T keys in front seen by all (no T x T tensor is built for
    these two).
    Returns (B, T, H * E).
    """
    if isinstance(mask, Segments):
        return attend_segments(query, key, value, mask, again)
    num_groups, num_queries, num_keys = query.shape[1] // key.shape[1], query.shape[2], key.shape[2]
    causal = mask is None and num_queries == num_keys
    in_place = num_groups > 1 and mask is None and num_queries in (1, num_keys) and has_flash_attention(query)
    if num_groups > 1 and not in_place:
        key, value = (again(torch.repeat_interleave, x, num_groups, 1) for x in (key, value))  # (B, H, S, E)
    if mask is None and 1 < num_queries < num_keys:  # after a cache or a prefix
        mask = causal_lower_right(num_queries, num_keys)
    out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=causal, enable_gqa=in_place)  # (B, H, T, E)
    return out.transpose(1, 2).flatten(2)  # (B, T, H * E)


def attend_segments(query, key, value, segments, again=directly):
    """`attend` with Segments: flash attention over all of them at once on cards that have it, else one after the other.

    query: (B, H, T, E); key, value: (B, K, P + T, E), the first P seen by every segment of their row.
    Either way memory and time are those of the samples alone, whatever the width of a row.
    """
    num_rows, _, num_tokens, _ = query.shape
    num_shared, bounds = key.shape[2] - num_tokens, segments.bounds
    query = query.transpose(1, 2).flatten(0, 1)  # (B * T, H, E)
    key, value = (lay_out(x, bounds, num_shared) for x in (key, value))  # (B * T + N * P, K, E)
    if has_flash_attention(query):
        key_bounds = bounds + num_shared * torch.arange(len(bounds), dtype=bounds.dtype, device=bounds.device)
        longest = segments.longest or num_tokens  # an upper bound: to look would cost a CPU-GPU sync
        sizes = longest, num_shared + longest
        shares_heads = {"enable_gqa": query.shape[1] != key.shape[1]} if VARLEN_ASKS_FOR_GQA else {}
        out = varlen_attn(
            query, key, value, bounds, key_bounds, *sizes, window_size=(-1, 0), **shares_heads
        )  # (B * T, H, E); (-1, 0): causal, aligned with the last key
        return out.flatten(1).unflatten(0, (num_rows, num_tokens))
    sizes = bounds.diff().tolist()  # CPU-GPU sync on a card without flash attention
    pieces = zip(query.split(sizes), *(x.split([size + num_shared for size in sizes]) for x in (key, value)))
    outs = [attend(*(x.transpose(0, 1)[None] for x in piece), None, again) for piece in pieces]  # (1, t, H * E) each
    return torch.cat(outs, 1).view(num_rows, num_tokens, -1)


def lay_out(x, bounds, num_shared):
    """Keys or values of the segments end to end, each with its row's shared ones in front.

    x: (B, K, P + T, E), P = num_shared -> (B * T + N * P, K, E).
    """
    # One row s a b c d with a shared key s (P = 1) and bounds 0 2 4 becomes s a b s c d:
    # ends 3 6, segment 0 0 0 1 1 1, token -1 0 1 1 2 3 (below its segment's begin, 0 or 2: it is the shared one).
    x = x.transpose(1, 2)  # (B, P + T, K, E)
    if not num_shared:
        return x.flatten(0, 1)
    num_tokens = x.shape[1] - num_shared
    shift = num_shared * torch.arange(1, len(bounds), device=x.device)
    ends = bounds[1:] + shift  # (N,) where a segment ends in the result
    place = torch.arange(x.shape[0] * num_tokens + num_shared * len(shift), device=x.device)
    segment = torch.searchsorted(ends, place, right=True)  # (B * T + N * P,)
    token = place - shift[segment]  # of its B * T tokens; of shared ones, in front of the segment by up to P
    begin = bounds[segment]
    row = begin // num_tokens
    within = torch.where(token < begin, token - begin, token - row * num_tokens) + num_shared
    return x.flatten(0, 1)[row * x.shape[1] + within]


def has_flash_attention(query):
    """Whether a card's flash attention takes this tensor, and so reads shared kv heads in place. A card's other kernels
    fall back to a (B, H, T, T) product; on CPUs no step got faster.
    """
    is_half = query.is_cuda and query.dtype in (torch.float16, torch.bfloat16)
    return is_half and torch.cuda.get_device_capability(query.device)[0] >= 8


def rotary_angles(position_ids, inv_freq):
    """position_ids: (..., T) of any kind; inv_freq: (n,) fp32 -> cos, sin (..., T, n) fp32, not the model's dtype."""
    with torch.autocast(device_type=position_ids.device.type, enabled=False):
        angles = position_ids.float()[..., None] * inv_freq
        return angles.cos(), angles.sin()


class LanguageModelHead(nn.Linear):
    """The output layer: logits, or (with `targets`) the losses of the target positions without keeping logits."""

    def forward(self, hidden, targets=None):
        """hidden: (..., D). Without targets: logits (..., V). With targets (N,): hidden (N, D) -> (N,) fp32 losses."""
        return super().forward(hidden) if targets is None else token_losses(hidden, self.weight, targets)


def at(rows, x):
    """(B, T, D) -> (N, D), of its B * T rows only those in `rows`, (N,) int64; x itself for None."""
    return x if rows is None else x.flatten(0, 1).index_select(0, rows)


def head_losses(hidden, head, labels, index):
    """Cross-entropies of next-token prediction, (N,) fp32. Logits exist only at positions with a target.

    hidden: (B, T, D), position t predicts labels[:, t + 1], or (N, D), at these positions already. labels: (B, T)
    int64, -100 = not a target. index: (N,) of `target_index(labels)`.
    """
    hidden, targets = at(index if hidden.dim() == 3 else None, hidden), labels.flatten()[index + 1]  # (N, D), (N,)
    has_losses = isinstance(head, LanguageModelHead)
    return head(hidden, targets) if has_losses else wrapped_head_losses(hidden, head, targets)
