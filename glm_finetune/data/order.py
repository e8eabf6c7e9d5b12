"""The order of the rows in an epoch: a function of seed and epoch alone, whatever the ranks and the batch size.

shuffled(1000, seed=1, epoch=0)             # (1000,) int64
by_length(shuffled(1000, 1, 0), lengths)    # the same rows, those of similar length side by side
in_windows(1000, 100, 1, 0, 250, 260)       # rows 250 to 260 of a stream shuffled in windows of 100
"""

from functools import reduce

import numpy as np
import torch

GROUP = 64  # rows of similar length that stay together; steps of other sizes cut groups, which costs a little padding
POOL = 64 * GROUP  # rows that are sorted together: enough for even groups, few enough to keep epochs different


def shuffled(num_rows, *seeds):
    """A permutation of `num_rows` rows, (N,) int64. seeds: ints that decide it."""
    return torch.randperm(num_rows, generator=torch.Generator().manual_seed(mixed(*seeds))).numpy()


def mixed(*seeds):
    """One seed of several ints."""
    return reduce(lambda one, seed: (one * 1_000_003 + seed) % 2**63, seeds, 0)


def by_length(order, lengths, *seeds):
    """`order` with rows of similar length side by side: pools of it are sorted and cut into groups, which are shuffled.

    order: (N,) permutation. lengths: (N,) tokens of each row. seeds: of the groups' order. A step then has rows of
    similar length, unlike with random order; that is what saves the padding.
    """
    # lengths 9 2 8 3 in groups of two: sorted 2 3 8 9, groups [2 3] [8 9], shuffled to 8 9 2 3
    pools = [order[start : start + POOL] for start in range(0, len(order), POOL)]
    pools = [pool[np.argsort(lengths[pool], kind="stable")] for pool in pools]
    groups = [pool[start : start + GROUP] for pool in pools for start in range(0, len(pool), GROUP)]
    return np.concatenate([groups[i] for i in shuffled(len(groups), *seeds, len(order))])


def in_windows(num_rows, window, seed, epoch, start, end):
    """Places [start, end) of an order that permutes rows within windows of `window` consecutive ones. (n,) int64."""
    # 10 rows in windows of 4, shuffled to 2 0 3 1 | 7 4 6 5 | 9 8: places [3, 6) are rows 1 7 4
    parts = [np.zeros(0, np.int64)]
    for first in range(start // window * window, end, window):
        rows = first + shuffled(min(window, num_rows - first), seed, epoch, first // window)
        parts.append(rows[max(start - first, 0) : end - first])
    return np.concatenate(parts)
