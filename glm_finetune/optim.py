"""The learning rate as a function of the step, and which parameters decay.

lr_at(step, peak=1e-4, total=100, warmup=10, shape="linear", floor=0.1)
"""

import math


def num_warmup_steps(warmup_ratio, total):
    """Steps of the warm-up: a share of all, rounded up."""
    return math.ceil(warmup_ratio * total)


def lr_at(step, peak, total, warmup, shape, floor):
    """Learning rate of optimizer step `step` (from 1 to `total`).

    It rises linearly, is `peak` at step `warmup`, then falls to `peak * floor` at step `total`: linear, cosine (half a
    period), or not at all (constant). Without warm-up the first step has the peak.
    """
    if step < warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    first = max(warmup, 1)
    progress = min(1.0, (step - first) / max(1, total - first))
    share = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * share)


def parameter_groups(model, weight_decay):
    """Trainable parameters in two groups: matrices decay, vectors (biases, norms) do not. Empty groups are left out."""
    trainable = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trainable if len(full_shape(p)) > 1]
    vectors = [p for p in trainable if len(full_shape(p)) <= 1]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def full_shape(parameter):
    """Shape of a parameter, also when ZeRO-3 keeps only a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_size(parameter):
    """Number of elements of a parameter, also when ZeRO-3 keeps only a part of it here."""
    return full_shape(parameter).numel()
