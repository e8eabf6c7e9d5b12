"""Streams: the rows of prepared data without preparing them, in windows, at any position."""

import json

import pytest

from glm_finetune import MODE
from glm_finetune.checkpoint import checkpoints as checkpoints_in
from glm_finetune.config import TrainConfig, parse
from glm_finetune.data import files, stream
from glm_finetune.data.order import in_windows
from glm_finetune.data.sampler import Progress, StepSampler
from tests.refusal import refused
from tests.test_bad_input import NEEDED
from tests.test_resume import losses, stopped_copy
from tests.test_training import run

STREAM = dict(streaming=True, shuffle_buffer=4)


def dataset(checkpoints, path, mode="glm3", window=None, **options):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    settings = {"max_len": 128, "max_src_len": 64, **options}
    return MODE[mode].dataset(path, tokenizer, stream_window=window, **settings)


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("mode", MODE)
def test_streamed_rows_are_prepared_rows(mode, form, checkpoints, data_file, rows, monkeypatch):
    text = [json.dumps(row, ensure_ascii=False) for row in rows]
    data_file.write_text("\n\n".join(text) if form == "lines" else json.dumps(rows, indent=1), encoding="utf-8")
    monkeypatch.setattr(files, "BLOCK_BYTES", 700)
    whole = dataset(checkpoints, data_file, mode)
    for window in (1, 3, 11, 100):
        streamed = dataset(checkpoints, data_file, mode, window)
        order = [7, 0, 10, 3, 4, 5, 1, 2, 6, 8, 9]
        assert [streamed[i] for i in order] == [whole[i] for i in order]
        assert [streamed.where(i) for i in order] == [whole.where(i) for i in order]


def test_memory_holds_two_windows_and_reads_each_once(checkpoints, data_file, monkeypatch):
    monkeypatch.setattr(files, "BLOCK_BYTES", 300)
    data, read = dataset(checkpoints, data_file, window=3), []
    rows_of = stream.rows_of
    monkeypatch.setattr(stream, "rows_of", lambda block: read.append(block.first_row) or rows_of(block))
    for i in (2, 0, 3, 1, 5, 4, 6, 8, 7, 9, 10):  # a step may span two windows
        data[i]
        assert sum(len(rows) for rows in data.rows._windows.values()) <= 6
    assert len(read) <= len(data.rows.layout.blocks) + 3  # a block on the border of two windows is read for both


def test_a_row_that_is_skipped_stays_without_targets(checkpoints, data_file):
    prepared = dataset(checkpoints, data_file, max_len=60, max_src_len=20, is_skip=True)
    assert 0 < prepared.report.skipped < 11
    streamed = dataset(checkpoints, data_file, window=4, max_len=60, max_src_len=20, is_skip=True)
    rows = [streamed[i] for i in range(11)]
    with_targets = [row for row in rows if any(label != -100 for label in row["labels"])]
    assert len(rows) == 11 and with_targets == list(prepared)


def test_a_bad_line_is_named_when_it_is_its_turn(checkpoints, data_file):
    with open(data_file, "a", encoding="utf-8") as file:
        file.write('{"instruction": "a", "input": "b"}\n{oops\n')
    data = dataset(checkpoints, data_file, window=4)
    assert len(data) == 13 and data[7]["input_ids"]
    refused(lambda: data[12], f"{data_file}, line 13: not JSON", "{oops")
    data_file.write_text(data_file.read_text(encoding="utf-8").replace("{oops\n", ""), encoding="utf-8")
    refused(lambda: dataset(checkpoints, data_file, window=4)[11], "line 12: field 'output' is missing")


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
