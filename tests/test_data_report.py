"""python -m glm_finetune.data: counts, the histogram, the preview; and that it reads no weights."""

import json
import re
import shlex
import sys
from collections import Counter
from pathlib import Path

import pytest
from matplotlib.colors import to_hex

from glm_finetune import MODE, exits
from glm_finetune.data import __main__ as report_script
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.flags import ReportConfig
from glm_finetune.data.histogram import BAR, LIMIT, OVER, Panel, bins_of, figure_of, nice_step, save_histograms
from glm_finetune.data.report import Report, percentile
from glm_finetune.data.samples import settings_of
from glm_finetune.data.survey import survey
from glm_finetune.flags import parse
from tests.refusal import refused

ROOT = Path(__file__).parents[1]
every_mode = pytest.mark.parametrize("mode", MODE)


@pytest.fixture
def report(checkpoints, tmp_path, monkeypatch, capsys):
    """Function: rows, flags -> (exit code, what was printed, errors), in an empty folder with the rows."""
    monkeypatch.chdir(tmp_path)

    def run(rows, *arguments, mode="glm3"):
        lines = (row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows)
        Path("data.jsonl").write_text("\n".join(lines), encoding="utf-8")
        arguments = ["data.jsonl", "--mode", mode, "--model_name_or_path", str(checkpoints[mode]), *arguments]
        monkeypatch.setattr(sys, "argv", ["glm_finetune.data", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            exits.exit_with_message(report_script.main)
            sys.exit(0)
        return stop.value.code, *capsys.readouterr()

    return run


ROWS = [{"question": "风" * length, "answer": "水温高"} for length in (5, 10, 20, 30, 200)]


@every_mode
def test_the_report_counts_and_draws_what_training_would_do(report, mode):
    code, printed, _ = report(ROWS, "--max_len", "100", "--max_src_len", "60", mode=mode)
    numbers = dict(re.findall(r"^  ([a-z ,%\d]+?)  +([\d,]+)", printed, re.MULTILINE))
    assert code == 0
    assert (numbers["rows"], numbers["samples"], numbers["bad rows"]) == ("5", "5", "0")
    assert (numbers["questions cut"], numbers["answers cut"]) == ("1", "0")
    assert "1 questions longer than --max_src_len are cut: raise it" in printed
    assert Path("lengths.png").read_bytes().startswith(b"\x89PNG")


@every_mode
def test_the_lengths_are_those_before_cutting_and_agree_with_what_is_cut(mode, checkpoints, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + '{"question": 3}\n', encoding="utf-8")
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    arguments = ["--train_path", str(path), "--model_name_or_path", "x", "--on_bad_row", "skip", "--max_len", "300"]
    for max_src_len in (30, 60, 200):
        config = parse(ReportConfig, [*arguments, "--max_src_len", str(max_src_len)])
        settings = settings_of(config, MODE[mode], tokenizer)
        found = survey(path, settings)
        assert found.questions.total() == found.samples.total() == len(ROWS) and max(found.samples) > 200
        over = sum(count for length, count in found.questions.items() if length > max_src_len)
        assert over == InstructionDataset(path, settings).report.question_cut > 0


def test_the_report_says_each_files_format_and_what_is_left_alone(report):
    rows = [{"question": "q", "answer": "a", "id": i, **({"late": 1} if i > 30 else {})} for i in range(40)]
    _, printed, _ = report(rows)
    assert "data.jsonl: format question_answer; left alone: id, late (--columns FIELD=COLUMN reads one)" in printed
    assert "data.jsonl: format question_answer\n" in report(ROWS)[1]
    texts = [{"text": "t", "label": "x"}]
    _, printed, _ = report(texts, "--data_format", "text")
    assert "data.jsonl: format text; left alone: label (--columns FIELD=COLUMN reads one)" in printed
    _, printed, _ = report(texts, "--columns", "answer=label")
    assert "data.jsonl: format text_answer\n" in printed
    rows = [{"instruction": "i", "q": "x", "output": "o", "tag": 1, "tag2": 2}]
    _, printed, _ = report(rows, "--columns", "instruction=q")
    assert "left alone: instruction, tag, tag2 (--columns FIELD=COLUMN reads one)" in printed


def test_no_weights_are_read(report, checkpoints, tmp_path):
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    for path in checkpoints["glm3"].glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    assert report(ROWS, "--model_name_or_path", str(folder))[0] == 0


def test_samples_are_shown_with_their_place_their_targets_and_no_control_characters(report):
    rows = [{"question": "q\x1b[2J", "answer": "水温高\r\x07"}, ROWS[0]]
    _, printed, _ = report(rows, "--preview", "9")
    shown = printed.partition("data.jsonl, line 1\n")[2]
    assert shown.startswith("[gMASK]sop<|user|>\n q\\x1b[2J⟦<|assistant|>\n 水温高\\r\\x07</s>⟧\n")
    assert "data.jsonl, line 2\n" in shown and "\x1b" not in shown
    assert "data.jsonl, line" not in report(rows)[1]


def test_a_terminal_gets_colours_unless_it_asks_for_none(monkeypatch, checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    ids = tokenizer.encode_text("水温高")
    row = {"input_ids": ids, "labels": [-100, *ids[1:]]}
    coloured = report_script.preview(row, tokenizer, colour=True)
    assert coloured.count("\x1b[32m⟦") == coloured.count("⟧\x1b[0m") == 1
    assert re.sub("\x1b\\[\\d+m", "", coloured) == report_script.preview(row, tokenizer, colour=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert report_script.in_colour()
    monkeypatch.setenv("NO_COLOR", "1")
    assert not report_script.in_colour()


def test_bad_rows_are_listed_on_request_and_an_error_otherwise(report):
    rows = [ROWS[0], "{oops", {"question": 3, "answer": "a"}]
    code, _, errors = report(rows)
    assert code == 2 and "data.jsonl, line 2: not JSON" in errors
    code, printed, _ = report(rows, "--on_bad_row", "skip")
    assert code == 0 and "bad rows in bad_rows.txt" in printed
    assert [line.split(": ")[0] for line in Path("bad_rows.txt").read_text().splitlines()] == [
        "data.jsonl, line 2",
        "data.jsonl, line 3",
    ]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--preview", "-1"], ["--preview -1"]),
        (["--output_path", "x.jpg"], ["--output_path x.jpg", ".png"]),
        (["--max_len", "0"], ["--max_len 0"]),
        (["--truncation", "x"], ["--truncation 'x'"]),
        (["--modle", "x"], ["--modle", "--mode?"]),
    ],
)
def test_wrong_flags_are_named(arguments, parts):
    refused(lambda: parse(ReportConfig, ["--train_path", "a", "--model_name_or_path", "b", *arguments]), *parts)


def test_an_unknown_mode_and_a_missing_file_are_named(report):
    assert "Did you mean glm3?" in report(ROWS, "--mode", "gml3")[2]
    assert "none.json: no such file" in report(ROWS, "--train_path", "none.json")[2]


def test_the_command_in_the_readmes_is_one_that_parses():
    for name in ("README.md", "README_zh.md", "data/README.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        commands = re.findall(r"python -m glm_finetune\.data (.+)", text)
        assert commands, name
        for command in commands:
            assert parse(ReportConfig, ["--train_path", *shlex.split(command, comments=True)])


# Lengths


def test_percentiles_are_those_of_the_sorted_lengths():
    lengths = Counter({3: 1, 10: 8, 50: 1})
    assert [percentile(lengths, p) for p in (1, 10, 11, 50, 90, 91, 100)] == [3, 3, 10, 10, 10, 50, 50]
    assert percentile(Counter(), 50) == 0 and Report().longest == 0


STEPS = [(1, 60, 1), (60, 60, 1), (61, 60, 2), (115, 60, 2), (301, 60, 10), (9e6, 5, 2e6)]


@pytest.mark.parametrize("span, num, step", STEPS)
def test_steps_are_round_numbers(span, num, step):
    assert nice_step(span, num) == step


SHAPES = [{1: 1}, {40: 5, 60: 3, 61: 2}, {n: n % 7 for n in range(1, 900)}, {30: 999, 50_000: 1}]


@pytest.mark.parametrize("limit", [50, 60, 64, 1024])
@pytest.mark.parametrize("lengths", SHAPES)
def test_every_sample_is_in_its_bin_or_counted_as_outside(lengths, limit):
    lengths = Counter(lengths)
    width, counts, over, num_outside = bins_of(Panel("x", lengths, "max", limit))
    assert sum(counts) + num_outside == lengths.total() and len(counts) <= 64
    for i, count in enumerate(counts):
        inside = {length: n for length, n in lengths.items() if i * width < length <= (i + 1) * width}
        assert count == sum(inside.values())
        assert over[i] == sum(n for length, n in inside.items() if length > limit)
    assert num_outside <= lengths.total() / 100


def drawn(panel):
    """(samples in bars by colour, where the limit is marked or None, all text) of a panel."""
    (axes,) = figure_of([panel]).axes
    bars = Counter()
    for bar in axes.patches:
        bars[to_hex(bar.get_facecolor())] += round(bar.get_height())
    marked = [line.get_xdata()[0] for line in axes.lines if to_hex(line.get_color()) == LIMIT]
    texts = [axes.get_title("left"), axes.get_title("right"), axes.get_xlabel()]
    legend = axes.get_legend()
    return bars, marked, "\n".join(texts + [text.get_text() for text in (legend.texts if legend else ())])


def test_the_picture_shows_what_is_over_the_limit_and_marks_it():
    lengths = Counter({10: 30, 20: 50, 40: 20})
    for limit, num_over in ((40, 0), (25, 20)):
        bars, marked, text = drawn(Panel("tokens", lengths, "max_len", limit))
        assert bars[BAR] == 100 - num_over and bars[OVER] == num_over and marked == [limit]
        assert f"max_len {limit}" in text and f"{num_over} ({num_over}.0%) over max_len {limit}" in text
        assert "100 samples by tokens\n50% up to 20, 90% up to 40, 99% up to 40, longest 40" in text
    bars, marked, text = drawn(Panel("tokens", lengths, "max_len", 9000))
    assert bars == {BAR: 100} and not marked and "0 (0.0%) over max_len 9,000" in text  # too far away to show
    text = drawn(Panel("tokens", Counter({30: 999, 50_000: 1}), "max_len", 40))[2]
    assert "1 right of the axis" in text and "1 (0.1%) over max_len 40" in text


def test_every_panel_is_in_one_file_and_a_picture_of_nothing_can_be_drawn(tmp_path):
    empty, full = (Panel("tokens", Counter(lengths), "max_len", 10) for lengths in ({}, {4: 2, 12: 3}))
    save_histograms([empty, full], tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG") and len(figure_of([empty, full]).axes) == 2
    assert not drawn(empty)[0] and "0 samples by tokens" in drawn(empty)[2]
    assert "matplotlib.pyplot" not in sys.modules


def test_a_picture_needs_matplotlib_and_a_folder(tmp_path, monkeypatch):
    panels = [Panel("tokens", Counter({1: 1}), "max_len", 10)]
    refused(lambda: save_histograms(panels, tmp_path / "none/a.png"), "none/a.png: cannot be written")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    refused(lambda: save_histograms(panels, tmp_path / "a.png"), "a.png", "pip install matplotlib")


def test_a_folder_of_another_mode_is_refused(report, checkpoints):
    config = checkpoints["glm3"] / "config.json"
    text = config.read_text(encoding="utf-8")
    try:
        config.write_text(json.dumps(json.loads(text) | {"_name_or_path": "THUDM/chatglm2-6b"}), encoding="utf-8")
        code, _, error = report(ROWS)
    finally:
        config.write_text(text, encoding="utf-8")
    assert code == 2 and "THUDM/chatglm2-6b, not a model for --mode glm3" in error
