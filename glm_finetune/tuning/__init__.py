"""The registry of train types: what of the model learns. A new one is a file here and a line below.

Dtype policy, the same for all: weights are held in the compute dtype (--precision), quantised ones as their format
says; for every weight that learns the optimizer has an fp32 master copy and fp32 moments. The encoder of a prefix is
itself fp32 and computes in fp32. With fp16, whose loss scaler needs fp16 weights, it has fp32 masters; version 2
computes in fp32 all the same, the LSTM of version 1 in fp16.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.tuning.lora import VARIANT, add_lora
from glm_finetune.tuning.ptuning import add_prefix, add_prompt
from glm_finetune.tuning.select import last_layers, train_all, train_named

LORA_FLAGS = (
    "lora_dim",
    "lora_alpha",
    "lora_dropout",
    "lora_module_name",
    "lora_variant",
    "loraplus_ratio",
    "modules_to_save",
)
LORA_IDENTITY = tuple(name for name in LORA_FLAGS if name != "lora_dropout")
FREEZE_FLAGS = ("freeze_module_name", "freeze_last")
PTUNING_FLAGS = ("pre_seq_len", "prefix_projection", "prefix_dropout", "ptuning_version")


@dataclass(frozen=True)
class TrainType:
    """apply(model, config, mode) -> the model with what learns set.

    flags: those that concern this type only. identity: flags that a run cannot change when it is resumed.
    learning_rate(config) -> the default, that of the recipe.
    saves: "weights" (all), "adapter" (peft's files) or "prefix" (what learns, under its own names).
    fp32: what learns is held in fp32 whatever the compute dtype. quantizes: the base is quantised as it is read.
    """

    name: str
    apply: Callable
    flags: tuple
    identity: tuple
    learning_rate: Callable
    saves: str = "weights"
    fp32: bool = False
    quantizes: bool = False


def names_in(text):
    """A comma list -> its non-empty parts."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def _lora(model, config, mode):
    return add_lora(
        model,
        config.lora_dim,
        config.lora_alpha,
        config.lora_dropout,
        names_in(config.lora_module_name) or mode.lora_targets,
        config.model_name_or_path,
        config.lora_variant,
        names_in(config.modules_to_save),
    )


def _freeze(model, config, mode):
    if config.freeze_last:
        return train_named(model, last_layers(model, config.freeze_last))
    return train_named(model, names_in(config.freeze_module_name or "layers.27."))


def _ptuning(model, config, mode):
    if config.ptuning_version == 1:
        return add_prompt(model, config.pre_seq_len, config.prefix_projection, config.prefix_dropout, config.max_len)
    return add_prefix(model, config.pre_seq_len, config.prefix_projection, config.prefix_dropout)


def _ptuning_rate(config):
    """The official recipe trains keys and values themselves. Through an encoder its rate saturates every tanh within 40
    steps at the 6B models' width, so there it is lower (benchmarks/prefix_rate.py: loss 3.54 against 1.82).
    """
    return 2e-2 if config.ptuning_version == 2 and not config.prefix_projection else 1e-3


TRAIN_TYPE = {
    train_type.name: train_type
    for train_type in (
        TrainType("lora", _lora, LORA_FLAGS, LORA_IDENTITY, lambda config: 5e-4, saves="adapter"),
        TrainType(
            "qlora",
            _lora,
            (*LORA_FLAGS, "quantization_bit"),
            (*LORA_IDENTITY, "quantization_bit"),
            lambda config: 2e-4,
            saves="adapter",
            quantizes=True,
        ),
        TrainType("freeze", _freeze, FREEZE_FLAGS, FREEZE_FLAGS, lambda config: 1e-4),
        TrainType(
            "ptuning",
            _ptuning,
            PTUNING_FLAGS,
            tuple(name for name in PTUNING_FLAGS if name != "prefix_dropout"),
            _ptuning_rate,
            saves="prefix",
            fp32=True,
        ),
        TrainType("all", lambda model, config, mode: train_all(model), (), (), lambda config: 1e-4),
    )
}


def problems(config, train_type, stage):
    """Yield what does not go together in the flags of a train type. stage: of ZeRO."""
    if config.lora_variant not in VARIANT:
        yield f"--lora_variant {config.lora_variant!r}: must be one of {', '.join(VARIANT)}."
    if config.freeze_last and config.freeze_module_name:
        yield "--freeze_last and --freeze_module_name both say what stays trainable: give one of them."
    if train_type.quantizes and stage == 3:
        yield (
            f"--train_type {train_type.name} with ZeRO-3: weights are quantised or divided as they are read, not "
            "both. Use a ds_zero2_*.json; the quantised base of a 6B model takes about 4 GB on each card."
        )
    if train_type.quantizes and config.lora_variant == "pissa":
        yield "--lora_variant pissa changes the base's weights, which qlora has quantised: use --train_type lora."


def unused_flags(train_type, given):
    """Flags in `given` (those that were set) that concern other train types only, and so have no effect here."""
    others = {name for other in TRAIN_TYPE.values() for name in other.flags} - set(train_type.flags)
    return sorted(others & set(given))
