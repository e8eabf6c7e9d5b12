"""How a mode writes a conversation: first as drafts, texts beside special tokens; then as ids, cut where they must be.

    template = MODE["glm3"].template
    template.samples(tokenizer, messages, limits)       # what is trained
    template.render(tokenizer, messages)                # one answer, or the prompt for one

The two steps are apart so that the texts of many rows can be encoded in one call (`data/prepare.py`): that is what
makes preparation fast.
"""

from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.errors import UserError
from glm_finetune.modes.cutting import Fitting
from glm_finetune.modes.drafts import FIXED, QUESTION, Draft, Rendered, num_tokens


@dataclass(frozen=True)
class Template:
    """draft(tokenizer, messages, style, trained) -> Draft that ends with answer trained[-1] and what follows it; its
    targets are the answers `trained`, indices in messages. Without any: the prompt after all messages.

    style: of the flag --template, see `Mode`. question_head: tokens of a role in front of a question's text,
    question_tail: tokens at the end of a text before an answer; neither is ever cut. overhead: tokens kept free beside
    question and answer. joins_answers: whether one sample has all answers of a conversation. text_prefix: tokens of the
    bidirectional prefix of a text to continue training on, which stands after tokenizer.begin_ids.
    """

    draft: Callable
    question_tail: int
    overhead: int
    joins_answers: bool = False
    text_prefix: int = 0
    question_head: int = 0

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
                rendered += Fitting(self, tokenizer, encode, limits, style).samples(draft)
        return rendered

    def turn_lengths(self, tokenizer, draft, encode, style):
        """Tokens of the turn before each answer of a draft, with those of its role: what Limits.max_src_len counts."""
        if len(draft.messages) == 2 and draft.asks:  # most samples: be quick
            return [num_tokens(draft, encode(draft.parts))[0]]
        alone = [one for _, one in self.turns(tokenizer, draft, style)]
        return [num_tokens(one, encode(one.parts))[0] for one in alone]

    def turns(self, tokenizer, draft, style):
        """Yield (part that ends with it, prompt of it alone) of the turn before each answer of a draft; a call that
        follows what was said before it has none.
        """
        asked = [i - 1 for i in draft.trained] or [len(draft.messages) - 1]
        for part, i in zip(draft.asks, asked):
            if draft.messages[i]["role"] != "assistant":
                yield part, self.draft(tokenizer, [draft.messages[i]], style, [])

    def all_parts(self, tokenizer, drafts, style):
        """Yield what will be encoded of drafts, to be encoded in one call: their parts, and those of turns alone."""
        for draft in drafts:
            yield from draft.parts
            if len(draft.messages) > 2:
                for _, alone in self.turns(tokenizer, draft, style):
                    yield from alone.parts

    def render(self, tokenizer, messages, limits=None, style="train"):
        """See Mode.render."""
        if not messages:
            raise UserError("an empty conversation.")
        if style == "text":
            return self._text_prompt(tokenizer, messages, limits)
        trained = [len(messages) - 1] if messages[-1]["role"] == "assistant" else []
        draft = self.draft(tokenizer, messages, style, trained)
        encode = remembering(tokenizer, draft.parts)
        if not limits:
            return Rendered(draft, encode(draft.parts))
        one = Fitting(self, tokenizer, encode, limits, style).prompt(draft)
        if not one.fits:
            raise UserError(f"its roles and calls of tools alone have more than {limits.max_src_len} tokens.")
        return one

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

    def _text(self, tokenizer, messages):
        """A text to continue training on: everything after the beginning is a target."""
        begin = tuple(tokenizer.begin_ids)
        hidden = self.text_prefix or len(begin)
        parts = begin[:hidden], begin[hidden:], messages[0]["content"], (tokenizer.eos_token_id,)
        return Draft(messages, [], parts, (FIXED,) * 4, (False, True, True, True), bool(self.text_prefix))

    def _text_prompt(self, tokenizer, messages, limits):
        """A text that is to be continued; of a long one its end."""
        if [message["role"] for message in messages] != ["user"]:
            raise UserError("--template text continues one text; this is a conversation. Give another --template.")
        whole = self._text(tokenizer, messages)
        draft = whole._replace(parts=whole.parts[:3], kinds=(FIXED, FIXED, QUESTION), is_target=(False,) * 3)
        *begin, text = tokenizer.encode_parts(draft.parts)
        kept = text[-limits.max_src_len :] if limits else text
        return Rendered(draft, [*begin, kept], len(kept) < len(text))

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
