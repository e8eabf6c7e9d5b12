"""Checkpoints written by the code of commit 32989c6 (before the package was divided into rooms) are gone on from.

    python -m tests.test_old_checkpoint FOLDER      # how tests/fixtures/old_checkpoint was made, at that commit

base/ and data.jsonl are what the runs began with; TRAIN_TYPE/out is the run's folder after its second step of six, in
the middle of an epoch; TRAIN_TYPE/metrics.jsonl and end.safetensors are what it came to without a stop.
"""

import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from glm_finetune.run.checkpoint import write_manifest
from glm_finetune.run.folder import checkpoints as checkpoints_in
from tests.ranks import run_ranks, train_arguments, train_main
from tests.tiny import DATA, make_checkpoint

OLD = Path(__file__).parent / "fixtures/old_checkpoint"
RANKS = {"lora": 2, "all": 1}
STOPPED = "epoch-1-step-2"
WAYS = {name: (name, ()) for name in RANKS} | {"lora, plain": ("lora", ("--lean", "False"))}  # as the old code computed
NUMBERS = ("step", "epoch", "loss", "lr", "grad_norm")  # of a line, without time and memory


def train_in(folder, train_type, *more):
    """Six steps of the run, in `folder`: what is recorded names files as they are called there."""
    os.chdir(folder)
    flags = dict(num_train_epochs=2, save_model_step=2, lora_dropout=0.1, per_device_train_batch_size=1)
    flags |= dict(gradient_accumulation_steps=4 // RANKS[train_type], max_grad_norm=0.5, lr_scheduler="cosine")
    return train_main([*train_arguments("glm3", train_type, "base", "data.jsonl", "out", **flags), *more])


def metrics(path):
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [{name: line[name] for name in NUMBERS} for line in lines]


def weights_in(folder):
    """{name: tensor} of a checkpoint's weights or adapter."""
    return load_file(next(folder.glob("*model.safetensors")))


@pytest.fixture(scope="module", params=WAYS)
def runs(request, tmp_path_factory):
    """(train type, folder of a run made whole here, folder of one that goes on from the old checkpoint)."""
    (train_type, way), folders = WAYS[request.param], []
    for name, more in (("whole", ()), ("resumed", ("--resume", "auto"))):
        folder = tmp_path_factory.mktemp(name)
        shutil.copytree(OLD / "base", folder / "base")
        shutil.copyfile(OLD / "data.jsonl", folder / "data.jsonl")
        if more:
            shutil.copytree(OLD / train_type / "out", folder / "out")
        printed = run_ranks(train_in, RANKS[train_type], folder, train_type, *more, *way)[0]
        assert ("resumed from" in printed) == bool(more)
        folders.append(folder)
    return train_type, *folders


def assert_as_recorded(folder, train_type):
    """The losses, norms and learning rates of all steps, and the weights in the end, are those of the old code."""
    now, before = metrics(folder / "out/metrics.jsonl"), metrics(OLD / train_type / "metrics.jsonl")
    assert [line["step"] for line in now] == [1, 2, 3, 4, 5, 6]
    for line, expected in zip(now, before):
        assert line == pytest.approx(expected, rel=1e-6), line["step"]
    weights, recorded = weights_in(folder / "out/epoch-2-step-6"), load_file(OLD / train_type / "end.safetensors")
    assert weights.keys() == recorded.keys()
    for name, tensor in recorded.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.slow
def test_a_checkpoint_of_the_old_code_goes_on_as_it_did_there(runs):
    assert_as_recorded(runs[2], runs[0])


@pytest.mark.slow
def test_a_run_begun_now_has_the_numbers_of_the_old_code(runs):
    assert_as_recorded(runs[1], runs[0])


@pytest.mark.slow
@pytest.mark.parametrize(
    "runs", ["lora, plain"], indirect=True
)  # a head that learns sums its gradient in another order now
def test_going_on_from_the_old_checkpoint_is_bit_equal_to_a_whole_run_of_the_new_code(runs):
    train_type, whole, resumed = runs
    state = f"out/{STOPPED}/state/model.safetensors"
    now, before = load_file(whole / state), load_file(OLD / train_type / state)
    if any(not torch.equal(now[name], tensor) for name, tensor in before.items()):
        pytest.skip("this CPU rounds two steps otherwise than the one that the checkpoint was written on")
    assert metrics(resumed / "out/metrics.jsonl") == metrics(whole / "out/metrics.jsonl")
    ends = [weights_in(folder / "out/epoch-2-step-6") for folder in (whole, resumed)]
    assert all(torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())


def record(folder):
    """Write what is in tests/fixtures/old_checkpoint to `folder`."""
    make_checkpoint("glm3", folder / "base", seq_length=2048, hidden_size=8, ffn_hidden_size=16)
    lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:11]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    for train_type, world_size in RANKS.items():
        run_ranks(train_in, world_size, folder, train_type)
        (folder / train_type).mkdir()
        out = (folder / "out").rename(folder / train_type / "out")
        shutil.copyfile(next((out / "epoch-2-step-6").glob("*model.safetensors")), out.parent / "end.safetensors")
        shutil.copyfile(out / "metrics.jsonl", out.parent / "metrics.jsonl")
        for path in [*out.glob("runs"), *checkpoints_in(out)[1:]]:
            shutil.rmtree(path)
        config = out / STOPPED / "train_config.json"
        config.write_text(config.read_text(encoding="utf-8").replace(str(folder.resolve()), "/where/it/was"))
        (out / STOPPED / "manifest.json").unlink()
        write_manifest(out / STOPPED)
        for name in ("latest", "metrics.jsonl", ".lock"):
            (out / name).unlink()
        (out / "metrics.jsonl").write_text("".join((out.parent / "metrics.jsonl").read_text().splitlines(True)[:2]))


if __name__ == "__main__":
    record(Path(sys.argv[1]))
