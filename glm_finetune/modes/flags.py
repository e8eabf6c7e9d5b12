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
        "glm (ChatGLM-6B), glm2 (ChatGLM2-6B, CodeGeeX2) or glm3 (ChatGLM3-6B)", "glm2", group="model and data"
    )
    model_name_or_path: str = flag("folder of the base checkpoint (config.json, weights, tokenizer)")
    rope_rule: str | None = flag(ROPE_HELP, None, RULES)
    allow_longer: bool = flag("let --max_len be more than the base was made for", False)
