"""What is left of a conversation that does not fit. No answer ever stands behind a turn that is not its own.

    Fitting(template, tokenizer, encode, Limits(1024, 256), style="train").samples(draft)

A turn is what stands directly before an answer: the user's text, or the result of a tool. It has max_src_len tokens at
most, with the tokens of its role; `truncation` says what of it goes. The rest of a sample shares max_len: whole rounds
go first, the oldest one before the others. Then parts of the last round give way as far as they must, in this order:
earlier results of tools; the turn, to half of what there is before the answer; what the user asked in the round, to a
quarter; the end of the system message. The end of the answer goes last: it has what max_src_len leaves of max_len.
"""

from bisect import bisect, bisect_left
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from glm_finetune.errors import UserError
from glm_finetune.modes.drafts import ANSWER, QUESTION, Draft, Rendered, num_tokens
from glm_finetune.modes.spec import Limits, system_text

SLACK = 8  # tokens that an estimate may be wrong by


class Turn(NamedTuple):
    """A turn that is too long: its tokens, those before its own text, and how many are too many."""

    length: int
    head: int
    excess: int


class Sized(NamedTuple):
    """A draft with its lengths. ids: of each part. turns: {part: the Turn at its end}, of turns that are too long.
    before: tokens before the last answer when what is too much of them is gone. answer: tokens of it.
    """

    draft: Draft
    ids: list
    turns: dict
    before: int
    answer: int


@dataclass(frozen=True)
class Fitting:
    """One way of fitting. encode: see Template.fitted. limits: a Limits."""

    template: object
    tokenizer: object
    encode: object
    limits: Limits
    style: str
    known: dict = field(default_factory=dict)  # {(number of messages, trained): Sized} of rounds of one conversation

    @property
    def room(self):
        """Tokens of a sample that the mode's own special tokens leave."""
        return self.limits.max_len - self.template.overhead

    def samples(self, draft):
        """Samples that train every answer of a draft, each answer once -> list of Rendered.

        Those that fit together are one sample; of the later ones each sample begins with the rounds before it that fit
        into half of max_len.
        """
        if not self.limits.truncation:
            return self._marked(draft.messages, draft.trained)
        samples, left = [], draft.trained
        while left:
            messages, learnt = self._newest(draft.messages, left)
            num_joined = bisect(range(1, len(left) + 1), False, key=lambda n: not self._holds(messages, learnt[:n]))
            samples.append(self.alone(messages, learnt[: max(1, num_joined)]))
            history_cut = samples[-1].history_cut or len(messages) < len(draft.messages)
            samples[-1] = samples[-1]._replace(history_cut=history_cut)
            left = left[max(1, num_joined) :]
        return samples

    def prompt(self, draft):
        """A draft of one answer, or of none, as one Rendered; without a way of cutting it is only marked."""
        if not self.limits.truncation:
            return self._mark(self.sized(draft))
        messages, learnt = self._newest(draft.messages, draft.trained)
        one = self.alone(messages, learnt)
        return one._replace(history_cut=one.history_cut or len(messages) < len(draft.messages))

    def sized(self, draft, most=None):
        """most: tokens of the last turn, if they are fewer than max_src_len."""
        ids = self.encode(draft.parts)
        question, answer = num_tokens(draft, ids)
        is_long = question > self.limits.max_src_len or most is not None
        turns = dict(self._long_turns(draft, most)) if is_long else {}
        return Sized(draft, ids, turns, question - sum(turn.excess for turn in turns.values()), answer)

    def _long_turns(self, draft, most):
        turns = [*self.template.turns(self.tokenizer, draft, self.style)]
        for i, (part, alone) in enumerate(turns, 1):
            limit, length = self.limits.max_src_len, num_tokens(alone, self.encode(alone.parts))[0]
            limit = limit if most is None or i < len(turns) else min(limit, most)
            if length > limit:
                yield part, Turn(length, self._head(alone), length - limit)

    def _head(self, alone):
        """Tokens before the text of a turn alone: those it has in common with an empty one."""
        full, bare = (self._question_ids(one) for one in (alone, self._emptied(alone)))
        differ = np.flatnonzero(full[: len(bare)] != bare[: len(full)])
        return int(differ[0]) if len(differ) else len(bare)

    def _question_ids(self, draft):
        parts = zip(draft.kinds, self.encode(draft.parts))
        return np.concatenate([ids for kind, ids in parts if kind == QUESTION])

    def _emptied(self, alone):
        """The draft of a turn alone, without its text."""
        return self.template.draft(self.tokenizer, [{**alone.messages[0], "content": ""}], self.style, [])

    def _make(self, messages, trained):
        """Sized of the newest rounds of a conversation, whose number of messages says which they are."""
        key = len(messages), tuple(trained)
        if key not in self.known:
            self.known[key] = self._make_anew(messages, trained)
        return self.known[key]

    def _make_anew(self, messages, trained, most=None):
        return self.sized(self.template.draft(self.tokenizer, messages, self.style, trained), most)

    def _budget(self, one):
        """Tokens that may stand before the last answer; of a prompt max_src_len counts all of them."""
        return max(self.limits.max_src_len, self.room - one.answer) if one.draft.trained else self.limits.max_src_len

    def _excess(self, one):
        return one.before - self._budget(one)

    def _holds(self, messages, trained):
        """Whether these answers are one sample of which only turns are cut."""
        one = self._make(messages, trained)
        return one.before + one.answer <= self.room

    def _newest(self, messages, left):
        """(messages, left) without the oldest rounds that leave no room for the first of the answers `left`.

        If others follow it, and something must go, what stays is half of max_len, so that they find room behind it.
        """
        whole = self._make(messages, left[:1])
        if (excess := self._excess(whole)) <= 0:
            return messages, left
        rounds = [*newest_rounds(messages, left[:1], left)] or [(messages, left)]
        most = whole.before - excess if len(left) <= 1 else min(whole.before - excess, self.room // 2)

        def fits(i):
            kept, learnt = rounds[i]
            one = self._make(kept, learnt[:1])
            return one.before <= most and self._excess(one) <= 0

        place = self._first_guess(whole, rounds, most + SLACK)
        while place < len(rounds) - 1 and not fits(place):
            place += 1
        return rounds[place]

    def _first_guess(self, whole, rounds, most):
        """The first of `rounds` that has at most `most` tokens, if the messages of a conversation had as many alone as
        in it: encoding all that stands before an answer again and again is dear.
        """
        texts = [system_text(message) for message in whole.draft.messages]
        alone = list(map(len, self.encode(texts)))
        asked = whole.draft.trained[0] if whole.draft.trained else len(texts)
        each = (whole.before - sum(alone[:asked])) / asked  # of roles and counts of rounds
        forgotten = [len(texts) - len(kept) for kept, _ in rounds]
        first = int(whole.draft.messages[0]["role"] == "system")
        gone = [sum(alone[first : first + count]) + each * count for count in forgotten]
        return min(bisect_left(gone, whole.before - most), len(rounds) - 1)

    def alone(self, messages, trained):
        """These answers, or a prompt, as one Rendered, cut where it must be. `fits` is False where that does not do."""
        whole, one, most = messages, self._make(messages, trained), None
        for i, least in yielding(messages, trained, self._budget(one)):
            if (excess := self._excess(one)) <= 0:
                break
            if i is None:
                most = self._shorter_turn(one, excess, least)
                one = self._make_anew(messages, trained, most)
            while (excess := self._excess(one)) > 0 and i is not None:
                if (shorter := self._shortened(messages[i], excess, least)) is None:
                    break
                messages = [*messages[:i], shorter, *messages[i + 1 :]]
                one = self._make_anew(messages, trained, most)
        changed = {old["role"] for old, new in zip(whole, messages) if old is not new}
        if self._excess(one) > 0 and messages[0]["role"] == "system" and len(messages) > 1:
            one = self._make_anew(messages[1:], [i - 1 for i in trained], most)
        if self._excess(one) > 0:
            return self._mark(one)._replace(fits=False)
        cut = self._cut(one)
        return cut._replace(question_cut=cut.question_cut or "user" in changed, history_cut=bool(changed - {"user"}))

    def _shorter_turn(self, one, excess, least):
        """Tokens of the turn before the last answer or the answer to come without `excess`; `least` of them stay, and
        half as many of its own text.
        """
        *_, (_, alone) = self.template.turns(self.tokenizer, one.draft, self.style)
        length = min(num_tokens(alone, self.encode(alone.parts))[0], self.limits.max_src_len)
        least = max(least, len(self._question_ids(self._emptied(alone))) + least // 2)
        return max(length - excess, min(length, least))

    def _shortened(self, message, excess, least):
        """The message without the last `excess` tokens of its text, of which `least` stay; None if none can go."""
        (ids,) = self.encode([system_text(message)])
        text = self.tokenizer.decode(ids[: max(least, len(ids) - excess)], clean_up_tokenization_spaces=False)
        text = text.rstrip("\ufffd")  # half of a character
        return {"role": message["role"], "content": text} if len(text) < len(system_text(message)) else None

    def _cut(self, one):
        ids = list(one.ids)
        for part, turn in one.turns.items():
            ids[part] = self._without(ids[part], turn)
        left = max(0, self.room - one.before)
        answer_cut = one.answer > left
        for i, kind in enumerate(one.draft.kinds):
            if kind == ANSWER:
                ids[i], left = ids[i][:left], max(0, left - len(ids[i]))
        if answer_cut and not self.limits.end_cut_answers:
            ids[-1] = ids[-1][:0]
        return Rendered(one.draft, ids, bool(one.turns), answer_cut)

    def _without(self, ids, turn):
        """The ids of a text without the excess of the turn that it ends with; the ending of the prompt stays."""
        # max_src_len 7, question_tail 2, a turn r q0 .. q6 答 ： of 10 tokens (r: "[Round 1] 问："), so that 3 must go:
        # tail r q0 q1 q2 q3 | 答 ：    head r | q3 q4 q5 q6 答 ：    middle r q0 q1 | q5 q6 答 ：
        first, end, excess = max(0, len(ids) - turn.length), len(ids) - self.template.question_tail, turn.excess
        if excess > end - first:
            fixed = f"{turn.length - end + first} tokens before an answer cannot be cut (its role, the prompt's ending)"
            allowed = f"--max_src_len (in prediction what --max_length leaves) allows {turn.length - excess}"
            raise UserError(f"{fixed}; {allowed}. Raise it.")
        begin = max(first, min(len(ids) - turn.length + turn.head, end - excess))
        ways = {"tail": end - excess, "head": begin, "middle": (begin + end - excess) // 2}
        start = ways[self.limits.truncation]
        return np.concatenate((ids[:start], ids[start + excess :]))

    def _marked(self, messages, trained):
        """Nothing is cut: the answers that fit together as one sample, each of the others marked."""
        num_joined = bisect(range(1, len(trained) + 1), False, key=lambda n: not self._whole(messages, trained[:n]))
        parts = [trained[:num_joined]] if num_joined else []
        parts += [[i] for i in trained[num_joined:]]
        return [self._mark(self._make(messages, part)) for part in parts]

    def _whole(self, messages, trained):
        one = self._make(messages, trained)
        return not one.turns and one.before + one.answer <= self.room

    def _mark(self, one):
        excess = max(0, self._excess(one))
        answer_cut = one.answer > self.room - one.before + excess
        return Rendered(one.draft, one.ids, bool(one.turns), answer_cut, excess > 0)


def newest_rounds(messages, trained, left=None):
    """Yield (messages, left) without the oldest round, the two oldest, ...; a system message and the round of the
    answer stay. left: indices that are counted anew, by default those of `trained`.
    """
    # system q1 a1 q2 a2 q3 a3, [6] -> system q2 a2 q3 a3, [4] -> system q3 a3, [2]
    end = trained[-1] if trained else len(messages)
    first, *others = [i for i, message in enumerate(messages[:end]) if message["role"] == "user"] or [0]
    for start in others:
        kept = messages[:first] + messages[start:]
        yield kept, [i - start + first for i in (trained if left is None else left)]


def yielding(messages, trained, budget):
    """[(index of a message, or None for the turn before the last answer; tokens of it that stay)] in the order in which
    they get shorter where a round alone has more than `budget` tokens before its answer.
    """
    end = trained[-1] if trained else len(messages)
    others = set(range(end)) - ({i - 1 for i in trained} or {end - 1})
    turn = [(None, budget // 2)] if messages[end - 1]["role"] != "assistant" else []

    def of(role, least):
        return [(i, least) for i in sorted(others) if messages[i]["role"] == role]

    return [*of("observation", 0), *turn, *of("user", budget // 4), *of("system", 0)]
