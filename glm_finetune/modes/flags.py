"""Flags of the base model."""

from dataclasses import dataclass

from glm_finetune.flags import Flags, flag


@dataclass(kw_only=True)
class ModelFlags(Flags):
    """Which model is trained."""

    mode: str = flag(
        "glm (ChatGLM-6B), glm2 (ChatGLM2-6B, CodeGeeX2) or glm3 (ChatGLM3-6B)", "glm2", group="model and data"
    )
    model_name_or_path: str = flag("folder of the base checkpoint (config.json, weights, tokenizer)")
