"""merge_lora.py, predict.py and the commands that users have: what they print, write and refuse."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
import predict
from glm_finetune import MODE, dist
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.convert import merge
from glm_finetune.convert.flags import MergeConfig
from glm_finetune.evaluate.metrics import triple_scores
from glm_finetune.flags import parse
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.weights import iter_tensors, write_sharded
from tests.ranks import free_port, run_ranks, train_arguments, train_main

ROOT = Path(__file__).parents[1]
every_mode = pytest.mark.parametrize("mode", MODE)


@pytest.fixture(scope="module")
def adapters(checkpoints, tmp_path_factory, rows):
    """{mode: adapter folder}, each trained for a few steps."""
    root = tmp_path_factory.mktemp("adapters")
    (root / "data.jsonl").write_text("".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows), encoding="utf-8")
    for mode in MODE:
        run_ranks(train_main, 1, train_arguments(mode, "lora", checkpoints[mode], root / "data.jsonl", root / mode))
    return {mode: checkpoints_in(root / mode)[-1] for mode in MODE}


def call(module, monkeypatch, *arguments):
    """A script's main() in this process."""
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    module.main()


@pytest.mark.slow
@every_mode
def test_merged_folder_predicts_what_the_adapter_predicts(mode, adapters, data_file, tmp_path, monkeypatch, capsys):
    before = {p.name: p.read_bytes() for p in adapters[mode].rglob("*") if p.is_file()}
    call(merge_lora, monkeypatch, "--model_dir", adapters[mode], "--output_dir", tmp_path / "merged")
    assert "greedy agreement 100.0%" in capsys.readouterr().out
    assert {p.name: p.read_bytes() for p in adapters[mode].rglob("*") if p.is_file()} == before
    for name, folder in (("adapter", adapters[mode]), ("merged", tmp_path / "merged")):
        call(
            predict,
            monkeypatch,
            "--model_path",
            folder,
            "--test_path",
            data_file,
            "--max_new_tokens",
            8,
            "--device",
            "cpu",
            "--batch_size",
            4,
            "--metrics",
            "triples",
            "--output_path",
            tmp_path / f"{name}.jsonl",
        )
    assert (tmp_path / "adapter.jsonl").read_bytes() == (tmp_path / "merged.jsonl").read_bytes()
    assert "triples of 11 samples" in capsys.readouterr().out


@pytest.mark.slow
def test_merged_folder_has_the_layout_and_dtypes_of_the_base(adapters, checkpoints, tmp_path, monkeypatch):
    base = tmp_path / "base"
    base.mkdir()
    for path in checkpoints["glm"].iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tensors = load_file(base / "model.safetensors")
    mixed = {name: t if "layernorm" in name else t.half() for name, t in tensors.items()}  # as the released ChatGLM-6B
    save_file(mixed, base / "model.safetensors")
    (base / "modeling_chatglm.py").write_text("# the original's code")
    call(
        merge_lora,
        monkeypatch,
        "--model_dir",
        adapters["glm"],
        "--ori_model_dir",
        base,
        "--force",  # these are other weights: rounded
        "--output_dir",
        tmp_path / "merged",
    )
    merged = load_file(tmp_path / "merged/model.safetensors")
    assert {name: (t.dtype, t.shape) for name, t in merged.items()} == {
        name: (t.dtype, t.shape) for name, t in mixed.items()
    }
    assert (tmp_path / "merged/modeling_chatglm.py").is_file() and not (
        tmp_path / "merged/adapter_config.json"
    ).exists()


@pytest.mark.slow
def test_a_merge_that_loses_the_adapter_is_removed(adapters, checkpoints, tmp_path, monkeypatch):
    def lose(tensors, folder, size):
        assert list(tensors)
        write_sharded(iter_tensors(checkpoints["glm3"]), folder, size)

    monkeypatch.setattr(merge, "write_sharded", lose)
    with pytest.raises(ValueError, match="is not base \\+ adapter"):
        call(merge_lora, monkeypatch, "--model_dir", adapters["glm3"], "--output_dir", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_of_two_merges_into_one_folder_neither_destroys_the_other(adapters, tmp_path, monkeypatch):
    arguments = ["--model_dir", adapters["glm3"], "--output_dir", tmp_path / "merged"]
    compare, others = merge.compare, []

    def while_another_starts(*given):
        if not others:
            others.append("started")
            with pytest.raises(ValueError, match="another merge_lora.py is writing it, or was killed"):
                call(merge_lora, monkeypatch, *arguments)
        return compare(*given)

    monkeypatch.setattr(merge, "compare", while_another_starts)
    call(merge_lora, monkeypatch, *arguments)
    assert others and [path.name for path in tmp_path.iterdir()] == ["merged"]
    with pytest.raises(ValueError, match="exists. Give another folder"):
        call(merge_lora, monkeypatch, *arguments)


@pytest.mark.slow
def test_a_sum_that_is_not_base_plus_adapter_is_refused(adapters, tmp_path, monkeypatch):
    monkeypatch.setattr("peft.tuners.lora.Linear.merge", lambda self: None)
    with pytest.raises(ValueError, match="query_key_value.weight: merging changed its results"):
        call(merge_lora, monkeypatch, "--model_dir", adapters["glm3"], "--output_dir", tmp_path / "merged")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_answers_of_another_model_are_never_taken_for_its_own(adapters, checkpoints, data_file, tmp_path, monkeypatch):
    arguments = [
        "--test_path",
        data_file,
        "--max_new_tokens",
        2,
        "--device",
        "cpu",
        "--output_path",
        tmp_path / "a.jsonl",
    ]
    call(predict, monkeypatch, "--model_path", adapters["glm3"], *arguments)
    before = (tmp_path / "a.jsonl").read_bytes()
    for changes in (["--model_path", checkpoints["glm3"]], ["--model_path", adapters["glm3"], "--num_beams", 2]):
        with pytest.raises(ValueError, match="made with other settings"):
            call(predict, monkeypatch, *arguments, *changes)
    assert (tmp_path / "a.jsonl").read_bytes() == before


@pytest.mark.slow
def test_a_conversation_that_grows_too_long_goes_on(checkpoints, monkeypatch, capsys):
    lines = iter(["风扇不转", "水温高", "长" * 300, "电压低", "stop"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    arguments = [
        "--model_path",
        checkpoints["glm2"],
        "--chat",
        "--device",
        "cpu",
        "--max_length",
        60,
        "--max_new_tokens",
        16,
    ]
    call(predict, monkeypatch, *arguments)
    printed = capsys.readouterr().out
    assert "the oldest turn is forgotten" in printed and "leaves room for 44" in printed
    assert printed.count("ChatGLM：") == 3


@pytest.mark.slow
def test_interrupted_prediction_goes_on_and_ends_the_same(adapters, data_file, tmp_path, monkeypatch):
    arguments = [
        "--model_path",
        adapters["glm2"],
        "--test_path",
        data_file,
        "--max_new_tokens",
        6,
        "--device",
        "cpu",
        "--batch_size",
        2,
        "--output_path",
        tmp_path / "out.jsonl",
    ]
    call(predict, monkeypatch, *arguments)
    whole = (tmp_path / "out.jsonl").read_bytes()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # killed in the middle of a line
    call(predict, monkeypatch, *arguments)
    assert (tmp_path / "out.jsonl").read_bytes() == whole


@pytest.mark.slow
def test_one_question_and_a_conversation(adapters, checkpoints, monkeypatch, capsys):
    call(
        predict,
        monkeypatch,
        "--model_path",
        adapters["glm3"],
        "--instruction",
        "风扇",
        "--input",
        "不转",
        "--device",
        "cpu",
        "--max_new_tokens",
        3,
    )
    assert capsys.readouterr().out.strip()
    lines = iter(["你好", "clear", "再见", "stop"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    call(
        predict,
        monkeypatch,
        "--model_path",
        checkpoints["glm3"],
        "--mode",
        "glm3",
        "--chat",
        "--device",
        "cpu",
        "--max_new_tokens",
        3,
    )
    assert capsys.readouterr().out.count("ChatGLM：") == 2


def test_triple_scores_are_the_originals():
    pairs = [("a_r_b\nc_r_d", "a_r_b\nc_r_d"), ("a_r_b\nx", "a_r_b\nc_r_d"), ("none", "a_r_b")]
    scores = triple_scores([(text, [gold]) for text, gold in pairs])
    assert scores.mean_f1 == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert (scores.precision, scores.recall, scores.f1) == pytest.approx((1.0, 0.6, 0.75))
    assert scores.exact == pytest.approx(1 / 3)


# The command lines of the original's README for LoRA and full tuning: (mode, folder, what differs).
ORIGINAL = """deepspeed --master_port 520 train.py --train_path data/spo_0.json --model_name_or_path {folder}
    --per_device_train_batch_size 1 --max_len 1560 --max_src_len 1024 --learning_rate 1e-4 --weight_decay 0.1
    --num_train_epochs 2 --gradient_accumulation_steps 4 --warmup_ratio 0.1 --mode {mode} {method} --seed 1234
    --ds_file {ds_file} --gradient_checkpointing --show_loss_step 10 --output_dir ./output-{mode}"""
LORA = '--train_type lora --lora_dim 16 --lora_alpha 64 --lora_dropout 0.1 --lora_module_name "{targets}"'
ALL_TARGETS = "query_key_value,dense_h_to_4h,dense_4h_to_h,dense"
COMMANDS = {
    "glm lora": ("glm", "ChatGLM-6B", LORA.format(targets="query_key_value"), "ds_zero2_no_offload.json"),
    "glm2 lora": ("glm2", "ChatGLM2-6B", LORA.format(targets=ALL_TARGETS), "ds_zero2_no_offload.json"),
    "glm3 lora by default": (
        "glm3",
        "ChatGLM3-6B",
        LORA.format(targets=ALL_TARGETS).replace("--train_type lora", ""),
        "ds_zero2_no_offload.json",
    ),
    "glm ptuning": (
        "glm",
        "ChatGLM-6B",
        "--train_type ptuning --pre_seq_len 16 --prefix_projection True",
        "ds_zero2_no_offload.json",
    ),
    "glm2 freeze": (
        "glm2",
        "ChatGLM2-6B",
        '--train_type freeze --freeze_module_name "layers.1.,layers.0."',  # the original names layers 24 to 27
        "ds_zero2_no_offload.json",
    ),
    "glm all": ("glm", "ChatGLM-6B", "--train_type all", "ds_zero3_offload.json"),
    "glm2 all": ("glm2", "ChatGLM2-6B", "--train_type all", "ds_zero3_no_offload.json"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_of_the_original_run_unchanged(name, checkpoints, rows, tmp_path, monkeypatch):
    mode, folder, method, ds_file = COMMANDS[name]
    (tmp_path / folder).symlink_to(checkpoints[mode])
    (tmp_path / "data").mkdir()
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:4])
    (tmp_path / "data/spo_0.json").write_text(text, encoding="utf-8")
    command = ORIGINAL.format(mode=mode, folder=folder, method=method, ds_file=ds_file)
    monkeypatch.chdir(tmp_path)
    run_ranks(train_main, 2, shlex.split(command)[4:])  # without `deepspeed --master_port 520 train.py`
    assert [p.name for p in checkpoints_in(tmp_path / f"output-{mode}")] == ["epoch-1-step-1", "epoch-2-step-2"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    ["deepspeed --num_gpus 2 --master_port {port}", "torchrun --nproc_per_node 2 --master_port {port}", "{python}"],
)
def test_every_launcher_starts_the_same_training(launcher, checkpoints, data_file, tmp_path):
    bin_folder = Path(sys.executable).parent
    prefix = launcher.format(port=free_port(), python=sys.executable).split()
    prefix[0] = prefix[0] if prefix[0] == sys.executable else str(bin_folder / prefix[0])
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", max_steps=2)
    result = subprocess.run([*prefix, "train.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]
    world_size = 1 if launcher == "{python}" else 2
    assert f"world size {world_size}" in result.stdout
    assert (checkpoints_in(tmp_path / "out")[-1] / "adapter_model.safetensors").is_file()
    assert not list(Path("/dev/shm").glob("deepspeed_allreduce_buffer*"))


@pytest.mark.slow
def test_the_benchmark_runs_and_finds_both_models_equal():
    command = [sys.executable, "benchmarks/step_time.py", "--quick", "--device", "cpu"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert "logits differ by" in result.stdout and "Tokens/s x" in result.stdout


def commands_in(text):
    """Argument lists of train.py, merge_lora.py and predict.py in a shell script or a README, line breaks joined."""
    for line in re.sub(r"\\+\n\s*", " ", text).splitlines():
        match = re.search(r"\b(train|merge_lora|predict)\.py +(--.*)", line)
        if match:
            arguments = re.sub(r'"\$@".*|[|>#].*|<[^>]*>', "", match[2].split("`")[0].replace("...", ""))
            yield match[1], shlex.split(arguments)


@pytest.mark.parametrize(
    "path", sorted([*ROOT.glob("*.md"), *ROOT.glob("run_scripts/*.sh"), *ROOT.glob("data/*.md")]), ids=lambda p: p.name
)
def test_every_command_that_is_shown_parses(path):
    classes = {"train": TrainConfig, "merge_lora": MergeConfig, "predict": PredictConfig}
    for script, arguments in commands_in(path.read_text(encoding="utf-8")):
        if "--help" not in arguments and arguments:
            parse(classes[script], [a for a in arguments if a])


@pytest.mark.parametrize("path", sorted(ROOT.glob("run_scripts/*.sh")), ids=lambda p: p.name)
def test_shell_scripts_are_valid_and_say_how_they_are_started(path):
    subprocess.run(["bash", "-n", str(path)], check=True)
    assert f"run_scripts/{path.name}" in path.read_text(encoding="utf-8")


def test_a_card_that_is_not_there_is_an_error(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for wanted in ("cuda", "0"):
        with pytest.raises(ValueError, match="--device"):
            dist.choose_device(wanted)
