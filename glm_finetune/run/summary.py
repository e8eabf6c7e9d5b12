"""What a run is, in words, before it starts: settings, versions, parameters, steps, and one sample with its targets."""

import dataclasses
import importlib.metadata
import json

import torch

from glm_finetune.data.report import describe_sample
from glm_finetune.record import PACKAGES
from glm_finetune.run.optim import num_warmup_steps
from glm_finetune.tuning import unused_flags
from glm_finetune.weights import full_bytes, full_size


def start_lines(run):
    """The text that train.py prints at the start."""
    config, rows, sampler, train_type = run.config, run.rows, run.sampler, run.train_type
    card = torch.cuda.get_device_name(run.device) if run.device.type == "cuda" else "CPU"
    micro, accumulate = config.per_device_train_batch_size, config.gradient_accumulation_steps
    flags = [(item.name, getattr(config, item.name), item.default) for item in dataclasses.fields(config)]
    shown = (f"{name} {value}" for name, value, default in flags if config.verbose or value != default)
    lines = [
        f"flags       {', '.join(shown)}",
        *[f"deepspeed   {json.dumps(run.ds_config)}"] * config.verbose,
        f"versions    {', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)}",
        f"device      {card}, {run.precision} ({run.why}), world size {sampler.world_size}, {ways(config, run.device)}",
        f"parameters  {describe_parameters(run.engine.module)}",
        f"data        {config.train_path}: {rows.report}",
    ]
    lines += (f"            {hint}" for hint in rows.report.hints())
    if run.eval_rows is not None:
        lines.append(f"evaluation  {config.eval_path}: {run.eval_rows.report}")
    warmup = num_warmup_steps(config.warmup_ratio, config.warmup_steps, run.total_steps)
    unused = unused_flags(train_type, config.given)
    lines += [
        *[f"default     learning_rate {config.learning_rate}, the recipe of {train_type.name}"]
        * ("learning_rate" not in config.given),
        *[f"note        no effect with --train_type {train_type.name}: {', '.join(unused)}"] * bool(unused),
        f"steps       {micro} samples x {accumulate} micro-batches x "
        f"{sampler.world_size} ranks = {sampler.rows_per_step} samples a step; {len(rows):,} samples = "
        f"{sampler.steps_per_epoch:,} steps an epoch; {run.total_steps:,} steps in all, {warmup:,} of warm-up",
        f"sample      targets between ⟦ and ⟧:\n{describe_sample(rows[0], run.tokenizer)}",
        *[f"resumed from {run.resumed_from}: {run.progress}"] * bool(run.resumed_from),
    ]
    return "\n".join(lines)


def ways(config, device):
    """Which of the ways to the same numbers are taken, in words."""
    layers = "compiled" if config.compile else "lean" if config.lean else "plain"
    layers += " checkpointed layers" if config.gradient_checkpointing else " layers"
    return layers if device.type == "cpu" else f"{layers}, attention {_kernels(config, device)}"


def _kernels(config, card):
    has_flash = torch.cuda.get_device_capability(card)[0] >= 8
    kernels = ["cuDNN's"] * config.cudnn_attention + (["flash"] if has_flash else ["plain (the card has no flash)"])
    return " or ".join(kernels)


def describe_parameters(model):
    """How many parameters there are and learn, and what they take on all ranks together with their optimizer state."""
    groups = ([p for p in model.parameters() if p.requires_grad is learns] for learns in (True, False))
    (learn, mib), (still, frozen) = ((sum(map(full_size, g)), sum(map(full_bytes, g)) / 2**20) for g in groups)
    share, state = 100 * learn / (learn + still), f"with fp32 masters and moments {mib + learn * 12 / 2**20:,.1f} MiB"
    learns = f"{learn:,} learn ({share:.2f}%), {mib:,.1f} MiB, {state}"
    return f"{learn + still:,} in all; {learns}; frozen {frozen:,.1f} MiB"
