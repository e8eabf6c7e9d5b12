"""LoRA through peft: inject, save what was trained, load it again."""
from peft import LoraConfig, PeftModel, get_peft_model


def add_lora(model, rank, alpha, dropout, targets, base_path):
    """Freeze `model` and add LoRA layers. targets: module names, or endings of them after a dot.

    base_path is recorded in adapter_config.json, from where `merge_lora.py` and `predict.py` find the base again.
    Raises ValueError with the names that exist when a target matches nothing.
    """
    check_targets(model, targets)
    config = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(targets), bias="none",
                        task_type="CAUSAL_LM", base_model_name_or_path=str(base_path))
    model.name_or_path = str(base_path)
    return get_peft_model(model, config)


def check_targets(model, targets):
    """Raise ValueError naming the targets that no linear layer has, and the names that exist."""
    modules = {name: module for name, module in model.named_modules() if name and not list(module.children())}
    linear = sorted({name.rpartition(".")[2] for name, m in modules.items() if getattr(m, "weight", None) is not None
                     and m.weight.dim() == 2})
    unmatched = [t for t in targets if not any(name == t or name.endswith("." + t) for name in modules)]
    if unmatched:
        raise ValueError(f"--lora_module_name: no layer is called {', '.join(unmatched)}. Layers that take LoRA: "
                         f"{', '.join(linear)}.")


def load_adapter(model, folder):
    """Put the adapter in `folder` (peft's layout, also of 2023) on `model`, for prediction.

    Raises ValueError when its tensors do not fit the base.
    """
    try:
        return PeftModel.from_pretrained(model, str(folder)).eval()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: the adapter does not fit the base model: {str(error)[:400]}") from error
