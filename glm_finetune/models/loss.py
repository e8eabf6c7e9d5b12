"""Token cross-entropy over a large vocabulary: fp32, only where there is a target, in chunks of rows.

A 65,024-word vocabulary makes logits the largest tensor of a step. Here no more than MAX_LOGITS_BYTES of fp32 logits
are alive at a time, and none are kept for the backward pass: each chunk's gradient is formed while its logits exist.

    loss = token_loss_sum(hidden, weight, targets) / num_targets
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


class _TokenLossSum(torch.autograd.Function):
    """Sum of -log softmax(hidden @ weight.T)[target]; d loss / d logits = softmax - one_hot, formed chunk by chunk."""

    @staticmethod
    def forward(ctx, hidden, weight, targets):
        need_hidden, need_weight = ctx.needs_input_grad[0], ctx.needs_input_grad[1]
        loss = hidden.new_zeros((), dtype=torch.float32)
        grad_hidden = torch.zeros_like(hidden) if need_hidden else None
        rows = chunk_rows(weight.shape[0])
        # Summing chunks in 16 bit would round once a chunk, so several chunks are summed in fp32.
        sum_dtype = torch.float32 if hidden.shape[0] > rows else weight.dtype
        grad_weight = torch.zeros_like(weight, dtype=sum_dtype) if need_weight else None
        for start in range(0, hidden.shape[0], rows):
            part, target = hidden[start : start + rows], targets[start : start + rows, None]  # (N, D), (N, 1)
            logits = (part @ weight.t()).float()  # (N, V) fp32, the largest tensor; from here on changed in place
            top = logits.amax(-1, keepdim=True)  # (N, 1)
            target_logit = logits.gather(1, target) - top
            total = logits.sub_(top).exp_().sum(-1, keepdim=True)  # (N, 1)
            loss += (total.log() - target_logit).sum()
            if not (need_hidden or need_weight):
                continue
            grad = logits.div_(total)  # (N, V): softmax, in the memory of the logits
            grad.scatter_add_(1, target, grad.new_full(target.shape, -1.0))
            grad = grad.to(weight.dtype)
            if need_hidden:
                grad_hidden[start : start + rows] = grad @ weight
            if need_weight:
                grad_weight += grad.t() @ part  # (V, D)
        ctx.save_for_backward(grad_hidden, grad_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        grad_hidden, grad_weight = ctx.saved_tensors
        if grad_hidden is not None:
            grad_hidden = grad_hidden * grad_loss.to(grad_hidden.dtype)
        if grad_weight is not None:
            grad_weight = grad_weight.mul_(grad_loss.to(grad_weight.dtype)).to(ctx.weight_dtype)
        return grad_hidden, grad_weight, None


def token_loss_sum(hidden, weight, targets):
    """Sum of the cross-entropies of N target tokens, fp32 scalar.

    hidden: (N, D); weight: (V, D), same dtype; targets: (N,) int64 in [0, V). N may be 0: the loss is 0 with a
    gradient.
    """
    return _TokenLossSum.apply(hidden, weight, targets)


def wrapped_head_loss_sum(hidden, head, targets):
    """The same for a head that is more than a matrix (LoRA on the output layer): any callable (N, D) -> (N, V).

    Each chunk is computed again in the backward pass, which costs one more product than `token_loss_sum`.
    """

    def chunk_loss(part, target):
        return F.cross_entropy(head(part).float(), target, reduction="sum")

    rows = chunk_rows(full_shape(head.weight)[0])
    losses = [
        checkpoint(chunk_loss, part, target, use_reentrant=False)
        for part, target in zip(hidden.split(rows), targets.split(rows))
    ]
    return torch.stack(losses).sum() if losses else hidden.float().sum() * 0.0


def target_index(labels):
    """Where next-token prediction has a target. labels: (B, T) int64 -> (N,) int64 indices into (B * T).

    Position t of a row is listed when labels[row, t + 1] is a target. On a GPU this waits for the device (N must be
    known), so the collate function calls it on the CPU.
    """
    return (F.pad(labels[:, 1:], (0, 1), value=IGNORE) != IGNORE).flatten().nonzero()[:, 0]
