"""What may surprise who trains on a data set: each is counted, with an example and what changes it."""

import json
import random
import string
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.flags import ReportConfig
from glm_finetune.data.near import LEAST, NearIndex, runs_of
from glm_finetune.data.samples import settings_of
from glm_finetune.data.survey import SURPRISES, survey
from glm_finetune.flags import parse

CHECKPOINTS = Path(__file__).parent / "fixtures/oracle/checkpoints"
FILES = sorted((Path(__file__).parents[1] / "data/formats").iterdir())
every_mode = pytest.mark.parametrize("mode", MODE)


@pytest.fixture
def look(tmp_path):
    """Function: rows, mode, flags -> Survey."""

    def run(rows, mode="glm3", context=None, evaluation=None, **flags):
        for name, some in (("a", rows), ("e", evaluation or [])):
            lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in some)
            (tmp_path / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
        arguments = [part for name, value in flags.items() for part in (f"--{name}", str(value))]
        needed = ["--train_path", str(tmp_path / "a.jsonl"), "--model_name_or_path", "x", "--mode", mode]
        config = parse(ReportConfig, [*needed, *arguments])
        tokenizer = MODE[mode].tokenizer.from_pretrained(CHECKPOINTS / f"{mode}-a")
        settings = settings_of(config, MODE[mode], tokenizer)
        return survey(config.train_path, settings, context, evaluation and str(tmp_path / "e.jsonl"))

    return run


def row(question="水温高？", answer="看风扇。", **more):
    return {"question": question, "answer": answer, **more}


def counts(found):
    return {name: count for name, (count, _) in found.surprises.items()}


@every_mode
def test_nothing_is_surprising_about_plain_rows(look, mode):
    found = look([row(), row("电压低？")], mode)
    assert found.surprises == {} and len(found.lines()) == 1 and found.samples.total() == 2


@every_mode
def test_what_is_too_long_is_counted_with_the_line_and_the_flag(look, mode):
    rows = [row(), row("水" * 60), row("电", "风" * 200), row("泵", "温" * 300)]
    longest = max(look(rows, mode).samples)
    found = look(rows, mode, context=longest - 1, max_src_len=50, max_len=150)
    assert counts(found) == {"question cut": 1, "sample cut": 2, "beyond the model": 1}
    printed = "\n".join(found.lines())
    for part in (
        "a.jsonl, line 2: ",
        "a.jsonl, line 3: ",
        f"the model has {longest - 1}",
        "--max_src_len",
        "--max_len",
    ):
        assert part in printed
    assert max(found.questions) > 50 and found.questions.total() == found.samples.total() == 4


@every_mode
def test_each_turn_of_a_conversation_counts_not_the_rounds_before_it(look, mode):
    talk = [{"role": role, "content": f"{i}" + "水温" * 10} for i in range(8) for role in ("user", "assistant")]
    found = look([{"messages": talk}], mode, max_src_len=60)
    assert found.questions.total() == 8 and max(found.questions) <= 60 and found.surprises == {}


def test_answers_that_the_tokenizer_changes_are_counted_and_shown(look):
    rows = [row(answer="灯不亮，闪烁"), row(answer="灯不亮"), row("再问", answer="（左）")]
    found = look(rows, "glm")
    assert counts(found) == {"answer changes": 2}
    assert "'灯不亮，闪烁' becomes '灯不亮,闪烁'" in "\n".join(found.lines())
    assert look(rows, "glm2").surprises == {}
    talk = [{"role": role, "content": f"{i}，"} for i in range(2) for role in ("user", "assistant")]
    assert counts(look([{"messages": talk}], "glm")) == {"answer changes": 2}


def test_instructions_that_run_into_their_input_are_counted_until_a_separator_is_given(look):
    rows = [{"instruction": f"{i}{end}", "input": "We use", "output": "a"} for i, end in enumerate(["bold", "：", "."])]
    rows += [{"instruction": "alone", "output": "b"}, {"instruction": "bold", "input": "（a）", "output": "c"}]
    found = look(rows)
    assert counts(found) == {"no separator": 1} and "0boldWe use" in "\n".join(found.lines())
    assert look(rows, input_separator=r"\n").surprises == {}


def test_rows_that_are_there_twice_and_those_of_the_evaluation_are_counted(look):
    question = "发动机水温偏高，风扇不转，怎么办？"
    rows = [row(question), row(), row(question), row("发动机水温偏高风扇不转怎么办", id=3), row("别的问题" * 5)]
    found = look(rows, evaluation=[row(question)])
    assert counts(found) == {"the same": 1, "in evaluation": 3}
    printed = "\n".join(found.lines())
    assert "a.jsonl, line 3: as " in printed and "e.jsonl, line 1" in printed and "left alone: id" in printed


def test_near_is_the_jaccard_index_of_all_runs(tmp_path):
    rng = random.Random(5)
    known = ["".join(rng.choices(string.ascii_lowercase[:4], k=rng.randint(1, 60))) for _ in range(60)]
    index, found = NearIndex([(i, text) for i, text in enumerate(known)]), 0
    for text in known * 8:
        changed = list(text)
        for _ in range(rng.randint(0, 3)):
            changed[rng.randrange(len(changed))] = rng.choice("abcd -，A")
        changed = "".join(changed)
        runs = runs_of(changed)
        shares = [len(runs & runs_of(other)) / len(runs | runs_of(other)) for other in known]
        near = index.nearest(changed)
        assert (near is not None) == (max(shares) >= LEAST)
        assert near is None or shares[near] >= LEAST
        found += near is not None and known[near] != changed
    assert found > 50


@every_mode
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_shipped_file_is_surveyed(path, mode):
    config = parse(ReportConfig, ["--train_path", str(path), "--model_name_or_path", "x"])
    tokenizer = MODE[mode].tokenizer.from_pretrained(CHECKPOINTS / f"{mode}-a")
    found = survey(config.train_path, settings_of(config, MODE[mode], tokenizer))
    assert found.samples.total() or mode != "glm3"
    assert found.lines()[0].startswith(f"{path}: format ") and found.surprises.keys() <= SURPRISES.keys()


@every_mode
def test_what_is_said_to_be_cut_is_what_training_cuts(look, mode, tmp_path):
    rows = [row("水" * (i % 7), "温" * i) for i in range(80)]
    tokenizer = MODE[mode].tokenizer.from_pretrained(CHECKPOINTS / f"{mode}-a")
    for max_len in range(70, 90):
        found = counts(look(rows, mode, max_len=max_len, max_src_len=40))
        needed = ["--train_path", "x", "--model_name_or_path", "x", "--max_len", str(max_len), "--max_src_len", "40"]
        settings = settings_of(parse(ReportConfig, needed), MODE[mode], tokenizer)
        report = InstructionDataset(tmp_path / "a.jsonl", settings).report
        assert found.get("sample cut", 0) == report.answer_cut > 0
        assert found.get("question cut", 0) == report.question_cut
