"""LoRA and its variants through peft: inject, save what was trained, load it again."""

import dataclasses
import math
import warnings
from collections import Counter
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from torch import nn

from glm_finetune.errors import UserError
from glm_finetune.weights import full_shape, iter_file, read_json

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
ALL_LINEAR = "all-linear"
VARIANT = {
    "lora": {},
    "dora": {"use_dora": True},  # arXiv 2402.09353
    "rslora": {"use_rslora": True},  # arXiv 2312.03732: the scale is alpha / sqrt(rank)
    "pissa": {"init_lora_weights": "pissa_niter_16"},  # arXiv 2404.02948: begins with the largest singular values
}


def add_lora(model, rank, alpha, dropout, targets, base_path, variant="lora", modules_to_save=()):
    """Freeze `model` and add LoRA layers. targets: module names, endings of them after a dot, or `ALL_LINEAR`.

    modules_to_save: names of modules that are trained whole beside it. variant: a key of VARIANT.
    base_path is recorded in adapter_config.json, from where `merge_lora.py` and `predict.py` find the base again.
    Raises UserError with the names that exist when a target matches nothing.
    """
    targets = all_linear(model) if list(targets) == [ALL_LINEAR] else targets
    check_targets(model, targets)
    if variant == "pissa":
        check_rank(model, rank, targets)
    check_modules(model, modules_to_save)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        modules_to_save=list(modules_to_save) or None,
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base_path),
        **VARIANT[variant],
    )
    model.name_or_path = str(base_path)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft uses names that transformers renames
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    model.initial_lora = initial_factors(model) if variant == "pissa" else None
    return model


def check_rank(model, rank, targets):
    """Raise UserError if a target has fewer singular values than `rank`, with which PiSSA would begin."""
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight")
        most = min(full_shape(weight))
        if name.endswith(".weight") and layer.endswith(tuple(targets)) and rank > most:
            raise UserError(
                f"--lora_dim {rank}: {layer} has {most} singular values; --lora_variant pissa takes no more."
            )


def all_linear(model):
    """Names of all kinds of linear layers except the output layer."""
    head = model.get_output_embeddings()
    found = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    return sorted(found)


def check_modules(model, names):
    """Raise UserError for a module to save that does not exist or shares its weight with another."""
    modules = dict(model.named_modules())
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for wanted in names:
        found = [module for name, module in modules.items() if name == wanted or name.endswith("." + wanted)]
        if not found:
            shown = sorted({name.rpartition(".")[2] for name in modules if not name.rpartition(".")[2].isdecimal()})
            raise UserError(f"--modules_to_save: no module is called {wanted}. There are: {', '.join(shown[1:])}.")
        if any(uses[id(weight)] > 1 for module in found for weight in module.parameters()):
            raise UserError(
                f"--modules_to_save: {wanted} shares its weight with another module of this model (embedding and "
                "output layer are one matrix in ChatGLM-6B): it cannot be trained by itself."
            )


def initial_factors(model):
    """{name: CPU copy} of the LoRA matrices as they begin; PiSSA has taken their product out of the base."""
    return {name: tensor.detach().cpu().clone() for name, tensor in get_peft_model_state_dict(model).items()}


def exported(model, weights):
    """(tensors, LoraConfig) of an adapter for the base as it is on disk. weights: {name: whole tensor} of what learns.

    PiSSA's begins at B0 A0 and not at 0: B A - B0 A0 is an ordinary adapter of twice the rank.
    """
    tensors = get_peft_model_state_dict(model, state_dict=weights)
    config = dataclasses.replace(model.peft_config["default"], inference_mode=True)
    if not model.initial_lora:
        return tensors, config
    for name, first in model.initial_lora.items():
        if "lora_A" in name:
            tensors[name] = torch.cat((tensors[name], first.to(tensors[name].dtype)), 0)  # (2R, in)
        elif "lora_B" in name:
            tensors[name] = torch.cat((tensors[name], -first.to(tensors[name].dtype)), 1)  # (out, 2R)
    alpha = 2 * config.lora_alpha if not config.use_rslora else math.sqrt(2) * config.lora_alpha
    return tensors, dataclasses.replace(config, r=2 * config.r, lora_alpha=alpha, init_lora_weights=True)


def check_targets(model, targets):
    """Raise UserError naming the targets that no layer with a matrix of its own has, and the names that exist.

    Layers that share one matrix (ChatGLM-6B's head and embedding) are none: an update of one would be the other's too.
    """
    named = list(model.named_parameters(remove_duplicate=False))
    uses = Counter(id(weight) for _, weight in named)
    matrices = [
        name.removesuffix(".weight")
        for name, weight in named
        if name.endswith(".weight") and len(full_shape(weight)) == 2 and uses[id(weight)] == 1
    ]
    linear = sorted({name.rpartition(".")[2] for name in matrices})
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in matrices)]
    if unmatched:
        if ALL_LINEAR in unmatched:
            raise UserError(f"--lora_module_name: {ALL_LINEAR} stands alone; leave the other names out.")
        raise UserError(
            f"--lora_module_name: no layer is called {', '.join(unmatched)}. Layers that take LoRA: "
            f"{', '.join(linear)}."
        )


def load_adapter(model, folder):
    """Put the adapter in `folder` (peft's layout, also of 2023) on `model`, for prediction.

    Raises UserError when a file is missing or damaged, or its tensors do not fit the base: of names that are missing
    peft only warns, and those that it does not know it leaves out in silence.
    """
    _check_adapter_config(Path(folder) / "adapter_config.json")
    names = {name for name, _ in iter_file(_adapter_file(folder))}
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device)).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(f"{folder}: the adapter does not fit the base model: {str(error)[:400]}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(expected - names)
    unexpected = sorted(name for name in names - expected if not name.endswith("base_layer.weight"))
    if missing or unexpected:
        raise UserError(
            f"{folder}: the adapter does not fit the base model: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}. Is it of another base?"
        )
    return model


def _adapter_file(folder):
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise UserError(f"{folder}: no weights of the adapter, expected {' or '.join(WEIGHT_FILES)}.")


def _check_adapter_config(path):
    """Raise UserError unless it says what a LoRA adapter is: peft would take a default for what is missing."""
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise UserError(f"{path}: peft_type is {fields.get('peft_type')!r}; adapters of type LORA are read.")
    for name, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not isinstance(fields.get(name), kind):
            raise UserError(f"{path}: {name} is {fields.get(name)!r}: the file is damaged, copy it again.")
