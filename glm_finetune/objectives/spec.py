"""What an objective is: the record that data and loop read instead of asking which one it is."""

from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.data.order import mixed


@dataclass(frozen=True)
class Objective:
    """drafts(template, tokenizer, messages, style, train_on) -> Drafts of a row, as Template.drafts: what is stored.
    draw(sample, seed, epoch) -> the sample that is trained in that epoch. sample: a row of a data set; seed: its own.
    count(batch) -> target tokens of a micro-batch, int: the loss of a step is divided by their sum over all ranks.
    loss(losses, batch) -> fp32 scalar, the sum of what is learnt. losses: (N,) fp32, of batch["target_index"] in order.
    """

    name: str
    drafts: Callable
    draw: Callable
    count: Callable
    loss: Callable

    def rows(self, data, numbers, seed, epoch):
        """Rows as they are trained in an epoch: each follows from seed, epoch and its number, whatever the ranks."""
        return [self.draw(data[number], mixed(seed, number), epoch) for number in numbers]
