"""Flags: a configuration file behind them, help that names all of them, schedules that end where they should."""

import dataclasses
import json
import os
import shutil

import pytest

from glm_finetune import dist
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.convert.flags import MergeConfig
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.flags import parse
from glm_finetune.run.optim import lr_at, num_warmup_steps
from glm_finetune.run.parts import choose
from glm_finetune.tuning import TRAIN_TYPE, unused_flags
from tests.refusal import refused
from tests.test_training import run

NEEDED = {"model_name_or_path": "base", "train_path": "data.json", "output_dir": "out"}


def write(path, values, record=False):
    text = json.dumps({"format_version": 1, "flags": values} if record else values)
    path.write_text(text, encoding="utf-8")
    return ["--config", str(path)]


def test_a_yaml_file_gives_flags_and_the_command_line_wins(tmp_path):
    text = "model_name_or_path: base\ntrain_path: data.json\noutput_dir: out\nlearning_rate: 1e-4\n"
    text += "lora_module_name: [dense, query_key_value]\nprefix_projection: false\n--max_steps: 7\nmode: glm3\n"
    (tmp_path / "run.yaml").write_text(text, encoding="utf-8")
    config = parse(TrainConfig, ["--max_steps", "9", "--config", str(tmp_path / "run.yaml")])
    assert (config.learning_rate, config.lora_module_name) == (1e-4, "dense,query_key_value")
    assert (config.prefix_projection, config.max_steps, config.mode) == (False, 9, "glm3")
    assert "learning_rate" in config.given and "weight_decay" not in config.given


def test_the_record_of_a_run_gives_the_same_run_again(tmp_path):
    first = parse(TrainConfig, [f"--{k}={v}" for k, v in NEEDED.items()] + ["--lora_dim", "3", "--resume", "auto"])
    again = parse(TrainConfig, write(tmp_path / "train_config.json", dataclasses.asdict(first), record=True))
    assert again == dataclasses.replace(first, resume=None, config=again.config)
    assert {"lora_dim", "mode"} <= again.given


def test_only_what_was_set_counts_as_set_when_a_run_is_started_from_its_record(tmp_path):
    first = parse(TrainConfig, [f"--{k}={v}" for k, v in NEEDED.items()] + ["--warmup_steps", "3"])
    record = {"format_version": 1, "flags": dataclasses.asdict(first), "given": sorted(first.given)}
    again = parse(TrainConfig, write(tmp_path / "train_config.json", record))  # has the default of --warmup_ratio, too
    assert again.warmup_steps == 3 and again.given == first.given | {"config"}


@pytest.mark.parametrize(
    "values, parts",
    [
        ({"lerning_rate": 1}, ["unknown flag lerning_rate", "Did you mean learning_rate?"]),
        ({"max_len": "many"}, ["max_len is 'many'"]),
        ({"max_len": True}, ["max_len is True"]),
        ({"max_len": {"a": 1}}, ["max_len is {'a': 1}"]),
        ({"learning_rate": "nan"}, ["learning_rate is 'nan'", "finite"]),
        ({"lora_dim": -1}, ["--lora_dim -1"]),
        ([1, 2], ["expected names of flags"]),
    ],
)
def test_a_bad_configuration_file_is_named(values, parts, tmp_path):
    if isinstance(values, dict):
        values = NEEDED | values
    refused(lambda: parse(TrainConfig, write(tmp_path / "run.json", values)), *parts)


@pytest.mark.parametrize("name, text", [("run.json", "{"), ("run.yaml", "a: [1"), ("run.yml", None)])
def test_an_unreadable_configuration_file_is_named(name, text, tmp_path):
    if text is not None:
        (tmp_path / name).write_text(text)
    refused(lambda: parse(TrainConfig, ["--config", str(tmp_path / name)]), "--config", name)


@pytest.mark.parametrize("config_class", [TrainConfig, MergeConfig, PredictConfig])
def test_help_names_every_flag_with_its_default(config_class, capsys):
    with pytest.raises(SystemExit):
        parse(config_class, ["--help"])
    text = " ".join(capsys.readouterr().out.split())
    for item in dataclasses.fields(config_class):
        assert f"--{item.name} " in text
        if item.default not in (None, dataclasses.MISSING):
            assert f"(default: {item.default})" in text
    assert "nan" not in text.split()


def test_flags_of_another_train_type_are_named_and_the_right_ones_not():
    given = {"pre_seq_len", "lora_dim", "freeze_last", "max_len"}
    assert unused_flags(TRAIN_TYPE["lora"], given) == ["freeze_last", "pre_seq_len"]
    assert unused_flags(TRAIN_TYPE["qlora"], given) == ["freeze_last", "pre_seq_len"]
    assert unused_flags(TRAIN_TYPE["ptuning"], given) == ["freeze_last", "lora_dim"]


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--lora_variant", "vera"], ["--lora_variant 'vera'", "dora"]),
        (["--train_type", "freeze", "--freeze_last", "1", "--freeze_module_name", "x"], ["give one of them"]),
        (["--train_type", "qlora", "--ds_file", "ds_zero3_no_offload.json"], ["qlora with ZeRO-3", "zero2"]),
        (["--train_type", "qlora", "--lora_variant", "pissa"], ["pissa", "--train_type lora"]),
    ],
)
def test_what_does_not_work_together_is_refused_with_the_reason(arguments, parts):
    from glm_finetune.errors import raise_together
    from glm_finetune.run.ds_config import read_ds_file, stage_of
    from glm_finetune.tuning import problems

    config = parse(TrainConfig, [f"--{k}={v}" for k, v in NEEDED.items()] + arguments)
    _, train_type = choose(config)
    stage = stage_of(read_ds_file(config.ds_file))
    refused(lambda: raise_together(problems(config, train_type, stage)), *parts)


# rows, ranks, micro-batch, accumulation, epochs -> optimizer steps: each epoch is rounded up by itself
STEPS = [
    (10, 1, 1, 1, 1, 10),
    (10, 1, 4, 1, 1, 3),
    (10, 1, 4, 1, 3, 9),
    (10, 2, 2, 1, 2, 6),
    (10, 2, 1, 4, 2, 4),
    (10, 4, 1, 1, 2, 6),
    (10, 4, 8, 4, 5, 5),
    (1000, 3, 7, 5, 2, 20),
    (1001, 8, 16, 4, 3, 6),
    (4200, 4, 1, 4, 2, 526),
]


@pytest.mark.parametrize("rows, ranks, micro_batch, accumulation, epochs, steps", STEPS)
def test_the_number_of_steps_is_right_and_the_schedule_ends_with_the_last(
    rows, ranks, micro_batch, accumulation, epochs, steps
):
    sampler, progress = StepSampler(rows, micro_batch, accumulation, ranks, seed=1), Progress()
    assert sampler.total_steps(progress, epochs) == steps
    seen = 0
    while progress.epoch < epochs:
        seen += sum(len(slot) for rank in range(ranks) for slot in sampler.micro_batches(progress, rank))
        sampler.advance(progress)
    assert (progress.step, seen) == (steps, rows * epochs)
    warmup = num_warmup_steps(0.1, None, steps)
    rates = [lr_at(step, 1e-3, steps, warmup, "linear", 0.1) for step in range(1, steps + 1)]
    assert max(rates) == pytest.approx(1e-3) and rates[max(warmup, 1) - 1] == pytest.approx(1e-3)
    assert steps < 3 or rates[-1] == pytest.approx(1e-4)


@pytest.mark.parametrize(
    "shape, floor, warmup, expected",
    [
        ("linear", 0.0, 2, [0.5, 1, 0.75, 0.5, 0.25, 0]),
        ("linear", 0.2, 2, [0.5, 1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 0.0, 0, [1, 0.8, 0.6, 0.4, 0.2, 0]),
        ("cosine", 0.0, 2, [0.5, 1, 0.853553, 0.5, 0.146447, 0]),
        ("cosine", 0.1, 1, [1, 0.914058, 0.689058, 0.410942, 0.185942, 0.1]),
        ("constant", 0.5, 3, [1 / 3, 2 / 3, 1, 1, 1, 1]),
        ("constant", 0.0, 0, [1, 1, 1, 1, 1, 1]),
    ],
)
def test_a_schedule_is_its_table(shape, floor, warmup, expected):
    rates = [lr_at(step, 1.0, 6, warmup, shape, floor) for step in range(1, 7)]
    assert rates == pytest.approx(expected, abs=1e-6)


def test_warmup_is_a_share_or_steps_but_not_both():
    assert (num_warmup_steps(0.1, None, 55), num_warmup_steps(0.1, 0, 55), num_warmup_steps(0.1, 7, 55)) == (6, 0, 7)
    arguments = [f"--{k}={v}" for k, v in NEEDED.items()]
    assert parse(TrainConfig, [*arguments, "--warmup_steps", "0"]).warmup_steps == 0
    refused(lambda: parse(TrainConfig, [*arguments, "--warmup_steps", "3", "--warmup_ratio", "0.1"]), "give one")
    refused(lambda: parse(TrainConfig, [*arguments, "--warmup_steps", "-3"]), "--warmup_steps -3")


def test_a_warmup_longer_than_the_run_is_refused_with_both_numbers(checkpoints, data_file, tmp_path):
    arguments = [f"--{k}={v}" for k, v in NEEDED.items()]
    refused(
        lambda: parse(TrainConfig, [*arguments, "--warmup_steps", "100", "--max_steps", "10"]),
        "--warmup_steps 100",
        "10 steps",
    )
    assert parse(TrainConfig, [*arguments, "--warmup_steps", "10", "--max_steps", "10"]).warmup_steps == 10


@pytest.mark.slow
def test_a_warmup_longer_than_the_epochs_is_refused_before_the_model_is_read(checkpoints, data_file, tmp_path):
    flags = dict(warmup_steps=4, num_train_epochs=1)  # 11 rows, 4 a step
    base = shutil.copytree(checkpoints["glm3"], tmp_path / "base")
    (base / "model.safetensors").write_bytes(b"not read")
    with pytest.raises(RuntimeError, match="--warmup_steps 4: the run has 3 steps"):
        run("glm3", "lora", {"glm3": base}, data_file, tmp_path / "out", 1, **flags)
    assert not (tmp_path / "out").exists()


# What launchers set

LAUNCHED = {"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    "changes, parts",
    [
        ({"WORLD_SIZE": None}, ["RANK=1", "WORLD_SIZE=unset", "without WORLD_SIZE", "mpirun", "torchrun"]),
        ({"MASTER_PORT": None}, ["without MASTER_PORT"]),
        ({"MASTER_ADDR": "", "MASTER_PORT": None}, ["without MASTER_ADDR, MASTER_PORT"]),
        ({"RANK": "2"}, ["RANK=2", "WORLD_SIZE=2", "do not go together"]),
        ({"RANK": "one"}, ["RANK=one"]),
        ({"WORLD_SIZE": "-2"}, ["WORLD_SIZE=-2"]),
    ],
)
def test_half_an_environment_of_ranks_is_refused(changes, parts, monkeypatch):
    monkeypatch.setattr(os, "environ", {k: v for k, v in (LAUNCHED | changes).items() if v is not None})
    refused(dist.launch_environment, *parts)
    assert isinstance(dist.is_main(), bool)  # exits asks, to say it


@pytest.mark.parametrize("given", [{}, {"RANK": "0", "WORLD_SIZE": "1"}, LAUNCHED])
def test_what_a_launcher_leaves_out_is_filled_in(given, monkeypatch):
    monkeypatch.setattr(os, "environ", dict(given))
    dist.launch_environment()
    assert os.environ.items() >= given.items() and os.environ.keys() >= LAUNCHED.keys()
    assert dist.launched() == ((1, 2) if given is LAUNCHED else (0, 1))


@pytest.mark.slow
@pytest.mark.parametrize("ranks, micro_batch, accumulation", [(1, 4, 1), (1, 2, 2), (2, 1, 2)])
def test_a_run_uses_the_learning_rates_of_its_table(ranks, micro_batch, accumulation, checkpoints, data_file, tmp_path):
    flags = dict(per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulation)
    flags |= dict(num_train_epochs=2, warmup_steps=2, learning_rate=1e-3, min_lr_ratio=0, lr_scheduler="linear")
    records, *_ = run("glm3", "lora", checkpoints, data_file, tmp_path / "out", ranks, **flags)
    assert [r["lr"] for r in records] == pytest.approx([5e-4, 1e-3, 7.5e-4, 5e-4, 2.5e-4, 0], abs=1e-9)


@pytest.mark.parametrize("name", ["--local_rank", "--local-rank"])
def test_both_launchers_names_of_the_rank_are_taken(name):
    needed = ["--train_path", "a", "--output_dir", "b", "--model_name_or_path", "c"]
    assert parse(TrainConfig, [*needed, f"{name}=1"]).local_rank == 1
