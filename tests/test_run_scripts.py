"""The recipes in run_scripts/: bash runs each with a stub named `deepspeed` that writes down how it was started, and
what it was started with trains the tiny models.
"""

import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import predict
from glm_finetune import MODE, tuning
from glm_finetune.config import TrainConfig
from glm_finetune.errors import raise_together
from glm_finetune.flags import parse
from glm_finetune.run.ds_config import read_ds_file, resolve, stage_of
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.parts import choose, with_defaults
from glm_finetune.run.stop import RESUME_ME
from tests.conftest import DATA
from tests.ranks import free_port, run_ranks, train_main
from tests.refusal import run_main

ROOT = Path(__file__).parents[1]
NOT_RECIPES = {"setup", "test", "test_oldest", "quickstart"}
ORIGINAL = {  # the grid of ChatGLM-Finetuning's README, and glm3 like glm2: (mode, train type, cards)
    f"{mode}_{train_type}_{cards}": (mode, train_type, cards)
    for mode in MODE
    for train_type in ("freeze", "ptuning", "lora", "all")
    for cards in ("1card", "4cards")
    if (train_type, cards) != ("all", "1card")
}
PREEMPTIBLE = "glm3_lora_preemptible_1card"
OURS = [
    "glm3_ptuning_v1_1card",
    "glm3_qlora_1card",
    "glm3_lora_variant_1card",
    "glm_ptuning_official_1card",
    PREEMPTIBLE,
]
RECIPES = [*ORIGINAL, *OURS]
CARDS = {"1card": "0", "4cards": "0,1,2,3"}
every_recipe = pytest.mark.parametrize("name", RECIPES)

STUB = """#!{python}
import json, os, sys
calls = {folder!r} + "/calls.jsonl"
before = open(calls).readlines() if os.path.exists(calls) else []
call = dict(arguments=sys.argv[1:], cwd=os.getcwd(), cards=os.environ.get("CUDA_VISIBLE_DEVICES"))
open(calls, "a").write(json.dumps(call) + "\\n")
sys.exit([*{exit_codes}, *[0] * 99][len(before)])
"""


def start(name, folder, *arguments, exit_codes=(), **environment):
    """Run a script from another folder with the stub first in PATH; returns (exit code, calls of the stub)."""
    folder.mkdir(exist_ok=True)
    stub = folder / "deepspeed"
    stub.write_text(STUB.format(python=sys.executable, folder=str(folder), exit_codes=list(exit_codes)))
    stub.chmod(0o755)
    own = ("CUDA_VISIBLE_DEVICES", "MASTER_PORT", "VARIANT")
    env = {key: value for key, value in os.environ.items() if key not in own}
    env |= {"PATH": f"{folder}:{env['PATH']}", **environment}
    command = ["bash", str(ROOT / f"run_scripts/{name}.sh"), *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=env, timeout=60)
    calls = [json.loads(line) for line in (folder / "calls.jsonl").read_text().splitlines()]
    return result.returncode, calls


def flags_of(call):
    """The arguments of train.py."""
    assert call["arguments"][2] == "train.py" and (ROOT / "train.py").is_file()
    return call["arguments"][3:]


def tiny(name, checkpoints, output_dir):
    """What a user would append, here to train on a tiny model instead of one of 6B."""
    mode, train_type = name.split("_")[:2]
    arguments = ["--model_name_or_path", checkpoints[mode], "--output_dir", output_dir]
    arguments += ["--train_path", DATA / "spo_1.json", "--max_steps", 2, "--show_loss_step", 1]
    arguments += ["--device", "cpu", "--precision", "fp32"]
    return arguments + (["--freeze_module_name", "layers.1."] if train_type == "freeze" else [])


def test_there_is_a_script_for_every_recipe():
    assert {path.stem for path in ROOT.glob("run_scripts/*.sh")} == {*RECIPES, *NOT_RECIPES}


@every_recipe
def test_the_script_is_valid_and_says_what_it_does_and_how_it_is_started(name):
    path = ROOT / f"run_scripts/{name}.sh"
    subprocess.run(["bash", "-n", str(path)], check=True)
    lines = path.read_text(encoding="utf-8").splitlines()
    comment = "\n".join(lines[: lines.index("set -euo pipefail")])
    assert "ChatGLM" in comment and f"bash run_scripts/{name}.sh" in comment
    assert " GB" in comment or "Not measured" in comment
    assert max(map(len, lines)) <= 120


@every_recipe
def test_what_is_started_is_what_the_name_says(name, tmp_path):
    code, (call,) = start(name, tmp_path)
    mode, train_type, *_, cards = name.split("_")
    assert code == 0 and call["cwd"] == str(ROOT)
    assert call["arguments"][:2] == ["--master_port", "29500"] and call["cards"] == CARDS[cards]
    config = parse(TrainConfig, flags_of(call))  # raises for unknown flags and impossible values
    assert (config.mode, config.train_type) == (mode, train_type)
    assert config.model_name_or_path == {"glm": "ChatGLM-6B/", "glm2": "ChatGLM2-6B/", "glm3": "ChatGLM3-6B/"}[mode]
    assert config.output_dir.startswith(f"./output-{mode}") and (ROOT / config.train_path).is_file()


@every_recipe
def test_the_flags_go_together(name, tmp_path):
    _, (call,) = start(name, tmp_path)
    config = parse(TrainConfig, flags_of(call))
    _, train_type = choose(config)
    config = with_defaults(config, train_type)
    ds_json = read_ds_file(config.ds_file)
    raise_together(tuning.problems(config, train_type, stage_of(ds_json)))
    world_size = len(call["cards"].split(","))
    resolve(ds_json, config, world_size, config.precision or "bf16", "cuda", train_type.fp32)
    assert not tuning.unused_flags(train_type, config.given)


@pytest.mark.parametrize("name", ORIGINAL)
def test_the_recipes_are_the_originals(name, tmp_path):
    mode, train_type, cards = ORIGINAL[name]
    _, (call,) = start(name, tmp_path)
    config = parse(TrainConfig, flags_of(call))
    short = (mode, train_type, cards) == ("glm", "ptuning", "1card")
    expected = dict(max_len=768, max_src_len=512) if short else dict(max_len=1560, max_src_len=1024)
    expected |= dict(per_device_train_batch_size=1, gradient_accumulation_steps=4, num_train_epochs=2, seed=1234)
    expected |= dict(weight_decay=0.1, warmup_ratio=0.1, gradient_checkpointing=True, show_loss_step=10)
    expected |= dict(train_path="data/spo_0.json", output_dir=f"./output-{mode}", ds_file="ds_zero2_no_offload.json")
    expected["learning_rate"] = None if train_type == "ptuning" else 1e-4  # the original's 1e-4 is left out there
    layers = "query_key_value" if mode == "glm" else "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"
    expected |= {
        "freeze": dict(freeze_module_name="layers.27.,layers.26.,layers.25.,layers.24."),
        "ptuning": dict(pre_seq_len=16, prefix_projection=True),
        "lora": dict(lora_dim=16, lora_alpha=64, lora_dropout=0.1, lora_module_name=layers),
        "all": dict(ds_file="ds_zero3_offload.json" if mode == "glm" else "ds_zero3_no_offload.json"),
    }[train_type]
    assert {key: getattr(config, key) for key in expected} == expected
    given = {key for key, value in expected.items() if value is not None}
    assert config.given == given | {"mode", "train_type", "model_name_or_path"}


@every_recipe
def test_users_choose_cards_and_port_and_append_what_counts(name, tmp_path):
    own = ["--max_len", "1300", "--output_dir", "my output", "--train_path", "$HOME/*.json"]
    _, (call,) = start(name, tmp_path, *own, CUDA_VISIBLE_DEVICES="2", MASTER_PORT="29777")
    assert call["cards"] == "2" and call["arguments"][:2] == ["--master_port", "29777"]
    config = parse(TrainConfig, flags_of(call))
    assert (config.max_len, config.output_dir, config.train_path) == (1300, "my output", "$HOME/*.json")


@pytest.mark.parametrize("variant", ["pissa", "rslora"])
def test_the_variant_of_lora_comes_from_the_environment(variant, tmp_path):
    _, (default,) = start("glm3_lora_variant_1card", tmp_path / "default")
    _, (call,) = start("glm3_lora_variant_1card", tmp_path / variant, VARIANT=variant)
    assert parse(TrainConfig, flags_of(default)).lora_variant == "dora"
    config = parse(TrainConfig, flags_of(call))
    assert (config.lora_variant, config.output_dir) == (variant, f"./output-glm3-{variant}")
    assert not list(tuning.problems(config, tuning.TRAIN_TYPE["lora"], 2))


@pytest.mark.parametrize("exit_codes, ends_with", [((75, 75, 0), 0), ((75, 2), 2), ((1,), 1)])
def test_the_preemptible_run_is_started_again_while_it_asks_for_it(exit_codes, ends_with, tmp_path):
    code, calls = start(PREEMPTIBLE, tmp_path, "--max_steps", 7, exit_codes=exit_codes)
    assert RESUME_ME == 75 and code == ends_with and len(calls) == len(exit_codes)
    assert all(call == calls[0] for call in calls)
    config = parse(TrainConfig, flags_of(calls[0]))
    assert (config.resume, config.save_model_step, config.save_total_limit, config.max_steps) == ("auto", 200, 2, 7)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, variant",
    [*((name, "dora") for name in RECIPES), *(("glm3_lora_variant_1card", v) for v in ("pissa", "rslora"))],
)
def test_the_recipe_trains_and_what_it_saved_answers(name, variant, checkpoints, tmp_path, monkeypatch, capsys):
    _, (call,) = start(name, tmp_path / "stub", *tiny(name, checkpoints, tmp_path / "out"), VARIANT=variant)
    run_ranks(train_main, 1 if name.endswith("1card") else 2, flags_of(call))
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [1, 2]
    assert all(math.isfinite(record["loss"]) and record["grad_norm"] > 0 for record in records)
    saved = checkpoints_in(tmp_path / "out")[-1]
    assert saved.name.endswith("-step-2")
    question = ["--instruction", "你好", "--max_new_tokens", "4", "--device", "cpu"]
    assert run_main(predict, monkeypatch, capsys, "--model_path", saved, *question) == (0, "")


@pytest.mark.slow
def test_a_preempted_script_saves_asks_to_be_resumed_and_goes_on(checkpoints, tmp_path):
    # The whole way, with DeepSpeed's launcher: signal -> script -> ranks -> checkpoint -> 75 -> the same script again.
    out = tmp_path / "out"
    env = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "MASTER_PORT": str(free_port())}
    env |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "0"}
    command = ["bash", str(ROOT / f"run_scripts/{PREEMPTIBLE}.sh"), *tiny(PREEMPTIBLE, checkpoints, out)]
    command = [*map(str, command), "--max_steps", "400", "--save_model_step", "1000"]
    with open(tmp_path / "log", "w") as log:
        script = subprocess.Popen(command, env=env, stdout=log, stderr=log)
        while not (out / "metrics.jsonl").is_file() or not (out / "metrics.jsonl").read_text():
            assert script.poll() is None, (tmp_path / "log").read_text()[-3000:]
            time.sleep(0.05)
        script.send_signal(signal.SIGTERM)
        assert script.wait(60) == RESUME_ME, (tmp_path / "log").read_text()[-3000:]
        stopped_at = int(checkpoints_in(out)[-1].name.rpartition("-")[2])
        assert 1 <= stopped_at < 400
        last = str(stopped_at + 2)
        assert subprocess.run([*command, "--max_steps", last], env=env, stdout=log, stderr=log).returncode == 0
    assert checkpoints_in(out)[-1].name.endswith(f"-step-{last}")
    assert "resumed from" in (tmp_path / "log").read_text()
