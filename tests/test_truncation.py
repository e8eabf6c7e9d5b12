"""Length: what is cut, what is never cut, what is counted."""

import json

import numpy as np
import pytest

from glm_finetune import MODE
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.samples import Settings, settings_of
from glm_finetune.flags import parse
from glm_finetune.modes import template
from glm_finetune.modes.spec import TRUNCATIONS, Limits
from glm_finetune.modes.template import Draft, Template, newest_rounds
from tests.refusal import refused
from tests.test_bad_input import NEEDED

every_mode = pytest.mark.parametrize("mode", MODE)
every_truncation = pytest.mark.parametrize("truncation", TRUNCATIONS)
QUESTION = "甲乙丙丁戊己庚辛壬癸" * 6
ANSWER = "一二三四五六七八九十" * 6


@pytest.fixture
def tokenizer(mode, checkpoints):
    return MODE[mode].tokenizer.from_pretrained(checkpoints[mode])


def turn(question, answer):
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def render(mode, tokenizer, messages, *limits):
    return MODE[mode].render(tokenizer, messages, Limits(*limits) if limits else None)


def special(tokenizer, ids):
    return [i for i in ids if i in tokenizer.special_ids]


class Digits:
    """A tokenizer with an id for each digit."""

    @staticmethod
    def encode_parts(parts):
        return [np.array([int(i) for i in part], np.int32) for part in parts]


def cut(truncation, max_src_len, question_tail):
    """The ids left of a question of one special token, a text of nine, and a special token that nobody counts."""
    talk = [{"role": "user", "content": ""}]
    kinds = template.QUESTION, template.QUESTION, template.FIXED
    draft = Draft(talk, [], ((0,), "123456789", (99,)), kinds, (False,) * 3)
    way = Template(lambda *_: draft, question_tail, overhead=0)
    return way.render(Digits, talk, Limits(99, max_src_len, truncation)).input_ids


@pytest.mark.parametrize(
    "truncation, expected", [("tail", [0, 1, 2, 3, 8, 9]), ("head", [0, 5, 6, 7, 8, 9]), ("middle", [0, 1, 6, 7, 8, 9])]
)
def test_each_way_cuts_where_it_says_and_keeps_what_is_fixed(truncation, expected):
    assert cut(truncation, 6, question_tail=2) == [*expected, 99]


def test_what_is_fixed_alone_must_fit():
    assert cut("tail", 4, question_tail=3) == [0, 7, 8, 9, 99]
    refused(lambda: cut("tail", 3, question_tail=3), "cannot be cut", "--max_src_len", "allows 3")


@every_mode
@every_truncation
@pytest.mark.parametrize("max_src_len", [12, 33, 80])
def test_a_long_question_is_cut_to_the_limit_with_its_special_tokens_and_its_ending(
    mode, tokenizer, truncation, max_src_len
):
    whole = render(mode, tokenizer, turn(QUESTION, "风"))
    cut = render(mode, tokenizer, turn(QUESTION, "风"), 500, max_src_len, truncation, False)
    removed = whole.num_question - max_src_len
    assert cut.question_cut and not cut.answer_cut and removed > 0
    assert cut.num_question == max_src_len and len(cut.input_ids) == len(whole.input_ids) - removed
    assert special(tokenizer, cut.input_ids) == special(tokenizer, whole.input_ids)
    assert [x for x in cut.labels if x != -100] == [x for x in whole.labels if x != -100]
    if MODE[mode].template.question_tail:
        num_targets = sum(label != -100 for label in whole.labels)
        num_kept = (
            MODE[mode].template.question_tail + bool(whole.num_prefix) + num_targets
        )  # [gMASK] is between the two
        assert cut.input_ids[-num_kept:] == whole.input_ids[-num_kept:]


@every_mode
@every_truncation
def test_the_end_of_the_question_is_kept_by_all_but_tail(mode, tokenizer, truncation):
    question = "头" + QUESTION + "尾"
    cut = render(mode, tokenizer, turn(question, "风"), 500, 60, truncation, False)
    text = tokenizer.decode(cut.input_ids)
    assert ("尾" in text) == (truncation != "tail")
    assert ("头" in text) == (truncation != "head")


@every_mode
@pytest.mark.parametrize("end_cut_answers", [False, True])
def test_a_cut_answer_has_an_end_token_only_if_that_is_asked_for(mode, tokenizer, end_cut_answers):
    end = tokenizer.eos_token_id
    whole = render(mode, tokenizer, turn("风", ANSWER), 500, 100, "tail", end_cut_answers)
    assert not whole.answer_cut and whole.labels[-1] == end
    unused = 3 if mode == "glm3" else 0  # tokens of ChatGLM3's overhead
    overhead = MODE[mode].template.overhead - unused
    fits = len(whole.input_ids) + MODE[mode].template.overhead - overhead
    assert render(mode, tokenizer, turn("风", ANSWER), fits, 100, "tail", end_cut_answers).row == whole.row
    cut = render(mode, tokenizer, turn("风", ANSWER), fits - 1, 100, "tail", end_cut_answers)
    assert cut.answer_cut and len(cut.input_ids) <= fits - 1
    assert (cut.labels[-1] == end) == end_cut_answers
    assert cut.labels.count(end) == end_cut_answers
    learnt = [x for x in cut.labels if x not in (-100, end)]
    assert learnt == [x for x in whole.labels if x not in (-100, end)][: len(learnt)] and len(learnt) > 20


@every_mode
@every_truncation
@pytest.mark.parametrize("max_len, max_src_len", [(40, 15), (90, 60), (120, 20), (300, 200)])
def test_nothing_is_longer_than_the_limits_and_every_sample_still_asks_and_answers(
    mode, tokenizer, truncation, max_len, max_src_len
):
    talk = [m for i in range(3) for m in turn(f"{i}" + QUESTION[: 20 * i + 5], f"{i}" + ANSWER[: 15 * i + 5])]
    limits = Limits(max_len, max_src_len, truncation, False)
    rendered = MODE[mode].samples(tokenizer, talk, limits)
    assert rendered
    for sample in rendered:
        assert len(sample.input_ids) == len(sample.labels) <= max_len
        assert sample.num_question <= max_src_len
        assert sample.labels[0] == -100 and any(label != -100 for label in sample.labels)
        assert (sample.labels[-1] in MODE[mode].stop_token_ids(tokenizer)) == (not sample.answer_cut)


@every_mode
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_head_forgets_the_oldest_rounds_and_asks_as_if_they_had_never_been(mode, tokenizer, spare):
    system = [{"role": "system", "content": "短"}]
    rounds = [turn(f"问题{i}" * 5, f"回答{i}" * 5) for i in "甲乙丙丁"]
    talk = system + [message for part in rounds for message in part]
    newest = system + rounds[2] + rounds[3]
    room = render(mode, tokenizer, newest).num_question + spare
    cut, alone = render(mode, tokenizer, talk, 500, room, "head", False), render(mode, tokenizer, newest)
    assert cut.question_cut
    assert (cut.input_ids, cut.labels) == (alone.input_ids, alone.labels)
    asked = [render(mode, tokenizer, messages[:-1], 500, room, "head", False) for messages in (talk, newest)]
    assert asked[0].input_ids == asked[1].input_ids


def test_rounds_are_forgotten_whole_and_the_last_one_stays():
    talk = [m for i in range(4) for m in turn(f"q{i}", f"a{i}")]
    system = [{"role": "system", "content": "s"}]
    assert list(newest_rounds(system + talk, [8])) == [(system + talk[i:], [8 - i]) for i in (2, 4, 6)]
    assert list(newest_rounds(talk, [3])) == [(talk[2:], [1])]  # what comes after the answer is left in its place
    assert list(newest_rounds(talk[:-1], [])) == [(talk[i:-1], []) for i in (2, 4, 6)]
    assert list(newest_rounds(talk[:1], [])) == list(newest_rounds(system, [])) == []


@every_truncation
@every_mode
def test_of_a_conversation_whose_roles_alone_do_not_fit_the_oldest_rounds_are_forgotten(mode, tokenizer, truncation):
    talk = [m for i in range(40) for m in turn(f"问{i}", f"答{i}")]
    limits = Limits(120, 60, truncation)
    samples = MODE[mode].samples(tokenizer, talk, limits)
    asked = MODE[mode].render(tokenizer, talk[:-1], limits)
    for one in (samples[-1], asked):
        assert one.question_cut and one.num_question <= 60 and len(one.input_ids) <= 120
        assert "问39" in tokenizer.decode(one.input_ids) or truncation != "head"
    assert all(one.num_question <= 60 for one in samples) and "答39" in tokenizer.decode(samples[-1].input_ids)


def test_roles_of_one_round_that_do_not_fit_are_an_error_with_the_numbers(checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    call = {"role": "assistant", "metadata": "one_tool_with_a_very_long_name", "content": "```python\ntool_call()\n```"}
    talk = [{"role": "user", "content": "q"}, call, {"role": "observation", "content": "1"}, *turn("q", "a")[1:]]
    refused(
        lambda: MODE["glm3"].samples(tokenizer, talk, Limits(90, 16)), "cannot be cut", "--max_src_len", "allows 16"
    )


@pytest.mark.parametrize("flags", [["--truncation", "drop"], ["--is_skip"], ["--is_skip", "--truncation", "head"]])
@every_mode
def test_what_does_not_fit_is_dropped_and_counted_however_much_too_long_it_is(mode, checkpoints, flags, tmp_path):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    call = {"role": "assistant", "metadata": "name_" * 40, "content": "```python\ntool_call()\n```"}
    calls = [{"role": "user", "content": "q"}, call, {"role": "observation", "content": "1"}, *turn("q", "a")[1:]]
    talks = [[m for i in range(60) for m in turn("问", "答")], turn("问", "答"), *([calls] if mode == "glm3" else [])]
    text = "".join(json.dumps({"messages": talk}, ensure_ascii=False) + "\n" for talk in talks)
    (tmp_path / "a.jsonl").write_text(text, encoding="utf-8")
    config = parse(TrainConfig, [*NEEDED, "--max_len", "120", "--max_src_len", "60", *flags])
    rows = InstructionDataset(tmp_path / "a.jsonl", settings_of(config, MODE[mode], tokenizer))
    lengths = [len(row["input_ids"]) for row in rows]
    assert rows.report.skipped >= len(talks) - 1 and max(lengths) <= 120
    assert rows[len(rows) - 1] == MODE[mode].samples(tokenizer, turn("问", "答"), config_limits(config))[0].row
    assert rows.report.rows == len(talks) and rows.report.kept == len(rows)


def config_limits(config):
    return Limits(config.max_len, config.max_src_len, "tail", config.end_cut_answers)


def test_a_conversation_that_just_fits_is_one_sample(checkpoints):
    mode = MODE["glm3"]
    tokenizer = mode.tokenizer.from_pretrained(checkpoints["glm3"])
    talk = turn("问题", "回答") + turn("再问", "再答")
    (whole,) = mode.samples(tokenizer, talk)
    num_counted = len(whole.input_ids) - 3 + mode.template.overhead  # [gMASK] sop and </s> are in the overhead
    limits = [Limits(num_counted - short, whole.num_question, "tail", False) for short in (0, 1)]
    assert [one.row for one in mode.samples(tokenizer, talk, limits[0])] == [whole.row]
    assert [sample.answer_cut for sample in mode.samples(tokenizer, talk, limits[1])] == [False, True]


@every_mode
def test_lengths_that_leave_no_room_for_an_answer_are_refused_in_training(mode, tokenizer):
    overhead = MODE[mode].template.overhead
    config = parse(TrainConfig, [*NEEDED, "--mode", mode, "--max_src_len", "50", "--max_len", str(50 + overhead)])
    refused(lambda: settings_of(config, MODE[mode], tokenizer), f"use --max_len {50 + overhead + 1} or more")


# Drop and error, and the report


@pytest.fixture
def dataset(checkpoints, tmp_path):
    """Function: rows of (question, answer), settings -> data set."""

    def make(rows, limits=(60, 30, "tail", False), mode="glm3", **options):
        lines = (f'{{"question": "{question}", "answer": "{answer}"}}\n' for question, answer in rows)
        (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
        tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
        return InstructionDataset(
            tmp_path / "a.jsonl", Settings(MODE[mode].template, tokenizer, Limits(*limits), **options)
        )

    return make


ROWS = [("风", "风"), (QUESTION, "风"), ("风", ANSWER), (QUESTION, ANSWER), ("风", "")]


def test_what_is_cut_dropped_and_empty_is_counted(dataset):
    cut, dropped = dataset(ROWS).report, dataset(ROWS, too_long="drop").report
    assert (cut.rows, cut.kept, cut.question_cut, cut.answer_cut, cut.skipped) == (5, 5, 2, 2, 0)
    assert (dropped.rows, dropped.kept, dropped.question_cut, dropped.answer_cut, dropped.skipped) == (5, 2, 2, 2, 3)
    assert cut.answer_empty == dropped.answer_empty == 1
    assert cut.lengths.total() == cut.kept and cut.longest <= 60
    assert "2 questions were cut" in "".join(cut.hints()) and not list(dropped.hints())


def test_an_answer_with_no_room_at_all_is_no_sample(dataset):
    data = dataset([("风", "风"), ("长" * 40, "风" * 40)], (36, 33, "tail", False))
    assert (data.report.rows, data.report.kept, data.report.no_target) == (2, 1, 1)


@pytest.mark.parametrize(
    "rows, part",
    [
        (ROWS[:2], "the question does not fit into --max_src_len"),
        ([ROWS[0], ROWS[2]], "the answer does not fit into --max_len"),
    ],
)
def test_error_names_the_line(dataset, rows, part):
    refused(lambda: dataset(rows, too_long="error"), "a.jsonl, line 2", part)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--truncation", "left"], ["--truncation 'left'", "tail, head, middle, drop, error"]),
        (["--train_on", "first"], ["--train_on 'first'", "all, last"]),
        (["--template", "offical"], ["--template 'offical'", "Did you mean official?"]),
        (["--on_bad_row", "ignore"], ["--on_bad_row 'ignore'", "stop, skip"]),
        (["--is_skip", "--truncation", "error"], ["--is_skip", "--truncation error"]),
    ],
)
def test_wrong_data_flags_are_named(arguments, parts):
    needed = ["--model_name_or_path", "base", "--train_path", "data", "--output_dir", "out"]
    refused(lambda: parse(TrainConfig, [*needed, *arguments]), *parts)
