"""The files of a LoRA adapter, in peft's layout: written after training, put on a base again. What learns: `lora`.

tensors, settings = exported(model, weights)          # adapter_model.safetensors, adapter_config.json
model = load_adapter(base, "output/epoch-1-step-100")
"""

import dataclasses
import math
import warnings
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model_state_dict

from glm_finetune.errors import UserError
from glm_finetune.tuning.lora import ALL_LINEAR
from glm_finetune.weights import iter_file, read_json

# Of adapter_config.json: what makes an adapter that the flags of a training cannot say.
NOT_TRAINED = ("rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices", "layer_replication")
WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def exported(model, weights):
    """(tensors, LoraConfig) of an adapter for the base as it is on disk. weights: {name: whole tensor} of what learns.

    PiSSA's begins at B0 A0 and not at 0: B A - B0 A0 is an ordinary adapter of twice the rank.
    """
    tensors = get_peft_model_state_dict(model, state_dict=weights)
    config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    return _without_start(tensors, config, model.initial_lora) if model.initial_lora else (tensors, config)


def _without_start(tensors, config, start):
    """B A - B0 A0 as one adapter. start: {name: tensor} of A0 and B0."""
    for name, first in start.items():
        if "lora_A" in name:
            tensors[name] = torch.cat((tensors[name], first.to(tensors[name].dtype)), 0)  # (2R, in)
        elif "lora_B" in name:
            tensors[name] = torch.cat((tensors[name], -first.to(tensors[name].dtype)), 1)  # (out, 2R)
    alpha = 2 * config.lora_alpha if not config.use_rslora else math.sqrt(2) * config.lora_alpha
    return tensors, dataclasses.replace(config, r=2 * config.r, lora_alpha=alpha, init_lora_weights=True)


def load_adapter(model, folder, is_empty=False):
    """Put the adapter in `folder` (peft's layout, also of 2023) on `model`, for prediction.

    is_empty: the model has no values (`convert.proof.empty_model`), and what learnt gets its own dtype.

    Raises UserError when a file is missing or damaged, or its tensors do not fit the base: of names that are missing
    peft only warns, and those that it does not know it leaves out in silence.
    """
    adapter_fields(folder)
    names = {name for name, _ in iter_file(adapter_file(folder))}
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            place = dict(torch_device=str(model.device), low_cpu_mem_usage=is_empty)
            model = PeftModel.from_pretrained(model, str(folder), **place).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: the adapter does not fit the base model: {str(error)[:400]}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(expected - names)
    unexpected = sorted(name for name in names - expected if not name.endswith("base_layer.weight"))
    if missing or unexpected:
        counts = f"{len(missing)} tensors missing {missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}"
        raise UserError(f"{folder}: the adapter does not fit the base model: {counts}. Is it of another base?")
    return model


def adapter_file(folder):
    """Path of the weights of an adapter. Raises UserError if there are none."""
    files = [path for name in WEIGHT_FILES if (path := Path(folder) / name).is_file()]
    if not files:
        raise UserError(f"{folder}: no weights of the adapter, expected {' or '.join(WEIGHT_FILES)}.")
    return files[0]


def adapter_fields(folder):
    """What adapter_config.json says. Raises UserError unless that is a LoRA adapter: peft would take a default for what
    is missing.
    """
    path = Path(folder) / "adapter_config.json"
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {fields.get('peft_type')!r}; adapters of type LORA are read.")
    for name, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not isinstance(fields.get(name), kind):
            raise UserError(f"{path}: {name} is {fields.get(name)!r}: the file is damaged, copy it again.")
    return fields


def adapter_sizes(folder):
    """{flag: value} of what shapes an adapter or scales it. Raises UserError for one that cannot be trained here."""
    fields = adapter_fields(folder)
    others = [f"{name} {fields[name]}" for name in NOT_TRAINED if fields.get(name)]
    variants = [name for name in ("dora", "rslora") if fields.get(f"use_{name}")]
    start = fields.get("init_lora_weights", True)
    others += [f"init_lora_weights {start}"] * str(start).startswith(("pissa", "olora", "corda", "loftq"))
    if others := others + [f"use_{name}" for name in variants[1:]]:
        raise UserError(f"--init_from {folder}: an adapter with {', '.join(others)} cannot be trained further here.")
    targets = fields["target_modules"]
    sizes = {"lora_dim": fields["r"], "lora_alpha": fields["lora_alpha"], "lora_variant": [*variants, "lora"][0]}
    if not isinstance(targets, str) or targets == ALL_LINEAR:  # else a pattern: what it matches is seen in the tensors
        sizes["lora_module_name"] = targets if isinstance(targets, str) else ",".join(sorted(targets))
    return {**sizes, "modules_to_save": ",".join(sorted(fields.get("modules_to_save") or ())) or None}
