"""Data sets, and their rows -> batches. Every rank sees the whole data set; `sampler` says which rows are whose.

The batch contract, which every model reads (B rows, T tokens, right-padded):
  input_ids (B, T), labels (B, T) with -100 where there is no target, position_ids (B, T) or (B, 2, T),
  target_index (N,): see `loss.target_index`; and, only where causal attention is not enough,
  segment_ids (B, T), -1 = padding, and is_prefix (B, T) bool: see `models.layers.visible`; or, where causal attention
  within samples is enough, segment_bounds (S + 1,) int32: see `models.layers.Segments`.
"""

import re
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F

from glm_finetune.data.cache import prepared
from glm_finetune.data.columns import SPECIAL, special
from glm_finetune.data.files import list_data_files
from glm_finetune.data.packing import best_fit
from glm_finetune.data.prepare import in_memory
from glm_finetune.data.report import NUM_SHOWN
from glm_finetune.data.stream import Stream
from glm_finetune.errors import UserError
from glm_finetune.models.loss import IGNORE, target_index

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


class InstructionDataset(Sequence):
    """The samples of files: {"input_ids", "labels", "num_prefix"} of lists, and "position_ids" where a sample has its
    own. `report` says what became of the rows, `where(i)` which row sample i is from.
    """

    def __init__(self, path, settings, progress=False, cache_dir=None, overwrite_cache=False, window=None):
        """path: see `files.list_data_files`. settings: `samples.settings_of`.

        cache_dir: prepare the samples there, or find them there (see `cache`); None: prepare them here, in memory, in
        this process. progress: show a bar while that is done. window: prepare nothing, render a row when it is asked
        for, best in windows of so many consecutive rows (see `stream`).
        Raises UserError for a bad row (file, line, field), or if no row is left; with a window when it is its turn.
        """
        data_files = list_data_files(path)
        if window:
            self.rows = Stream(data_files, settings, window, cache_dir)
        elif cache_dir:
            self.rows = PreparedRows(data_files, prepared(data_files, settings, cache_dir, overwrite_cache, progress))
        else:
            self.rows = PreparedRows(data_files, in_memory(data_files, settings, progress))
        self.data_files, self.report = data_files, self.rows.report
        if not len(self):
            bad = "".join(f"\n{problem}" for problem in self.report.bad[:NUM_SHOWN])
            raise UserError(
                f"{path}: no row left to train on ({self.report}). For the skipped raise --max_len and --max_src_len "
                f"or cut them (neither --is_skip nor --truncation drop); the others have no answer to train.{bad}"
            )

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self.rows[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        return self.rows[index % len(self)]

    def where(self, index):
        """File and line that a sample is from."""
        return self.rows.where(index)

    def lengths(self):
        """(N,) int64: tokens of each row. Not for streams, which do not know."""
        return self.rows.lengths()


class PreparedRows:
    """`prepare.Samples` as rows; what is memory-mapped is read when a row is asked for."""

    def __init__(self, data_files, samples):
        self.data_files, self.columns, self.report = data_files, samples.columns, samples.report

    def __len__(self):
        return len(self.columns["index"])

    def __getitem__(self, index):
        columns, ends, sample = self.columns, self.columns["ends"], int(self.columns["index"][index])
        tokens = slice(int(ends[sample - 1]) if sample else 0, int(ends[sample]))
        ids = columns["input_ids"][tokens]
        labels, position_ids = (special(columns, name, sample) for name in SPECIAL)
        if labels is None:
            labels = np.where(columns["is_target"][tokens], ids, IGNORE)
        row = {
            "input_ids": ids.tolist(),
            "labels": labels.tolist(),
            "num_prefix": int(columns["num_prefix"][sample]),
        }
        if position_ids is not None:
            shape = (2, -1) if len(position_ids) > len(ids) else -1
            row["position_ids"] = position_ids.reshape(shape).tolist()
        return row

    def where(self, index):
        sample = self.columns["index"][index]
        return self.data_files[self.columns["files"][sample]].where(self.columns["numbers"][sample])

    def lengths(self):
        return np.diff(self.columns["ends"], prepend=0)[self.columns["index"]]


def collate(rows, pad_token_id, positions, max_len=None):
    """Rows of `InstructionDataset` -> a batch (see the top), padded on the right to the longest row.

    positions: Mode.positions, for samples without their own. max_len: None = a row of the batch for each row of data;
    otherwise samples are packed, laid end to end in as few rows of at most `max_len` tokens as best-fit finds;
    attention, positions and loss of a sample are the same either way. What the model can do without is left out, so
    that causal modes build no mask.
    """
    # Samples 5 6 7 (targets 6 7) and 8 9 (target 9) packed, beside a longer row, with a causal mode:
    # input_ids    5    6    7    8    9    0       position_ids  0 1 2 0 1 0     segment_ids  0 0 0 1 1 -1
    # labels       -100 6    7    -100 9    -100    target_index  0 1 3: whose outputs predict 6 7 9
    lengths = [len(row["input_ids"]) for row in rows]
    bins = [[i] for i in range(len(rows))] if max_len is None else best_fit(lengths, max_len)
    width = max(sum(lengths[i] for i in packed) for packed in bins)
    input_ids = torch.full((len(bins), width), pad_token_id)
    labels = torch.full((len(bins), width), IGNORE)
    segment_ids = torch.full((len(bins), width), -1)
    is_prefix = torch.zeros(len(bins), width, dtype=torch.bool)
    position_ids = torch.stack([packed_positions([rows[i] for i in packed], positions, width) for packed in bins])
    for b, packed in enumerate(bins):
        start = 0
        for segment, row in enumerate(rows[i] for i in packed):
            end = start + len(row["input_ids"])
            input_ids[b, start:end] = torch.tensor(row["input_ids"])
            labels[b, start + 1 : end] = torch.tensor(row["labels"][1:])  # nothing predicts a sample's first token
            segment_ids[b, start:end] = segment
            is_prefix[b, start : start + row["num_prefix"]] = True
            start = end
    batch = {
        "input_ids": input_ids,
        "labels": labels,
        "position_ids": position_ids,
        "target_index": target_index(labels),
    }
    if is_prefix.any():
        batch |= {"segment_ids": segment_ids, "is_prefix": is_prefix}
    elif len(bins) < len(rows):
        batch["segment_bounds"] = segment_bounds(segment_ids)
    return batch


def packed_positions(rows, positions, width):
    """(width,) or (2, width) int64: each sample's own positions, where it has none `positions`, 0 for padding."""

    def own(row):
        if "position_ids" in row:
            return torch.tensor(row["position_ids"])
        return positions(len(row["input_ids"]), row["num_prefix"])

    joined = torch.cat([own(row) for row in rows], -1)
    return F.pad(joined, (0, width - joined.shape[-1]))


def segment_bounds(segment_ids):
    """Where segments (padding is one too) begin in the flattened rows, and their end. (B, T) -> (S + 1,) int32."""
    # 0 0 0 1 1 -1 and 0 0 0 0 0 0 -> 0 3 5 6 12
    begins = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=segment_ids.numel()).int()


def to_device(batch, device):
    """A batch of `collate` on `device`."""
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def without_targets(row):
    """The same row with nothing to learn: it stands in where a rank has no row left but must join the others' work."""
    return {**row, "labels": [IGNORE] * len(row["labels"])}


def describe_sample(row, tokenizer):
    """One row as text, its targets between ⟦ and ⟧: what the model is asked and what it is taught.

    Control characters are shown, never sent to a terminal.
    """
    parts, start = [], 0
    flags = [label != IGNORE for label in row["labels"]]
    for end in range(1, len(flags) + 1):
        if end == len(flags) or flags[end] != flags[start]:
            text = "".join(decode_with_names(row["input_ids"][start:end], tokenizer))
            text = CONTROL.sub(lambda match: repr(match[0])[1:-1], text)
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
