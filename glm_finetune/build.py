"""Names and folders -> mode, tokenizer, model with weights. Used by every script and by the tests.

folder = find_model_folder("output/epoch-1-step-100")        # what it is, and where its base is
tokenizer, model = load_model_folder(folder, "bf16", device)
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from glm_finetune.errors import UserError, raise_together, unknown_choice
from glm_finetune.models.network import enable_checkpointing
from glm_finetune.models.original import DTYPES
from glm_finetune.modes import MODE, mode_of, refuse_architecture, refuse_others
from glm_finetune.modes.added import refuse_added
from glm_finetune.modes.identity import fields_of_base, is_adapter_folder
from glm_finetune.record import Prompt, prompt_of, read_record
from glm_finetune.tuning.adapter import load_adapter
from glm_finetune.tuning.ptuning import is_prefix_folder, load_prefix
from glm_finetune.tuning.quantize import Quantized
from glm_finetune.weights import Mapped, fingerprint, read_json, weight_files


def check_base(mode, folder, rope_rule=None, max_len=0):
    """Tokenizer and model configuration of a base folder, without its weights. max_len: tokens it must be able to take.
    Raises UserError if the folder lacks a file, is of another mode, or its tokenizer belongs to another model.
    """
    config = config_of(mode, folder, rope_rule)
    weight_files(folder)
    refuse_others(mode, folder, config.source)
    if max_len > config.max_positions:
        raise too_long(f"--max_len {max_len}", folder, config)
    tokenizer = mode.tokenizer.from_pretrained(folder)
    raise_together(f"{folder}: {problem} belongs to another checkpoint." for problem in _of_another(tokenizer, config))
    return tokenizer, config


def too_long(flag, folder, config):
    """The UserError of more tokens than the base of a configuration was made for. flag: with its value."""
    made = f"{folder} was made for {config.max_positions} tokens (its config.json)"
    return UserError(
        f"{flag}: {made}. Lower it, take a long-context variant, or add --allow_longer: its answers get worse beyond "
        "unless it is trained there."
    )


def _of_another(tokenizer, config):
    """What of a tokenizer is not the model's. Checkpoints pad the vocabulary by a few hundred rows at most."""
    ids, size, file = len(tokenizer), config.vocab_size, tokenizer.model_file
    if not 0.8 * size <= ids <= size:
        yield f"the tokenizer has {ids:,} ids, the model {size:,}: {file}"
    for field in ("bos_token_id", "eos_token_id", "gmask_token_id"):
        if config.source.get(field) not in (None, own := getattr(tokenizer, field)):
            yield f"{field} is {config.source[field]} in config.json and {own} in {file}: the tokenizer"


def config_of(mode, folder, rope_rule=None):
    """The configuration of a base folder. Raises UserError if there is none or it is of another architecture."""
    refuse_architecture(mode, Path(folder) / "config.json", fields_of_base(folder))
    config = mode.config.from_pretrained(folder).stretch(folder, rope_rule, mode.rope_rule)
    if config.source.get("quantization_bit") or (rope_rule and config.rope_ratio == 1):
        raise _not_usable(folder, config, rope_rule)
    return config


def _not_usable(folder, config, rope_rule):
    if bits := config.source.get("quantization_bit"):
        quantised = f"{folder}: quantised to {bits} bits (its config.json)"
        return UserError(f"{quantised}; give the original checkpoint in 16 bit.")
    return UserError(f"--rope_rule {rope_rule}: {folder} has no rope_ratio in its config.json. Leave it out.")


def load_base(mode, folder, place, gradient_checkpointing=False, rope_rule=None):
    """The base model in eval mode, its weights at `place`. Raises UserError for weights that do not fit."""
    rope_rule = config_of(mode, folder, rope_rule).rope_rule
    model = mode.model.from_pretrained(folder, place=place, rope_rule=rope_rule)
    if gradient_checkpointing:
        enable_checkpointing(model)
    return model


@dataclass(frozen=True)
class ModelFolder:
    """What a folder is that holds a model, or a part of one: a base, one trained or merged here, or an adapter.

    adapter: folder of a LoRA adapter or (is_prefix) a P-tuning prefix, or None. is_bare: not made by this project.
    prompt: of its training. rope_rule: asked for, or of its training.
    """

    mode: object
    base: Path
    adapter: Path | None
    prompt: Prompt
    is_bare: bool
    is_prefix: bool
    rope_rule: str | None = None

    def check_base(self, max_len=0):
        """Tokenizer and configuration of its base, see `check_base`; an adapter must not have learnt other tokens."""
        tokenizer, config = check_base(self.mode, self.base, self.rope_rule, max_len)
        if self.adapter:
            refuse_added(tokenizer, self.adapter)
        return tokenizer, config

    def settled_rule(self):
        """The rule of its base's rope_ratio, see `models.rope`; None without one."""
        return config_of(self.mode, self.base, self.rope_rule).rope_rule

    def context(self):
        """Tokens of prompt and answer that the model was made for; a P-tuning prompt of version 1 takes its share."""
        taken = (read_json(self.adapter / "config.json").get("prompt_len") or 0) if self.is_prefix else 0
        return config_of(self.mode, self.base, self.rope_rule).max_positions - taken


def find_model_folder(folder, mode_name=None, base=None, flags=None, force=False, rope_rule=None):
    """Look at a folder (of this project or plain peft) -> ModelFolder.

    mode_name, base: replace what it says. flags: an object with the names of Prompt; what is not None there replaces
    the recorded prompt. force: take a base that is not the one of the training. rope_rule: instead of the training's.
    Raises UserError saying what is missing and which flag gives it, or that the base is another one.
    """
    folder = Path(folder)
    raise_together(unknown_choice("mode", mode_name, tuple(MODE)))
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder.")
    record = read_record(folder)
    is_prefix = record.get("saves") == "prefix" or is_prefix_folder(folder)
    is_adapter = is_prefix or is_adapter_folder(folder)
    base = Path(base or _recorded_base(folder, record)) if is_adapter else folder
    fields = fields_of_base(base)
    mode_name = mode_name or record.get("mode")
    mode = MODE.get(mode_name) if mode_name else mode_of(fields, base.resolve().name)
    if mode is None:
        raise UserError(f"{folder}: which member of the family is it? Give --mode ({', '.join(MODE)}).")
    asked = {name: value for name, value in vars(flags).items() if value is not None} if flags else {}
    prompt, is_known = prompt_of(record, asked)
    if record and not is_known:
        hint = "an earlier version merged it and did not record the prompt of its training"
        print(f"{folder}: {hint}: give --prompt_text where one was used.", file=sys.stderr)
    if is_adapter:
        check_fingerprint(folder, record, base, force)
    is_bare = not record and not is_adapter
    rope_rule = rope_rule or (record.get("flags", {}).get("rope_rule") if is_adapter else None)
    return ModelFolder(mode, base, folder if is_adapter else None, prompt, is_bare, is_prefix, rope_rule)


def check_fingerprint(folder, record, base, force, flag="--ori_model_dir"):
    """Raise UserError if an adapter was trained on other weights: every sum with them would be wrong in silence.
    flag: the one that names the base.
    """
    known = record.get("base_fingerprint")
    if known is None:
        print(f"{folder}: does not say what its base was like; {base} is taken for it.", file=sys.stderr)
    elif known != fingerprint(base):
        problem = f"{folder} was trained on {record['base']}; the weights in {base} are others now"
        if not force:
            raise UserError(f"{problem}. Give that base with {flag}, or --force where it is meant.")
        print(f"{problem}; --force takes them.", file=sys.stderr)


def _recorded_base(folder, record):
    recorded = [record.get("base_absolute"), record.get("base")]
    if (folder / "adapter_config.json").is_file():
        recorded.append(read_json(folder / "adapter_config.json").get("base_model_name_or_path"))
    for path in filter(None, recorded):
        if (Path(path) / "config.json").is_file():
            return path
    place = next(filter(None, recorded), "a recorded place")
    raise UserError(f"{folder}: its base checkpoint is not at {place} any more. Say where it is with --ori_model_dir.")


def load_model_folder(folder, precision, device, bits=None):
    """Tokenizer and model of a ModelFolder, ready to generate. bits: 4 or 8 of the base's weights, else `precision`."""
    (tokenizer, _), given = folder.check_base(), (DTYPES[precision], device)
    place = Quantized(*given, bits) if bits else Mapped(*given)
    model = load_base(folder.mode, folder.base, place, rope_rule=folder.rope_rule)
    if folder.adapter is None:
        return tokenizer, model
    return tokenizer, load_prefix(model, folder.adapter) if folder.is_prefix else load_adapter(model, folder.adapter)
