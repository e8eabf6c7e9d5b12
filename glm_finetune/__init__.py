"""Fine-tuning of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.

`MODE` is the registry of models, TRAIN_TYPE that of methods.
"""

import logging

from glm_finetune.modes import MODE

__all__ = ["MODE"]

# bitsandbytes, if it is there, recommends another package at every start on a CPU, where it is only used by tests.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
