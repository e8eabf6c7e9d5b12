"""Which samples of a micro-batch lie together in a row of the batch.

best_fit([900, 300, 500], max_len=1024)    # -> [[0], [2, 1]]
"""


def best_fit(lengths, max_len):
    """Groups of indices whose lengths sum to at most `max_len`, with little padding when all are as wide as the widest.

    Best-fit decreasing (Johnson 1974) says how few rows are enough; so many or more, filled evenly, may pad less.
    lengths: tokens of each sample, at most max_len. Of equal arrangements the one with fewest rows is taken.
    """
    assert max(lengths) <= max_len, f"a sample of {max(lengths)} tokens cannot be packed into rows of {max_len}"
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    fewest = _fill(lengths, order, max_len)
    found = [fewest, *(_spread(lengths, order, count) for count in range(len(fewest), len(lengths) + 1))]
    sized = [(max(sum(lengths[i] for i in row) for row in rows), rows) for rows in found]
    return min((pair for pair in sized if pair[0] <= max_len), key=lambda pair: pair[0] * len(pair[1]))[1]


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


def _spread(lengths, order, count):
    """Each sample into the emptiest of `count` rows."""
    rows, sizes = [[] for _ in range(count)], [0] * count
    for i in order:
        emptiest = sizes.index(min(sizes))
        rows[emptiest].append(i)
        sizes[emptiest] += lengths[i]
    return rows
