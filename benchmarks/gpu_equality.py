"""Equality on a card (or the CPU): each kernel that training uses against plain fp32 arithmetic, with gradients.

for result in checks(card): ...         # {"what", "error", "allowed", "equal"}; the error of bf16 results and
                                        # gradients is the norm of the difference beside that of the value
"""

import importlib.util
import math

import torch
import torch.nn.functional as F

from glm_finetune.models import layers
from glm_finetune.models.again import Dropout, RMSNorm, made_again
from glm_finetune.models.glm import rotate as rotate_glm
from glm_finetune.models.glm2 import inverse_frequencies, rotate
from glm_finetune.models.loss import token_losses

ALLOWED = 0.02  # of bf16, whose unit is 2 ** -8, after several products, as a share of the norm (0.003 to 0.008 seen)


def plainly(query, key, value, sees):
    """softmax(q k / sqrt(E)) v of (B, heads, T, E) in fp32; sees: (B or 1, 1, T, S) bool."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) / math.sqrt(query.shape[-1])
    return (scores.masked_fill(~sees, float("-inf")).softmax(-1) @ value).transpose(1, 2).flatten(2)


def compared(what, fast, plain, inputs, dtype=torch.bfloat16):
    """fast(*inputs) in `dtype` against plain(*inputs) in fp32, and the gradients of both."""
    results = []
    for function, kind in ((fast, dtype), (plain, torch.float32)):
        leaves = [x.detach().to(dtype).to(kind).requires_grad_() for x in inputs]
        out = function(*leaves)
        weight = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out)
        results.append([out, *torch.autograd.grad((out.float() * weight).sum(), leaves)])
    errors = [((own.float() - right).norm() / right.norm()).item() for own, right in zip(*results)]
    error = max(errors)
    return {"what": what, "error": error, "allowed": ALLOWED, "equal": bool(error < ALLOWED)}


def attention(card, length, num_heads, num_kv_heads, num_shared=0):
    """Random query, key, value: (1, heads, length, 64), keys with `num_shared` more in front."""
    sizes = (num_heads, length), (num_kv_heads, num_shared + length), (num_kv_heads, num_shared + length)
    return [torch.randn(1, heads, tokens, 64, device=card.device) for heads, tokens in sizes]


def attention_checks(card):
    length = 24 if card.quick else 704  # % 128 == 64: where cuDNN's gradients were seen to be nan
    position = torch.arange(length, device=card.device)
    causal = (position <= position[:, None])[None, None]
    shared = F.pad(causal, (16, 0), value=True)
    bounds = torch.tensor([0, length // 4, length // 2, length], dtype=torch.int32, device=card.device)
    segments = layers.Segments(bounds, length // 2)
    inside, inside_shared = segments.as_mask(1), F.pad(segments.as_mask(1), (16, 0), value=True)
    prefix = layers.visible(torch.zeros(1, length, dtype=torch.long, device=card.device), (position < 9)[None], length)
    cases = {
        "causal, shared heads": (None, causal, (8, 2)),
        "causal, all heads": (None, causal, (8, 8)),
        "causal behind a prefix": (None, shared, (8, 2, 16)),
        "packed": (segments, inside, (8, 2)),
        "packed behind a prefix": (segments, inside_shared, (8, 2, 16)),
        "prefix mask": (layers.added_to_scores(prefix, torch.bfloat16), prefix, (8, 8)),
    }
    for name, (mask, sees, sizes) in cases.items():
        fast = lambda q, k, v, mask=mask: layers.attend(q, k, v, mask)  # noqa: E731
        plain = lambda q, k, v, sees=sees: plainly(q, k, v, sees)  # noqa: E731
        yield compared(f"attention, {name}", fast, plain, attention(card, length, *sizes))


def cudnn_check(card):
    """The inputs of pytorch #196678, whose gradients were nan with cuDNN's attention and a mask."""
    for on in (False, True):
        torch.backends.cuda.enable_cudnn_sdp(on)
        query, key, value = (torch.randn(1, 1, 704, 64, device=card.device, dtype=card.dtype) for _ in range(3))
        query[..., 0], key[..., 0] = 1.0, -120 * 8.0
        leaf = query.requires_grad_()
        mask = torch.ones(1, 1, 704, 704, dtype=torch.bool, device=card.device).tril()
        layers.attend(leaf, key, value, mask).float().sum().backward()
        count = int((~leaf.grad.isfinite()).sum())
        verdict = {} if on else {"equal": count == 0}  # with it on: seen, not judged, since it is off by default
        yield {"what": f"gradients that are not finite, cuDNN {'on' if on else 'off'}", "count": count, **verdict}
    torch.backends.cuda.enable_cudnn_sdp(False)


def checks(card):
    yield from attention_checks(card)
    if card.on_card:
        yield from cudnn_check(card)
    rows, size, vocabulary = (6, 16, 64) if card.quick else (700, 512, 65024)
    hidden, weight = (torch.randn(n, size, device=card.device) * 0.1 for n in (rows, vocabulary))
    targets = torch.randint(0, vocabulary, (rows,), device=card.device)
    frozen = weight.to(card.dtype)
    yield compared(
        "losses, frozen head",
        lambda x: token_losses(x, frozen, targets),
        lambda x: F.cross_entropy(x @ frozen.float().t(), targets, reduction="none"),
        [hidden],
    )
    yield compared(
        "losses, head that learns",
        lambda x, w: token_losses(x, w, targets),
        lambda x, w: F.cross_entropy(x @ w.t(), targets, reduction="none"),
        [hidden, weight],
    )
    norm = RMSNorm(size, eps=1e-5, device=card.device, dtype=card.dtype)
    yield compared("RMSNorm", norm, lambda x: x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt(), [hidden])
    yield compared("SwiGLU made again", swiglu, lambda x, y: F.silu(x) * y, [hidden, hidden * 2])
    yield from rotations(card)
    yield from dropout(card, hidden.to(card.dtype))
    if importlib.util.find_spec("bitsandbytes") and card.on_card:
        yield from quantised(card)
    else:
        yield {"what": "nf4 was left out: no bitsandbytes, or no card"}


def swiglu(gate, up):
    with made_again() as again:
        return again(torch.mul, again(F.silu, gate), up) * 1


def rotations(card):
    """Against complex numbers; ChatGLM-6B's pairs lie otherwise, which a permutation undoes."""
    x = torch.randn(1, 12, 3, 32, device=card.device)
    frequencies = inverse_frequencies(32, card.device)  # (8,)
    cos, sin = layers.rotary_angles(torch.arange(12, device=card.device)[None], frequencies)  # (1, 12, 8)
    turn = torch.complex(cos, sin)[:, :, None]

    def plain(x):
        pairs = torch.view_as_complex(x[..., :16].float().reshape(1, 12, 3, 8, 2))
        return torch.cat((torch.view_as_real(pairs * turn).flatten(-2), x[..., 16:]), -1)

    tables = [table[:, :, None].to(card.dtype) for table in (cos, sin)]
    yield compared("rotary, glm2 and glm3", lambda x: rotate(x, *tables), plain, [x])

    def plain_glm(x):
        halves = x.unflatten(-1, (2, 2, 8))
        turned = torch.complex(halves[..., 0, :], halves[..., 1, :]) * turn[:, :, :, None]
        return torch.stack((turned.real, turned.imag), -2).flatten(-3)

    both = [table[:, :, None, None].expand(1, 12, 1, 2, 8).to(card.dtype) for table in (cos, sin)]
    yield compared("rotary, glm", lambda x: rotate_glm(x, *both), plain_glm, [x])


def dropout(card, x):
    """The mask of the backward pass is that of the forward pass, and a tenth is dropped, give or take 5 deviations."""
    leaf = torch.ones_like(x).requires_grad_()
    out = Dropout(0.1).train()(leaf)
    out.sum().backward()
    share = (out == 0).float().mean().item()
    equal = torch.equal(leaf.grad, out.detach()) and abs(share - 0.1) < 5 * math.sqrt(0.09 / x.numel())
    yield {"what": "dropout drawn again", "share": share, "equal": bool(equal)}


def quantised(card):
    """A product of nf4 weights against that of the dequantised ones."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(256, 128, bias=False, compute_dtype=card.dtype, quant_type="nf4")
    layer.weight = bnb.nn.Params4bit(torch.randn(128, 256), requires_grad=False, quant_type="nf4")
    layer = layer.to(card.device)
    weight = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    yield compared("nf4", layer, lambda x: x @ weight.t(), [torch.randn(40, 256, device=card.device)])
