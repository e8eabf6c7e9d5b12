"""Histograms of lengths as a PNG, drawn with Pillow. The text is ASCII, so that no font can lack a character.

save_histograms([Panel("tokens of a sample", Counter({12: 3, 40: 1}), "max_len", 1024)], "lengths.png")
"""

import math
from collections import Counter
from dataclasses import dataclass

from glm_finetune.data.report import percentile
from glm_finetune.errors import UserError

WIDTH, HEIGHT = 1200, 440  # pixels of a panel
LEFT, RIGHT, TOP, BOTTOM = 110, 40, 84, 76  # margins around its bars
NUM_BINS = 60  # about
INK, GREY, GRID, BAR, OVER, LIMIT = "#1f2933", "#616e7c", "#e4e7eb", "#3e7cb1", "#d9822b", "#b42318"


@dataclass(frozen=True)
class Panel:
    """lengths: tokens -> how many samples have that many. limit: marked with its name; samples beyond it stand out."""

    title: str
    lengths: Counter
    limit_name: str
    limit: int


def save_histograms(panels, path):
    """Draw the panels below each other. Raises UserError if Pillow is not installed or the file cannot be written."""
    try:
        from PIL import Image, ImageDraw
    except ImportError:
        raise UserError(f"{path}: drawing it needs Pillow: pip install pillow") from None
    image = Image.new("RGB", (WIDTH, HEIGHT * len(panels)), "white")
    draw = ImageDraw.Draw(image)
    for i, panel in enumerate(panels):
        _draw_panel(draw, panel, i * HEIGHT)
    try:
        image.save(path, format="PNG")
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error}).") from None


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


def _font(size):
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _draw_panel(draw, panel, top):
    width, counts, over, num_outside = bins_of(panel)
    right, highest = width * len(counts), max([1, *counts])
    step = nice_step(highest, 5)
    tallest = step * math.ceil(highest / step)

    def at(tokens, samples=0):
        x = LEFT + (WIDTH - LEFT - RIGHT) * tokens / right
        return x, top + HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * samples / tallest

    _draw_titles(draw, panel, top, num_outside)
    for value in range(0, tallest + 1, step):
        draw.line([at(0, value), at(right, value)], fill=GRID, width=1)
        draw.text((LEFT - 12, at(0, value)[1]), f"{value:,}", fill=GREY, font=_font(17), anchor="rm")
    for i, (count, num_over) in enumerate(zip(counts, over)):
        (x0, bottom), (x1, _) = at(i * width), at((i + 1) * width)
        for colour, height, base in ((OVER, count, count - num_over), (BAR, count - num_over, 0)):
            if height > base:
                y0, y1 = at(0, height)[1], at(0, base)[1]
                draw.rectangle([x0 + 1, min(y0, bottom - 2), x1 - 1, y1], fill=colour)
    draw.line([at(0), at(right)], fill=INK, width=2)
    for value in range(0, right + 1, nice_step(right, 12)):
        x, y = at(value)
        draw.line([(x, y), (x, y + 6)], fill=INK, width=2)
        draw.text((x, y + 12), f"{value:,}", fill=GREY, font=_font(17), anchor="mt")
    draw.text((at(right / 2)[0], top + HEIGHT - 14), panel.title, fill=INK, font=_font(19), anchor="ms")
    if panel.limit <= right:
        _draw_limit(draw, at(panel.limit, tallest), at(panel.limit), f"{panel.limit_name} {panel.limit:,}")


def _draw_titles(draw, panel, top, num_outside):
    """Above the bars: the title, then the numbers that one looks for."""
    lengths, total = panel.lengths, max(1, panel.lengths.total())
    longer = sum(count for length, count in lengths.items() if length > panel.limit)
    numbers = ", ".join(f"{percent}% up to {percentile(lengths, percent):,}" for percent in (50, 90, 99))
    facts = f"{numbers}, longest {max(lengths, default=0):,}"
    facts += f"; {num_outside:,} right of the axis" if num_outside else ""
    draw.text((LEFT, top + 14), f"{lengths.total():,} samples by {panel.title}", fill=INK, font=_font(23))
    draw.text((LEFT, top + 46), facts, fill=GREY, font=_font(17))
    over = f"{longer:,} ({100 * longer / total:.1f}%) over {panel.limit_name} {panel.limit:,}"
    draw.text((WIDTH - RIGHT, top + 16), over, fill=LIMIT if longer else GREY, font=_font(19), anchor="rt")
    draw.text((LEFT - 12, top + TOP - 22), "samples", fill=GREY, font=_font(17), anchor="rm")


def _draw_limit(draw, above, below, label):
    """A dashed line with its label on the side where there is room."""
    (x, y), end = above, below[1]
    while y < end:
        draw.line([(x, y), (x, min(y + 9, end))], fill=LIMIT, width=2)
        y += 15
    at, anchor = (x - 8, "ra") if x > WIDTH - RIGHT - 170 else (x + 8, "la")
    draw.text((at, above[1] + 2), label, fill=LIMIT, font=_font(17), anchor=anchor)
