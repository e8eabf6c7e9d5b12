"""What the backward pass makes again instead of keeping it: cheap functions of what is kept anyway.

    with made_again() as again:
        product = again(torch.mul, again(F.silu, gate), up)      # what follows keeps gate and up for product
        return self.dense_4h_to_h(product)

The forward pass computes what it would without, and the backward pass gets the same bits, so no number changes. Half of
what a LoRA step would keep are such values: results of activations, repeated keys and values; also dropout's masks,
which are drawn again. Only inside `made_again` autograd does not see that a kept tensor was changed in place: `_unpack`
looks itself.
"""

from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn


class Lean:
    """A module with a plain way and one that keeps or moves less; they differ by rounding. `Network.choose_ways`."""

    lean = True


class Recipe(NamedTuple):
    """How to make a tensor again. inputs: as `_Making.pack` gave them. The last three: of the view that is kept."""

    function: object
    inputs: list
    size: tuple = ()
    stride: tuple = ()
    offset: int = 0


class Kept(NamedTuple):
    """A tensor as it was when it was kept. version: torch's count of the changes in place."""

    tensor: torch.Tensor
    version: int


class _Making:
    """Recipes of the tensors made inside one `made_again`, by the address of their memory; they live until it ends."""

    def __init__(self):
        self.tensors, self.recipes = [], {}

    def again(self, function, *inputs):
        result = function(*inputs)
        kept = [self.pack(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        self.recipes[result.untyped_storage().data_ptr()] = Recipe(function, kept)
        self.tensors.append(result)
        return result

    def pack(self, tensor):
        """What is kept of a tensor: a Recipe, or itself. A leaf as it is: ZeRO-3 exchanges what lies behind it."""
        recipe = self.recipes.get(tensor.untyped_storage().data_ptr())
        if recipe:
            return recipe._replace(size=tensor.shape, stride=tensor.stride(), offset=tensor.storage_offset())
        return tensor if tensor.is_leaf else Kept(tensor.detach(), tensor._version)


def _unpack(kept):
    if isinstance(kept, Kept):
        assert kept.tensor._version == kept.version, "a tensor that the backward pass needs was changed in place"
        return kept.tensor
    if not isinstance(kept, Recipe):
        return kept
    with torch.no_grad():
        return kept.function(*map(_unpack, kept.inputs)).as_strided(kept.size, kept.stride, kept.offset)


def directly(function, *inputs):
    """The place of `again` where nothing is made again."""
    return function(*inputs)


@contextmanager
def made_again(wanted=True):
    """Gives again(function, *inputs) -> function(*inputs), a new tensor; `directly` where it is not wanted."""
    if not (wanted and torch.is_grad_enabled()):
        yield directly
        return
    kept = _Making()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, _unpack):
        yield kept.again
    kept.tensors.clear()
    kept.recipes.clear()


class _Dropped(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, p):
        generator = torch.cuda.default_generators[x.device.index] if x.is_cuda else torch.default_generator
        ctx.p, ctx.state = p, generator.get_state()  # of a card: seed and offset, known to the host
        return x * _scaled_mask(x, p, generator)

    @staticmethod
    def backward(ctx, grad):
        generator = torch.Generator(grad.device)
        generator.set_state(ctx.state)
        return grad * _scaled_mask(grad, ctx.p, generator), None


def _scaled_mask(x, p, generator):
    return x.new_empty(x.shape).bernoulli_(1 - p, generator=generator).div_(1 - p)


class Dropout(Lean, nn.Dropout):
    """torch's dropout, whose mask is drawn again in the backward pass and not kept. On a CPU the same numbers."""

    def forward(self, x):
        return _Dropped.apply(x, self.p) if self.training and self.p and self.lean else super().forward(x)


class RMSNorm(Lean, nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight, in fp32 inside. On CPUs torch's own would keep three fp32 copies of x."""

    def forward(self, x):
        return _RMSNorm.apply(x, self.weight, self.eps) if self.lean and not x.is_cuda else super().forward(x)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        wide = x.float()
        scale = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()  # (..., 1)
        ctx.save_for_backward(x, weight, scale)
        return (wide * scale).mul_(weight).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        x, weight, scale = ctx.saved_tensors
        grad, normed = grad.float(), x.float() * scale
        grad_weight = (grad * normed).flatten(0, -2).sum(0).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * weight
        return ((grad - normed * (grad * normed).mean(-1, keepdim=True)) * scale).to(x.dtype), grad_weight, None
