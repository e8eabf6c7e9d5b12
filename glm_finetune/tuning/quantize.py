"""A base in 4 or 8 bit, quantised tensor by tensor as it is read: there is never a whole 16-bit copy. bitsandbytes.

    place = Quantized(4, torch.bfloat16, torch.device("cuda", 0))
    model = mode.model.from_pretrained("ChatGLM3-6B/", place=place)

The layers' matrices are quantised; embedding, norms, biases and the output layer stay in the compute dtype.
"""

from dataclasses import dataclass

import torch
from torch import nn

from glm_finetune.errors import UserError
from glm_finetune.weights import OnDevice, is_finite, replace_parameter

PACKAGE = "bitsandbytes==0.50.2"
NF4 = {"compress_statistics": True, "quant_type": "nf4"}  # with double quantisation


@dataclass(frozen=True)
class Quantized(OnDevice):
    """A place for weights (see `weights.OnDevice`): bits 4 is nf4 with double quantisation, 8 is LLM.int8()."""

    bits: int
    verb = "quantise"

    def host_bytes(self, num_elements):
        """About a tenth of the weights are no matrix of a layer."""
        return super().host_bytes(num_elements) * (0.1 + 0.9 * self.bits / 8 / self.dtype.itemsize)

    def construct(self, build):
        with torch.device("meta"):
            model = build()
            head = model.get_output_embeddings()
            for name, module in list(model.named_modules()):
                if isinstance(module, nn.Linear) and module is not head:
                    owner, _, attribute = name.rpartition(".")
                    setattr(model.get_submodule(owner), attribute, self._layer(module))
        setattr(model, f"is_loaded_in_{self.bits}bit", True)  # by this peft knows which layers it meets
        return model

    def _layer(self, linear):
        kinds, sizes = import_bitsandbytes().nn, (linear.in_features, linear.out_features, linear.bias is not None)
        if self.bits == 8:
            return kinds.Linear8bitLt(*sizes, has_fp16_weights=False, threshold=6.0)
        layer = kinds.Linear4bit(*sizes, compute_dtype=self.dtype, **NF4)
        # On CPUs the first evaluation would pack the weights anew, for good and with scales rounded to bf16.
        layer.support_avx512bf16_for_cpu = False
        return layer

    def assign(self, model, name, tensor):
        kinds, (owner, _, attribute) = import_bitsandbytes().nn, name.rpartition(".")
        layer = model.get_submodule(owner)
        if attribute != "weight" or not isinstance(layer, (kinds.Linear4bit, kinds.Linear8bitLt)):
            return super().assign(model, name, tensor)
        # bitsandbytes quantises 8-bit weights only on their way from the CPU to a card.
        value = tensor.to("cpu" if self.bits == 8 else self.device, self.dtype)
        finite = is_finite(value)
        if self.bits == 4:
            weight = kinds.Params4bit(value, requires_grad=False, module=layer, **NF4)
        else:
            weight = kinds.Int8Params(value, requires_grad=False, has_fp16_weights=False)
        replace_parameter(model, name, weight.to(self.device))  # quantises
        return finite


def import_bitsandbytes():
    """The package, or a UserError that says how to install it."""
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f"a base in 4 or 8 bit needs bitsandbytes ({error}): pip install {PACKAGE}") from None
    return bitsandbytes
