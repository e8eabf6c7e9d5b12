"""Flags of the base model."""

from dataclasses import dataclass

from glm_finetune.flags import Flags, flag
from glm_finetune.models.rope import RULES

ROPE_HELP = (
    "base or position: what rope_ratio of a long-context variant means; default: what its modeling_chatglm.py says, "
    "else base for glm3"
)


@dataclass(kw_only=True)
class ModelFlags(Flags):
    """Which model is trained."""

    mode: str = flag(
        "glm (ChatGLM-6B), glm2 (ChatGLM2-6B, CodeGeeX2) or glm3 (ChatGLM3-6B); may be left out where the base says "
        "that it is of the default",
        "glm2",
        group="model and data",
    )
    model_name_or_path: str = flag("folder of the base checkpoint (config.json, weights, tokenizer)")
    init_from: str | None = flag(
        "begin with the weights in a folder, at step 0 with a new optimizer: an adapter (lora, qlora), a prefix "
        "(ptuning) or a whole model (all, freeze), which is then the base",
        None,
    )
    rope_rule: str | None = flag(ROPE_HELP, None, RULES)
    allow_longer: bool = flag("let --max_len be more than the base was made for", False)
