"""Messages -> token rows -> batches. Every rank holds the whole data set; `sampler` says which rows are whose.

The batch contract, which every model reads (B rows, T tokens, right-padded):
  input_ids (B, T), labels (B, T) with -100 where there is no target, position_ids (B, T) or (B, 2, T),
  target_index (N,): see `loss.target_index`; and, only where causal attention is not enough,
  segment_ids (B, T), -1 = padding, and is_prefix (B, T) bool: see `models.layers.visible`.
"""

from array import array
from collections.abc import Sequence

import torch
from tqdm import tqdm

from glm_finetune.data.files import list_sources, occurrences
from glm_finetune.data.report import NUM_SHOWN, Report
from glm_finetune.data.samples import Settings, check_limits, of_source, prepare_row
from glm_finetune.loss import IGNORE, target_index
from glm_finetune.modes.spec import Limits


class InstructionDataset(Sequence):
    """The samples of files, in memory. `report` says what became of the rows, `where(i)` which row sample i is from."""

    def __init__(self, path, settings, progress=False):
        """path: see `files.list_sources`. settings: `samples.settings_of`. progress: show a bar.

        Raises ValueError for a bad row (file, line, field), or if no row is left.
        """
        self.report, self.rows, self.sources = Report(), [], list_sources(path)
        self._source, self._number = array("H"), array("q")
        for index, source in enumerate(self.sources):
            rows = tqdm(source.rows(), desc=f"tokenize {source.path}", unit=" rows", disable=not progress)
            self._read(index, rows, of_source(source, settings))
        if not self.rows:
            bad = "".join(f"\n{problem}" for problem in self.report.bad[:NUM_SHOWN])
            raise ValueError(
                f"{path}: no row left to train on ({self.report}). Raise --max_len and --max_src_len, or "
                f"leave out --is_skip.{bad}"
            )

    def _read(self, index, rows, settings):
        source = self.sources[index]
        for position, (number, row) in enumerate(rows):
            try:
                rendered = prepare_row(source.where(number), row, settings)
            except ValueError as error:
                if settings.on_bad_row != "skip":
                    raise
                self.report.add_bad(error)
                continue
            times = occurrences(position, source.weight)
            for one in self.report.keep(rendered, settings.too_long, times):
                sample = {"input_ids": one.input_ids, "labels": one.labels, "num_prefix": one.num_prefix}
                self.rows += [sample] * times
                self._source.extend([index] * times)
                self._number.extend([number] * times)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        return self.rows[index]

    def where(self, index):
        """File and line that a sample is from."""
        return self.sources[self._source[index]].where(self._number[index])


def original_dataset(
    samples, question_tail, overhead, path, tokenizer, max_len=1024, max_src_len=256, is_skip=False, progress=False
):
    """Mode.dataset: the data set as ChatGLM-Finetuning makes it, an end token after cut answers included.

    max_len, max_src_len: tokens of a sample, of its question. is_skip: leave out rows that do not fit instead of
    cutting them. Raises ValueError for limits that leave no room, and as InstructionDataset.
    """
    check_limits(max_len, max_src_len, question_tail, overhead)
    settings = Settings(samples, tokenizer, Limits(max_len, max_src_len), too_long="drop" if is_skip else "cut")
    return InstructionDataset(path, settings, progress)


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
