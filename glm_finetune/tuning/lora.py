"""LoRA and its variants through peft: which layers get it, with what settings. Its files: `adapter`."""

import warnings
from collections import Counter

from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from glm_finetune.errors import UserError, did_you_mean
from glm_finetune.tuning.fused import make_lean
from glm_finetune.weights import full_shape

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
    """
    targets = all_linear(model) if list(targets) == [ALL_LINEAR] else list(targets)
    if variant == "pissa":
        check_rank(model, rank, targets)
    if modules_to_save:
        check_modules(model, modules_to_save)
    sizes = {"r": rank, "lora_alpha": alpha, "lora_dropout": dropout, "bias": "none", "task_type": "CAUSAL_LM"}
    layers = {"target_modules": targets, "modules_to_save": list(modules_to_save) or None}
    config = LoraConfig(**sizes, **layers, base_model_name_or_path=str(base_path), **VARIANT[variant])
    model.name_or_path = str(base_path)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft uses names that transformers renames
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    make_lean(model, dropout)
    factors = get_peft_model_state_dict(model) if variant == "pissa" else {}  # as they begin, see adapter.exported
    model.initial_lora = {name: tensor.detach().cpu().clone() for name, tensor in factors.items()}
    return model


def check_rank(model, rank, targets):
    """Raise UserError if a target has fewer singular values than `rank`, with which PiSSA would begin."""
    for name, weight in model.named_parameters():
        layer = name.removesuffix(".weight")
        most = min(full_shape(weight))
        if name.endswith(".weight") and layer.endswith(tuple(targets)) and rank > most:
            problem = f"{layer} has {most} singular values; --lora_variant pissa takes no more."
            raise UserError(f"--lora_dim {rank}: {problem}")


def all_linear(model):
    """Names of all kinds of linear layers except the output layer."""
    head = model.get_output_embeddings()
    linear = (name for name, part in model.named_modules() if isinstance(part, nn.Linear) and part is not head)
    return sorted(last_names(linear))


def last_names(names):
    """{"query_key_value", ...} of names like transformer.encoder.layers.0.self_attention.query_key_value."""
    return {name.rpartition(".")[2] for name in names}


def check_modules(model, names):
    """Raise UserError for a module to save that does not exist or shares its weight with another."""
    modules = dict(model.named_modules())
    uses = Counter(id(weight) for _, weight in model.named_parameters(remove_duplicate=False))
    for wanted in names:
        found = [module for name, module in modules.items() if name == wanted or name.endswith("." + wanted)]
        if not found:
            shown = sorted(name for name in last_names(modules) if not name.isdecimal())
            there = f"There are: {', '.join(shown[1:])}.{did_you_mean(wanted, shown)}"
            raise UserError(f"--modules_to_save: no module is called {wanted}. {there}")
        if any(uses[id(weight)] > 1 for module in found for weight in module.parameters()):
            raise UserError(
                f"--modules_to_save: {wanted} shares its weight with another module of this model (embedding and "
                "output layer are one matrix in ChatGLM-6B): it cannot be trained by itself."
            )


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
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in matrices)]
    if unmatched:
        raise _no_layer(unmatched, matrices)


def _no_layer(unmatched, matrices):
    if ALL_LINEAR in unmatched:
        return UserError(f"--lora_module_name: {ALL_LINEAR} stands alone; leave the other names out.")
    linear, unknown = sorted(last_names(matrices)), ", ".join(unmatched)
    there = f"Layers that take LoRA: {', '.join(linear)}.{did_you_mean(unmatched[0], linear)}"
    return UserError(f"--lora_module_name: no layer is called {unknown}. {there}")
