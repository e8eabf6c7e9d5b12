"""Names and folders -> mode, tokenizer, model with weights. Used by every script and by the tests.

source = find_source("output/epoch-1-step-100")        # what a folder is, and where its base is
tokenizer, model = load_source(source, torch.bfloat16, device)
"""

import re
from dataclasses import dataclass
from pathlib import Path

from glm_finetune.errors import UserError, raise_together, unknown_choice
from glm_finetune.models.original import DTYPES
from glm_finetune.modes import MODE
from glm_finetune.tuning.lora import load_adapter
from glm_finetune.tuning.ptuning import is_prefix_folder, load_prefix
from glm_finetune.weights import OnDevice, read_json, weight_files


def check_base(mode, folder, max_len=0):
    """Tokenizer and model configuration of a base folder, without its weights. max_len: tokens it must be able to take.

    Raises UserError if the folder lacks a file, is of another mode, or its tokenizer belongs to another model.
    """
    config = mode.config.from_pretrained(folder)
    weight_files(folder)
    if config.source.get("quantization_bit"):
        raise UserError(
            f"{folder}: quantised to {config.source['quantization_bit']} bits (its config.json); give the "
            "original checkpoint in 16 bit."
        )
    if config.source.get("rope_ratio", 1) != 1:
        raise UserError(
            f"{folder}: rope_ratio is {config.source['rope_ratio']} in its config.json; models with stretched "
            "positions (the 32k variants) are not supported."
        )
    mode.refuse_others(folder, config.source)
    if max_len > config.max_positions:
        raise UserError(f"--max_len {max_len}: {folder} was made for {config.max_positions} tokens (its config.json).")
    tokenizer = mode.tokenizer.from_pretrained(folder)
    # Checkpoints pad the vocabulary by a few hundred rows at most; a tokenizer far smaller than that is another
    # model's.
    if not 0.8 * config.vocab_size <= len(tokenizer) <= config.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {len(tokenizer):,} ids, the model {config.vocab_size:,}: "
            f"{tokenizer.model_file} belongs to another checkpoint."
        )
    for field in ("bos_token_id", "eos_token_id", "gmask_token_id"):
        expected = config.source.get(field)
        if expected is not None and expected != getattr(tokenizer, field):
            raise UserError(
                f"{folder}: {field} is {expected} in config.json and {getattr(tokenizer, field)} in "
                f"{tokenizer.model_file}: the tokenizer belongs to another checkpoint."
            )
    return tokenizer, config


def load_base(mode, folder, place, gradient_checkpointing=False):
    """The base model, its weights where `choose_place` says, in eval mode. Raises UserError for weights that do not
    fit."""
    model = mode.model.from_pretrained(folder, place=place)
    if gradient_checkpointing:
        model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        model.disable_input_require_grads()  # it would carry the backward pass below the lowest layer that learns
    return model


@dataclass(frozen=True)
class Source:
    """What a model folder is.

    prompt_text: that of its training, or None.
    adapter: folder of a LoRA adapter or (is_prefix) a P-tuning prefix, or None. template: "train" or "official".
    is_bare: not made by this project.
    """

    mode: object
    base: Path
    adapter: Path | None
    template: str
    is_bare: bool
    is_prefix: bool
    prompt_text: str | None = None


def find_source(folder, mode_name=None, base=None, template=None):
    """Look at a folder: a base checkpoint, one trained or merged here, or an adapter (of this project or plain peft).

    mode_name, base, template replace what the folder says. Raises UserError saying what is missing and which flag
    gives it.
    """
    folder = Path(folder)
    raise_together(unknown_choice("mode", mode_name, tuple(MODE)))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    record = read_json(folder / "train_config.json") if (folder / "train_config.json").is_file() else {}
    is_prefix = record.get("saves") == "prefix" or is_prefix_folder(folder)
    is_adapter = is_prefix or (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file()
    base = Path(base or _recorded_base(folder, record)) if is_adapter else folder
    mode = MODE.get(mode_name or record.get("mode") or _mode_of(base))
    if mode is None:
        raise UserError(f"{folder}: which member of the family is it? Give --mode ({', '.join(MODE)}).")
    return Source(
        mode,
        base,
        folder if is_adapter else None,
        template or record.get("template", "official"),
        is_bare=not record and not is_adapter,
        is_prefix=is_prefix,
        prompt_text=record.get("flags", {}).get("prompt_text"),
    )


def _recorded_base(folder, record):
    recorded = [record.get("base_absolute"), record.get("base")]
    if (folder / "adapter_config.json").is_file():
        recorded.append(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    for path in filter(None, recorded):
        if (Path(path) / "config.json").is_file():
            return path
    raise UserError(
        f"{folder}: its base checkpoint is not at {next(filter(None, recorded), 'a recorded place')} any more. "
        "Say where it is with --ori_model_dir."
    )


def _mode_of(base):
    """The mode of a bare checkpoint, from the fields and the name in its config.json; None if they leave it open."""
    if not (base / "config.json").is_file():
        inside = sorted(path.name for path in base.glob("*/*config.json") for path in [path.parent])
        raise UserError(
            f"{base}: has no config.json; expected a checkpoint or an adapter (adapter_config.json)."
            + (f" Give one of the folders in it: {', '.join(dict.fromkeys(inside))}." if inside else "")
        )
    fields = read_json(base / "config.json")
    if all(name in fields for name in MODE["glm"].config.required_fields):
        return "glm"
    name = f"{fields.get('_name_or_path', '')} {base.resolve().name}"
    match = re.search(r"chatglm([23])|(codegeex2)", name, re.IGNORECASE)
    return match and ("glm2" if match[2] else f"glm{match[1]}")


def load_source(source, precision, device):
    """Tokenizer and model of a `find_source` result, ready to generate."""
    tokenizer, _ = check_base(source.mode, source.base)
    model = load_base(source.mode, source.base, OnDevice(DTYPES[precision], device))
    if source.adapter is None:
        return tokenizer, model
    return tokenizer, load_prefix(model, source.adapter) if source.is_prefix else load_adapter(model, source.adapter)
