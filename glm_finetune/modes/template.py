"""How a mode writes a conversation: first as drafts, texts beside special tokens; then as ids, cut where they must be.

    template = MODE["glm3"].template
    template.samples(tokenizer, messages, limits)       # what is trained
    template.render(tokenizer, messages)                # one answer, or the prompt for one

The two steps are apart so that the texts of many rows can be encoded in one call (`data/prepare.py`): that is what
makes preparation fast.
"""

from bisect import bisect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np

from glm_finetune.errors import UserError
from glm_finetune.models.loss import IGNORE

FIXED, QUESTION, ANSWER = range(3)  # kinds of parts. Limits.max_src_len counts QUESTION; what is left is ANSWER's


class Draft(NamedTuple):
    """A sample, or a prompt, as it is when nothing is cut; its texts are not ids yet.

    messages, trained: what it is made of, see Template.draft. parts: a str is a text to encode, a tuple has ids, which
    are never cut. kinds, is_target: of each part. num_prefix_parts: how many of them are the bidirectional prefix.
    labels: (T,) list, where they are not the targets' own ids; position_ids: beside them, (T,) or (2, T) list, where
    they are not Mode.positions. Such a draft has no text and is never cut.
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

    @property
    def answer_empty(self):
        """Whether an answer to train is ""."""
        return "" in self.parts and not all(self.messages[i]["content"] for i in self.trained)


class Rendered(NamedTuple):
    """A draft as the model sees it.

    ids: a (T,) int32 array for each part of the draft, cut where question_cut or answer_cut says so.
    """

    draft: Draft
    ids: list
    question_cut: bool = False
    answer_cut: bool = False

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


@dataclass(frozen=True)
class Template:
    """draft(tokenizer, messages, style, trained) -> Draft that ends with answer trained[-1] and what follows it; its
    targets are the answers `trained`, indices in messages. Without any: the prompt after all messages.

    style: of the flag --template, see `Mode`. question_tail: tokens at the end of a text before an answer that are
    never cut. overhead: tokens kept free beside question and answer. joins_answers: whether one sample has all answers
    of a conversation. text_prefix: tokens of the bidirectional prefix of a text to continue training on, which stands
    after tokenizer.begin_ids.
    """

    draft: Callable
    question_tail: int
    overhead: int
    joins_answers: bool = False
    text_prefix: int = 0

    def drafts(self, tokenizer, messages, style="train", train_on="all"):
        """A row as drafts that together train every answer ("last": the last one); none if none is to be trained."""
        if messages[0]["role"] == "text":
            return [self._text(tokenizer, messages)]
        trained = trained_turns(messages, train_on)
        if self.joins_answers:
            return [self.draft(tokenizer, messages, style, trained)] if trained else []
        return [self.draft(tokenizer, messages, style, [i]) for i in trained]

    def fitted(self, tokenizer, drafts, encode, limits=None, style="train"):
        """Drafts of a row as samples of at most limits -> list of Rendered, one of each unless it must be divided.

        encode: function, parts -> their ids (`tokenizer.encode_parts`, or what remembers). limits: None = no limit.
        Joined answers: those that fit together are one sample, each of the others its own. A text: pieces.
        """
        rendered = []
        for draft in drafts:
            ids = encode(draft.parts)
            if draft.labels is not None:
                assert not limits or len(draft.labels) <= limits.max_len, f"{len(draft.labels)} tokens, {limits}"
                rendered.append(Rendered(draft, ids))
            elif draft.messages[0]["role"] == "text":
                rendered += self._pieces(draft, ids, limits)
            elif self._fits(draft, ids, limits):  # most samples
                rendered.append(Rendered(draft, ids))
            else:
                rendered += self._cut_to_fit(tokenizer, draft, encode, limits, style)
        return rendered

    def _cut_to_fit(self, tokenizer, draft, encode, limits, style):
        """The samples of a draft that does not fit as it is."""
        # max_len 40, answers that end at tokens 20, 35 and 50: the first two are one sample, the third is cut alone
        trained, make = draft.trained, partial(self.draft, tokenizer, draft.messages, style)
        joined = [make(trained[:count]) for count in range(1, len(trained))]
        num_joined = bisect(joined, False, key=lambda one: not self._fits(one, encode(one.parts), limits))
        alone = [make([i]) for i in trained[num_joined:]] if joined else [draft]
        return [self._alone(tokenizer, one, encode, limits, style) for one in joined[:num_joined][-1:] + alone]

    def render(self, tokenizer, messages, limits=None, style="train"):
        """See Mode.render."""
        if not messages:
            raise UserError("an empty conversation.")
        trained = [len(messages) - 1] if messages[-1]["role"] == "assistant" else []
        draft = self.draft(tokenizer, messages, style, trained)
        return self._alone(tokenizer, draft, tokenizer.encode_parts, limits, style)

    def samples(self, tokenizer, messages, limits=None, style="train", train_on="all"):
        """See Mode.samples."""
        drafts = self.drafts(tokenizer, messages, style, train_on)
        return self.fitted(tokenizer, drafts, remembering(tokenizer), limits, style)

    def _fits(self, draft, ids, limits):
        """Whether nothing must be cut."""
        room = limits and limits.max_len - self.overhead
        if not limits or sum(map(len, ids)) <= min(limits.max_src_len, room):  # most samples: be quick
            return True
        question, answer = num_tokens(draft, ids)
        return question <= limits.max_src_len and question + answer <= room

    def _alone(self, tokenizer, draft, encode, limits, style):
        """A draft of one answer (or none: a prompt) -> Rendered."""
        ids = encode(draft.parts)
        if self._fits(draft, ids, limits):
            return Rendered(draft, ids)
        question, answer = num_tokens(draft, ids)
        question_cut = question > limits.max_src_len
        if not limits.truncation:
            room = limits.max_len - self.overhead - min(question, limits.max_src_len)
            return Rendered(draft, ids, question_cut, answer > room)
        rounds = newest_rounds(draft.messages, draft.trained)
        while self._least(draft, ids, limits) > limits.max_src_len and (newer := next(rounds, None)):
            draft = self.draft(tokenizer, newer[0], style, newer[1])
            ids = encode(draft.parts)
        return self._cut(draft, ids, limits, question_cut)

    def _least(self, draft, ids, limits):
        """Tokens of a question before its oldest round is forgotten: all, or what cannot be cut out of it."""
        if limits.truncation == "head":
            return num_tokens(draft, ids)[0]
        lengths = zip(draft.kinds, draft.parts, map(len, ids))
        tail = self.question_tail
        return sum(min(n, tail) if isinstance(part, str) else n for kind, part, n in lengths if kind == QUESTION)

    def _cut(self, draft, ids, limits, question_cut):
        """The draft without the tokens that limits leave no room for."""
        # max_src_len 6, question_tail 2, a question of 9 tokens q0 .. q8 (q7 q8 are "答："), so that 3 are too many:
        # tail q0 q1 q2 q3 | q7 q8    head q3 q4 q5 q6 q7 q8    middle q0 q1 | q5 q6 q7 q8
        lengths = [len(part) for part in ids]
        kinds = np.repeat(draft.kinds, lengths)
        is_text = np.repeat([isinstance(part, str) for part in draft.parts], lengths)
        num_behind = np.concatenate([np.arange(length)[::-1] for length in lengths])  # in the same part
        asks, answer = kinds == QUESTION, np.flatnonzero(kinds == ANSWER)
        free, num_question = np.flatnonzero(asks & is_text & (num_behind >= self.question_tail)), int(asks.sum())
        excess = max(0, num_question - limits.max_src_len)
        if excess > len(free):
            fixed = f"{num_question - len(free)} tokens before its answer cannot be cut (roles, names of tools)"
            allowed = f"--max_src_len (in prediction what --max_length leaves) allows {limits.max_src_len}"
            raise UserError(f"{fixed}; {allowed}. Raise it.")
        start = {"tail": len(free) - excess, "head": 0, "middle": (len(free) - excess) // 2}[limits.truncation]
        room = max(0, limits.max_len - self.overhead - num_question + excess)
        stays = np.ones(len(kinds), np.bool_)
        stays[free[start : start + excess]] = stays[answer[room:]] = False
        if len(answer) > room and not limits.end_cut_answers:
            stays[-1] = False
        ids = [part[stay] for part, stay in zip(ids, np.split(stays, np.cumsum(lengths)[:-1]))]
        return Rendered(draft, ids, question_cut, len(answer) > room)

    def _text(self, tokenizer, messages):
        """A text to continue training on: everything after the beginning is a target."""
        begin = tuple(tokenizer.begin_ids)
        hidden = self.text_prefix or len(begin)
        parts = begin[:hidden], begin[hidden:], messages[0]["content"], (tokenizer.eos_token_id,)
        return Draft(messages, [], parts, (FIXED,) * 4, (False, True, True, True), bool(self.text_prefix))

    def _pieces(self, draft, ids, limits):
        """A text as pieces of at most max_len tokens, each with its beginning, only the last one ended.

        Nothing is lost, nothing overlaps; an empty text has no piece.
        """
        # max_len 5, text 1 2 3 4 5: [gMASK] sop 1 2 | [gMASK] sop 3 4 | [gMASK] sop 5 </s>
        prefix, begin, text, end = ids
        room = limits.max_len - len(prefix) - len(begin) - len(end) if limits else len(text) or 1
        pieces = [text[start : start + room] for start in range(0, len(text), room)]
        ends = [end[:0]] * (len(pieces) - 1) + [end]
        return [Rendered(draft, [prefix, begin, piece, last]) for piece, last in zip(pieces, ends)]


def trained_turns(messages, train_on):
    """Indices of the assistant messages to train: all ("last": the last one), without those whose `loss` is False."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    chosen = answers[-1:] if train_on == "last" else answers
    return [i for i in chosen if messages[i].get("loss", True)]


def newest_rounds(messages, trained):
    """Yield (messages, trained) without the oldest round, the two oldest, ...; a system message and the round of the
    answer stay.
    """
    # system q1 a1 q2 a2 q3 a3, [6] -> system q2 a2 q3 a3, [4] -> system q3 a3, [2]
    end = trained[-1] if trained else len(messages)
    first, *others = [i for i, message in enumerate(messages[:end]) if message["role"] == "user"] or [0]
    for start in others:
        yield messages[:first] + messages[start:], [i - start + first for i in trained]


def remembering(tokenizer, parts=(), num_threads=1):
    """`tokenizer.encode_parts` that encodes every part once; those in `parts` at once, in one call."""
    known = {}

    def learn(parts):
        if new := [part for part in dict.fromkeys(parts) if part not in known]:
            known.update(zip(new, tokenizer.encode_parts(new, num_threads)))

    def encode(parts):
        try:
            return list(map(known.__getitem__, parts))
        except KeyError:
            learn(parts)
            return list(map(known.__getitem__, parts))

    learn(parts)
    return encode


def num_tokens(draft, ids):
    """(tokens of QUESTION, of ANSWER). ids: of each part."""
    counts = [0, 0, 0]
    for kind, part in zip(draft.kinds, ids):
        counts[kind] += len(part)
    return counts[QUESTION], counts[ANSWER]
