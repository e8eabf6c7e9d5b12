"""No answer is trained behind a question that is not its own: random conversations, lengths, modes, ways of cutting.

    python -m tests.test_own_questions 20000        # so many conversations a mode; in the tests some hundred

For every answer: it is a target once; the sample has the whole turn before it, or the turn was cut to --max_src_len and
that is counted; the rounds before it are the newest ones, whole, or that is counted. Or the sample was left out for its
length, and that is counted.
"""

import random
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from glm_finetune import MODE
from glm_finetune.data.report import Report, describe_sample
from glm_finetune.modes.spec import TRUNCATIONS, Limits

ROOT = Path(__file__).parent / "fixtures/oracle/checkpoints"
WORDS = "水温 发动机 风扇 怎么办 好的 先看 然后 a stop 12 ok".split()
STYLES = ("train", "official", "official_rounds")


def conversation(rng, mode):
    """Messages with a system text, tools and answers that are not trained here and there; each text occurs once."""
    count = iter(range(1000))

    def text(longest):
        words = rng.choices(WORDS, k=rng.randint(0, longest))
        return f"{next(count)}号{''.join(words)}完"

    longest, talk = rng.choice([2, 10, 40]), []
    if rng.random() < 0.3:
        talk.append({"role": "system", "content": text(longest)})
        if mode == "glm3" and rng.random() < 0.5:
            talk[0]["tools"] = [{"name": text(2), "description": text(longest)}]
    for _ in range(rng.choice([1, 2, 8, 20])):
        talk.append({"role": "user", "content": text(longest)})
        for _ in range(rng.choice([0, 0, 1, 2]) if mode == "glm3" else 0):
            talk.append({"role": "assistant", "metadata": "f", "content": text(longest)})
            talk.append({"role": "observation", "content": text(longest)})
        talk.append({"role": "assistant", "content": text(longest)})
        if rng.random() < 0.1:
            talk[-1]["loss"] = False
    return talk


def check(rng, mode, tokenizer):
    """One conversation within some limits."""
    talk, template = conversation(rng, mode), MODE[mode].template
    max_src_len = rng.choice([24, 60, 200])
    max_len = max_src_len + template.overhead + rng.choice([8, 50, 400])
    way, style, is_dropped = rng.choice(TRUNCATIONS), rng.choice(STYLES), rng.random() < 0.2
    limits = Limits(max_len, max_src_len, None if is_dropped else way, rng.random() < 0.5)
    samples = template.samples(tokenizer, talk, limits, style)
    kept = Report("drop" if is_dropped else "cut").keep(samples)
    assert is_dropped or all(one in kept or not one.fits or one.answer_cut for one in samples)
    seen = [i for one in samples for i in one.draft.trained]
    assert len(seen) == sum(m["role"] == "assistant" and m.get("loss", True) for m in talk)
    learnt = [i for one in kept for i in answers_of(one, talk, tokenizer, limits, style, mode)]
    assert len(learnt) == len(set(learnt))


def answers_of(one, talk, tokenizer, limits, style, mode):
    """Yield the place in the conversation of each answer that a sample trains."""
    assert len(one.input_ids) <= limits.max_len
    own = one.draft.messages
    forgotten = len(talk) - len(own)
    start = forgotten + (own[0]["role"] == "system")
    system = talk[: start - forgotten]
    assert own[len(system) :] == talk[start:] or one.history_cut or one.question_cut
    assert all(message["content"] for message in own if message["role"] == "user")
    shown, at = describe_sample(one.row, tokenizer), 0
    for i in one.draft.trained:
        place = i + forgotten
        answer, turn = held(tokenizer, talk[place]["content"]), talk[place - 1]
        begin = shown.find(answer.partition("号")[0] + "号", at)
        assert talk[place] == own[i] and (begin >= 0 or one.answer_cut)
        if begin >= 0:
            end = shown.find(answer, begin)
            assert end == begin or one.answer_cut
            has_turn(one, turn, shown[at:begin], tokenizer, limits, style, mode)
            at = begin + len(answer)
            yield place
    if not one.is_cut:
        whole = MODE[mode].render(tokenizer, talk[: one.draft.trained[-1] + 1], None, style)
        assert one.input_ids[:-1] == whole.input_ids[:-1]


def has_turn(one, turn, before, tokenizer, limits, style, mode):
    """The text before an answer, back to the answer before, holds its whole turn unless that is too long: then some.

    What is too long is longer than --max_src_len, or than half of it where calls and the like leave no more.
    """
    text = held(tokenizer, turn["content"])
    if text not in before:
        alone = MODE[mode].render(tokenizer, [turn], None, style)
        assert one.question_cut and alone.num_question > limits.max_src_len // 2
        assert all(len(one.ids[part]) for part in one.draft.asks)


def held(tokenizer, text):
    return tokenizer.decode(tokenizer.encode_text(text), clean_up_tokenization_spaces=False)


def run(mode, number, title=None):
    rng, tokenizer = random.Random(f"{mode} own questions"), MODE[mode].tokenizer.from_pretrained(ROOT / f"{mode}-a")
    for _ in tqdm(range(number), desc=title, disable=not title):
        check(rng, mode, tokenizer)


@pytest.mark.parametrize("mode", MODE)
def test_no_answer_is_trained_behind_a_question_that_is_not_its_own(mode):
    run(mode, 400)


if __name__ == "__main__":
    for name in MODE:
        run(name, int(sys.argv[1]), name)
