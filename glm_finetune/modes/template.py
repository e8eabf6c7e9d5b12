"""How a mode writes a conversation: first as drafts, texts beside special tokens; then as ids, cut where they must be.

    form = MODE["glm3"].form
    form.samples(tokenizer, messages, limits)       # what is trained
    form.render(tokenizer, messages)                # one answer, or the prompt for one

The two steps are apart so that the texts of many rows can be encoded in one call (`data/prepare.py`): that is what
makes preparation fast.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import chain, compress
from typing import NamedTuple

import numpy as np

from glm_finetune.errors import UserError
from glm_finetune.models.loss import IGNORE
from glm_finetune.modes.spec import Rendered

FIXED, SOURCE, ANSWER = range(3)  # kinds of parts. Limits.max_src_len counts SOURCE; what is left is ANSWER's


class Draft(NamedTuple):
    """A sample, or a prompt, as it is when nothing is cut; its texts are not ids yet.

    parts: a str is a text to encode, a tuple has ids, which are never cut. kinds, is_target: of each part.
    num_prefix_parts: how many of them are the bidirectional prefix. answer_empty: an answer to train is "".
    """

    parts: tuple
    kinds: tuple
    is_target: tuple
    num_prefix_parts: int = 0
    answer_empty: bool = False


@dataclass(frozen=True)
class Form:
    """draft(tokenizer, messages, template, trained) -> Draft that ends with answer trained[-1] and what follows it; its
    targets are the answers `trained`, places in messages. Without any: the prompt after all messages.

    question_tail: tokens at the end of a text before an answer that are never cut. overhead: tokens kept free beside
    source and answer. joins_answers: whether one sample has all answers of a conversation. text_prefix: tokens of the
    bidirectional prefix of a text to continue training on, which stands after tokenizer.prefix_ids.
    """

    draft: Callable
    question_tail: int
    overhead: int
    joins_answers: bool = False
    text_prefix: int = 0

    def fits(self, num_source, num_answer, limits):
        """Whether nothing of so many tokens must be cut. int, or arrays of them -> bool, or an array."""
        if limits is None:
            return num_source == num_source
        return (num_source <= limits.max_src_len) & (num_source + num_answer <= limits.max_len - self.overhead)

    def drafts(self, tokenizer, messages, template, train_on):
        """The samples of a conversation if none must be cut: they are `samples` then."""
        trained = trained_turns(messages, train_on)
        if self.joins_answers:
            return [self.draft(tokenizer, messages, template, trained)] if trained else []
        return [self.draft(tokenizer, messages, template, [i]) for i in trained]

    def render(self, tokenizer, messages, limits=None, template="train"):
        """See Mode.render."""
        if not messages:
            raise UserError("an empty conversation.")
        last = len(messages) - 1
        trained = [last] if messages[last]["role"] == "assistant" else []
        return self._alone(tokenizer, cache(tokenizer.encode_text), messages, limits, template, trained)

    def samples(self, tokenizer, messages, limits=None, template="train", train_on="all"):
        """See Mode.samples. Joined answers: those that fit together are one sample, each of the others its own."""
        encode = cache(tokenizer.encode_text)  # parts of a conversation come again and again when it is too long
        if messages[0]["role"] == "text":
            return self._pieces(tokenizer, encode(messages[0]["content"]), limits)
        trained = trained_turns(messages, train_on)
        rows, alone = [], trained
        for count in range(len(trained) if self.joins_answers else 0, 0, -1):
            draft = self.draft(tokenizer, messages, template, trained[:count])
            ids = encoded(draft, encode)
            if self.fits(*num_tokens(draft, ids), limits):
                rows, alone = [complete(draft, ids)], trained[count:]
                break
        return rows + [self._alone(tokenizer, encode, messages, limits, template, [i]) for i in alone]

    def _alone(self, tokenizer, encode, messages, limits, template, trained):
        """One answer (or none: a prompt) after all that is before it."""

        def made(messages, trained):
            draft = self.draft(tokenizer, messages, template, trained)
            return draft, encoded(draft, encode)

        draft, ids = made(messages, trained)
        if self.fits(*num_tokens(draft, ids), limits):
            return complete(draft, ids)
        source_cut = num_tokens(draft, ids)[0] > limits.max_src_len
        if source_cut and limits.truncation == "head":
            for kept in newest_rounds(messages, trained):
                draft, ids = made(*kept)
                if num_tokens(draft, ids)[0] <= limits.max_src_len:
                    break
        return self._cut(draft, ids, limits, source_cut)

    def _cut(self, draft, ids, limits, source_cut):
        """The draft without the tokens that limits leave no room for."""
        lengths = [len(part) for part in ids]
        ends = np.cumsum(lengths)
        kinds, is_text, end = (
            np.repeat(values, lengths)
            for values in (draft.kinds, [isinstance(part, str) for part in draft.parts], ends)  # of each token
        )
        can_go = is_text & (np.arange(ends[-1]) < end - self.question_tail)
        free, answer = np.flatnonzero((kinds == SOURCE) & can_go), np.flatnonzero(kinds == ANSWER)
        num_source = int(np.count_nonzero(kinds == SOURCE))
        excess = max(0, num_source - limits.max_src_len)
        if excess > len(free):
            forget = ", or use --truncation head, which forgets the oldest rounds"
            raise UserError(
                f"its role tokens alone are more than --max_src_len {limits.max_src_len} (what --max_length leaves, in "
                f"prediction): raise it{forget if limits.truncation != 'head' else ''}."
            )
        start = {"tail": len(free) - excess, "head": 0, "middle": (len(free) - excess) // 2}[limits.truncation]
        room = max(0, limits.max_len - self.overhead - num_source + excess)
        stays = np.ones(ends[-1], np.bool_)
        stays[free[start : start + excess]] = False
        stays[answer[room:]] = False
        if len(answer) > room and not limits.end_cut_answers:
            stays[-1] = False
        ids = [list(compress(part, stay)) for part, stay in zip(ids, np.split(stays, ends[:-1]))]
        return complete(draft, ids, source_cut, len(answer) > room)

    def _pieces(self, tokenizer, ids, limits):
        """A text as pieces of at most max_len tokens, each after the tokenizer's prefix_ids, only the last one ended.

        Everything after the prefix and the mode's own beginning is a target: nothing is lost, nothing overlaps.
        """
        begin = tokenizer.prefix_ids
        room = limits.max_len - len(begin) - 1 if limits else len(ids) or 1
        pieces = [ids[i : i + room] for i in range(0, len(ids), room)]
        rows = [begin + piece + ([tokenizer.eos_token_id] if piece is pieces[-1] else []) for piece in pieces]
        hidden = self.text_prefix or len(begin)
        return [Rendered(row, [IGNORE] * hidden + row[hidden:], self.text_prefix) for row in rows]


def trained_turns(messages, train_on):
    """Places of the assistant messages to train: all ("last": the last one), without those whose `loss` is False."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return [i for i in chosen if messages[i].get("loss", True)]


def newest_rounds(messages, trained):
    """Yield (messages, trained) without the oldest round, the two oldest, ...; a system message and the round of the
    answer stay.
    """
    end = trained[-1] if trained else len(messages)
    first, *others = [i for i, message in enumerate(messages[:end]) if message["role"] == "user"] or [0]
    for start in others:
        yield messages[:first] + messages[start:], [i - start + first for i in trained]


def encoded(draft, encode):
    """The ids of each part of a draft."""
    return [encode(part) if isinstance(part, str) else part for part in draft.parts]


def num_tokens(draft, ids):
    """(tokens of SOURCE, of ANSWER). ids: of each part."""
    counts = [0, 0, 0]
    for kind, part in zip(draft.kinds, ids):
        counts[kind] += len(part)
    return counts[SOURCE], counts[ANSWER]


def complete(draft, ids, source_cut=False, answer_cut=False):
    """A draft and the ids of its parts -> Rendered."""
    labels = [part if target else [IGNORE] * len(part) for part, target in zip(ids, draft.is_target)]
    return Rendered(
        list(chain.from_iterable(ids)),
        list(chain.from_iterable(labels)),
        sum(map(len, ids[: draft.num_prefix_parts])),
        source_cut,
        answer_cut,
        draft.answer_empty,
        num_tokens(draft, ids)[0],
    )
