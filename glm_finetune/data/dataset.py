"""Messages -> token rows -> batches. Every rank holds the whole data set; `sampler` says which rows are whose.

The batch contract, which every model reads (B rows, T tokens, right-padded):
  input_ids (B, T), labels (B, T) with -100 where there is no target, position_ids (B, T) or (B, 2, T),
  target_index (N,): see `loss.target_index`; and, only where causal attention is not enough,
  segment_ids (B, T), -1 = padding, and is_prefix (B, T) bool: see `models.layers.visible`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from tqdm import tqdm

from glm_finetune.data.formats import instruction_messages, read_rows
from glm_finetune.loss import IGNORE, target_index
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


class InstructionDataset(Sequence):
    """Rows of instruction / input / output, rendered by a mode. `report` counts what was cut, skipped or empty."""

    def __init__(
        self,
        render,
        question_tail,
        overhead,
        path,
        tokenizer,
        max_len=1024,
        max_src_len=256,
        is_skip=False,
        progress=False,
    ):
        """path: JSONL or a JSON array. max_len, max_src_len: tokens of a sample, of its question. is_skip: leave out
        rows that do not fit instead of cutting them. progress: show a bar.

        Raises ValueError for limits that leave no room, a bad line (file, line, field), or no row left.
        """
        check_limits(max_len, max_src_len, question_tail, overhead)
        self.report, self.rows, self.places, limits = Report(), [], [], Limits(max_len, max_src_len)
        for where, row in tqdm(read_rows(path), desc=f"tokenize {path}", unit=" rows", disable=not progress):
            messages = instruction_messages(row, where)
            self._add(where, render(tokenizer, messages, limits), is_skip, empty=not messages[-1]["content"])
        if not self.rows:
            raise ValueError(
                f"{path}: no row left to train on ({self.report}). Raise --max_len and --max_src_len, or "
                "leave out --is_skip."
            )

    def where(self, index):
        """File and line that a row came from, as text."""
        return self.places[index]

    def _add(self, where, rendered, is_skip, empty):
        report = self.report
        report.rows += 1
        report.question_cut += rendered.source_cut
        report.answer_cut += rendered.target_cut
        report.answer_empty += empty
        if is_skip and (rendered.source_cut or rendered.target_cut):
            report.skipped += 1
            return
        report.kept += 1
        report.tokens += len(rendered.input_ids)
        report.targets += sum(label != IGNORE for label in rendered.labels)
        report.longest = max(report.longest, len(rendered.input_ids))
        self.places.append(where)
        self.rows.append(
            {"input_ids": rendered.input_ids, "labels": rendered.labels, "num_prefix": rendered.num_prefix}
        )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]


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


def collate(rows, pad_token_id, positions):
    """Rows of `InstructionDataset` -> a batch (see the top), padded on the right to the longest row.

    positions: Mode.positions. What the model can do without is left out, so that causal modes build no mask.
    """
    width = max(len(row["input_ids"]) for row in rows)
    input_ids = torch.full((len(rows), width), pad_token_id)
    labels = torch.full((len(rows), width), IGNORE)
    segment_ids = torch.full((len(rows), width), -1)
    is_prefix = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        length = len(row["input_ids"])
        input_ids[i, :length] = torch.tensor(row["input_ids"])
        labels[i, :length] = torch.tensor(row["labels"])
        segment_ids[i, :length] = 0
        is_prefix[i, : row["num_prefix"]] = True
    position_ids = torch.stack([positions(width, row["num_prefix"]) for row in rows])
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "target_index": target_index(labels),
    }
    if is_prefix.any():
        batch |= {"segment_ids": segment_ids, "is_prefix": is_prefix}
    return batch


def without_targets(row):
    """The same row with nothing to learn: it stands in where a rank has no row left but must join the others' work."""
    return {**row, "labels": [IGNORE] * len(row["labels"])}


def describe_sample(row, tokenizer):
    """One row as text, its targets between ⟦ and ⟧: what the model is asked and what it is taught."""
    parts, start = [], 0
    flags = [label != IGNORE for label in row["labels"]]
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = "".join(decode_with_names(row["input_ids"][start:end], tokenizer))
            parts.append(f"⟦{text}⟧" if flags[start] else text)
            start = end
    return "".join(parts)


def decode_with_names(ids, tokenizer):
    """Yield text, special tokens by name: decode() alone hides them in two of three modes."""
    special = tokenizer.special_names()
    run = []
    for i in [*ids, None]:
        if i is None or i in special:
            if run:
                yield tokenizer.decode(run, clean_up_tokenization_spaces=False)
            run = []
            if i is not None:
                yield special[i]
        else:
            run.append(i)
