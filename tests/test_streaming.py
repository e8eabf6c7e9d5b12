"""Streams: the rows of prepared data without preparing them, in windows, at any position."""

import gzip
import json
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.config import TrainConfig
from glm_finetune.data import blocks
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.order import in_windows
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.data.samples import Settings
from glm_finetune.flags import parse
from glm_finetune.modes.spec import Limits
from glm_finetune.run.folder import checkpoints as checkpoints_in
from tests.refusal import refused
from tests.test_bad_input import NEEDED
from tests.test_resume import losses, stopped_copy
from tests.test_training import run

STREAM = dict(streaming=True, shuffle_buffer=4)


def dataset(checkpoints, path, mode="glm3", window=None, limits=(128, 64), **options):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    return InstructionDataset(path, Settings(MODE[mode].template, tokenizer, Limits(*limits), **options), window=window)


@pytest.mark.parametrize("num_files", [1, 3])
@pytest.mark.parametrize("mode", MODE)
def test_streamed_rows_are_prepared_rows(mode, num_files, checkpoints, rows, tmp_path, monkeypatch):
    paths = [tmp_path / f"{i}.jsonl" for i in range(num_files)]
    for i, path in enumerate(paths):
        part = [json.dumps(row, ensure_ascii=False) for row in rows[i::num_files]]
        path.write_text("\ufeff" * (i == 1) + "\n" + "\n\n".join(part), encoding="utf-8")
    path = ",".join(map(str, paths))
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 700)
    whole = dataset(checkpoints, path, mode)
    for window in (1, 3, 11, 100):
        streamed = dataset(checkpoints, path, mode, window)
        assert len(streamed) == len(whole) == 11
        order = [7, 0, 10, 3, 4, 5, 1, 2, 6, 8, 9]
        assert [streamed[i] for i in order] == [whole[i] for i in order]
        assert [streamed.where(i) for i in order] == [whole.where(i) for i in order]


def test_memory_holds_two_windows_and_reads_each_once(checkpoints, data_file, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 300)
    data, read = dataset(checkpoints, data_file, window=3), []
    rows = blocks.Block.rows
    monkeypatch.setattr(blocks.Block, "rows", lambda block: read.append(block.first_row) or rows(block))
    for i in (2, 0, 3, 1, 5, 4, 6, 8, 7, 9, 10):  # a step may span two windows
        data[i]
        assert sum(len(rows) for rows in data.rows._windows.values()) <= 6
    assert len(read) <= len(data.rows._blocks) + 3  # a block on the border of two windows is read for both


def test_a_file_that_changes_under_a_stream_is_named(checkpoints, data_file):
    data = dataset(checkpoints, data_file, window=4)
    data[0]
    data_file.write_text(data_file.read_text(encoding="utf-8") * 2, encoding="utf-8")
    refused(lambda: data[8], str(data_file), "changed while it was read")


def test_a_bad_line_is_named_when_it_is_its_turn(checkpoints, data_file, rows):
    data_file.write_text("".join(json.dumps(row) + "\n" for row in rows + rows), encoding="utf-8")
    with open(data_file, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a", "input": "b"}\n{oops\n')
    data = dataset(checkpoints, data_file, window=4)
    assert len(data) == 24 and data[7]["input_ids"]
    refused(lambda: data[23], f"{data_file}, line 24: not JSON", "{oops")
    data_file.write_text(data_file.read_text(encoding="utf-8").replace("{oops\n", ""), encoding="utf-8")
    refused(lambda: dataset(checkpoints, data_file, window=4)[22], "line 23: field 'output' is missing")


LEAVE = "Leave --streaming out."
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize("kind", ["array", "gzip", "csv", "weighted"])
def test_what_cannot_be_read_at_any_place_is_refused(kind, checkpoints, data_file, rows):
    path = f"{data_file}:2" if kind == "weighted" else data_file
    if kind == "array":
        data_file.write_text(json.dumps(rows), encoding="utf-8")
    elif kind == "gzip":
        path = Path(f"{data_file}.gz")
        path.write_bytes(gzip.compress(data_file.read_bytes()))
    elif kind == "csv":
        path = data_file.with_suffix(".csv")
        path.write_text("question,answer\na,b\n", encoding="utf-8")
    assert len(dataset(checkpoints, path)) > 0
    refused(
        lambda: dataset(checkpoints, path, window=4), data_file.stem, "--streaming reads files of JSON lines", LEAVE
    )


@pytest.mark.parametrize("mode", MODE)
def test_rows_that_make_other_than_one_sample_are_refused(mode, checkpoints, tmp_path):
    path = tmp_path / "data.jsonl"

    def lines(*talks):
        path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
        return dataset(checkpoints, path, mode, window=4)

    assert len(lines(TALK)) == 1
    if mode == "glm3":  # a conversation is one sample
        assert len(lines(TALK, TALK * 2)) == 2
    else:
        refused(lambda: lines(TALK, TALK * 2), f"{path}, line 2: makes 2 samples", LEAVE)
        assert len(lines(*[TALK] * 30, TALK * 2)) == 31
        refused(lambda: lines(*[TALK] * 30, TALK * 2)[30], f"{path}, line 31: makes 2 samples", LEAVE)
    unspoken = [TALK[0], {**TALK[1], "loss": False}]
    refused(lambda: lines(unspoken), f"{path}, line 1: makes 0 samples", LEAVE)
    path.write_text(json.dumps({"text": "x" * 900}) + "\n", encoding="utf-8")
    refused(lambda: dataset(checkpoints, path, mode, window=4), "line 1: makes", LEAVE)


def test_a_window_is_permuted_and_any_position_is_reached_directly():
    whole = in_windows(23, 5, 7, 0, 0, 23).tolist()
    for start in range(0, 23, 5):
        window = list(range(start, min(start + 5, 23)))
        assert sorted(whole[start : start + 5]) == window
    assert whole != list(range(23)) and whole != in_windows(23, 5, 7, 1, 0, 23).tolist()
    assert whole != in_windows(23, 5, 8, 0, 0, 23).tolist()
    for start in range(24):
        for end in range(start, 24):
            assert in_windows(23, 5, 7, 0, start, end).tolist() == whole[start:end]


def test_windows_of_one_place_are_permuted_differently():
    whole = in_windows(80, 8, 7, 0, 0, 80).reshape(10, 8) % 8
    assert len({tuple(window) for window in whole.tolist()}) > 7


def test_a_position_needs_no_order_of_the_whole_file():
    sampler = StepSampler(10**12, 4, 2, 3, seed=1, window=1000)
    progress = Progress(step=10**9, epoch=0, rows=24 * 10**9)
    rows = sampler.micro_batches(progress, rank=1)
    first = 24 * 10**9 // 1000 * 1000
    assert all(first <= row < first + 2000 for slot in rows for row in slot) and len(rows) == 2


@pytest.mark.parametrize(
    "flags, part",
    [
        (["--streaming", "--overwrite_cache"], "--overwrite_cache goes without --streaming"),
        (["--streaming", "--group_by_length"], "--group_by_length goes without --streaming"),
        (["--packing", "--group_by_length"], "--group_by_length goes without --packing"),
        (["--streaming", "--on_bad_row", "skip"], "--on_bad_row skip goes without --streaming"),
        (["--streaming", "--is_skip"], "--is_skip goes without --streaming"),
        (["--streaming", "--truncation", "drop"], "--truncation drop goes without --streaming"),
        (["--shuffle_buffer", "100"], "--shuffle_buffer goes with --streaming only"),
        (["--streaming", "--shuffle_buffer", "0"], "--shuffle_buffer 0: must be above 0"),
    ],
)
def test_flags_of_which_one_would_go_unheard_are_refused(flags, part):
    refused(lambda: parse(TrainConfig, [*NEEDED, *flags]), part)


@pytest.mark.slow
def test_a_streamed_run_trains_on_the_same_steps_on_any_number_of_ranks(checkpoints, data_file, tmp_path):
    found = {}
    for world_size, batch in ((1, 6), (2, 3), (3, 2)):
        flags = dict(STREAM, per_device_train_batch_size=batch, num_train_epochs=2)
        records = run("glm3", "lora", checkpoints, data_file, tmp_path / f"{world_size}", world_size, **flags)[0]
        found[world_size] = losses(records)
    assert len(found[1]) == 4
    assert found[2] == pytest.approx(found[1], rel=1e-5) and found[3] == pytest.approx(found[1], rel=1e-5)


@pytest.mark.slow
def test_a_stopped_stream_goes_on_at_its_position_and_in_no_other_order(checkpoints, data_file, tmp_path):
    flags = dict(STREAM, num_train_epochs=2, save_model_step=1, per_device_train_batch_size=2)
    whole = run("glm2", "lora", checkpoints, data_file, tmp_path / "whole", **flags)
    folder = stopped_copy(tmp_path / "whole", tmp_path / "again", step=4)  # in the third window of the first epoch
    again = run("glm2", "lora", checkpoints, data_file, folder, **flags, resume="auto")
    assert losses(again[0]) == losses(whole[0]) and len(checkpoints_in(folder)) == 12
    for other in (dict(shuffle_buffer=5), dict(streaming=False, shuffle_buffer=None), {"group_by_length": True}):
        changed = {**flags, **other}
        changed = {name: value for name, value in changed.items() if value not in (None, False)}
        if "group_by_length" in other:
            changed.pop("streaming"), changed.pop("shuffle_buffer")
        folder = stopped_copy(tmp_path / "whole", tmp_path / "-".join(other), step=4)
        with pytest.raises(RuntimeError, match="is of another run"):
            run("glm2", "lora", checkpoints, data_file, folder, **changed, resume="auto")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["csv", "array"])
def test_evaluation_data_of_a_streamed_run_may_be_any_file(kind, checkpoints, data_file, rows, tmp_path):
    path = tmp_path / f"eval.{kind}"
    if kind == "csv":
        path.write_text("question,answer\na,b\nc,d\n", encoding="utf-8")
    else:
        path.write_text(json.dumps(rows[:2]), encoding="utf-8")
    with_eval = dict(STREAM, eval_path=path, cache_dir=tmp_path / "cache", per_device_train_batch_size=6)
    records = run("glm3", "lora", checkpoints, data_file, tmp_path / "out", **with_eval)[0]
    assert any("eval_loss" in record for record in records)
