"""Which rows belong to which optimizer step, micro-batch and rank. The order depends on seed and epoch alone.

An optimizer step takes `micro_batch_size * num_accumulate * world_size` rows of the epoch's order. The last step of an
epoch takes what is left, spread evenly; a micro-batch may then be empty, and its rank joins with a row without targets.
With lengths the rows of a step are dealt out by length, the longest micro-batches of all ranks at the same time.

    sampler = StepSampler(len(dataset), micro_batch_size=2, num_accumulate=4, world_size=2, seed=1234)
    sampler.micro_batches(Progress(step=0, epoch=0, rows=0), rank=1)  # -> 4 lists of row numbers
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from glm_finetune.data.order import by_length, in_windows, shuffled


@dataclass
class Progress:
    """Where a run stands. step: optimizer steps done; epoch: of the next row, from 0; rows: done of that epoch."""

    step: int = 0
    epoch: int = 0
    rows: int = 0


@dataclass(eq=False)
class StepSampler:
    """Every row once in an epoch, for every number of ranks; the same rows in a step however it is split.

    lengths: (N,) tokens of each row, to group by. window: shuffle within so many consecutive rows.
    """

    num_rows: int
    micro_batch_size: int
    num_accumulate: int
    world_size: int
    seed: int
    lengths: np.ndarray | None = None
    window: int | None = None

    def __post_init__(self):
        self.rows_per_step = self.micro_batch_size * self.num_accumulate * self.world_size
        self.steps_per_epoch = math.ceil(self.num_rows / self.rows_per_step)
        self._order_in = lru_cache(1)(self._whole_order)

    def total_steps(self, progress, num_epochs):
        """Optimizer steps at the end of `num_epochs`, for a run that stands at `progress`."""
        rest = math.ceil((self.num_rows - progress.rows) / self.rows_per_step)
        return progress.step + rest + (num_epochs - progress.epoch - 1) * self.steps_per_epoch

    def advance(self, progress):
        """Count a step that is done; returns whether it ended an epoch."""
        progress.step += 1
        progress.rows += self.rows_per_step
        if progress.rows < self.num_rows:
            return False
        progress.epoch, progress.rows = progress.epoch + 1, 0
        return True

    def order(self, epoch, start=0, end=None):
        """Places [start, end) of the order of an epoch, as a list of row numbers."""
        end = self.num_rows if end is None else min(end, self.num_rows)
        if self.window:
            return in_windows(self.num_rows, self.window, self.seed, epoch, start, end).tolist()
        return self._order_in(epoch)[start:end].tolist()

    def _whole_order(self, epoch):
        rows = shuffled(self.num_rows, self.seed, epoch)
        return rows if self.lengths is None else by_length(rows, self.lengths, self.seed, epoch)

    def micro_batches(self, progress, rank):
        """Row numbers of the `num_accumulate` micro-batches of one rank in the step after `progress`."""
        rows = self.order(progress.epoch, progress.rows, progress.rows + self.rows_per_step)
        if self.lengths is not None:
            rows.sort(key=self.lengths.__getitem__)
        # rows 10 .. 15, 2 micro-batches on each of 2 ranks: slots [10] [11 12] [13] [14 15], dealt out in turn:
        # rank 0 has [10] [13], rank 1 [11 12] [14 15]
        num_slots = self.num_accumulate * self.world_size
        bounds = [len(rows) * i // num_slots for i in range(num_slots + 1)]
        slots = [rows[start:end] for start, end in zip(bounds, bounds[1:])]
        return slots[rank :: self.world_size]
