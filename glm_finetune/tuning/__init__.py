"""The registry of train types: what of the model learns. A new one is a file here and a line below.

Dtype policy, the same for all: weights are held in the compute dtype (--precision); for every weight that learns,
DeepSpeed keeps an fp32 master copy and fp32 moments in the optimizer.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.tuning.lora import add_lora
from glm_finetune.tuning.ptuning import add_prefix
from glm_finetune.tuning.select import train_all, train_named


@dataclass(frozen=True)
class TrainType:
    """apply(model, config, mode) -> the model with what learns set.

    saves: "weights" (all), "adapter" (peft's files) or "prefix" (what learns, under its own names).
    identity: flags that a run cannot change when it is resumed.
    """

    name: str
    apply: Callable
    saves: str = "weights"
    identity: tuple = ()


def names_in(text):
    """A comma list -> its non-empty parts."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _lora(model, config, mode):
    targets = names_in(config.lora_module_name or "") or mode.lora_targets
    return add_lora(model, config.lora_dim, config.lora_alpha, config.lora_dropout, targets, config.model_name_or_path)


def _ptuning(model, config, mode):
    return add_prefix(model, config.pre_seq_len, config.prefix_projection, config.prefix_dropout)


TRAIN_TYPE = {
    train_type.name: train_type
    for train_type in (
        TrainType("lora", _lora, saves="adapter", identity=("lora_dim", "lora_alpha", "lora_module_name")),
        TrainType(
            "freeze",
            lambda model, config, mode: train_named(model, names_in(config.freeze_module_name)),
            identity=("freeze_module_name",),
        ),
        TrainType(
            "ptuning",
            _ptuning,
            saves="prefix",
            identity=("pre_seq_len", "prefix_projection"),
        ),
        TrainType("all", lambda model, config, mode: train_all(model)),
    )
}
