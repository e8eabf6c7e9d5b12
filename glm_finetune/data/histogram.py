"""Histograms of lengths as a PNG, drawn with matplotlib. The text is ASCII, so that no font can lack a character.

save_histograms([Panel("tokens of a sample", Counter({12: 3, 40: 1}), "max_len", 1024)], "lengths.png")
"""

import math
from collections import Counter
from dataclasses import dataclass

from glm_finetune.data.report import percentile
from glm_finetune.errors import UserError

NUM_BINS = 60  # about
GREY, BAR, OVER, LIMIT = "#616e7c", "#3e7cb1", "#d9822b", "#b42318"


@dataclass(frozen=True)
class Panel:
    """lengths: tokens -> how many samples have that many. limit: marked with its name; samples beyond it stand out."""

    title: str
    lengths: Counter
    limit_name: str
    limit: int


def save_histograms(panels, path):
    """Draw the panels below each other. Raises UserError without matplotlib, or if the file cannot be written."""
    try:
        figure = figure_of(panels)
    except ImportError:
        raise UserError(f"{path}: drawing it needs matplotlib: pip install matplotlib") from None
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}).") from None


def figure_of(panels):
    """The panels as a matplotlib Figure that belongs to no window. Raises ImportError without matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.4 * len(panels)), dpi=100, layout="constrained")
    for axes, panel in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels):
        _draw_panel(axes, panel)
    return figure


def nice_step(span, num):
    """The smallest of 1, 2, 5, 10, 20, ... that divides `span` into at most `num` parts."""
    power = 10 ** max(0, math.floor(math.log10(max(span / num, 1))))
    return next(step for step in (power, 2 * power, 5 * power, 10 * power) if step * num >= span)


def bins_of(panel):
    """(width of a bin, counts, how many of each are over the limit, number of samples right of the last bin).

    Bin i has lengths above i * width. The axis ends at twice the 99th percentile, so that one very long sample does not
    flatten the rest, but shows a limit that lies within reach of the samples.
    """
    longest, usual = max(panel.lengths, default=1), 2 * percentile(panel.lengths, 99)
    right = max(1, min(longest, usual))
    if panel.limit <= 1.5 * right:
        right = max(right, math.ceil(1.05 * panel.limit))
    width = nice_step(right, NUM_BINS)
    counts = [0] * math.ceil(right / width)
    over = list(counts)
    for length, count in panel.lengths.items():
        i = max(0, length - 1) // width
        if i < len(counts):
            counts[i] += count
            over[i] += count if length > panel.limit else 0
    return width, counts, over, panel.lengths.total() - sum(counts)


def _draw_panel(axes, panel):
    width, counts, over, num_outside = bins_of(panel)
    edges, inside = [width * i for i in range(len(counts))], [count - num for count, num in zip(counts, over)]
    for bottom, heights, colour in ((None, inside, BAR), (inside, over, OVER)):
        if any(heights):
            axes.bar(edges, heights, 0.95 * width, bottom, align="edge", color=colour)
    axes.set(xlim=(0, width * len(counts)), ylim=(0, 1.05 * max([1, *counts])))
    axes.grid(axis="y", color=GREY, alpha=0.2)
    for axis in (axes.xaxis, axes.yaxis):
        axis.get_major_locator().set_params(integer=True)
        axis.set_major_formatter("{x:,.0f}")
    axes.set(xlabel=panel.title, ylabel="samples", axisbelow=True)
    if panel.limit <= width * len(counts):
        axes.axvline(panel.limit, color=LIMIT, linestyle="--", label=f"{panel.limit_name} {panel.limit:,}")
        axes.legend(loc="upper right")
    lengths, longer = panel.lengths, sum(count for length, count in panel.lengths.items() if length > panel.limit)
    numbers = ", ".join(f"{percent}% up to {percentile(lengths, percent):,}" for percent in (50, 90, 99))
    facts = f"{numbers}, longest {max(lengths, default=0):,}"
    facts += f"; {num_outside:,} right of the axis" if num_outside else ""
    share = 100 * longer / max(1, lengths.total())
    axes.set_title(f"{lengths.total():,} samples by {panel.title}\n{facts}", loc="left", fontsize=11)
    title = f"{longer:,} ({share:.1f}%) over {panel.limit_name} {panel.limit:,}"
    axes.set_title(title, loc="right", fontsize=11, color=LIMIT if longer else GREY)
