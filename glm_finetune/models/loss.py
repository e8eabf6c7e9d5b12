"""Token cross-entropy over a large vocabulary: fp32, only where there is a target, in chunks of rows.

A 65,024-word vocabulary makes logits the largest tensor of a step. Here no more than MAX_LOGITS_BYTES of fp32 logits
are alive at a time, and none are kept for the backward pass. What a token's loss weighs is decided outside:

    losses = token_losses(hidden, weight, targets)      # (N,) fp32
    (losses.sum() / num_targets).backward()
"""

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from glm_finetune.weights import full_shape

IGNORE = -100  # label of a position that is not a target
MAX_LOGITS_BYTES = 128 * 2**20  # bound on one chunk's (rows, V) fp32 logits


def chunk_rows(vocab_size):
    """Rows of a chunk such that (rows, V) fp32 stays within MAX_LOGITS_BYTES."""
    return max(1, MAX_LOGITS_BYTES // (4 * vocab_size))


def _chunks(weight, *tensors):
    """Tensors of N rows in step with each other, `chunk_rows` at a time."""
    return zip(*(tensor.split(chunk_rows(weight.shape[0])) for tensor in tensors))


def _losses_and_gradient(hidden, weight, targets):
    """(n,) losses, and d losses / d logits (n, V) fp32 = softmax - one_hot, in the memory of the logits."""
    target = targets[:, None]
    logits = (hidden @ weight.t()).float()  # (n, V) fp32, the largest tensor; from here on changed in place
    top = logits.amax(-1, keepdim=True)  # (n, 1)
    target_logit = logits.gather(1, target) - top
    total = logits.sub_(top).exp_().sum(-1, keepdim=True)  # (n, 1)
    gradient = logits.div_(total)
    return (total.log() - target_logit)[:, 0], gradient.scatter_add_(1, target, gradient.new_full(target.shape, -1.0))


class _TokenLosses(torch.autograd.Function):
    """-log softmax(hidden @ weight.T)[target] of each row.

    A frozen head: d loss / d hidden is formed while a chunk's logits exist, since a row's does not depend on what the
    other losses weigh. One that learns: its gradient is a sum over rows, each with its loss's weight, which is known in
    the backward pass only; there the logits are computed once more.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        losses, grads, learns = [], [], ctx.needs_input_grad[1]
        for part, target in _chunks(weight, hidden, targets):
            loss, gradient = _losses_and_gradient(part, weight, target)
            losses.append(loss)
            if ctx.needs_input_grad[0] and not learns:
                grads.append(gradient.to(weight.dtype) @ weight)  # (n, D)
        ctx.save_for_backward(*((hidden, weight, targets) if learns else (torch.cat(grads),) if grads else ()))
        return torch.cat(losses)

    @staticmethod
    def backward(ctx, grad_losses):
        """grad_losses: (N,) fp32, what each token's loss weighs."""
        if ctx.needs_input_grad[1]:
            return *_gradients(*ctx.saved_tensors, grad_losses[:, None], ctx.needs_input_grad[0]), None
        (grad_hidden,) = ctx.saved_tensors
        return grad_hidden * grad_losses[:, None].to(grad_hidden.dtype), None, None


def _gradients(hidden, weight, targets, scale, needs_hidden):
    """Gradients of hidden (or None) and of a weight that learns. scale: (N, 1) fp32, what each token's loss weighs."""
    # Summing chunks in 16 bit would round once a chunk, so several chunks are summed in fp32.
    sum_dtype = torch.float32 if len(hidden) > chunk_rows(weight.shape[0]) else weight.dtype
    grads, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=sum_dtype)
    for part, target, part_scale, part_grads in _chunks(weight, hidden, targets, scale, grads):
        _, gradient = _losses_and_gradient(part, weight, target)  # (n, V)
        if needs_hidden:
            part_grads.copy_(gradient.to(weight.dtype) @ weight * part_scale.to(hidden.dtype))
        grad_weight += gradient.mul_(part_scale).to(weight.dtype).t() @ part  # (V, D)
    return grads if needs_hidden else None, grad_weight.to(weight.dtype)


def token_losses(hidden, weight, targets):
    """Cross-entropy of each of N target tokens, (N,) fp32. N may be 0: a gradient flows all the same, of zeros.

    hidden: (N, D); weight: (V, D), same dtype; targets: (N,) int64 in [0, V).
    """
    return _TokenLosses.apply(hidden, weight, targets)


def wrapped_head_losses(hidden, head, targets):
    """The same for a head that is more than a matrix (LoRA on the output layer): any callable (N, D) -> (N, V).

    Each chunk is computed again in the backward pass, which costs one more product than `token_losses`.
    """

    def chunk_losses(part, target):
        return F.cross_entropy(head(part).float(), target, reduction="none")

    rows = chunk_rows(full_shape(head.weight)[0])
    parts = zip(hidden.split(rows), targets.split(rows))
    return torch.cat([checkpoint(chunk_losses, part, target, use_reentrant=False) for part, target in parts])


def target_index(labels):
    """Where next-token prediction has a target. labels: (B, T) int64 -> (N,) int64 indices into (B * T).

    Position t of a row is listed when labels[row, t + 1] is a target. On a GPU this waits for the device (N must be
    known), so the collate function calls it on the CPU.
    """
    # labels of one row  -100 -100 7 8: positions 1 and 2 predict them -> [1, 2]. A row's first label has no position
    # before it and never counts.
    return (F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE).flatten().nonzero()[:, 0]
