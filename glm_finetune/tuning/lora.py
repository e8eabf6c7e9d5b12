"""LoRA through peft: inject, save what was trained, load it again."""

import warnings
from collections import Counter
from pathlib import Path

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from glm_finetune.optim import full_shape
from glm_finetune.weights import iter_file, read_json

WEIGHT_FILES = ("adapter_model.safetensors", "adapter_model.bin")


def add_lora(model, rank, alpha, dropout, targets, base_path):
    """Freeze `model` and add LoRA layers. targets: module names, or endings of them after a dot.

    base_path is recorded in adapter_config.json, from where `merge_lora.py` and `predict.py` find the base again.
    Raises ValueError with the names that exist when a target matches nothing.
    """
    check_targets(model, targets)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=list(targets),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=str(base_path),
    )
    model.name_or_path = str(base_path)
    with warnings.catch_warnings(action="ignore", category=FutureWarning):  # peft uses names that transformers renames
        return get_peft_model(model, config)


def check_targets(model, targets):
    """Raise ValueError naming the targets that no layer with a matrix of its own has, and the names that exist.

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
        raise ValueError(
            f"--lora_module_name: no layer is called {', '.join(unmatched)}. Layers that take LoRA: "
            f"{', '.join(linear)}."
        )


def load_adapter(model, folder):
    """Put the adapter in `folder` (peft's layout, also of 2023) on `model`, for prediction.

    Raises ValueError when a file is missing or damaged, or its tensors do not fit the base: of names that are missing
    peft only warns, and those that it does not know it leaves out in silence.
    """
    _check_adapter_config(Path(folder) / "adapter_config.json")
    names = {name for name, _ in iter_file(_adapter_file(folder))}
    try:
        with warnings.catch_warnings(action="ignore", category=FutureWarning):
            model = PeftModel.from_pretrained(model, str(folder), torch_device=str(model.device)).eval()
    except (RuntimeError, ValueError, TypeError) as error:
        raise ValueError(f"{folder}: the adapter does not fit the base model: {str(error)[:400]}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    missing = sorted(expected - names)
    unexpected = sorted(name for name in names - expected if not name.endswith("base_layer.weight"))
    if missing or unexpected:
        raise ValueError(
            f"{folder}: the adapter does not fit the base model: {len(missing)} tensors missing "
            f"{missing[:3]}, {len(unexpected)} unexpected {unexpected[:3]}. Is it of another base?"
        )
    return model


def _adapter_file(folder):
    for name in WEIGHT_FILES:
        if (Path(folder) / name).is_file():
            return Path(folder) / name
    raise ValueError(f"{folder}: no weights of the adapter, expected {' or '.join(WEIGHT_FILES)}.")


def _check_adapter_config(path):
    """Raise ValueError unless it says what a LoRA adapter is: peft would take a default for what is missing."""
    fields = read_json(path)
    if fields.get("peft_type") != "LORA":
        raise ValueError(f"{path}: peft_type is {fields.get('peft_type')!r}; adapters of type LORA are read.")
    for name, kind in (("r", int), ("lora_alpha", (int, float)), ("target_modules", (list, str))):
        if not isinstance(fields.get(name), kind):
            raise ValueError(f"{path}: {name} is {fields.get(name)!r}: the file is damaged, copy it again.")
