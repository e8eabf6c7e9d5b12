"""peft's LoRA layers, moving and keeping less: what `models/again.py` is for the base.

make_lean(model, dropout=0.1)       # after get_peft_model; the layers stay peft's classes but for their forward
"""

import torch
from peft.tuners import lora

from glm_finetune.models.again import Dropout, Lean
from glm_finetune.weights import full_shape


class FusedLinear(Lean, lora.Linear):
    """peft's layer, where it does what all layers do: scale and sum are part of the second product, not three passes
    over the layer's output. Under ZeRO-3 to look at `up.weight` gathers it; were it divided peft's way would be taken.
    """

    def forward(self, x, *args, **kwargs):
        (name, *others), varies = self.active_adapters, args or kwargs or self.lora_variant
        down, up = self.lora_A[name], self.lora_B[name]
        is_plain = not (others or varies or self.disable_adapters or self.merged) and up.bias is None
        if not (self.lean and is_plain and x.dtype == up.weight.dtype and up.weight.shape == full_shape(up.weight)):
            return super().forward(x, *args, **kwargs)
        result, low = self.base_layer(x), down(self.lora_dropout[name](x))  # (..., out), (..., rank)
        total = torch.addmm(result.flatten(0, -2), low.flatten(0, -2), up.weight.t(), alpha=self.scaling[name])
        return total.view_as(result)


def make_lean(model, dropout):
    """Give LoRA layers the dropout that keeps no mask, and plain ones the fused product."""
    for layer in model.modules():
        if isinstance(layer, lora.LoraLayer) and dropout:
            layer.lora_dropout.update({name: Dropout(dropout) for name in layer.lora_dropout})
        if type(layer) is lora.Linear:
            layer.__class__ = FusedLinear
