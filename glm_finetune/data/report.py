"""What became of the rows of a data set: counts, lengths, bad rows.

report = Report()
to_train_on = report.keep(prepare_row(where, row, settings), settings.too_long)
print(report)
"""

import itertools
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from glm_finetune.loss import IGNORE

NUM_SHOWN = 5  # bad rows that an error lists
PERCENTILES = (50, 90, 99)


@dataclass
class Report:
    """What became of the rows of a data set. lengths: tokens -> number of samples."""

    rows: int = 0
    kept: int = 0  # samples; a row can be several, and count several times by its file's weight
    question_cut: int = 0
    answer_cut: int = 0
    skipped: int = 0  # too long, and left out because of --is_skip or --truncation drop
    no_target: int = 0  # nothing to learn in them
    answer_empty: int = 0
    bad: list = field(default_factory=list)  # what was wrong with rows that --on_bad_row skip left out
    tokens: int = 0
    targets: int = 0
    too_long: str = "cut"  # Settings.too_long
    lengths: Counter = field(default_factory=Counter)

    def keep(self, rendered, too_long, times=1):
        """Count the samples of a row; returns those to train on."""
        self.rows += 1
        self.too_long = too_long
        self.no_target += not any(label != IGNORE for one in rendered for label in one.labels)
        kept = []
        for one in rendered:
            num_targets = sum(label != IGNORE for label in one.labels)
            self.question_cut += one.source_cut
            self.answer_cut += one.target_cut
            self.answer_empty += one.answer_empty
            if too_long == "drop" and (one.source_cut or one.target_cut):
                self.skipped += 1
            elif num_targets:
                kept.append(one)
                self.kept += times
                self.tokens += times * len(one.input_ids)
                self.targets += times * num_targets
                self.lengths[len(one.input_ids)] += times
        return kept

    def add_bad(self, error):
        """Count a row that is left out for what is wrong with it."""
        self.rows += 1
        self.bad.append(str(error))

    @property
    def longest(self):
        return max(self.lengths, default=0)

    def percentile(self, percent):
        """The length that `percent` % of the samples do not exceed."""
        rank = max(1, -(-sum(self.lengths.values()) * percent // 100))
        ordered = itertools.accumulate(sorted(self.lengths.items()), lambda sofar, item: (item[0], sofar[1] + item[1]))
        return next((length for length, count in ordered if count >= rank), 0)

    def __str__(self):
        names = [
            "rows",
            "kept",
            "question_cut",
            "answer_cut",
            "skipped",
            "no_target",
            "answer_empty",
            "tokens",
            "targets",
        ]
        lengths = " ".join(f"{percent}% {self.percentile(percent):,}" for percent in PERCENTILES)
        counts = ", ".join(f"{name} {getattr(self, name):,}" for name in names)
        counts += f", bad {len(self.bad):,}, tokens {self.tokens:,}, targets {self.targets:,}"
        return f"{counts}, lengths {lengths} longest {self.longest:,}"

    def hints(self):
        """What the counts say that the user should know, one line each."""
        if self.question_cut and self.too_long == "cut":
            yield (
                f"{self.question_cut:,} questions were cut: raise --max_src_len (--truncation head keeps the newest "
                "rounds of a conversation, and the end of a question)."
            )
        if self.bad:
            yield f"{len(self.bad):,} bad rows were left out, the first: {self.bad[0]}"


def write_bad_rows(folder, *data_sets):
    """List the bad rows that were skipped in folder/bad_rows.txt, if there are any. data_sets: None is passed over."""
    bad = [problem for data in data_sets if data is not None for problem in data.report.bad]
    if bad:
        path = Path(folder) / "bad_rows.txt"
        path.write_text("".join(f"{problem}\n" for problem in bad), encoding="utf-8")
