"""Row -> samples: what the formats and a mode make of one row under the flags of a run, and the counts of it.

A `Recipe` is pickled to worker processes, so everything in it is data, a class or a function at the top of a module.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

from glm_finetune.data.formats import instruction_messages
from glm_finetune.modes.spec import Limits


@dataclass
class Report:
    """What became of the rows of a file."""

    rows: int = 0
    kept: int = 0
    question_cut: int = 0
    answer_cut: int = 0
    skipped: int = 0  # cut, and left out because of --is_skip
    answer_empty: int = 0
    tokens: int = 0
    targets: int = 0
    longest: int = 0

    def __str__(self):
        return ", ".join(f"{field.name} {getattr(self, field.name):,}" for field in fields(self))

    def add(self, other):
        """Count the rows of another report too."""
        for field in fields(self):
            values = getattr(self, field.name), getattr(other, field.name)
            setattr(self, field.name, max(values) if field.name == "longest" else sum(values))


@dataclass(frozen=True)
class Recipe:
    """render: Mode.render. limits: tokens of a sample, of its question. is_skip: leave out what would be cut."""

    render: Callable
    tokenizer: object
    limits: Limits
    is_skip: bool = False

    def samples(self, row, where, report):
        """The samples of a row, a list of Rendered; counts in `report` what was cut, skipped or empty.

        Raises ValueError naming `where`.
        """
        messages = instruction_messages(row, where)
        rendered = self.render(self.tokenizer, messages, self.limits)
        report.rows += 1
        report.question_cut += rendered.source_cut
        report.answer_cut += rendered.target_cut
        report.answer_empty += not messages[-1]["content"]
        if self.is_skip and (rendered.source_cut or rendered.target_cut):
            report.skipped += 1
            return []
        return [rendered]


def check_limits(max_len, max_src_len, question_tail, overhead):
    """Raise ValueError unless a question of max_src_len tokens fits into max_len, and its ending into max_src_len."""
    if max_src_len >= max_len:
        raise ValueError(f"--max_src_len {max_src_len} must be below --max_len {max_len}: the answer needs room too.")
    if max_src_len + overhead > max_len:
        raise ValueError(
            f"--max_len {max_len} leaves no room for an answer after --max_src_len {max_src_len} and the "
            f"{overhead} special tokens of this mode: use --max_len {max_src_len + overhead + 1} or more."
        )
    if max_src_len < max(1, question_tail):
        raise ValueError(
            f"--max_src_len {max_src_len} is too small: the ending of a question alone is {question_tail}."
        )
