"""The files that predict.py writes its answers to, and how long these may be."""

from pathlib import Path

import pytest

import predict
from glm_finetune import build
from glm_finetune.answer.answers import check_output
from tests.refusal import refused, run_main
from tests.test_bad_input import ROW, lines
from tests.tiny import make_checkpoint


@pytest.fixture
def ask(tmp_path, monkeypatch, capsys):
    """Function: flags of predict.py -> exit code, stderr. A base with a context of 256 answers into out.jsonl."""
    make_checkpoint("glm3", tmp_path / "base")
    (tmp_path / "data.jsonl").write_bytes(lines(ROW))

    def run(*arguments):
        flags = {"--model_path": tmp_path / "base", "--test_path": tmp_path / "data.jsonl", "--device": "cpu"}
        flags |= {"--output_path": tmp_path / "out.jsonl", **dict(zip(arguments[::2], arguments[1::2]))}
        return run_main(predict, monkeypatch, capsys, *[part for item in flags.items() for part in item])

    return run


def many(folder):
    """A folder of questions, a file of them elsewhere, one whose name is that of settings, and a saved data set."""
    (folder / "all").mkdir()
    (folder / "saved").mkdir()
    (folder / "saved/state.json").write_text("{}")
    for name in ("all/a.jsonl", "b.jsonl", "out.settings.json"):
        (folder / name).write_bytes(lines(ROW))


@pytest.mark.parametrize(
    "test_path, output, part",
    [
        ("all/a.jsonl,b.jsonl", "b.jsonl", "is the file of --test_path"),
        ("b.jsonl:1,all/a.jsonl", "x/../b.jsonl", "is the file of --test_path"),
        ("b.jsonl,all", "all/a.jsonl", "is the file of --test_path"),
        ("all", "all/answers.jsonl", "lies in the folder of --test_path"),
        ("all:1", "all/answers", "lies in the folder of --test_path"),
        ("out.settings.json", "out", "is the file of --test_path"),
        ("saved#test", "saved/test/answers.jsonl", "lies in the folder of --test_path"),
    ],
)
def test_answers_never_become_questions(tmp_path, test_path, output, part, monkeypatch):
    many(tmp_path)
    (tmp_path / "x").mkdir()
    monkeypatch.chdir(tmp_path)
    refused(lambda: check_output(Path(output), test_path), f"--output_path {Path(output)} {part}")


def test_answers_to_several_files_go_on_and_lie_beside_them(ask, tmp_path, monkeypatch):
    many(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(predict, "answer_batch", lambda *parts: (["x"] * len(parts[-1]), 0))
    for _ in range(2):
        assert ask("--test_path", "all/a.jsonl,b.jsonl", "--output_path", "out.jsonl")[0] == 0
    assert len((tmp_path / "out.jsonl").read_bytes().splitlines()) == 2


@pytest.mark.parametrize("by_default", [False, True])
def test_no_answer_is_longer_than_the_model_was_made_for(ask, monkeypatch, by_default):
    asked = []
    monkeypatch.setattr(build, "load_base", lambda *parts: pytest.fail("loaded"))
    if not by_default:
        for length in (257, 100_000):
            code, error = ask("--max_length", length)
            assert code == 2 and f"--max_length {length}: " in error and "was made for 256 tokens" in error
        code, error = ask("--max_new_tokens", 250)
        assert code == 2 and "--max_new_tokens 250: " in error and "was made for 256 tokens" in error
        return
    monkeypatch.undo()
    monkeypatch.setattr(
        predict, "answer_batch", lambda *parts: (asked.append(parts[3]), (["x"] * len(parts[-1]), 0))[1]
    )
    assert ask()[0] == 0 and {config.max_length for config in asked} == {256}
