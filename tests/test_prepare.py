"""Preparation: whatever the files, the blocks and the processes, the samples and the report are those in memory."""

import gzip
import json
import shutil
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from glm_finetune import MODE
from glm_finetune.data import blocks, cache, files, prepare
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.files import DataFile, list_data_files
from glm_finetune.data.report import Report
from glm_finetune.data.samples import prepare_row
from glm_finetune.modes.spec import Limits
from tests.refusal import refused
from tests.test_cache import damage_last_line, dataset, prepared, settings_of


@pytest.fixture
def settings(checkpoints):
    return settings_of("glm3", checkpoints)


@pytest.mark.parametrize("form", ["lines", "array", "gzip", "weighted"])
def test_blocks_and_workers_change_no_byte(form, settings, data_file, rows, tmp_path, monkeypatch, fork_server):
    settings = replace(settings, on_bad_row="skip", limits=Limits(80, 64, end_cut_answers=False), too_long="drop")
    damage_last_line(data_file)
    path = {"lines": data_file, "array": tmp_path / "a.json", "gzip": tmp_path / "a.jsonl.gz"}.get(form)
    if form == "array":
        path.write_text(json.dumps([*rows, 3], ensure_ascii=False, indent=1), encoding="utf-8")
    elif form == "gzip":
        path.write_bytes(gzip.compress(data_file.read_bytes()))
    else:
        path = path or f"{data_file}:1.5,{data_file}:0.4"
    whole = prepared(path, settings, tmp_path / "whole", num_workers=0)
    assert len(whole.report.bad) == (2 if form == "weighted" else 1) and whole.report.skipped
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    monkeypatch.setattr(blocks, "BLOCK_ROWS", 3)
    assert len(list(blocks.blocks_of(list_data_files(path)[0]))) > 3
    for name, num_workers in (("blocks", 0), ("workers", 2)):
        parts = prepared(path, settings, tmp_path / name, num_workers=num_workers)
        assert parts.report == whole.report
        for column, values in whole.columns.items():
            assert values.tobytes() == parts.columns[column].tobytes(), column


ROWS = [  # of one format each, with and without what can be cut, dropped, or refused
    *[{"messages": [{"role": r, "content": c * n} for r, c in roles]} for n in (1, 9, 40) for roles in (
        [("user", "问"), ("assistant", "答")],
        [("system", "短"), ("user", "问"), ("assistant", "答"), ("user", "再问"), ("assistant", "再答")],
        [("user", "问"), ("assistant", ""), ("user", "<|user|>"), ("assistant", "<eop></s>")],
        [("user", "问"), ("assistant", "")],
    )],
    {"messages": [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答", "loss": False}]},
    {"messages": [{"role": "user", "content": "问"}]},
    {"messages": [{"role": "user", "content": "长" * 99}, {"role": "assistant", "content": "答"}], "x": 1},
    {"messages": 3},
]  # fmt: skip


@pytest.mark.parametrize("mode", MODE)
@pytest.mark.parametrize("limits", [None, (60, 40, "tail", True), (60, 40, "head", False), (70, 30, "middle", False)])
@pytest.mark.parametrize("options", [{}, {"style": "official", "train_on": "last"}, {"too_long": "drop"}])
def test_rows_encoded_together_are_the_rows_prepared_one_by_one(mode, limits, options, checkpoints, tmp_path):
    settings = settings_of(mode, checkpoints)
    limits = limits and Limits(*limits)
    settings = replace(settings, limits=limits, data_format="messages", on_bad_row="skip", **options)
    path, report, expected, where = tmp_path / "rows.jsonl", Report(settings.too_long), [], []
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    for number, row in enumerate(ROWS, 1):
        try:
            kept = report.keep(prepare_row(f"{path}, line {number}", row, settings))
        except ValueError as error:
            report.add_bad(str(error))
            continue
        expected += [one.row for one in kept]
        where += [f"{path}, line {number}"] * len(kept)
    data = InstructionDataset(path, settings)
    assert list(data) == expected and [data.where(i) for i in range(len(data))] == where
    targets = [sum(label != -100 for label in row["labels"]) for row in expected]
    lengths = Counter(len(row["input_ids"]) for row in expected)
    report.kept, report.lengths, report.targets, report.formats = len(expected), lengths, sum(targets), ["messages"]
    report.tokens = sum(length * count for length, count in lengths.items())
    assert data.report == report and len(report.bad) >= 2 and report.no_target and report.answer_empty


def test_files_of_any_kind_with_weights_are_prepared_as_in_memory_and_no_token_twice(
    settings, data_file, rows, tmp_path
):
    (tmp_path / "b.json").write_text(json.dumps(rows[:4]), encoding="utf-8")
    (tmp_path / "c.csv").write_text("question,answer\n水温高,风扇\n漏水,水泵\n异响,轴承\n", encoding="utf-8")
    path = f"{data_file}:2.5, {tmp_path}/b.json, {tmp_path}/c.csv:0.5"
    expected, data = dataset(settings, path, None), dataset(settings, path, tmp_path / "cache")
    for found in (data, dataset(settings, path, tmp_path / "cache")):
        assert list(found) == list(expected) and found.report == expected.report
        assert [found.where(i) for i in range(len(found))] == [expected.where(i) for i in range(len(expected))]
        assert found.lengths().tolist() == [len(row["input_ids"]) for row in expected]
    assert data.report.kept == len(data) == 27 + 4 + 1 and data.where(31) == f"{tmp_path}/c.csv, line 3"
    [stored] = (tmp_path / "cache").glob("*/input_ids")
    parts = [dataset(settings, part, None) for part in (data_file, tmp_path / "b.json")]
    assert stored.stat().st_size == 4 * (sum(part.report.tokens for part in parts) + len(data[31]["input_ids"]))


def test_the_report_of_a_second_start_is_that_of_the_preparation(settings, data_file, tmp_path, monkeypatch):
    damage_last_line(data_file)
    settings = replace(settings, on_bad_row="skip", limits=Limits(60, 20))
    expected = dataset(settings, data_file, None).report
    assert expected.bad and len(list(expected.hints())) == 3
    assert dataset(settings, data_file, tmp_path / "cache").report == expected
    monkeypatch.setattr(prepare, "tokenize_block", lambda *args: pytest.fail("tokenized again"))
    again = dataset(settings, data_file, tmp_path / "cache").report
    assert (again, str(again), list(again.hints())) == (expected, str(expected), list(expected.hints()))


def test_the_same_bad_rows_elsewhere_are_named_where_they_are(settings, data_file, tmp_path):
    damage_last_line(data_file)
    settings = replace(settings, on_bad_row="skip")
    for path in (data_file, shutil.copy(data_file, tmp_path / "other.jsonl")):
        assert dataset(settings, path, tmp_path / "cache").report.bad[0].startswith(f"{path}, line 12: ")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_row_that_does_not_fit_stops_where_that_is_asked_for(
    num_workers, settings, data_file, tmp_path, monkeypatch, fork_server
):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    settings = replace(settings, too_long="error", limits=Limits(400, 23))
    expected = refused(lambda: dataset(settings, data_file, None), "does not fit into --max_src_len")
    assert refused(lambda: prepared(data_file, settings, tmp_path / "cache", num_workers)) == expected


def test_a_row_that_is_nested_too_deep_for_another_process_is_tokenized_all_the_same(
    settings, rows, tmp_path, fork_server
):
    deep = json.loads("[" * 900 + "]" * 900)
    path = tmp_path / "a.json"
    path.write_text(json.dumps([*rows, {**rows[0], "other": deep}]), encoding="utf-8")
    samples = prepared(path, settings, tmp_path / "cache", num_workers=2)
    assert len(samples.columns["index"]) == 12


def test_a_data_set_of_the_hub_is_read_at_every_start_and_a_saved_one_only_when_it_changes(
    settings, rows, tmp_path, monkeypatch
):
    found = list(rows)
    monkeypatch.setitem(files.READERS, "datasets", lambda path: enumerate(found, 1))
    hub = [DataFile("hf://owner/name", "datasets", Fraction(1))]
    assert blocks.content_of(hub[0]) is None and prepare.choose_workers(hub) > 0
    samples = cache.prepared(hub, settings, tmp_path / "cache", num_workers=0)
    found.pop()
    again = cache.prepared(hub, settings, tmp_path / "cache", num_workers=0)
    assert (len(samples.columns["index"]), len(again.columns["index"])) == (11, 10)

    for name in ("state.json", "data.arrow"):
        (tmp_path / "saved").mkdir(exist_ok=True)
        (tmp_path / "saved" / name).write_text("{}")
    first = dataset(settings, f"{tmp_path}/saved#train", tmp_path / "cache")
    found.pop()
    assert len(dataset(settings, f"{tmp_path}/saved#test", tmp_path / "cache")) == 9
    assert len(dataset(settings, f"{tmp_path}/saved#train", tmp_path / "cache")) == len(first) == 10
    (tmp_path / "saved/data.arrow").write_text("[]")
    assert len(dataset(settings, f"{tmp_path}/saved#train", tmp_path / "cache")) == 9


def test_the_report_counts_by_weight(settings, tmp_path):
    for name, length in (("long", 99), ("short", 3)):
        row = json.dumps({"question": "长" * length, "answer": "答"}, ensure_ascii=False)
        (tmp_path / f"{name}.jsonl").write_text(f"{row}\n" * 4, encoding="utf-8")
    path = f"{tmp_path}/long.jsonl:3,{tmp_path}/short.jsonl:2"
    for too_long, kept, skipped in (("cut", 20, 0), ("drop", 8, 12)):
        report = dataset(replace(settings, limits=Limits(80, 40), too_long=too_long), path, None).report
        assert (report.rows, report.kept, report.question_cut, report.skipped) == (8, kept, 12, skipped)
        assert any("(60.0%)" in line for line in report.table())


def test_a_file_that_changes_while_a_start_waits_is_not_prepared_under_its_old_name(
    settings, data_file, tmp_path, monkeypatch
):
    work = cache.read

    def change(*args, **kwargs):
        data_file.write_text(data_file.read_text(encoding="utf-8") * 2, encoding="utf-8")
        return work(*args, **kwargs)

    monkeypatch.setattr(cache, "read", change)
    refused(lambda: prepared(data_file, settings, tmp_path / "cache"), "changed while it was read")
    monkeypatch.setattr(cache, "read", work)
    assert not list((tmp_path / "cache").glob("*/header.json"))


def test_little_is_prepared_here_and_much_in_two_processes_at_least(tmp_path, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"x" * 999)
    for num_cores in (1, 4):
        monkeypatch.setattr(prepare, "num_cores", lambda num_cores=num_cores: num_cores)
        for at_least, expected in ((1000, 0), (999, 0), (500, 0), (499, 2), (100, 4)):
            monkeypatch.setattr(prepare, "MIN_BYTES_OF_WORKER", at_least)
            assert prepare.choose_workers(list_data_files(path)) == (expected if num_cores > 1 else 0)
