"""The registry of objectives: what a sample is and what is learnt from it. A new one is a file here and a line below.

rows = OBJECTIVE["instruct"].rows(data, numbers, seed=1234, epoch=0)    # what is collated
"""

from glm_finetune.objectives.instruct import INSTRUCT

OBJECTIVE = {objective.name: objective for objective in (INSTRUCT,)}
