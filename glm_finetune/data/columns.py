"""Prepared samples as arrays, which can be written, memory-mapped and sent between processes.

builder = Builder()
builder.add(number, times, [ids_of_prefix, ids_of_question, ids_of_answer], [False, False, True])
samples = Samples(builder.columns(position=0), report)
"""

from dataclasses import dataclass

import numpy as np

from glm_finetune.data.report import Report
from glm_finetune.models.loss import IGNORE

# The arrays of prepared samples. N rows of the data set, which are S different samples, of T tokens together.
COLUMNS = {
    "index": np.int64,  # (N,) the sample of each row: a weight repeats samples here, not their tokens
    "input_ids": np.int32,  # (T,)
    "is_target": np.bool_,  # (T,) where the label is the token itself; elsewhere it is -100
    "ends": np.int64,  # (S,) where a sample ends in them; it begins where the one before ends
    "num_prefix": np.int32,  # (S,)
    "sources": np.uint32,  # (S,) which of the sources a sample is from
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

    def add(self, number, times, parts, is_target, num_prefix_parts=0):
        """A sample. number: of its row. times: how often it counts, 0: it is left out. parts: (T,) int32 arrays of ids;
        is_target: whether those of each are targets. num_prefix_parts: how many of them are the bidirectional prefix.
        """
        if times:
            self._parts += parts
            self._is_target += is_target
            self._ends.append(len(self._parts))
            self._numbers.append(number)
            self._times.append(times)
            self._num_prefix.append(sum(map(len, parts[:num_prefix_parts])) if num_prefix_parts else 0)

    def add_rendered(self, number, times, one):
        """A Rendered, whose labels must be -100 or the ids themselves."""
        ids, labels = np.array(one.input_ids, np.int32), np.array(one.labels, np.int32)
        is_target = labels != IGNORE
        assert (labels == ids)[is_target].all(), "a label that is neither -100 nor the token itself cannot be stored"
        bounds = sorted({0, one.num_prefix, *(np.flatnonzero(np.diff(is_target)) + 1), len(ids)})
        parts = [ids[start:end] for start, end in zip(bounds, bounds[1:])]
        self.add(number, times, parts, is_target[bounds[:-1]].tolist(), bounds.index(one.num_prefix))

    def columns(self, position):
        """Arrays for each of COLUMNS. position: of the source among the sources."""
        lengths = lengths_of(self._parts)
        num_samples = len(self._ends)
        columns = {
            "index": np.repeat(np.arange(num_samples), self._times),
            "input_ids": np.concatenate(self._parts) if self._parts else [],
            "is_target": np.repeat(np.array(self._is_target, np.bool_), lengths),
            "ends": np.cumsum(lengths)[np.array(self._ends, np.int64) - 1],
            "num_prefix": self._num_prefix,
            "sources": np.full(num_samples, position),
            "numbers": self._numbers,
        }
        return {name: np.asarray(column, COLUMNS[name]) for name, column in columns.items()}


def lengths_of(parts):
    """How long each of P arrays is: (P,) int64."""
    return np.fromiter(map(len, parts), np.int64, len(parts))
