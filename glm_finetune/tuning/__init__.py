"""The registry of train types: what of the model learns. A new one is a file here and a line below.

Dtype policy, the same for all: weights are held in the compute dtype (--precision), quantised ones as their format
says; for every weight that learns the optimizer has an fp32 master copy and fp32 moments. The encoder of a prefix is
itself fp32 and computes in fp32. With fp16, whose loss scaler needs fp16 weights, it has fp32 masters; version 2
computes in fp32 all the same, the LSTM of version 1 in fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.tuning.lora import ALL_LINEAR, VARIANT, add_lora, check_targets
from glm_finetune.tuning.ptuning import add_prefix, add_prompt
from glm_finetune.tuning.select import last_layers, train_named

LORA_FLAGS = ("lora_dim", "lora_alpha", "lora_dropout", "lora_module_name", "lora_variant")
LORA_FLAGS += ("loraplus_ratio", "modules_to_save")
PTUNING_FLAGS = ("pre_seq_len", "prefix_projection", "prefix_dropout", "ptuning_version")


@dataclass(frozen=True)
class TrainType:
    """apply(model, config, mode) -> the model with what learns set.

    flags: those that concern this type only. learning_rate(config) -> the default, that of the recipe.
    saves: "weights" (all), "adapter" (peft's files) or "prefix" (what learns, under its own names).
    fp32: what learns is held in fp32 whatever the compute dtype. quantizes: the base is quantised as it is read.
    """

    name: str
    apply: Callable
    flags: tuple
    learning_rate: Callable
    saves: str = "weights"
    fp32: bool = False
    quantizes: bool = False

    @property
    def identity(self):
        """The flags that a run cannot change when it is resumed."""
        return [name for name in self.flags if not name.endswith("dropout")]


def names_in(text):
    """A comma list -> its non-empty parts."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _lora(model, config, mode):
    names, others = names_in(config.lora_module_name), names_in(config.modules_to_save)
    if names != [ALL_LINEAR] and names:
        check_targets(model, names)
    sizes = config.lora_dim, config.lora_alpha, config.lora_dropout
    return add_lora(model, *sizes, names or mode.lora_targets, config.model_name_or_path, config.lora_variant, others)


def _freeze(model, config, mode):
    parts = names_in(config.freeze_module_name or "layers.27.")
    return train_named(model, last_layers(model, config.freeze_last) if config.freeze_last else parts)


def _ptuning(model, config, mode):
    sizes = config.pre_seq_len, config.prefix_projection, config.prefix_dropout
    max_len = 0 if config.allow_longer else config.max_len
    return add_prompt(model, *sizes, max_len) if config.ptuning_version == 1 else add_prefix(model, *sizes)


def _ptuning_rate(config):
    """The official recipe trains keys and values themselves. Through an encoder its rate saturates every tanh within 40
    steps at the 6B models' width, so there it is lower (benchmarks/prefix_rate.py: loss 3.54 against 1.82).
    """
    return 2e-2 if config.ptuning_version == 2 and not config.prefix_projection else 1e-3


TRAIN_TYPE = {
    train_type.name: train_type
    for train_type in (
        TrainType("lora", _lora, LORA_FLAGS, lambda config: 5e-4, "adapter"),
        TrainType("qlora", _lora, (*LORA_FLAGS, "quantization_bit"), lambda config: 2e-4, "adapter", quantizes=True),
        TrainType("freeze", _freeze, ("freeze_module_name", "freeze_last"), lambda config: 1e-4),
        TrainType("ptuning", _ptuning, PTUNING_FLAGS, _ptuning_rate, "prefix", fp32=True),
        TrainType("all", lambda model, config, mode: model.requires_grad_(True), (), lambda config: 1e-4),
    )
}


def problems(config, train_type, stage):
    """Yield what does not go together in the flags of a train type. stage: of ZeRO."""
    if config.lora_variant not in VARIANT:
        yield f"--lora_variant {config.lora_variant!r}: must be one of {', '.join(VARIANT)}."
    if config.freeze_last and config.freeze_module_name:
        yield "--freeze_last and --freeze_module_name both say what stays trainable: give one of them."
    if config.compile and (stage == 3 or train_type.quantizes):
        yield "--compile: not with ZeRO-3, whose weights come and go, nor with quantised ones. Leave it out."
    if train_type.quantizes:
        yield from _quantized_problems(config, train_type, stage)


def _quantized_problems(config, train_type, stage):
    if stage == 3:
        why = "weights are quantised or divided as they are read, not both"
        remedy = "Use a ds_zero2_*.json; the quantised base of a 6B model takes about 4 GB on each card."
        yield f"--train_type {train_type.name} with ZeRO-3: {why}. {remedy}"
    if config.lora_variant == "pissa":
        yield "--lora_variant pissa changes the base's weights, which qlora has quantised: use --train_type lora."


def unused_flags(train_type, given):
    """Flags in `given` (those that were set) that concern other train types only, and so have no effect here."""
    others = {name for other in TRAIN_TYPE.values() for name in other.flags}
    return sorted(others.intersection(given).difference(train_type.flags))
