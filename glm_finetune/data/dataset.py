"""Data sets, and their rows -> batches. Every rank sees the whole data set; `sampler` says which rows are whose.

The batch contract, which every model reads (B rows, T tokens, right-padded):
  input_ids (B, T), labels (B, T) with -100 where there is no target, position_ids (B, T) or (B, 2, T),
  target_index (N,): see `loss.target_index`; and, only where causal attention is not enough,
  segment_ids (B, T), -1 = padding, and is_prefix (B, T) bool: see `models.layers.visible`; or, where causal attention
  within samples is enough, segment_bounds (S + 1,) int32 and longest_segment: see `models.layers.Segments`.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from glm_finetune.data.cache import prepared
from glm_finetune.data.files import list_data_files
from glm_finetune.data.packing import best_fit
from glm_finetune.data.prepare import in_memory
from glm_finetune.data.stream import Stream
from glm_finetune.models.loss import IGNORE, target_index


class InstructionDataset(Sequence):
    """The samples of files: {"input_ids", "labels", "num_prefix"} of lists, and "position_ids" where a sample has its
    own. rows: `columns.Samples`, or a `Stream`. report: what became of the rows of the files.
    """

    def __init__(self, path, settings, progress=False, cache_dir=None, overwrite_cache=False, window=None):
        """path: see `files.list_data_files`. settings: `samples.settings_of`. cache_dir: where samples are prepared, or
        found (see `cache`); None: in memory. progress: show a bar. window: render rows when they are asked for, best in
        windows of so many (see `stream`). Raises UserError for a bad row, or if no row is left.
        """
        self.data_files = list_data_files(path)
        if window:
            self.rows = Stream(self.data_files, settings, window, cache_dir)
        elif cache_dir:
            self.rows = prepared(self.data_files, settings, cache_dir, overwrite_cache, progress)
        else:
            self.rows = in_memory(self.data_files, settings, progress)
        self.report = self.rows.report
        if not len(self):
            raise self.report.nothing_left(path)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, index):
        chosen = range(len(self))[index]  # a number, or a range of them
        return [self.rows[i] for i in chosen] if isinstance(index, slice) else self.rows[chosen]

    def where(self, index):
        """File and line that a sample is from."""
        file, number = self.rows.place(index)
        return self.data_files[file].where(number)

    def lengths(self):
        """(N,) int64: tokens of each row. Not for streams, which do not know."""
        return self.rows.lengths()


def collate(rows, pad_token_id, positions, max_len=None):
    """Rows of `InstructionDataset` -> a batch (see the top), padded on the right to the longest row.

    positions: Mode.positions, for samples without their own. max_len: None = a row of the batch for each row of data;
    otherwise samples are packed, end to end in as few rows of at most max_len tokens as best-fit finds, with the same
    attention, positions and losses.
    """
    # Samples 5 6 7 (targets 6 7) and 8 9 (target 9) packed, beside a longer row, with a causal mode:
    # input_ids    5    6    7    8    9    0       position_ids  0 1 2 0 1 0     segment_ids  0 0 0 1 1 -1
    # labels       -100 6    7    -100 9    -100    target_index  0 1 3: whose outputs predict 6 7 9
    lengths, prefixes = [len(row["input_ids"]) for row in rows], [row["num_prefix"] for row in rows]
    bins = [[i] for i in range(len(rows))] if max_len is None else best_fit(lengths, max_len)
    width = max(sum(lengths[i] for i in packed) for packed in bins)

    def laid_out(values, padding):
        """What each row of data has, (n,) or (2, n) -> (B, T) or (B, 2, T)."""
        lines = (torch.cat([torch.as_tensor(values[i]) for i in packed], -1) for packed in bins)
        return torch.stack([F.pad(line, (0, width - line.shape[-1]), value=padding) for line in lines])

    labels = laid_out([[IGNORE, *row["labels"][1:]] for row in rows], IGNORE)  # nothing predicts a sample's first token
    own = [row.get("position_ids") or positions(*sizes) for row, *sizes in zip(rows, lengths, prefixes)]
    batch = {
        "input_ids": laid_out([row["input_ids"] for row in rows], pad_token_id),
        "labels": labels,
        "position_ids": laid_out(own, 0),
        "target_index": target_index(labels),
    }
    needs_no_mask = not any(prefixes) and len(bins) == len(rows)
    return batch if needs_no_mask else batch | _segments(bins, lengths, prefixes, laid_out)


def _segments(bins, lengths, prefixes, laid_out):
    """What a batch has besides where attention is more than causal: segments, and what is a prefix in them."""
    segment_of = {i: segment for packed in bins for segment, i in enumerate(packed)}
    segment_ids = laid_out([[segment_of[i]] * length for i, length in enumerate(lengths)], -1)
    if not any(prefixes):
        bounds = segment_bounds(segment_ids)
        return {"segment_bounds": bounds, "longest_segment": int(bounds.diff().max())}
    is_prefix = [torch.arange(length) < prefix for length, prefix in zip(lengths, prefixes)]
    return {"segment_ids": segment_ids, "is_prefix": laid_out(is_prefix, False)}


def segment_bounds(segment_ids):
    """Where segments (padding is one too) begin in the flattened rows, and their end. (B, T) -> (S + 1,) int32."""
    # 0 0 0 1 1 -1 and 0 0 0 0 0 0 -> 0 3 5 6 12
    begins = F.pad(segment_ids.diff(dim=1) != 0, (1, 0), value=True)
    return F.pad(begins.flatten().nonzero()[:, 0], (0, 1), value=segment_ids.numel()).int()


def to_device(batch, device):
    """A batch of `collate` on `device`."""
    tensors = {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}
    return batch | {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}


def without_targets(row):
    """The same row with nothing to learn: it stands in where a rank has no row left but must join the others' work."""
    return {**row, "labels": [IGNORE] * len(row["labels"])}
