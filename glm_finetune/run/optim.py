"""The learning rate as a function of the step, and which parameters decay.

lr_at(step, peak=1e-4, total=100, warmup=10, shape="linear", floor=0.1)
"""

import math

from glm_finetune.weights import full_shape


def num_warmup_steps(warmup_ratio, warmup_steps, total):
    """Steps of the warm-up: `warmup_steps`, or where that is None a share of all, rounded up."""
    return math.ceil(warmup_ratio * total) if warmup_steps is None else warmup_steps


def lr_at(step, peak, total, warmup, shape, floor):
    """Learning rate of optimizer step `step`, from 1 to `total`; without warm-up the first has the peak.

    It rises linearly to `peak` at step `warmup`, then falls to `peak * floor`: linear, cosine (half a period), or not.
    """
    if step < warmup:
        return peak * step / warmup
    if shape == "constant":
        return peak
    first = max(warmup, 1)
    progress = min(1.0, (step - first) / max(1, total - first))
    share = 1 - progress if shape == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return peak * (floor + (1 - floor) * share)


def parameter_groups(model, weight_decay, loraplus_ratio=None):
    """Trainable parameters in groups with `weight_decay` and `lr_ratio`, the factor on the schedule's learning rate.

    Matrices decay, vectors (biases, norms) do not. With LoRA+ (arXiv 2402.12354) the B matrices learn faster by
    `loraplus_ratio`. Empty groups are left out.
    """
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            decay = weight_decay if len(full_shape(parameter)) > 1 else 0.0
            ratio = loraplus_ratio if loraplus_ratio and "lora_B" in name else 1.0
            groups.setdefault((decay, ratio), []).append(parameter)
    keys = sorted(groups, reverse=True)
    return [{"params": groups[key], "weight_decay": key[0], "lr_ratio": key[1]} for key in keys]
