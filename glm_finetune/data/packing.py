"""Which samples of a micro-batch lie together in a row of the batch.

best_fit([900, 300, 500], max_len=1024)    # -> [[0], [2, 1]]
"""

from heapq import heapreplace

MAX_TRIED = 64  # numbers of rows; more never padded less in trials with up to 512 samples


def best_fit(lengths, max_len):
    """Groups of indices whose lengths sum to at most `max_len`, with little padding when all are as wide as the widest.

    Best-fit decreasing (Johnson 1974) says how few rows are enough; so many or more, filled evenly, may pad less.
    lengths: tokens of each sample, at most max_len. Of arrangements with equal padding the one with fewest rows.
    """
    # lengths 6 5 4 3 2 2, max_len 12: best fit makes [6 5] [4 3 2 2], 2 rows of 11: nothing is padded.
    # lengths 7 7 7, max_len 15: [7 7] [7] is 2 x 14 = 28 places for 21 tokens; 3 rows of 7 are 21.
    assert max(lengths) <= max_len, f"a sample of {max(lengths)} tokens cannot be packed into rows of {max_len}"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    descending, total = [lengths[i] for i in order], sum(lengths)
    rows = _fill(lengths, order, max_len)
    size, chosen, tried = len(rows) * max(sum(lengths[i] for i in row) for row in rows), None, 0
    for count in range(len(rows), len(lengths) + 1):
        if count * descending[0] >= size or tried == MAX_TRIED:  # no row is narrower than the longest sample
            break
        if count * -(-total // count) < size:  # else not even an even split is smaller
            tried += 1
            width = _spread_width(descending, count)
            if width <= max_len and count * width < size:
                size, chosen = count * width, count
    return rows if chosen is None else _spread(lengths, order, chosen)


def _fill(lengths, order, capacity):
    """Each sample into the fullest row that has room for it."""
    rows, rooms = [], []
    for i in order:
        fitting = [r for r, room in enumerate(rooms) if room >= lengths[i]]
        if not fitting:
            rows.append([])
            rooms.append(capacity)
        best = min(fitting, key=rooms.__getitem__) if fitting else -1
        rows[best].append(i)
        rooms[best] -= lengths[i]
    return rows


def _spread_width(descending, count):
    """The widest row of `_spread`, without its rows: the sizes alone, in a heap."""
    sizes = descending[:count][::-1]
    for length in descending[count:]:
        heapreplace(sizes, sizes[0] + length)
    return max(sizes)


def _spread(lengths, order, count):
    """Each sample into the emptiest of `count` rows."""
    rows, sizes = [[] for _ in range(count)], [0] * count
    for i in order:
        emptiest = sizes.index(min(sizes))
        rows[emptiest].append(i)
        sizes[emptiest] += lengths[i]
    return rows
