"""Rows of a file that is not prepared: each is rendered when it is asked for. Memory holds the lines of two windows.

The file is read once at the first start (`files.scan`: a hash and an index of blocks, remembered in the cache), so its
number of rows is known and any row can be found at once. Shuffling is the sampler's: it permutes the rows of a window,
which plays the part of a shuffling buffer, by seed, epoch and window alone. So a position is a number of rows, as for
prepared data, and a resumed run goes on exactly there without reading what came before.
"""

from bisect import bisect_right
from dataclasses import replace

from glm_finetune.data.cache import naming_the_cache
from glm_finetune.data.files import layout_of, rows_of
from glm_finetune.data.recipe import Report
from glm_finetune.loss import IGNORE


class Stream:
    """The rows of a file by number. A row that --is_skip leaves out stays, without targets."""

    def __init__(self, path, recipe, window, cache_dir=None):
        """window: rows that are kept together in memory, rows [0, window), [window, 2 * window), ..."""
        self.path, self.recipe, self.window = path, recipe, window
        with naming_the_cache(cache_dir):
            self.layout = layout_of(path, cache_dir)
        self.report = f"rows {self.layout.num_rows:,}, streamed: what is cut, skipped or empty is not known beforehand"
        self.unit = self.layout.blocks[0].unit
        self._first_rows = [block.first_row for block in self.layout.blocks]
        self._windows = {}  # number of a window: its rows; the newest two, since a step may span two

    def __len__(self):
        return self.layout.num_rows

    def __getitem__(self, index):
        """Raises ValueError naming file and line for a row that is none, or that does not make one sample."""
        number, row = self._rows_of_window(index // self.window)[index % self.window]
        where = f"{self.path}, {self.unit} {number}"
        samples = self.recipe.samples(row, where, Report())
        if len(samples) > 1:
            raise ValueError(f"{where}: makes {len(samples)} samples, --streaming takes one a row. Leave it out.")
        is_kept = bool(samples)
        sample = samples[0] if is_kept else replace(self.recipe, is_skip=False).samples(row, where, Report())[0]
        labels = sample.labels if is_kept else [IGNORE] * len(sample.labels)
        return {"input_ids": sample.input_ids, "labels": labels, "num_prefix": sample.num_prefix}

    def where(self, index):
        return f"{self.path}, {self.unit} {self._rows_of_window(index // self.window)[index % self.window][0]}"

    def _rows_of_window(self, window):
        """(number, row) of the rows of a window, read where they begin."""
        if window not in self._windows:
            first = window * self.window
            self._windows = {w: rows for w, rows in self._windows.items() if abs(w - window) == 1}
            self._windows[window] = list(self._read(first, min(first + self.window, len(self))))
        return self._windows[window]

    def _read(self, start, end):
        block = bisect_right(self._first_rows, start) - 1
        place = self._first_rows[block]
        while place < end:
            for entry in rows_of(self.layout.blocks[block]):
                if place >= end:
                    return
                if place >= start:
                    yield entry
                place += 1
            block += 1
