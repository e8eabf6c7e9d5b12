"""Which samples of a micro-batch lie together in a row of the batch.

best_fit([900, 300, 500], max_len=1024)    # -> [[0], [2, 1]]
"""

MAX_TRIES = 32


def best_fit(lengths, max_len):
    """Groups of indices whose lengths sum to at most `max_len`: best-fit decreasing (Johnson 1974).

    All rows of a batch are as wide as its widest, so with the number of rows settled they are made as even as a few
    narrower tries allow. lengths: tokens of each sample, at most max_len.
    """
    assert max(lengths) <= max_len, f"a sample of {max(lengths)} tokens cannot be packed into rows of {max_len}"
    bins = _fill(lengths, max_len)
    narrowest = max(max(lengths), -(-sum(lengths) // len(bins)))
    widest = max(sum(lengths[i] for i in packed) for packed in bins)
    step = max(1, -(-(widest - narrowest) // MAX_TRIES))
    for width in range(narrowest, widest, step):
        tried = _fill(lengths, width)
        if len(tried) == len(bins):
            return tried
    return bins


def _fill(lengths, capacity):
    bins, rooms = [], []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        fitting = [b for b, room in enumerate(rooms) if room >= lengths[i]]
        if fitting:
            best = min(fitting, key=rooms.__getitem__)
            bins[best].append(i)
            rooms[best] -= lengths[i]
        else:
            bins.append([i])
            rooms.append(capacity - lengths[i])
    return bins
