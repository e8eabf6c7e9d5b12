"""Prepared samples as arrays, which can be written, memory-mapped and sent between processes.

builder = Builder()
builder.add(number, times, rendered)
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
    "is_target": np.bool_,  # (T,) where there is a label; it is the token itself, elsewhere -100
    "ends": np.int64,  # (S,) where a sample ends in them; it begins where the one before ends
    "num_prefix": np.int32,  # (S,)
    "files": np.uint32,  # (S,) which of the files a sample is from
    "numbers": np.int64,  # (S,) line, entry or row of it, from 1
}
# Two samples, ids 7 8 9 and 5 6 of which 9 and 6 are targets, in a file of weight 2:
# index 0 0 1 1    input_ids 7 8 9 5 6    is_target 0 0 1 0 1    ends 3 5    num_prefix 0 0    numbers 1 2

# What only K of the samples have: values end to end, the sample of each, and where it ends in them. All empty where
# the bits of is_target and Mode.positions say it all, as for questions and answers.
SPECIAL = ("labels", "position_ids")  # (T,) each; positions (T,) or (2, T)
# Of samples 0 to 9 number 1 and number 9, of 2 and 3 tokens: labels 8 -100 5 6 7    labels_of 1 9    labels_ends 2 5
for _name in SPECIAL:
    COLUMNS |= {_name: np.int32, f"{_name}_of": np.int64, f"{_name}_ends": np.int64}


@dataclass
class Samples:
    """Rows of a data set. columns: an array for each of COLUMNS; of one that is memory-mapped, what a row needs is read
    when it is asked for. report: of the rows of the files that they came from.
    """

    columns: dict
    report: Report

    def __len__(self):
        return len(self.columns["index"])

    def __getitem__(self, i):
        sample = self.columns["index"][i]
        tokens = _places(self.columns["ends"], sample)
        ids, labels, position_ids = self.columns["input_ids"][tokens], *(self._own(name, sample) for name in SPECIAL)
        if labels is None:
            labels = np.where(self.columns["is_target"][tokens], ids, IGNORE)
        num_prefix = int(self.columns["num_prefix"][sample])
        row = {"input_ids": ids.tolist(), "labels": labels.tolist(), "num_prefix": num_prefix}
        if position_ids is not None:
            row["position_ids"] = position_ids.reshape((2, -1) if len(position_ids) > len(ids) else -1).tolist()
        return row

    def _own(self, name, sample):
        """The `labels` or `position_ids` that a sample has of its own, else None. -> (n,) int32"""
        samples, ends = self.columns[f"{name}_of"], self.columns[f"{name}_ends"]
        i = np.searchsorted(samples, sample)
        has_own = i < len(samples) and samples[i] == sample
        return self.columns[name][_places(ends, i)] if has_own else None

    def place(self, i):
        """(which of the files, number in it) of row i."""
        sample = self.columns["index"][i]
        return self.columns["files"][sample], self.columns["numbers"][sample]

    def lengths(self):
        """(N,) int64: tokens of each row."""
        return np.diff(self.columns["ends"], prepend=0)[self.columns["index"]]

    def after(self, counts):
        """The columns of these samples behind others. counts: elements of each column of those."""
        shifts = {"index": "ends", "ends": "input_ids"}
        for name in SPECIAL:
            shifts |= {f"{name}_of": "ends", f"{name}_ends": name}
        return self.columns | {name: self.columns[name] + counts[other] for name, other in shifts.items()}


def _places(ends, i):
    """Of values that end there, one behind the other, those of number i."""
    return slice(int(ends[i - 1]) if i else 0, int(ends[i]))


class Builder:
    """Samples, one after the other -> their columns."""

    def __init__(self):
        self._parts, self._is_target, self._ends = [], [], []  # of all samples; where each ends in them
        self._numbers, self._times, self._num_prefix = [], [], []
        self._special = {name: ([], []) for name in SPECIAL}  # which samples, their values

    def add(self, number, times, one):
        """A sample. number: of its row. times: how often it counts, 0: it is left out. one: a Rendered."""
        if not times:
            return
        draft = one.draft
        if draft.labels is not None or draft.position_ids is not None:
            self._add_special(draft)
        self._parts += one.ids
        self._is_target += draft.is_target
        self._ends.append(len(self._parts))
        self._numbers.append(number)
        self._times.append(times)
        self._num_prefix.append(one.num_prefix if draft.num_prefix_parts else 0)

    def _add_special(self, draft):
        for name, (samples, values) in self._special.items():
            if (own := getattr(draft, name)) is not None:
                samples.append(len(self._ends))
                values.append(np.array(own, np.int32).ravel())

    def columns(self, position):
        """Arrays for each of COLUMNS. position: of the file among the files."""
        lengths, num_samples = np.fromiter(map(len, self._parts), np.int64, len(self._parts)), len(self._ends)
        columns = {
            "index": np.repeat(np.arange(num_samples), self._times),
            "input_ids": np.concatenate(self._parts) if self._parts else [],
            "is_target": np.repeat(np.array(self._is_target, np.bool_), lengths),
            "ends": np.cumsum(lengths)[np.array(self._ends, np.int64) - 1],
            "num_prefix": self._num_prefix,
            "files": np.full(num_samples, position),
            "numbers": self._numbers,
        }
        for name, (samples, values) in self._special.items():
            ends = np.cumsum([len(value) for value in values])
            columns |= {name: np.concatenate(values or [[]]), f"{name}_of": samples, f"{name}_ends": ends}
        return {name: np.asarray(column, COLUMNS[name]) for name, column in columns.items()}
