"""What every model does, once: begin (a batch -> what flows through the layers), the layers, end (-> token losses).

A model file gives the rest: embedding, block, `angles`, `layout`. transformers gives `generate()`, gradient
checkpointing and what peft needs.

    losses = model(**batch, use_cache=False).token_losses          # (N,) fp32, one of each target token
    stream = model.begin(batch)                                    # the same in three parts
    for layer, prefix in zip(model.layers, stream.prefixes): ...
    losses = model.end(hidden, batch)

Dimension letters: B batch, T query tokens, S key tokens, P prefix tokens, D hidden, K kv heads, E head size, V
vocabulary, N target tokens.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from transformers import GenerationMixin
from transformers.cache_utils import DynamicCache
from transformers.utils import ModelOutput

from glm_finetune.models.again import Lean
from glm_finetune.models.layers import added_to_scores, head_losses
from glm_finetune.models.loss import target_index as target_index_of
from glm_finetune.models.original import OriginalModel
from glm_finetune.models.prefixes import prefix_keys_values, with_prefix_columns, with_prompt


class Stream(NamedTuple):
    """What flows through the layers, and what each of them is given beside it.

    hidden: (B, T, D). mask: see `layers.attend`. cos, sin: of the rotary positions, in the dtype of hidden.
    prefixes: of each layer (key, value), each (B, K, P, E), or None.
    """

    hidden: torch.Tensor
    mask: object
    cos: torch.Tensor
    sin: torch.Tensor
    prefixes: list


@dataclass
class Output(ModelOutput):
    """loss: mean of token_losses, fp32 scalar. token_losses: (N,) fp32, in the order of `loss.target_index`."""

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: object = None
    token_losses: torch.Tensor | None = None


def enable_checkpointing(model):
    """Switch gradient checkpointing of a transformers model on; the method got another name after 5.17."""
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": False})


class Network(OriginalModel, GenerationMixin):
    """Base of the language models.

    A subclass has `layers` (its blocks) and `final_norm`, gives angles(position_ids) -> cos, sin of each token in fp32,
    and layout(batch, embedded, num_past) -> position_ids and mask, derived where the batch leaves them out.
    """

    supports_gradient_checkpointing = True
    _supports_sdpa = True

    def choose_ways(self, lean, compiled=False):
        """lean: whether layers and adapters keep less and make it again, see `again`; the default. compiled: whether
        torch.compile makes kernels for each layer, for new shapes as they come, and itself chooses what to keep.
        """
        for part in self.modules():
            if isinstance(part, Lean):
                part.lean = lean and not compiled
        for layer in self.layers if compiled else ():
            layer.compile(dynamic=True)

    def enable_input_require_grads(self):
        """Nothing: checkpointing (peft asks for it) needs none here, and it would carry the backward pass through all
        frozen layers below the lowest that learns.
        """

    def begin(self, batch, cache=None):
        """A batch (see data/dataset.py; at least input_ids (B, T) or inputs_embeds (B, T, D)) -> Stream.

        cache: of earlier tokens, or None. With a prompt of P-Tuning version 1 hidden is longer by its P tokens.
        """
        config, embedded = self.config, batch.get("inputs_embeds")
        embedded = self.get_input_embeddings()(batch["input_ids"]) if embedded is None else embedded
        num_past = 0 if cache is None else max(0, cache.get_seq_length() - (config.prompt_len or 0))
        position_ids, mask = self.layout(batch, embedded, num_past)
        mask = with_prefix_columns(mask, config.pre_seq_len or 0)
        if config.prompt_len:
            prompt = None if num_past else self.transformer.prompt_encoder().to(embedded.dtype)  # (P, D)
            embedded, position_ids, mask = with_prompt(prompt, config.prompt_len, embedded, position_ids, mask)
        mask = added_to_scores(mask, embedded.dtype) if isinstance(mask, torch.Tensor) else mask
        cos, sin = (table.to(embedded.dtype)[:, :, None] for table in self.angles(position_ids))  # (B, T, 1, ...)
        prefixes = prefix_keys_values(self, embedded) if config.pre_seq_len else [None] * config.num_layers
        return Stream(embedded, mask, cos, sin, prefixes)

    def end(self, hidden, batch):
        """hidden of the last layer, (B, T, D) or at the targets (N, D) -> (N,) fp32 losses of those in batch["labels"].

        batch["target_index"]: (N,) where they are. See `layers.head_losses`.
        """
        hidden = self.final_norm(hidden)
        return head_losses(hidden, self.get_output_embeddings(), batch["labels"], batch["target_index"])

    def needed(self, batch, num_tokens):
        """What of each layer's result is needed, see `layers.at`: of the last one only the rows with a target."""
        index, prompt = batch["target_index"], self.config.prompt_len or 0
        rows = index + prompt * (index // num_tokens + 1) if prompt else index
        return [None] * (len(self.layers) - 1) + [rows if self.layers[-1].lean else None]

    def logits(self, hidden, num_last=0):
        """hidden: (B, T, D) of the last layer -> (B, T or num_last, V): of the last positions only, 0 = of all."""
        return self.get_output_embeddings()(self.final_norm(hidden[:, -num_last:]))

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        position_ids=None,
        past_key_values=None,
        inputs_embeds=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        segment_ids=None,
        is_prefix=None,
        segment_bounds=None,
        longest_segment=None,
        target_index=None,
        return_logits=None,
        output_attentions=None,
        output_hidden_states=None,
        return_dict=None,
    ):
        """Next-token logits, or losses -> Output.

        input_ids: (B, T), or inputs_embeds: (B, T, D), and the rest of a batch as in data/dataset.py; what is left out
        is derived: see `layout` of the model. attention_mask: (B, S) 1 = token, 0 = padding; ChatGLM-6B also takes the
        original's (B, 1, T, T) bool, True = masked. logits_to_keep: of the last so many positions only; 0 = all.
        return_logits: default, when without labels.
        """
        batch = dict(input_ids=input_ids, inputs_embeds=inputs_embeds, labels=labels, target_index=target_index)
        batch |= dict(attention_mask=attention_mask, position_ids=position_ids, segment_bounds=segment_bounds)
        batch |= dict(segment_ids=segment_ids, is_prefix=is_prefix, longest_segment=longest_segment)
        if output_attentions or output_hidden_states or return_dict is False:
            raise ValueError("output_attentions, output_hidden_states and return_dict=False are not supported.")
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        cache = DynamicCache(config=self.config) if past_key_values is None and use_cache else past_key_values
        stream = self.begin(batch, cache)
        hidden, num_tokens = stream.hidden, (input_ids if inputs_embeds is None else inputs_embeds).shape[1]
        wants_logits = labels is None if return_logits is None else return_logits
        if labels is not None and target_index is None:
            batch["target_index"] = target_index_of(labels)  # CPU-GPU sync
        needed = [None] * len(self.layers) if wants_logits else self.needed(batch, num_tokens)
        for layer, prefix, rows in zip(self.layers, stream.prefixes, needed):
            hidden = layer(hidden, stream.mask, stream.cos, stream.sin, prefix, cache, rows)
        hidden = hidden[:, -num_tokens:] if hidden.dim() == 3 else hidden  # without the prompt of P-Tuning version 1
        losses = None if labels is None else self.end(hidden, batch)
        loss = None if labels is None else losses.sum() / max(len(losses), 1)
        logits = self.logits(hidden, logits_to_keep) if wants_logits else None
        return Output(loss, logits, cache, losses)

    def generate(self, inputs=None, **kwargs):
        """transformers' generate(). A mask that hides nothing is noticed once, here, and not handed on: attention is
        faster without (5.23 does so itself, 5.17 does not).
        """
        mask = kwargs.get("attention_mask")
        hides = mask is None or not bool(mask.all())  # CPU-GPU sync. Without a mask transformers makes its own
        return super().generate(inputs, hides=hides, **kwargs)

    def prepare_inputs_for_generation(self, input_ids, hides=True, attention_mask=None, **kwargs):
        """hides: of `generate`, whether attention_mask (B, S) has a zero."""
        mask = attention_mask if hides else None
        return super().prepare_inputs_for_generation(input_ids, attention_mask=mask, **kwargs)
