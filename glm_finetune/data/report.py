"""What became of the rows of a data set: counts, lengths, bad rows; and one of them as text.

report = Report(settings.too_long)
to_train_on = report.keep(prepare_row(where, row, settings))
print(report)
"""

import math
import re
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass, field
from itertools import accumulate, compress, groupby
from pathlib import Path

import numpy as np

from glm_finetune.errors import UserError
from glm_finetune.models.loss import IGNORE

NUM_SHOWN = 5  # bad rows that an error lists
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
PERCENTILES = (50, 90, 99)
SHOWN = ("rows", "kept", "question_cut", "history_cut", "answer_cut", "skipped", "no_target", "answer_empty")
SHOWN += ("repaired",)
HINTED = ("question_cut", "history_cut", "answer_cut", "skipped", "bad")
COUNTS = (*SHOWN, "tokens", "targets")


def percentile(lengths, percent):
    """The length that `percent` % of the samples do not exceed; 0 without samples. lengths: Counter of lengths."""
    ordered, rank = sorted(lengths), max(1, math.ceil(lengths.total() * percent / 100))
    return ordered[bisect_left([*accumulate(map(lengths.get, ordered))], rank)] if ordered else 0


@dataclass
class Report:
    """What became of the rows of a data set. too_long: Settings.too_long. lengths: tokens -> number of samples."""

    too_long: str = "cut"
    rows: int = 0
    kept: int = 0  # samples; this and the counts below, except no_target, are weighted by --train_path
    question_cut: int = 0
    history_cut: int = 0  # what stands before the question: rounds, the system message
    answer_cut: int = 0
    skipped: int = 0  # too long, and left out: --is_skip, --truncation drop, or no cutting would help
    no_target: int = 0  # nothing to learn in them
    answer_empty: int = 0
    repaired: int = 0  # rows of --repair_turns
    bad: list = field(default_factory=list)  # what was wrong with rows that --on_bad_row skip left out
    tokens: int = 0
    targets: int = 0
    lengths: Counter = field(default_factory=Counter)
    formats: list = field(default_factory=list)  # of the files, each once
    streamed: bool = False  # only the number of rows is known

    @classmethod
    def from_json(cls, fields):
        """The report whose `vars` were written as JSON, which knows no numbers as keys. Raises TypeError for others."""
        return cls(**fields | {"lengths": Counter({int(length): n for length, n in fields["lengths"].items()})})

    def add(self, other):
        """Count the rows of another report too."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.bad += other.bad
        self.formats = sorted({*self.formats, *other.formats})
        self.lengths.update(other.lengths)

    def keep(self, rendered, times=1):
        """Count what became of the samples of a row that counts `times`; returns those to train on, to `count`."""
        self.rows += 1
        kept, has_target = [], False
        for one in rendered:
            learns = any(map(len, compress(one.ids, one.draft.is_target)))
            has_target = has_target or learns
            self.answer_empty += times * one.draft.answer_empty
            if one.is_cut and one.fits:
                self.question_cut += times * one.question_cut
                self.history_cut += times * one.history_cut
                self.answer_cut += times * one.answer_cut
            if not one.fits or (one.is_cut and self.too_long == "drop"):
                self.skipped += times
            elif learns:
                kept.append(one)
        self.no_target += not has_target
        self.repaired += bool(rendered) and "repaired" in rendered[0].draft.messages[-1]
        return kept

    def count(self, columns):
        """Count samples to train on. columns: `columns.COLUMNS`."""
        index, lengths = columns["index"], np.diff(columns["ends"], prepend=0)
        if len(index):
            targets = np.add.reduceat(columns["is_target"], columns["ends"] - lengths, dtype=np.int64)
            self.kept += len(index)
            self.tokens += int(lengths[index].sum())
            self.targets += int(targets[index].sum())
            self.lengths.update(lengths[index].tolist())

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
        samples, tokens = max(1, self.kept + self.skipped), max(1, self.tokens)
        counts = [
            ("rows", self.rows, None),
            ("bad rows", len(self.bad), None),
            ("rows without target", self.no_target, None),
            ("samples", self.kept, None),
            ("questions cut", self.question_cut, samples),
            ("histories cut", self.history_cut, samples),
            ("answers cut", self.answer_cut, samples),
            ("dropped, too long", self.skipped, samples),
            ("empty answers", self.answer_empty, samples),
            ("repaired rows", self.repaired, None),
            ("tokens", self.tokens, None),
            ("targets", self.targets, tokens),
            *((f"{percent}% up to", percentile(self.lengths, percent), None) for percent in PERCENTILES),
            ("longest", self.longest, None),
        ]
        for name, count, of in counts:
            yield f"  {name:<20}{count:>12,}" + (f"  ({count / of:.1%})" if of else "")

    def hints(self):
        """What the counts say that the user should know, one line each."""
        return self._hints() if any(getattr(self, name) for name in HINTED) else ()

    def _hints(self):
        if self.question_cut and self.too_long == "cut":
            yield f"{self.question_cut:,} questions were cut: raise --max_src_len. --truncation says what of them goes."
        if self.history_cut and self.too_long == "cut":
            yield (
                f"of {self.history_cut:,} samples the oldest rounds (or ends of system messages and results) are left "
                "out: raise --max_len."
            )
        if self.answer_cut and self.too_long == "cut":
            yield f"{self.answer_cut:,} answers were cut: raise --max_len."
        if self.skipped and self.too_long == "cut":
            yield f"{self.skipped:,} samples are left out: their calls of tools alone are too long. Raise --max_len."
        yield from self.bad_hints()

    def bad_hints(self):
        """The line about bad rows, where there are some."""
        if self.bad:
            yield f"{len(self.bad):,} bad rows were left out, the first: {self.bad[0]}"

    def nothing_left(self, path):
        """The UserError that there is no row to train on."""
        bad = "".join(f"\n{problem}" for problem in self.bad[:NUM_SHOWN])
        return UserError(
            f"{path}: no row left to train on ({self}). For the skipped raise --max_len and --max_src_len or cut them "
            f"(neither --is_skip nor --truncation drop); the others have no answer to train.{bad}"
        )


def write_bad_rows(path, *data_sets):
    """List the bad rows that were skipped in a file, if any were; returns its path or None. data_sets: some None."""
    bad = [f"{problem}\n" for data in data_sets if data is not None for problem in data.report.bad]
    Path(path).unlink(missing_ok=True)  # of an earlier run
    if bad:
        Path(path).write_text("".join(bad), encoding="utf-8")
    return path if bad else None


def describe_sample(row, tokenizer):
    """A row as text: targets between ⟦ and ⟧, special tokens by name, control characters as no terminal obeys them."""
    parts, names = [], tokenizer.special_names()
    for learns, pairs in groupby(zip(row["input_ids"], row["labels"]), lambda pair: pair[1] != IGNORE):
        text = ""
        for name, ids in groupby((i for i, _ in pairs), names.get):
            ids = [*ids]
            text += name * len(ids) if name else tokenizer.decode(ids, clean_up_tokenization_spaces=False)
        text = CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
        parts.append(f"⟦{text}⟧" if learns else text)
    return "".join(parts)
