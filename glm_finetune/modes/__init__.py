"""The registry of modes. A new one is a file here and a line below.

from glm_finetune import MODE
tokenizer = MODE["glm3"].tokenizer.from_pretrained(folder)
"""

from glm_finetune.modes.glm import GLM
from glm_finetune.modes.glm2 import GLM2
from glm_finetune.modes.glm3 import GLM3

MODE = {mode.name: mode for mode in (GLM, GLM2, GLM3)}
