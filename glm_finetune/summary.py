"""What a run is, in words, before it starts: settings, versions, parameters, steps, and one sample as the model
sees it.
"""

import dataclasses
import importlib.metadata
import json

import torch

from glm_finetune.checkpoint import PACKAGES
from glm_finetune.data.dataset import describe_sample
from glm_finetune.optim import full_size, num_warmup_steps


def start_lines(config, ds_config, model, rows, eval_rows, tokenizer, sampler, total_steps, device, precision):
    """The text that train.py prints at the start. rows, eval_rows: data sets with a `report`."""
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    sizes = [(full_size(p), p.requires_grad) for p in model.parameters()]
    total, trainable = sum(n for n, _ in sizes), sum(n for n, learns in sizes if learns)
    per_step = (
        f"{config.per_device_train_batch_size} samples x {config.gradient_accumulation_steps} micro-batches x "
        f"{sampler.world_size} ranks"
    )
    flags = {name: value for name, value in dataclasses.asdict(config).items() if value is not None}
    lines = [
        f"flags       {json.dumps(flags, ensure_ascii=False)}",
        f"deepspeed   {json.dumps(ds_config)}",
        f"versions    {', '.join(f'{name} {importlib.metadata.version(name)}' for name in PACKAGES)}",
        f"device      {card}, {precision}, world size {sampler.world_size}",
        f"parameters  {total:,}, of which {trainable:,} learn ({100 * trainable / total:.2f}%)",
        f"data        {config.train_path}: {rows.report}",
    ]
    lines += [f"            {hint}" for hint in rows.report.hints()]
    if eval_rows is not None:
        lines.append(f"evaluation  {config.eval_path}: {eval_rows.report}")
    warmup = num_warmup_steps(config.warmup_ratio, total_steps)
    lines += [
        f"steps       {per_step} = {sampler.rows_per_step} samples a step; {len(rows):,} samples = "
        f"{sampler.steps_per_epoch:,} steps an epoch; {total_steps:,} steps in all, {warmup:,} of warm-up",
        f"sample      targets between ⟦ and ⟧:\n{describe_sample(rows[0], tokenizer)}",
    ]
    return "\n".join(lines)
