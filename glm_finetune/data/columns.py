"""Prepared samples as arrays, which can be written, memory-mapped and sent between processes.

builder = Builder()
builder.add(number, times, rendered)
samples = Samples(builder.columns(position=0), report)
"""

from dataclasses import dataclass

import numpy as np

from glm_finetune.data.report import Report

# The arrays of prepared samples. N rows of the data set, which are S different samples, of T tokens together.
COLUMNS = {
    "index": np.int64,  # (N,) the sample of each row: a weight repeats samples here, not their tokens
    "input_ids": np.int32,  # (T,)
    "is_target": np.bool_,  # (T,) where the label is the token itself; elsewhere it is -100
    "ends": np.int64,  # (S,) where a sample ends in them; it begins where the one before ends
    "num_prefix": np.int32,  # (S,)
    "files": np.uint32,  # (S,) which of the files a sample is from
    "numbers": np.int64,  # (S,) line, entry or row of it, from 1
}


@dataclass
class Samples:
    """columns: an array for each of COLUMNS. report: of the rows they came from."""

    columns: dict
    report: Report

    def after(self, num_samples, num_tokens):
        """The columns of these samples when so many others lie in front of them."""
        moved = {"index": self.columns["index"] + num_samples, "ends": self.columns["ends"] + num_tokens}
        return {**self.columns, **moved}


class Builder:
    """Samples, one after the other -> their columns."""

    def __init__(self):
        self._parts, self._is_target, self._ends = [], [], []  # of all samples; where each ends in them
        self._numbers, self._times, self._num_prefix = [], [], []

    def add(self, number, times, one):
        """A sample. number: of its row. times: how often it counts, 0: it is left out. one: a Rendered."""
        if times:
            self._parts += one.ids
            self._is_target += one.draft.is_target
            self._ends.append(len(self._parts))
            self._numbers.append(number)
            self._times.append(times)
            self._num_prefix.append(one.num_prefix)

    def columns(self, position):
        """Arrays for each of COLUMNS. position: of the file among the files."""
        lengths = np.fromiter(map(len, self._parts), np.int64, len(self._parts))
        num_samples = len(self._ends)
        columns = {
            "index": np.repeat(np.arange(num_samples), self._times),
            "input_ids": np.concatenate(self._parts) if self._parts else [],
            "is_target": np.repeat(np.array(self._is_target, np.bool_), lengths),
            "ends": np.cumsum(lengths)[np.array(self._ends, np.int64) - 1],
            "num_prefix": self._num_prefix,
            "files": np.full(num_samples, position),
            "numbers": self._numbers,
        }
        return {name: np.asarray(column, COLUMNS[name]) for name, column in columns.items()}
