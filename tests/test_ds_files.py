"""DeepSpeed files that users bring along: where ChatGLM-Finetuning wrote over their numbers, the flags count."""

import json

import pytest

from glm_finetune.config import TrainConfig
from glm_finetune.flags import parse
from glm_finetune.run.ds_config import not_used, read_ds_file, resolve
from tests.ranks import run_ranks, train_arguments, train_main

NEEDED = ["--model_name_or_path", "base", "--train_path", "data", "--output_dir", "out"]
ORIGINAL = {  # what ChatGLM-Finetuning's ds_zero3_offload.json looks like in its users' folders
    "train_micro_batch_size_per_gpu": 4,
    "train_batch_size": 32,
    "gradient_accumulation_steps": 8,
    "gradient_clipping": 1.0,
    "steps_per_print": 1,
    "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "pin_memory": True}},
    "optimizer": {
        "type": "Adam",
        "params": {"lr": 1e-5, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.01, "adam_w_mode": True},
    },
    "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_max_lr": 1e-5, "total_num_steps": "auto"}},
}
NOT_USED = ["train_micro_batch_size_per_gpu 4", "gradient_accumulation_steps 8", "train_batch_size 32"]
NOT_USED += ["optimizer lr 1e-05", "optimizer weight_decay 0.01"]


def resolved(ds_json, *arguments):
    config = parse(TrainConfig, [*NEEDED, "--learning_rate", "0.001", *arguments])
    return resolve(ds_json, config, 2, "fp32", "cpu")


def test_of_the_originals_files_the_flags_count_and_what_does_not_is_listed():
    ds_config = resolved(ORIGINAL)
    assert [ds_config[name] for name in ORIGINAL if name.startswith(("train_", "gradient_"))] == [16, 32, 1, 1.0]
    assert [ds_config["optimizer"]["params"][name] for name in ("lr", "weight_decay")] == [0.001, 0.1]
    others = ["optimizer adam_w_mode True", "scheduler warmup_max_lr 1e-05"]
    assert set(not_used(ORIGINAL, ds_config)) == {*NOT_USED, *others} - {"train_batch_size 32"}  # 16 x 2 ranks


def test_equal_or_automatic_numbers_are_not_listed():
    ds_json = {"train_batch_size": "auto", "gradient_accumulation_steps": 1, "optimizer": {"params": {"lr": 0.001}}}
    assert not_used(ds_json, resolved(ds_json)) == []


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"train_batch_size": "many"}, "train_batch_size many"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": None}}}, "optimizer lr None"),
        ({"optimizer": {"type": "AdamW", "params": {"betas": [0.8, 0.9]}}}, "optimizer betas [0.8, 0.9]"),
    ],
)
def test_whatever_stands_in_place_of_a_number_is_listed(changes, said):
    assert not_used(changes, resolved(changes)) == [said]


def test_params_that_are_no_object_are_an_error(tmp_path):
    for name in ("optimizer", "scheduler"):
        (tmp_path / "ds.json").write_text(json.dumps({name: {"params": [1]}}))
        with pytest.raises(ValueError, match=f"{name}.params must be an object"):
            read_ds_file(str(tmp_path / "ds.json"))


@pytest.mark.slow
def test_a_run_with_such_a_file_says_once_what_is_not_used(checkpoints, data_file, tmp_path):
    (tmp_path / "ds.json").write_text(json.dumps(ORIGINAL))
    arguments = ["glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out"]
    printed = run_ranks(train_main, 2, train_arguments(*arguments, max_steps=1, ds_file=tmp_path / "ds.json"))
    lines = [line for text in printed for line in text.splitlines() if "not used" in line]
    assert len(lines) == 1 and f"--ds_file {tmp_path / 'ds.json'}: " in lines[0]
    assert all(said in lines[0] for said in NOT_USED[1:])  # 4 samples a micro-batch are the flag's too
