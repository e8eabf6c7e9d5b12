"""Fine-tuning of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.

`MODE` is the registry of models, TRAIN_TYPE that of methods.
"""

from glm_finetune.modes import MODE

__all__ = ["MODE"]
