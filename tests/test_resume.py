"""Going on after a stop: the numbers of an uninterrupted run, on the same ranks or others; damage is noticed."""

import json
import shutil

import pytest
import torch
from sentencepiece import sentencepiece_model_pb2

from glm_finetune.run.checkpoint import damage, forget_old, write_manifest
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.resume import find_resume
from glm_finetune.tuning import TRAIN_TYPE
from tests.ranks import run_ranks, train_arguments, train_main
from tests.test_matrix import TYPES
from tests.test_training import assert_close, run
from tests.tiny import make_checkpoint

FLAGS = dict(num_train_epochs=2, save_model_step=2, per_device_train_batch_size=2)


def stopped_copy(finished, folder, step):
    """A run's output folder as it was after `step`."""
    shutil.copytree(finished, folder)
    for path in checkpoints_in(folder):
        if int(path.name.rpartition("-")[2]) > step:
            shutil.rmtree(path)
    return folder


def losses(records):
    return [record["loss"] for record in records]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("kind", TYPES)
def test_resumed_on_the_same_ranks_is_bit_equal(kind, stage, checkpoints, data_file, tmp_path):
    train_type, flags = TYPES[kind]
    if TRAIN_TYPE[train_type].quantizes and stage == 3:
        pytest.skip("refused: see test_config")
    # Dropout: random numbers go on as well.
    flags = {**FLAGS, **flags, "ds_file": f"ds_zero{stage}_no_offload.json", "lora_dropout": 0.1, "prefix_dropout": 0.1}
    whole = run("glm2", train_type, checkpoints, data_file, tmp_path / "whole", 2, **flags)
    folder = stopped_copy(tmp_path / "whole", tmp_path / "again", step=2)  # in the middle of the first epoch
    again = run("glm2", train_type, checkpoints, data_file, folder, 2, **flags, resume="auto")
    assert losses(again[0]) == losses(whole[0]) and "resumed from" in again[3]
    assert all(torch.equal(again[1][name], tensor) for name, tensor in whole[1].items())


@pytest.mark.slow
@pytest.mark.parametrize("precision, stage", [("fp32", 2), ("bf16", 1), ("bf16", 2), ("bf16", 3)])
def test_resumed_with_accumulation_is_bit_equal_in_each_precision(precision, stage, checkpoints, data_file, tmp_path):
    ds_file = f"ds_zero{stage}_no_offload.json"
    flags = dict(FLAGS, gradient_accumulation_steps=2, precision=precision, ds_file=ds_file)
    whole = run("glm3", "all", checkpoints, data_file, tmp_path / "whole", **flags)
    folder = stopped_copy(tmp_path / "whole", tmp_path / "again", step=3)  # at the end of the first epoch
    again = run("glm3", "all", checkpoints, data_file, folder, **flags, resume="auto")
    assert losses(again[0]) == losses(whole[0])
    assert all(torch.equal(again[1][name], tensor) for name, tensor in whole[1].items())


DAMAGED_ENTRIES = [None, 3, "x", [], {}, {"bytes": 3}, {"bytes": "3", "sha256": "x"}, {"bytes": True, "sha256": "x"}]


@pytest.mark.parametrize("manifest", [{"train_config.json": entry} for entry in DAMAGED_ENTRIES] + [{}], ids=str)
def test_a_manifest_with_damaged_entries_is_damaged_and_no_traceback(manifest, tmp_path, capsys):
    folder = tmp_path / "epoch-1-step-2"
    folder.mkdir()
    (folder / "train_config.json").write_text("{}")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert "manifest.json: has no size and hash of train_config.json. The checkpoint is damaged." in damage(folder)
    assert find_resume("auto", tmp_path) is None and "is damaged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is damaged"):
        find_resume(str(folder), tmp_path)
    forget_old(folder, 1, None)
    assert folder.is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("world_size, batch, stage", [(1, 4, 2), (4, 1, 2), (2, 2, 3), (1, 4, 0)])
@pytest.mark.parametrize("train_type", ["lora", "all"])
def test_resumed_on_other_ranks_or_another_stage_goes_on_alike(
    train_type, world_size, batch, stage, checkpoints, data_file, tmp_path
):
    whole = run("glm", train_type, checkpoints, data_file, tmp_path / "whole", 2, **FLAGS)
    folder = stopped_copy(tmp_path / "whole", tmp_path / "again", step=2)
    ds_file = tmp_path / "ds.json"
    ds_file.write_text(json.dumps({"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}))
    flags = dict(FLAGS, per_device_train_batch_size=batch, ds_file=ds_file, resume="auto")
    again = run("glm", train_type, checkpoints, data_file, folder, world_size, **flags)
    assert losses(again[0]) == pytest.approx(losses(whole[0]), rel=1e-6)
    assert_close(again[1], whole[1])


@pytest.fixture(scope="module")
def finished(checkpoints, tmp_path_factory, rows):
    """A finished LoRA run with checkpoints after steps 2, 3, 4, 6, and the arguments that made it."""
    root = tmp_path_factory.mktemp("finished")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "data.jsonl").write_text(text, encoding="utf-8")
    arguments = train_arguments(
        "glm3", "lora", checkpoints["glm3"], root / "data.jsonl", root / "out", num_train_epochs=2, save_model_step=2
    )
    run_ranks(train_main, 1, arguments)
    return root, arguments


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "out")
    newest, before = checkpoints_in(folder)[-1], checkpoints_in(folder)[-2]
    shard = newest / "state/model.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    assert find_resume("auto", folder) == before
    assert f"{newest.name}: state/model.safetensors is damaged" in capsys.readouterr().out
    with pytest.raises(ValueError, match="is damaged"):
        find_resume(str(newest), folder)
    (before / "manifest.json").unlink()
    assert "not a complete checkpoint" in damage(before)
    assert (folder / "latest").read_text() == newest.name


@pytest.mark.slow
def test_resuming_another_run_is_refused_with_what_differs(finished, checkpoints, tmp_path):
    root, arguments = finished
    latest = str(checkpoints_in(root / "out")[-1])
    (tmp_path / "other.jsonl").write_bytes((root / "data.jsonl").read_bytes() + (root / "data.jsonl").read_bytes())
    other_base = make_checkpoint("glm3", tmp_path / "base", seq_length=1024)
    other_tokenizer = shutil.copytree(checkpoints["glm3"], tmp_path / "tokenizer")
    tokenizer = sentencepiece_model_pb2.ModelProto()
    tokenizer.ParseFromString((other_tokenizer / "tokenizer.model").read_bytes())
    tokenizer.pieces[-1].score -= 1
    (other_tokenizer / "tokenizer.model").write_bytes(tokenizer.SerializeToString())
    for changes, expected in (
        (["--mode", "glm2", "--model_name_or_path", str(checkpoints["glm2"])], "mode: glm3 there, glm2 here"),
        (["--train_type", "all"], "train_type: lora there, all here"),
        (["--train_path", str(tmp_path / "other.jsonl")], "training data: .* --force"),
        (["--lora_dim", "4"], "lora_dim: 8 there, 4 here"),
        (["--model_name_or_path", str(other_base)], "base: .* --force"),
        (["--model_name_or_path", str(other_tokenizer)], "tokenizer: .* --force"),
    ):
        with pytest.raises(RuntimeError, match=expected):
            run_ranks(train_main, 1, [*arguments, "--resume", latest, *changes])
    with pytest.raises(RuntimeError, match="not a complete checkpoint"):
        run_ranks(train_main, 1, [*arguments, "--resume", str(tmp_path)])


@pytest.mark.slow
def test_state_holds_only_what_learns(finished):
    from safetensors.torch import load_file

    folder = checkpoints_in(finished[0] / "out")[-1]
    state = load_file(folder / "state/model.safetensors")
    adapter = load_file(folder / "adapter_model.safetensors")
    assert sum(t.numel() for t in state.values()) == 3 * sum(t.numel() for t in adapter.values())


@pytest.mark.slow
def test_auto_begins_anew_where_there_is_nothing_to_resume(checkpoints, data_file, tmp_path):
    records, *_ = run("glm3", "lora", checkpoints, data_file, tmp_path / "out", resume="auto")
    assert [record["step"] for record in records] == [1, 2, 3]


@pytest.mark.slow
def test_a_checkpoint_of_a_newer_format_is_refused_and_passed_over(finished, tmp_path, capsys):
    folder = shutil.copytree(finished[0] / "out", tmp_path / "out")
    newest, before = checkpoints_in(folder)[-1], checkpoints_in(folder)[-2]
    record = json.loads((newest / "train_config.json").read_text())
    (newest / "train_config.json").write_text(json.dumps({**record, "format_version": 99}))
    (newest / "manifest.json").unlink()
    write_manifest(newest)
    with pytest.raises(ValueError, match="format 99, this version reads up to 1"):
        find_resume(str(newest), folder)
    assert find_resume("auto", folder) == before and "format 99" in capsys.readouterr().out
