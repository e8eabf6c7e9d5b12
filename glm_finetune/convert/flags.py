"""Flags of merge_lora.py."""

from dataclasses import dataclass

from glm_finetune.flags import PRECISIONS, Flags, flag
from glm_finetune.models.rope import RULES
from glm_finetune.modes.flags import ROPE_HELP


@dataclass(kw_only=True)
class MergeConfig(Flags):
    """Flags of merge_lora.py."""

    model_dir: str = flag("folder of the LoRA adapter")
    ori_model_dir: str | None = flag("base checkpoint; default: the one recorded with the adapter", None)
    mode: str | None = flag("glm, glm2 or glm3; default: recorded with the adapter", None)
    output_dir: str | None = flag("folder to write; default: <model_dir>-merged", None)
    rope_rule: str | None = flag(f"{ROPE_HELP}; or as in the training", None, RULES)
    force: bool = flag("take a base whose weights are not those of the training", False)
    dtype: str | None = flag("bf16, fp16 or fp32 of the written weights; default: the base's", None, PRECISIONS)
