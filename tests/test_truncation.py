"""Length: what is cut, what is never cut, what is counted."""

import json

import numpy as np
import pytest

from glm_finetune import MODE
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.samples import Settings, settings_of
from glm_finetune.flags import parse
from glm_finetune.modes.cutting import newest_rounds
from glm_finetune.modes.drafts import FIXED, Draft
from glm_finetune.modes.drafts import QUESTION as ASKED
from glm_finetune.modes.spec import TRUNCATIONS, Limits
from glm_finetune.modes.template import Template
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
    def encode_parts(parts, num_threads=1):
        return [np.array([int(i) for i in part], np.int32) for part in parts]


def cut(truncation, max_src_len, question_tail):
    """The ids left of a question of one special token, a text of nine, and a special token that nobody counts."""
    talk = [{"role": "user", "content": "1234567"}]

    def draft(tokenizer, messages, style, trained):
        parts = ((0,), messages[0]["content"] + "89", (99,))
        return Draft(messages, trained, parts, (ASKED, ASKED, FIXED), (False,) * 3, asks=(1,))

    way = Template(draft, question_tail, overhead=0)
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
        assert sample.labels[0] == -100 and any(label != -100 for label in sample.labels)
        assert (sample.labels[-1] in MODE[mode].stop_token_ids(tokenizer)) == (not sample.answer_cut)


@every_mode
@every_truncation
@pytest.mark.parametrize("spare", [0, 1, 7])
def test_the_oldest_rounds_are_forgotten_as_if_they_had_never_been(mode, tokenizer, spare, truncation):
    system = [{"role": "system", "content": "短"}]
    rounds = [turn(f"问题{i}" * 5, f"回答{i}" * 5) for i in "甲乙丙丁"]
    talk = system + [message for part in rounds for message in part]
    newest = system + rounds[2] + rounds[3]
    alone = render(mode, tokenizer, newest)
    unused = 3 if mode == "glm3" else 0  # tokens of ChatGLM3's overhead
    of_a_turn = max(render(mode, tokenizer, part).num_question for part in rounds)
    cut = render(mode, tokenizer, talk, len(alone.input_ids) + unused + spare, of_a_turn, truncation, False)
    assert cut.history_cut and not cut.question_cut and not cut.answer_cut
    assert (cut.input_ids, cut.labels) == (alone.input_ids, alone.labels)
    room = alone.num_question + spare
    asked = [render(mode, tokenizer, messages[:-1], 500, room, truncation, False) for messages in (talk, newest)]
    assert asked[0].input_ids == asked[1].input_ids and asked[0].history_cut and not asked[1].history_cut


@every_mode
@every_truncation
def test_a_conversation_that_fits_is_never_cut_nor_divided(mode, tokenizer, truncation):
    talk = [
        m for i in range(8) for m in turn(f"第{i}个问题：发动机水温高怎么办？", f"第{i}个回答：先看风扇，再看水温。")
    ]
    limits = Limits(1024, 64, truncation, False)  # 8 rounds are longer than --max_src_len
    samples = MODE[mode].samples(tokenizer, talk, limits)
    assert [one.row for one in samples] == [one.row for one in MODE[mode].samples(tokenizer, talk)]
    assert len(samples) == (1 if mode == "glm3" else 8) and not any(one.is_cut for one in samples)


@every_mode
def test_a_system_message_gives_way_before_the_question_does(mode, tokenizer):
    system = {"role": "system", "content": "你是一个助手。" * 40}
    talk = [system, *turn("水温高怎么办？", "看风扇。")]
    cut = render(mode, tokenizer, talk, 150, 60, "tail", False)
    text = tokenizer.decode(cut.input_ids)
    assert "水温高怎么办" in text and "看风扇" in text and "你是一个助手" in text and len(cut.input_ids) <= 150
    assert cut.history_cut and not cut.question_cut and not cut.answer_cut
    asked = render(mode, tokenizer, talk[:-1], 150, 120, "tail", False)
    assert "水温高怎么办" in tokenizer.decode(asked.input_ids) and asked.num_question <= 120
    none = render(mode, tokenizer, [{"role": "system", "content": ""}, *talk[1:-1]], 150, 120, "tail", False)
    assert none.row == render(mode, tokenizer, [{"role": "system", "content": ""}, *talk[1:-1]]).row


@every_mode
@every_truncation
def test_a_long_question_leaves_the_system_message_its_half(mode, tokenizer, truncation):
    system = [{"role": "system", "content": "要简短。"}]
    asked = render(mode, tokenizer, [*system, {"role": "user", "content": "水" * 300}], 400, 200, truncation, False)
    text = tokenizer.decode(asked.input_ids)
    assert "要简短。" in text and "水" * 40 in text and asked.question_cut and not asked.history_cut
    assert asked.num_question <= 200
    talk = [{"role": "system", "content": "要简短。" * 90}, *talk_of("水" * 300)]
    text = tokenizer.decode(render(mode, tokenizer, talk, 400, 200, truncation, False).input_ids)
    assert 20 < text.count("水") < 100 and text.count("要简短") > 3


@every_mode
@every_truncation
def test_however_little_room_there_is_some_of_the_question_stays(mode, tokenizer, truncation):
    system = {"role": "system", "content": "abcdef " * 60}
    for max_src_len in (24, 30, 40):
        cut = render(
            mode, tokenizer, [system, *turn("水" * 40, "好")], max_src_len + 20, max_src_len, truncation, False
        )
        assert "水水" in tokenizer.decode(cut.input_ids) and len(cut.input_ids) <= max_src_len + 20


def talk_of(question):
    return [{"role": "user", "content": question}]


def test_a_long_result_before_an_answer_is_cut_and_not_the_question_of_its_round(checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    call = {"role": "assistant", "metadata": "t", "content": "```python\ntool_call(a=1)\n```", "loss": False}
    talk = [*talk_of("查一下天气？"), call, {"role": "observation", "content": "晴" * 150}]
    asked = MODE["glm3"].render(tokenizer, talk, Limits(400, 100))
    text = tokenizer.decode(asked.input_ids)
    assert "查一下天气？" in text and text.count("晴") > 10 and asked.num_question <= 100
    (sample,) = MODE["glm3"].samples(tokenizer, [*talk, {"role": "assistant", "content": "好"}], Limits(120, 80))
    text = tokenizer.decode(sample.input_ids)
    assert sample.fits and sample.question_cut and "查一下天气？" in text and text.count("晴") > 10


@every_mode
@pytest.mark.parametrize("truncation", ["head", "middle"])
def test_only_the_text_of_a_question_is_cut_not_the_round_it_stands_in(mode, tokenizer, truncation):
    talk = [*turn("一问", "一答"), *talk_of("二" * 100)]
    asked = render(mode, tokenizer, talk, 500, 120, truncation, False)
    whole = render(mode, tokenizer, talk_of("二" * 100), 500, 40, truncation, False)
    text = tokenizer.decode(whole.input_ids)
    assert ("[Round 1]" in text and "问" in text) or mode == "glm3"
    assert whole.num_question <= 40 and asked.num_question <= 120


def test_tools_that_are_longer_than_the_limit_give_way_to_the_question(checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    tools = [{"name": f"tool_{i}", "description": "一个工具" * 5} for i in range(9)]
    talk = [{"role": "system", "content": "工具", "tools": tools}, *turn("今天天气怎么样？", "晴。")]
    cut = render("glm3", tokenizer, talk, 200, 40, "tail", False)
    text = tokenizer.decode(cut.input_ids)
    assert "tool_0" in text and "tool_8" not in text and "今天天气怎么样？" in text and "晴。" in text
    assert cut.history_cut and 180 < len(cut.input_ids) <= 200


def test_results_of_tools_give_way_oldest_first_and_each_answer_keeps_its_turn(checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    call = {"role": "assistant", "metadata": "f", "content": "```python\ntool_call()\n```", "loss": False}
    results = [{"role": "observation", "content": f"{i}" + "天" * 30 + "完"} for i in "ab"]
    talk = [{"role": "user", "content": "问天气？"}, call, results[0], call, results[1], *turn("", "晴。")[1:]]
    (cut,) = MODE["glm3"].samples(tokenizer, talk, Limits(150, 90, "tail", False))
    text = tokenizer.decode(cut.input_ids)
    assert "问天气？" in text and "a天" in text and "b" + "天" * 30 + "完" in text and "晴。" in text
    assert text.count("完") == 1 and cut.history_cut and not cut.question_cut


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
        assert one.history_cut and not one.question_cut and len(one.input_ids) <= 120
        assert "问39" in tokenizer.decode(one.input_ids)
    assert asked.num_question <= 60 and "答39" in tokenizer.decode(samples[-1].input_ids)


def test_calls_of_one_round_that_do_not_fit_drop_the_sample_and_are_an_error_in_prediction(checkpoints, tmp_path):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    call = {"role": "assistant", "metadata": "one_tool_with_a_very_long_name" * 4, "content": "```python\nf()\n```"}
    talk = [{"role": "user", "content": "q"}, call, {"role": "observation", "content": "1"}, *turn("q", "a")[1:]]
    limits = Limits(90, 16)
    assert [one.fits for one in MODE["glm3"].samples(tokenizer, talk, limits)] == [True, False]
    refused(lambda: MODE["glm3"].render(tokenizer, talk[:-1], limits), "alone have more than 16 tokens")
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}), encoding="utf-8")
    rows = InstructionDataset(tmp_path / "a.jsonl", Settings(MODE["glm3"].template, tokenizer, limits))
    assert (rows.report.kept, rows.report.skipped) == (1, 1)
    (tmp_path / "b.jsonl").write_text(json.dumps({"messages": [*talk[:-1], {**talk[-1], "loss": True}]}))
    last = Settings(MODE["glm3"].template, tokenizer, limits, train_on="last")
    refused(lambda: InstructionDataset(tmp_path / "b.jsonl", last, window=4), "line 1", "do not fit into --max_len")


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
