"""Instructions: the answers of a conversation, or a text, token by token; every epoch the same samples."""

from glm_finetune.modes.template import Template
from glm_finetune.objectives.spec import Objective


def draw(sample, seed, epoch):
    return sample


def count(batch):
    return len(batch["target_index"])


def loss(losses, batch):
    return losses.sum()


INSTRUCT = Objective("instruct", Template.drafts, draw, count, loss)
