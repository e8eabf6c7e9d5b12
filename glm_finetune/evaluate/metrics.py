"""Scores of triple extraction, as ChatGLM-Finetuning counts them.

An answer is lines of `head_relation_tail`. Predicted lines count only if they have exactly three parts; gold lines
all do.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class TripleScores:
    """mean_f1: mean over samples of each sample's F1 (the original's figure). The others are over all triples."""

    mean_f1: float
    precision: float
    recall: float
    f1: float
    exact: float  # share of samples whose set of triples is right


def triple_scores(pairs):
    """pairs: list of (predicted answer, its references), not empty -> TripleScores, all between 0 and 1.

    Of several references of a sample the one counts that gives the best F1.
    """
    counts, num_exact = [], 0
    for predicted, references in pairs:
        predicted = {line for line in predicted.split("\n") if len(line.split("_")) == 3}
        known = [set(gold.split("\n")) for gold in references]
        compared = [(len(predicted & gold), len(predicted), len(gold)) for gold in known]
        counts.append(max(compared, key=lambda numbers: _f1(*numbers)))
        num_exact += predicted in known
    num_right, num_predicted, num_gold = map(sum, zip(*counts))
    return TripleScores(
        sum(_f1(*numbers) for numbers in counts) / len(counts),
        num_right / max(num_predicted, 1),
        num_right / max(num_gold, 1),
        _f1(num_right, num_predicted, num_gold),
        num_exact / len(pairs),
    )


def _f1(right, predicted, gold):
    """2 P R / (P + R) = 2 right / (predicted + gold); 0 where nothing is right."""
    return 2 * right / (predicted + gold) if right else 0.0
