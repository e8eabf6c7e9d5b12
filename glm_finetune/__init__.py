"""Fine-tuning of ChatGLM-6B, ChatGLM2-6B and ChatGLM3-6B.

`MODE` is the registry of models, TRAIN_TYPE that of methods.
"""

import logging
from importlib.metadata import version

from packaging.version import Version

OLDEST = {"torch": "2.11.0", "transformers": "5.17.0"}  # what requirements.txt pins is what is tested at every change
for _name, _oldest in OLDEST.items():
    if Version(version(_name)) < Version(_oldest):
        raise ImportError(
            f"{_name} {version(_name)} is installed, {_oldest} is the oldest that works here: pip install -r "
            "requirements.txt"
        )

from glm_finetune.modes import MODE  # noqa: E402 (with an older one this fails somewhere inside)

__all__ = ["MODE"]

# bitsandbytes, if it is there, recommends another package at every start on a CPU, where it is only used by tests.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
