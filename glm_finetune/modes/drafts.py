"""A sample, or a prompt, before its texts are ids (Draft), and as the model sees it (Rendered)."""

from typing import NamedTuple

import numpy as np

from glm_finetune.models.loss import IGNORE

FIXED, QUESTION, ANSWER = range(3)  # kinds of parts. Limits.max_src_len counts QUESTION; what is left is ANSWER's


class Draft(NamedTuple):
    """A sample, or a prompt, as it is when nothing is cut; its texts are not ids yet.

    messages, trained: what it is made of, see Template.draft. parts: a str is a text to encode, a tuple has ids, which
    are never cut. kinds, is_target: of each part. num_prefix_parts: how many of them are the bidirectional prefix.
    labels: (T,) list, where they are not the targets' own ids; position_ids: beside them, (T,) or (2, T) list, where
    they are not Mode.positions. Such a draft has no text and is never cut. asks: the part that ends with the turn
    before each answer `trained`; of a prompt, before the answer to come.
    """

    # ChatGLM2, "你好" -> "好": parts     (64790, 64792)  "[Round 1]\n\n问：你好\n\n答："  "好"    (2,)
    #                          kinds      FIXED           QUESTION                         ANSWER  FIXED
    #                          is_target  False           False                            True    True
    messages: list
    trained: list
    parts: tuple
    kinds: tuple
    is_target: tuple
    num_prefix_parts: int = 0
    labels: list | None = None
    position_ids: list | None = None
    asks: tuple = ()

    @property
    def answer_empty(self):
        """Whether an answer to train is ""."""
        return "" in self.parts and not all(self.messages[i]["content"] for i in self.trained)


class Rendered(NamedTuple):
    """A draft as the model sees it.

    ids: a (T,) int32 array for each part of the draft. question_cut: a turn before an answer was cut, answer_cut: an
    answer, history_cut: what stands before the turn (rounds that are forgotten, the system message). Of a draft that
    must not be cut (Limits.truncation None) they say what would be. fits: False where no cutting helps.
    """

    draft: Draft
    ids: list
    question_cut: bool = False
    answer_cut: bool = False
    history_cut: bool = False
    fits: bool = True

    @property
    def is_cut(self):
        return self.question_cut or self.answer_cut or self.history_cut

    @property
    def input_ids(self):
        return np.concatenate(self.ids).tolist()

    @property
    def labels(self):
        """As long as input_ids, not shifted; -100 = not a target."""
        if self.draft.labels is not None:
            return self.draft.labels
        parts = zip(self.ids, self.draft.is_target)
        return np.concatenate([part if learns else np.full_like(part, IGNORE) for part, learns in parts]).tolist()

    @property
    def num_prefix(self):
        """Tokens of the bidirectional prefix (0 in causal modes)."""
        return sum(map(len, self.ids[: self.draft.num_prefix_parts]))

    @property
    def num_question(self):
        """Tokens before the last answer that Limits.max_src_len counts."""
        return num_tokens(self.draft, self.ids)[0]

    @property
    def row(self):
        """A row of a data set."""
        row = {"input_ids": self.input_ids, "labels": self.labels, "num_prefix": self.num_prefix}
        return row if self.draft.position_ids is None else {**row, "position_ids": self.draft.position_ids}


def num_tokens(draft, ids):
    """(tokens of QUESTION, of ANSWER). ids: of each part."""
    counts = [0, 0, 0]
    for kind, part in zip(draft.kinds, ids):
        counts[kind] += len(part)
    return counts[QUESTION], counts[ANSWER]
