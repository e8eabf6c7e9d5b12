"""What became of the rows of a data set: counts, lengths, bad rows.

report = Report(settings.too_long)
to_train_on = report.keep(prepare_row(where, row, settings))
report.count(columns)
report.add(of_other_rows)
print(report)
"""

import math
from collections import Counter
from dataclasses import dataclass, field
from itertools import compress
from pathlib import Path

import numpy as np

NUM_SHOWN = 5  # bad rows that an error lists
PERCENTILES = (50, 90, 99)
SHOWN = ("rows", "kept", "question_cut", "answer_cut", "skipped", "no_target", "answer_empty")
COUNTS = (*SHOWN, "tokens", "targets")


def percentile(lengths, percent):
    """The length that `percent` % of the samples do not exceed; 0 without samples. lengths: Counter of lengths."""
    rank, seen = max(1, math.ceil(lengths.total() * percent / 100)), 0
    for length in sorted(lengths):
        seen += lengths[length]
        if seen >= rank:
            return length
    return 0


@dataclass
class Report:
    """What became of the rows of a data set. too_long: Settings.too_long. lengths: tokens -> number of samples."""

    too_long: str = "cut"
    rows: int = 0
    kept: int = 0  # samples; this and the counts below, except no_target, are weighted by --train_path
    question_cut: int = 0
    answer_cut: int = 0
    skipped: int = 0  # too long, and left out because of --is_skip or --truncation drop
    no_target: int = 0  # nothing to learn in them
    answer_empty: int = 0
    bad: list = field(default_factory=list)  # what was wrong with rows that --on_bad_row skip left out
    tokens: int = 0
    targets: int = 0
    lengths: Counter = field(default_factory=Counter)
    streamed: bool = False  # only the number of rows is known

    @classmethod
    def from_json(cls, fields):
        """The report whose `vars` were written as JSON, which knows no numbers as keys. Raises TypeError for others."""
        lengths = Counter({int(length): count for length, count in fields["lengths"].items()})
        return cls(**{**fields, "lengths": lengths})

    def add(self, other):
        """Count the rows of another report too."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad += other.bad
        self.lengths.update(other.lengths)

    def keep(self, rendered, times=1):
        """Count what became of the samples of a row that counts `times`; returns those to train on, to `count`."""
        self.rows += 1
        kept, has_target = [], False
        for one in rendered:
            targets = compress(one.ids, one.draft.is_target)
            learns = any(map(len, targets))
            has_target = has_target or learns
            self.question_cut += times * one.question_cut
            self.answer_cut += times * one.answer_cut
            self.answer_empty += times * one.draft.answer_empty
            if self.too_long == "drop" and (one.question_cut or one.answer_cut):
                self.skipped += times
            elif learns:
                kept.append(one)
        self.no_target += not has_target
        return kept

    def count(self, columns):
        """Count samples to train on. columns: `columns.COLUMNS`."""
        if not len(columns["index"]):
            return
        lengths = np.diff(columns["ends"], prepend=0)
        num_targets = np.add.reduceat(columns["is_target"], columns["ends"] - lengths, dtype=np.int64)
        lengths, num_targets = lengths[columns["index"]], num_targets[columns["index"]]
        self.kept += len(lengths)
        self.tokens += int(lengths.sum())
        self.targets += int(num_targets.sum())
        self.lengths.update(lengths.tolist())

    def add_bad(self, problem):
        """Count a row that is left out for what is wrong with it."""
        self.rows += 1
        self.bad.append(problem)

    @property
    def longest(self):
        return max(self.lengths, default=0)

    def __str__(self):
        if self.streamed:
            return f"rows {self.rows:,}, streamed: what is cut, dropped or empty is not known beforehand"
        counts = ", ".join(f"{name} {getattr(self, name):,}" for name in SHOWN)
        counts += f", bad {len(self.bad):,}, tokens {self.tokens:,}, targets {self.targets:,}"
        lengths = " ".join(f"{percent}% {percentile(self.lengths, percent):,}" for percent in PERCENTILES)
        return f"{counts}, lengths {lengths} longest {self.longest:,}"

    def table(self):
        """The same as lines, for reading."""
        num_samples = max(1, self.kept + self.skipped)
        shares = {
            "questions cut": self.question_cut / num_samples,
            "answers cut": self.answer_cut / num_samples,
            "dropped, too long": self.skipped / num_samples,
            "empty answers": self.answer_empty / num_samples,
            "targets": self.targets / max(1, self.tokens),
        }
        counts = {
            "rows": self.rows,
            "bad rows": len(self.bad),
            "rows without target": self.no_target,
            "samples": self.kept,
            "questions cut": self.question_cut,
            "answers cut": self.answer_cut,
            "dropped, too long": self.skipped,
            "empty answers": self.answer_empty,
            "tokens": self.tokens,
            "targets": self.targets,
            **{f"{percent}% up to": percentile(self.lengths, percent) for percent in PERCENTILES},
            "longest": self.longest,
        }
        for name, count in counts.items():
            yield f"  {name:<20}{count:>12,}" + (f"  ({shares[name]:.1%})" if name in shares else "")

    def hints(self):
        """What the counts say that the user should know, one line each."""
        if self.question_cut and self.too_long == "cut":
            yield (
                f"{self.question_cut:,} questions were cut: raise --max_src_len. Of a conversation --truncation tail "
                "cuts the newest question; head forgets the oldest rounds instead."
            )
        if self.answer_cut and self.too_long == "cut":
            yield f"{self.answer_cut:,} answers were cut: raise --max_len."
        if self.bad:
            yield f"{len(self.bad):,} bad rows were left out, the first: {self.bad[0]}"


def write_bad_rows(path, *data_sets):
    """List the bad rows that were skipped in a file, if there are any; returns its path or None.

    data_sets: None is passed over.
    """
    bad = [problem for data in data_sets if data is not None for problem in data.report.bad]
    Path(path).unlink(missing_ok=True)  # of an earlier run
    if bad:
        Path(path).write_text("".join(f"{problem}\n" for problem in bad), encoding="utf-8")
    return path if bad else None
