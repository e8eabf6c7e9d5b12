"""Which of some texts is nearly the same as another: five characters in a row, of which four fifths are shared.

    NearIndex([("eval.json, line 3", "水温高怎么办")]).nearest("水温 高，怎么办？")     # "eval.json, line 3"

Letters and digits count, whatever their case and width; blanks and punctuation do not. The Jaccard index of the sets of
all runs of SIZE characters is exact: no hashing, no sampling.
"""

import math
import re
import unicodedata

SIZE, LEAST = 5, 0.8
IGNORED = re.compile(r"[\W_]+")


def runs_of(text):
    """The runs of SIZE characters in a text, a set; a shorter text is one run."""
    text = IGNORED.sub("", unicodedata.normalize("NFKC", text).casefold())
    return {text[i : i + SIZE] for i in range(max(1, len(text) - SIZE + 1))}


class NearIndex:
    """texts: (place, text), of which one is looked for. Memory and time follow their length."""

    def __init__(self, texts):
        self.runs = [(place, runs_of(text)) for place, text in texts]
        counts = {}
        for _, runs in self.runs:
            for run in runs:
                counts[run] = counts.get(run, 0) + 1
        # Two sets with a Jaccard index of LEAST share one of the 1 - LEAST rarest of either (prefix filtering).
        self.counts, self.places = counts, {}
        for i, (_, runs) in enumerate(self.runs):
            for run in sorted(runs, key=lambda run: (counts[run], run))[: self._prefix(runs)]:
                self.places.setdefault(run, []).append(i)

    @staticmethod
    def _prefix(runs):
        return len(runs) - math.ceil(LEAST * len(runs)) + 1

    def nearest(self, text):
        """The place of a text that is nearly `text`, or None."""
        runs = runs_of(text)
        shared = runs & self.counts.keys()
        if len(shared) < LEAST * len(runs):  # most texts: be quick
            return None
        rest = max(0, self._prefix(runs) - (len(runs) - len(shared)))  # the rarest are those that no text here has
        rarest = sorted(shared, key=lambda run: (self.counts[run], run))[:rest]
        for i in {i for run in rarest for i in self.places.get(run, ())}:
            place, other = self.runs[i]
            both = len(runs & other)
            if both >= LEAST * (len(runs) + len(other) - both):
                return place
        return None
