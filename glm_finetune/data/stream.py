"""Rows of JSON lines that are not prepared: each is rendered when it is asked for. Memory holds two windows of them.

Every file is read once at the first start (`blocks.scan`: a hash and an index of blocks, remembered in the cache), so
the number of rows is known and any row can be found at once. That needs exactly one sample a row: anything else is an
error. Shuffling is the sampler's: it permutes the rows of a window, which plays the part of a shuffling buffer, by
seed, epoch and window alone. So a position is a number of rows, as for prepared data, and a resumed run goes on exactly
there without reading what came before.
"""

from bisect import bisect_right
from itertools import islice

from glm_finetune.data.blocks import check_unchanged, layout_of, signatures
from glm_finetune.data.cache import naming_the_cache
from glm_finetune.data.report import Report
from glm_finetune.data.samples import first_rows, of_files, prepare_row
from glm_finetune.errors import UserError

LEAVE = "Leave --streaming out."


class Stream:
    """The rows of files by number."""

    def __init__(self, data_files, settings, window, cache_dir=None):
        """window: rows that are kept together in memory, rows [0, window), [window, 2 * window), ...

        Raises UserError for a file that is no plain JSON lines or has a weight, and for first rows that do not make
        one sample each.
        """
        self.data_files, self.window, self._blocks, self._first_rows, num_rows = data_files, window, [], [], 0
        self._before = signatures(data_files)
        for position, data_file in enumerate(data_files):
            if not data_file.has_blocks or data_file.weight != 1:
                problem = f"has the weight {float(data_file.weight):g}" if data_file.has_blocks else "is none"
                raise UserError(
                    f"{data_file.path}: --streaming reads files of JSON lines, not compressed, without a weight; this "
                    f"one {problem}. {LEAVE}"
                )
            with naming_the_cache(cache_dir):
                layout = layout_of(data_file, data_file.path, cache_dir)
            for block in layout.blocks:
                self._blocks.append((position, block))
                self._first_rows.append(num_rows + block.first_row)
            num_rows += layout.num_rows
        self._settings = of_files(data_files, settings)
        self.report = Report(rows=num_rows, streamed=True, formats=[known.data_format for known in self._settings])
        self._windows = {}  # number of a window: its rows; the newest two, since a step may span two
        for data_file, known in zip(data_files, self._settings):
            for number, row in first_rows(data_file, known):
                sample_of(data_file.where(number), row, known)

    def __len__(self):
        return self.report.rows

    def __getitem__(self, index):
        """Raises UserError naming file and line for a row that is none, or that does not make one sample."""
        position, number, row = self._row(index)
        return sample_of(self.data_files[position].where(number), row, self._settings[position])

    def place(self, index):
        """(which of the files, number in it) of a row."""
        return self._row(index)[:2]

    def _row(self, index):
        """(which file, number in it, dict or Unreadable)."""
        # windows of 4: row 5 is in window 1, rows 4 to 7; window 0 stays for a step that has rows 3 and 4
        window = index // self.window
        if window not in self._windows:
            first = window * self.window
            self._windows = {w: rows for w, rows in self._windows.items() if abs(w - window) == 1}
            check_unchanged(self._before)
            self._windows[window] = list(self._read(first, min(first + self.window, len(self))))
        return self._windows[window][index % self.window]

    def _read(self, start, end):
        at = bisect_right(self._first_rows, start) - 1
        for row_number, (position, block) in zip(self._first_rows[at:], self._blocks[at:]):
            if row_number >= end:
                return
            for number, row in islice(block.rows(), max(start - row_number, 0), end - row_number):
                yield position, number, row


def sample_of(where, row, settings):
    """The one sample of a row. Raises UserError naming `where` if it makes none, several, or one that cannot fit."""
    rendered = prepare_row(where, row, settings)
    if len(rendered) != 1:
        raise UserError(f"{where}: makes {len(rendered)} samples, --streaming takes one of each row. {LEAVE}")
    if not rendered[0].fits:
        raise UserError(f"{where}: its roles and calls of tools alone do not fit into --max_len. {LEAVE}")
    return rendered[0].row
