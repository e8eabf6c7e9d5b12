"""Wrong flags, data and DeepSpeed files: one error that names the thing and says what to do."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from glm_finetune import MODE, dist
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.convert.flags import MergeConfig
from glm_finetune.flags import parse
from glm_finetune.run.ds_config import precision_of, read_ds_file, resolve
from glm_finetune.run.parts import choose
from tests.original_data import original_dataset
from tests.refusal import refused

NEEDED = ["--model_name_or_path", "base", "--train_path", "data", "--output_dir", "out"]
every_mode = pytest.mark.parametrize("mode", MODE)


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--lora_dimm", "4"], ["unknown flag --lora_dimm", "--lora_dim?"]),
        (["--lora_dimm=4", "--xyzzy", "3"], ["--lora_dimm", "unknown flag --xyzzy", "--help"]),
        (["-max_len", "4"], ["unknown flag -max_len", "--max_len?"]),
        (["stray.json"], ["'stray.json' belongs to no flag"]),
        (["--lr_scheduler", "cosin"], ["--lr_scheduler 'cosin'", "Did you mean cosine?"]),
        (["--precision", "fp8"], ["--precision 'fp8'", "bf16, fp16, fp32"]),
        (["--device", "gpu"], ["--device 'gpu'", "cuda, cpu"]),
        (["--max_len", "abc"], ["--max_len", "invalid int value: 'abc'"]),
        (["--max_len"], ["--max_len", "expected one argument"]),
        (["--is_skip", "maybe"], ["--is_skip", "expected True or False, not 'maybe'"]),
        (["--ds_file", "a.json", "--deepspeed_config", "b.json"], ["--ds_file a.json", "--deepspeed_config b.json"]),
        (["--lora_module_name", " , "], ["--lora_module_name", "names nothing"]),
        (["--freeze_module_name", ""], ["--freeze_module_name", "names nothing"]),
        (["--seed", "-1"], ["--seed -1"]),
        (["--warmup_ratio", "1.5"], ["--warmup_ratio 1.5", "between 0 and 1"]),
        (["--max_len", "-3", "--learning_rat", "3", "--lr_scheduler", "x"], ["-3", "--learning_rate?", "--lr_sch"]),
    ],
)
def test_a_wrong_flag_is_named_with_what_is_allowed(arguments, parts):
    refused(lambda: parse(TrainConfig, [*NEEDED, *arguments]), *parts)


@pytest.mark.parametrize(
    "name",
    ["learning_rate", "weight_decay", "max_grad_norm", "lora_alpha", "lora_dropout", "warmup_ratio", "min_lr_ratio"],
)
@pytest.mark.parametrize("value", ["nan", "inf", "-0.5"])
def test_numbers_must_be_finite_and_not_negative(name, value):
    refused(lambda: parse(TrainConfig, [*NEEDED, f"--{name}", value]), f"--{name}", value)


@pytest.mark.parametrize(
    "name",
    [
        "max_len",
        "max_src_len",
        "lora_dim",
        "per_device_train_batch_size",
        "num_train_epochs",
        "gradient_accumulation_steps",
        "max_steps",
        "show_loss_step",
        "save_model_step",
        "save_total_limit",
    ],
)
@pytest.mark.parametrize("value", ["0", "-2"])
def test_counts_must_be_above_0(name, value):
    refused(lambda: parse(TrainConfig, [*NEEDED, f"--{name}", value]), f"--{name} {value}: must be above 0")


def test_a_misspelt_required_flag_is_named_with_the_right_one():
    refused(
        lambda: parse(TrainConfig, ["--model_name_or_pth", "base", *NEEDED[2:]]),
        "--model_name_or_pth",
        "Did you mean --model_name_or_path?",
        "--model_name_or_path must be given",
    )
    refused(lambda: parse(TrainConfig, [*NEEDED[:-1], ""]), "--output_dir must be given")


@pytest.mark.parametrize(
    "arguments, expected",
    [
        ([], False),
        (["--is_skip"], True),
        (["--is_skip", "True"], True),
        (["--is_skip", "False"], False),
        (["--is_skip=0"], False),
        (["--is_skip", "--is_skip", "False"], False),
    ],
)
def test_switches_take_values(arguments, expected):
    assert parse(TrainConfig, [*NEEDED, *arguments]).is_skip is expected


def test_unknown_mode_and_train_type_are_reported_together():
    config = parse(TrainConfig, [*NEEDED, "--mode", "GLM33", "--train_type", "lroa"])
    refused(lambda: choose(config), "--mode 'GLM33'", "you mean glm3?", "--train_type 'lroa'", "you mean lora?")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        ([], ["--instruction", "--test_path", "--chat"]),
        (["--chat", "--instruction", "x"], ["exactly one"]),
        (["--chat", "--top_p", "3"], ["--top_p 3.0"]),
        (["--chat", "--temperature", "nan"], ["--temperature", "finite"]),
        (["--chat", "--batch_size", "-1"], ["--batch_size -1"]),
        (["--chat", "--input", "x"], ["--input", "--instruction"]),
        (["--chat", "--max_length", "100", "--max_new_tokens", "100"], ["--max_length 100", "--max_new_tokens 100"]),
    ],
)
def test_predict_refuses_flags_that_make_no_sense(arguments, parts):
    refused(lambda: parse(PredictConfig, arguments), *parts)


def test_merge_refuses_an_unknown_dtype():
    refused(lambda: parse(MergeConfig, ["--model_dir", "x", "--dtype", "float"]), "--dtype 'float'", "bf16, fp16, fp32")


@pytest.mark.parametrize("wanted", ["cuda", "0", "1", "cuda:0", "-1", "²"])
def test_a_card_that_is_not_there_is_refused_by_its_number(wanted, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(lambda: dist.choose_device(wanted), f"--device {wanted}", "cpu")


def test_every_rank_sees_that_one_of_them_has_no_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    refused(lambda: dist.choose_device("cuda"), "card 3 was asked for", "shows 2")


# Data


ROW = {"instruction": "你好", "input": "a", "output": "b"}


def lines(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


@pytest.fixture
def dataset(checkpoints, tmp_path):
    """Function: bytes of a file -> the data set of a mode."""

    def read(content, mode="glm3", **limits):
        (tmp_path / "data.json").write_bytes(content)
        tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
        limits = {"max_len": 100, "max_src_len": 50, **limits}
        return original_dataset(mode, str(tmp_path / "data.json"), tokenizer, **limits)

    return read


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"", ["the file is empty"]),
        (b"\xef\xbb\xbf \n", ["the file is empty"]),
        (b"[]", ["the array is empty"]),
        (lines(ROW) + b"\n{oops\n", [", line 2: not JSON", "{oops"]),
        (lines(ROW, ROW)[:-4], [", line 2: not JSON"]),
        (lines(ROW, 3), [", line 2: expected an object, found 3"]),
        (b"[" + lines(ROW) + b', "x"]', [", entry 2: expected an object, found 'x'"]),
        (b"[\n" + lines(ROW) + b",\n{]", [", line 3: not JSON"]),
        (lines(ROW, {"instruction": "x", "input": "y"}), [", line 2: field 'output' is", "['input', 'instruction']"]),
        (lines({**ROW, "output": 3}), [", line 1: field 'output' is 3, not a string", "['input', 'instruction',"]),
        (lines({**ROW, "input": 3}), [", line 1: field 'input' is 3"]),
        (
            b'{"instruction": "\\ud800", "input": "", "output": "x"}',
            [", line 1: field 'instruction'", "half of a char"],
        ),
        (lines(ROW).decode().encode("gbk"), ["not UTF-8", "iconv -f GBK"]),
        (lines(ROW).decode().encode("utf-16"), ["not UTF-8"]),
    ],
)
def test_a_bad_data_file_is_named_with_the_line(dataset, content, parts):
    refused(lambda: dataset(content), "data.json", *parts)


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbf" + lines(ROW, ROW),
        b"[" + lines(ROW) + b"," + lines(ROW) + b"]",
        lines(ROW, ROW).replace(b"\n", b"\r\n\r\n"),
        b"\xef\xbb\xbf[" + lines(ROW) + b",\n" + lines(ROW) + b"]\n",
    ],
    ids=["bom", "array", "crlf", "bom-array"],
)
def test_files_of_other_editors_are_read(dataset, content):
    assert list(dataset(content)) == list(dataset(lines(ROW, ROW)))


def test_a_missing_data_file_is_named(checkpoints, tmp_path):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    refused(lambda: original_dataset("glm3", str(tmp_path / "none.json"), tokenizer), "none.json: no such file")


@every_mode
def test_samples_that_are_all_skipped_are_counted(dataset, mode):
    content = lines({**ROW, "input": "长" * 200})
    refused(lambda: dataset(content, mode, is_skip=True), "no row left", "skipped 1", "--is_skip")


@every_mode
@pytest.mark.parametrize("max_len, max_src_len", [(50, 50), (50, 60), (51, 50)])
def test_a_question_as_long_as_a_sample_is_refused(dataset, mode, max_len, max_src_len):
    refused(
        lambda: dataset(lines(ROW), mode, max_len=max_len, max_src_len=max_src_len),
        f"--max_src_len {max_src_len}",
        f"--max_len {max_len}",
    )


# DeepSpeed files


@pytest.fixture
def ds(tmp_path):
    """Function: text of a DeepSpeed file, flags -> what DeepSpeed gets."""

    def read(text, *arguments, precision="fp32"):
        (tmp_path / "ds.json").write_text(text, encoding="utf-8")
        value = read_ds_file(str(tmp_path / "ds.json"))
        precision_of(value)
        return resolve(value, parse(TrainConfig, [*NEEDED, *arguments]), 1, precision, "cpu")

    return read


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{x", ["ds.json: not valid JSON"]),
        ("[]", ["ds.json: expected a JSON object, found a list"]),
        ('{"gradient_clipping": 0.5}', ["gradient_clipping = 0.5", "--max_grad_norm says 1.0"]),
        ('{"gradient_clipping": NaN}', ["gradient_clipping = nan", "--max_grad_norm"]),
        ('{"optimizer": {"type": "Lamb"}}', ["optimizer 'Lamb'", "AdamW"]),
        ('{"bf16": {"enabled": true}}', ["bf16", "--precision says fp32"]),
        ('{"fp16": {"enabled": "true"}}', ["fp16.enabled must be true or false"]),
        ('{"zero_optimisation": {}}', ["'zero_optimisation'", "Did you mean zero_optimization?"]),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', ["offloads parameters at stage 2"]),
        ('{"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}', ["offloads the optimizer without a stage"]),
        ('{"zero_optimization": {"stage": "2"}}', ["stage is '2'"]),
        ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', ["zero_optimization.offload_param must be"]),
        *(
            (f'{{"{name}": {value}}}', [f"{name} must be an object"])
            for value in ("null", "3", '"auto"')
            for name in ("zero_optimization", "bf16", "fp16", "optimizer", "scheduler")
        ),
    ],
)
def test_a_bad_deepspeed_file_is_named_with_the_flag_it_contradicts(ds, text, parts):
    refused(lambda: ds(text), *parts)


def test_a_missing_deepspeed_file_is_answered_with_those_that_exist():
    refused(lambda: read_ds_file("ds_zero4.json"), "--ds_file ds_zero4.json: no such file", "ds_zero2_no_offload.json")


def test_a_deepspeed_file_with_a_bom_and_auto_is_read(ds):
    text = '\ufeff{"fp16": {"enabled": "auto", "loss_scale": "auto"}, "train_batch_size": "auto"}'
    assert ds(text)["train_batch_size"] == 16 and "loss_scale" not in ds(text)["fp16"]


@pytest.mark.parametrize("section", ["offload_optimizer", "offload_param"])
def test_an_nvme_folder_that_cannot_be_written_is_named(section, tmp_path):
    pytest.importorskip("deepspeed")
    from glm_finetune.run import engine

    (tmp_path / "file").write_text("")
    for path, parts in ((tmp_path / "file/x", ["cannot be written"]), (None, ["needs", "nvme_path"])):
        zero = {"stage": 3, section: {"device": "nvme", **({"nvme_path": str(path)} if path else {})}}
        config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": zero}
        refused(lambda config=config: engine.check(config), "nvme", *parts)


def test_output_that_nobody_reads_to_its_end_is_no_error():
    code = "from glm_finetune import exits; exits.exit_with_message(lambda: print('line\\n' * 10**6))"
    done = subprocess.run(
        f'{sys.executable} -c "{code}" | head -1',
        shell=True,
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.stdout, "Errno" in done.stderr) == ("line\n", False)
