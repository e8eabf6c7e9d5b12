"""No silent failure: what is not finite stops the run, or is skipped, before it reaches a weight, with its cause."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import train
from glm_finetune import build, dist
from glm_finetune.config import TrainConfig
from glm_finetune.run.checkpoint import damage
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.guard import MAX_STILL, Guard
from glm_finetune.run.memory import memory_advice, too_large
from glm_finetune.tuning import TRAIN_TYPE
from glm_finetune.weights import iter_tensors, read_json, write_tensors
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import run_main

FLAGS = dict(per_device_train_batch_size=2, num_train_epochs=3, save_model_step=1, learning_rate=1e-3)


class PoisonGradient(torch.autograd.Function):
    """Passes a loss on unchanged; its gradient is inf."""

    @staticmethod
    def forward(ctx, loss):
        return loss.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * float("inf")


def poisoned_main(arguments, bad_rank, bad_calls, what):
    """train_main with a loss (or only its gradient) that is not finite in some forward passes of one rank."""

    from glm_finetune.models import network

    original, calls = network.head_losses, iter(range(10**6))

    def head_losses(*args):
        losses = original(*args)
        if next(calls) in bad_calls and dist.rank() == bad_rank:
            return losses * float("nan") if what == "loss" else PoisonGradient.apply(losses)
        return losses

    network.head_losses = head_losses
    return train_main(arguments)


def fp16_main(arguments, *poison):
    """train_main, or poisoned_main, on a CPU that claims to have fp16."""
    from deepspeed.accelerator import get_accelerator

    from glm_finetune import dist

    dist.choose_precision = lambda *_: ("fp16", "")
    accelerator = get_accelerator()
    accelerator.supported_dtypes = lambda: [torch.float32, torch.float16]
    accelerator.is_fp16_supported = lambda: True
    return poisoned_main(arguments, *poison) if poison else train_main(arguments)


def one_rank_tells(arguments, rank):
    """train_main, whose ValueError only one rank lets pass."""
    try:
        return train_main(arguments)
    except ValueError:
        if dist.rank() == rank:
            raise


def records_in(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero2", "zero3"])
@pytest.mark.parametrize("what, words", [("loss", "the loss is nan"), ("gradient", "the gradient is not finite")])
def test_what_is_not_finite_stops_all_ranks_before_a_weight_changes(
    what, words, stage, checkpoints, data_file, tmp_path
):
    flags = dict(FLAGS, gradient_accumulation_steps=2, ds_file=f"ds_{stage}_no_offload.json")
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError) as caught:
        run_ranks(poisoned_main, 2, arguments, 1, [5], what)  # step 3, the second micro-batch of rank 1
    text = str(caught.value)
    assert f"NotFinite: step 3: {words}" in text and "no weight was changed by it" in text
    assert (f"rank 1, micro-batch 2: loss nan ({data_file}, line " in text) == (what == "loss")
    assert [path.name for path in checkpoints_in(tmp_path / "out")] == ["epoch-1-step-1", "epoch-1-step-2"]


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("max_grad_norm", [0, 1])
def test_a_skipped_step_changes_nothing_on_any_rank_and_is_counted(
    stage, max_grad_norm, checkpoints, data_file, tmp_path
):
    flags = dict(FLAGS, on_nonfinite="skip", ds_file=f"ds_{stage}_no_offload.json", max_grad_norm=max_grad_norm)
    arguments = train_arguments("glm2", "all", checkpoints["glm2"], data_file, tmp_path / "out", **flags)
    printed = run_ranks(poisoned_main, 2, arguments, 0, [2], "loss")[0]
    before, after = (dict(iter_tensors(tmp_path / "out" / f"epoch-1-step-{step}")) for step in (2, 3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in after.items())
    records = records_in(tmp_path / "out")
    assert records[-1]["skipped_nonfinite"] == 1 and "skipped, 1 of at most 10: step 3: the loss is nan" in printed
    assert len(records) == 9 and records[2]["loss"] is None  # nothing of that step counts, and it is not hidden
    assert all(record["loss"] for record in records if record["step"] != 3)


@pytest.mark.slow
def test_skipping_ends_after_the_given_number(checkpoints, data_file, tmp_path):
    flags = dict(FLAGS, on_nonfinite="skip", max_nonfinite=2)
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError, match="NotFinite: step 3: the loss is nan"):
        run_ranks(poisoned_main, 1, arguments, 0, [0, 1, 2], "loss")


@pytest.mark.slow
def test_a_learning_rate_far_too_high_is_named_as_the_cause(checkpoints, data_file, tmp_path):
    flags = dict(FLAGS, learning_rate=1e30, warmup_ratio=0)
    arguments = train_arguments("glm3", "all", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError) as caught:
        run_ranks(train_main, 1, arguments)
    assert "cause: --learning_rate 1e+30 is too high for all: its recipe has 0.0001" in str(caught.value)


@pytest.mark.slow
def test_fp16_steps_that_the_loss_scaler_discards_are_counted(checkpoints, data_file, tmp_path):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2}, "fp16": {"initial_scale_power": 26}}')
    flags = dict(FLAGS, ds_file=tmp_path / "ds.json", save_model_step=100)
    arguments = train_arguments("glm3", "all", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    run_ranks(fp16_main, 1, arguments)
    records = records_in(tmp_path / "out")
    assert 0 < records[-1]["skipped_fp16"] < len(records) and records[-1]["loss"] < records[0]["loss"] + 1


@pytest.mark.slow
def test_fp16_overflow_at_the_smallest_scale_stops_with_the_cure(checkpoints, data_file, tmp_path):
    fp16 = {"initial_scale_power": 2, "hysteresis": 1, "min_loss_scale": 1}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
    flags = dict(FLAGS, ds_file=tmp_path / "ds.json")
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError) as caught:
        run_ranks(fp16_main, 1, arguments, 0, range(100), "gradient")
    assert "fp16 overflowed with the smallest loss scale as well: use --precision bf16 or fp32" in str(caught.value)


@pytest.mark.slow
def test_a_loss_that_stands_still_is_reported(checkpoints, rows, tmp_path):
    (tmp_path / "one.jsonl").write_text(json.dumps(rows[0], ensure_ascii=False), encoding="utf-8")
    flags = dict(FLAGS, per_device_train_batch_size=1, learning_rate=1e-30, max_steps=40, save_model_step=100)
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], tmp_path / "one.jsonl", tmp_path / "out", **flags)
    with pytest.raises(RuntimeError, match=f"step 21: the loss has been .* for {MAX_STILL} steps"):
        run_ranks(train_main, 1, arguments)
    (folder,) = checkpoints_in(tmp_path / "out")[-1:]  # what was learnt until then is saved before
    assert folder.name.endswith("-step-21") and damage(folder) is None


class StandInEngine:
    """What the guard asks of an engine whose step was applied."""

    def was_step_applied(self):
        return True

    def fp16_enabled(self):
        return False


def new_guard(**changes):
    config = TrainConfig(model_name_or_path="b", train_path="t", output_dir="o", learning_rate=1e-4, **changes)
    return Guard(StandInEngine(), config, TRAIN_TYPE["lora"], "line {}".format)


def test_a_loss_of_exactly_0_is_reported_and_one_that_moves_is_not():
    guard = new_guard()
    for step in range(100):
        assert guard.accepts(step, 1 + step % 2, [], [])
    with pytest.raises(FloatingPointError, match=r"the loss has been 0\.0 for 20 steps"):
        for step in range(100):
            guard.accepts(step, 0.0, [], [])
    assert step == MAX_STILL - 1


def test_a_step_without_any_target_names_its_samples():
    new_guard().check_targets(7, 1, [[3]])
    with pytest.raises(FloatingPointError, match="step 7: no sample.*line 3; line 4; line 9.*--max_len"):
        new_guard().check_targets(7, 0, [[3, 4], [9]])


@pytest.mark.parametrize("message", ["CUDA out of memory. Tried to allocate 2.00 GiB", "can't allocate memory: 99"])
def test_out_of_memory_is_answered_with_flags_in_order(message, checkpoints, data_file, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise torch.OutOfMemoryError(message) if "CUDA" in message else RuntimeError(message)

    monkeypatch.setattr(build, "check_base", full)
    arguments = train_arguments("glm3", "all", checkpoints["glm3"], data_file, tmp_path / "out")
    code, error = run_main(train, monkeypatch, capsys, *arguments)
    tips = ["--per_device_train_batch_size 2 --gradient_accumulation_steps 2", "--gradient_checkpointing"]
    tips += ["ds_zero2_offload.json", "--max_len below 128", "--train_type qlora"]
    assert code == 2 and message in error and "Traceback" not in error
    assert [f"{i}. " in error for i in range(1, 6)] == [True] * 5
    assert [error.index(tip) for tip in tips] == sorted(error.index(tip) for tip in tips)


def test_other_runtime_errors_keep_their_traceback():
    with (
        pytest.raises(RuntimeError, match="size mismatch"),
        memory_advice(None, {}, False),
    ):
        raise RuntimeError("size mismatch")


def test_weights_that_are_not_finite_when_read_are_named(checkpoints, tmp_path):
    from safetensors.torch import load_file, save_file

    from glm_finetune import MODE

    tensors = load_file(checkpoints["glm2"] / "model.safetensors")
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    tensors[name][3, 3] = float("inf")
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(read_json(checkpoints["glm2"] / "config.json")))
    with pytest.raises(ValueError, match=f"inf or nan among the values, as bfloat16 .1.: {name}"):
        MODE["glm2"].model.from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.slow
def test_weights_that_are_not_finite_are_named_on_every_rank_of_zero3(checkpoints, data_file, tmp_path):
    base = Path(shutil.copytree(checkpoints["glm2"], tmp_path / "base"))
    tensors = dict(iter_tensors(base))
    name = "transformer.encoder.layers.0.mlp.dense_h_to_4h.weight"
    tensors[name][0, 0] = float("nan")
    write_tensors(tensors, base / "model.safetensors")
    arguments = train_arguments("glm2", "all", base, data_file, tmp_path / "out", ds_file="ds_zero3_no_offload.json")
    for rank_that_tells in (0, 1):
        with pytest.raises(RuntimeError, match=f"inf or nan among the values, as float32 .1.: {name}"):
            run_ranks(one_rank_tells, 2, arguments, rank_that_tells)


@pytest.mark.slow
def test_a_static_loss_scale_that_overflows_stops(checkpoints, data_file, tmp_path):
    fp16 = {"zero_optimization": {"stage": 2}, "fp16": {"loss_scale": 8}}
    (tmp_path / "ds.json").write_text(json.dumps(fp16))
    flags = dict(FLAGS, ds_file=tmp_path / "ds.json")
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError, match="step 1: the gradient is not finite"):
        run_ranks(fp16_main, 1, arguments, 0, range(100), "gradient")


@pytest.mark.slow
def test_skipping_at_the_smallest_fp16_scale_counts_and_ends(checkpoints, data_file, tmp_path):
    fp16 = {"initial_scale_power": 0, "hysteresis": 1, "min_loss_scale": 1}
    (tmp_path / "ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}, "fp16": fp16}))
    flags = dict(FLAGS, ds_file=tmp_path / "ds.json", on_nonfinite="skip", max_nonfinite=3)
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    with pytest.raises(RuntimeError, match="NotFinite: step 4: the gradient is not finite"):
        run_ranks(fp16_main, 1, arguments, 0, range(100), "gradient")


@pytest.mark.parametrize(
    "stage, world_size, offloads, gib, fits",
    [
        (2, 1, (), 80, False),  # 11.6 + 69.8 + 23.3 GiB
        (2, 1, (), 139, True),
        (2, 8, (), 24, True),  # 11.6 + 8.7 + 2.9
        (2, 8, (), 22, False),
        (3, 8, (), 16, True),  # 1.5 + 8.7 + 2.9
        (2, 1, ("offload_optimizer",), 12, True),
        (3, 1, ("offload_optimizer", "offload_param"), 1, True),
    ],
)
def test_what_cannot_fit_on_a_card_is_said_before_the_engine_starts(stage, world_size, offloads, gib, fits):
    with torch.device("meta"):
        model = torch.nn.Linear(2**16, 95_270, bias=False).bfloat16()  # 6.24e9 parameters, as ChatGLM3-6B
    zero = {"stage": stage, **{name: {"device": "cpu"} for name in offloads}}
    problems = list(too_large(model, zero, world_size, gib * 2**30))
    assert (problems == []) == fits
    assert fits or ("6,243,614,720 parameters learn" in problems[0] and f"it has {gib}.0 GiB" in problems[0])
