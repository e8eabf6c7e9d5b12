"""Results that exist stay as they are, whatever goes wrong: full disks, damaged adapters, killed predictions."""

import errno
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file

import merge_lora
import predict
import train
from glm_finetune import build, weights
from glm_finetune.config import TrainConfig
from glm_finetune.data.sampler import Progress
from glm_finetune.flags import parse
from glm_finetune.record import fingerprint, train_record
from glm_finetune.run import checkpoint, state
from glm_finetune.run.folder import check_output_dir
from glm_finetune.run.parts import choose
from glm_finetune.tuning import TRAIN_TYPE
from tests.refusal import contents, cut, json_fields, refused, remove, run_main, write
from tests.test_bad_input import ROW, lines
from tests.tiny import make_checkpoint

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")


@pytest.fixture
def adapter(checkpoints, tmp_path_factory):
    """A ChatGLM3 adapter as train.py leaves it, with random values."""
    return new_run(checkpoints["glm3"], tmp_path_factory.mktemp("run"), "lora")(1)


def new_run(base, output_dir, kind):
    """Function: step -> checkpoint folder, saved as train.py does."""
    config = parse(
        TrainConfig,
        [
            "--mode",
            "glm3",
            "--model_name_or_path",
            str(base),
            "--train_path",
            str(ROOT / "data/spo_1.json"),
            "--lora_dim",
            "2",
            "--output_dir",
            str(output_dir),
            "--train_type",
            kind,
        ],
    )
    mode, train_type = choose(config)
    model = train_type.apply(build.load_base(mode, base, weights.OnDevice(torch.float32, CPU)), config, mode)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    tokenizer = mode.tokenizer.from_pretrained(base)
    record, engine = train_record(config, train_type, tokenizer, 1) | fingerprint(base), StandInEngine(model)
    config.save_total_limit = 1
    saver = checkpoint.Saver(engine, tokenizer, TRAIN_TYPE[kind], config, record)
    return lambda step: save(saver, Progress(step, 1, 0))


def save(saver, progress):
    return saver.save(progress, state.of(saver.engine, progress))


class StandInEngine:
    """What saving asks of DeepSpeed's engine besides `state.tensors_of`, with moments that are all zero."""

    def __init__(self, model):
        self.module, self.device = model, CPU
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        self.basic_optimizer = torch.optim.AdamW(parameters, lr=0.0)
        self.basic_optimizer.step()

    def fp16_enabled(self):
        return False


@pytest.fixture(autouse=True)
def masters_only():
    """The state of a StandInEngine: the parameters themselves. (Not by monkeypatch, which some tests undo.)"""
    with mock.patch.object(state, "tensors_of", lambda engine: iter(state.learning(engine.module))):
        yield


@pytest.mark.parametrize("kind, module", [("lora", checkpoint), ("all", weights)])
@pytest.mark.parametrize("written", [0, 100])
def test_a_full_disk_leaves_the_earlier_checkpoint_alone(checkpoints, tmp_path, monkeypatch, kind, module, written):
    save = new_run(checkpoints["glm3"], tmp_path, kind)
    before = contents(save(1).parent)

    def full(tensors, path):
        Path(path).write_bytes(b"x" * written)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(module, "write_tensors", full)
    with pytest.raises(OSError, match=r"epoch-1-step-2 failed.*No space left.*Earlier checkpoints are untouched"):
        save(2)
    assert contents(tmp_path) == before and before
    monkeypatch.undo()
    assert save(2).is_dir() and not (tmp_path / "epoch-1-step-1").exists()


def test_results_are_refused_without_the_flag_and_untouched(checkpoints, tmp_path, data_file, monkeypatch, capsys):
    (tmp_path / "out/epoch-1-step-2").mkdir(parents=True)
    (tmp_path / "out/epoch-1-step-2/adapter_model.safetensors").write_bytes(b"weeks of work")
    (tmp_path / "out/epoch-1-step-2/manifest.json").write_text("{}")
    before = contents(tmp_path)
    code, error = run_main(
        train,
        monkeypatch,
        capsys,
        "--mode",
        "glm3",
        "--model_name_or_path",
        checkpoints["glm3"],
        "--train_path",
        data_file,
        "--output_dir",
        tmp_path / "out",
    )
    assert code == 2 and "epoch-1-step-2" in error and "--overwrite_output_dir" in error
    assert contents(tmp_path) == before
    (tmp_path / "file").touch()
    refused(lambda: check_output_dir(str(tmp_path / "file"), False), "--output_dir", "is a file")


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--train_path", "none.json"], ["none.json: no such file"]),
        (["--ds_file", "none.json"], ["--ds_file none.json"]),
        (["--max_src_len", "100", "--max_len", "100"], ["--max_src_len 100", "--max_len 100"]),
        (["--precision", "fp16"], ["--precision fp16", "bf16 or fp32"]),
        (["--model_name_or_path", "none"], ["none: no such folder"]),
    ],
)
def test_training_that_cannot_begin_writes_nothing(
    checkpoints, tmp_path, data_file, monkeypatch, capsys, arguments, parts
):
    flags = {
        "--mode": "glm3",
        "--model_name_or_path": checkpoints["glm3"],
        "--train_path": data_file,
        "--device": "cpu",
        "--output_dir": tmp_path / "out",
    } | dict(zip(arguments[::2], arguments[1::2]))
    code, error = run_main(train, monkeypatch, capsys, *[part for item in flags.items() for part in item])
    assert code == 2 and all(part in error for part in parts) and "Traceback" not in error
    assert not (tmp_path / "out").exists()


# Adapters, merging, prediction


def adapter_tensors(change):
    def damage(folder):
        state = load_file(folder / "adapter_model.safetensors")
        change(state, sorted(state)[0])
        save_file(state, folder / "adapter_model.safetensors")

    return damage


@pytest.mark.parametrize(
    "damage, parts",
    [
        (cut("adapter_config.json"), ["adapter_config.json: not valid JSON"]),
        (write("adapter_config.json", b"[]"), ["adapter_config.json: expected a JSON object"]),
        (write("adapter_config.json", b"{}"), ["adapter_config.json: peft_type is None"]),
        (json_fields("adapter_config.json", r=None), ["adapter_config.json: r is None"]),
        (json_fields("adapter_config.json", lora_alpha="8"), ["adapter_config.json: lora_alpha is '8'"]),
        (json_fields("adapter_config.json", r=4), ["does not fit the base", "size mismatch"]),
        (json_fields("adapter_config.json", target_modules=["q_proj"]), ["does not fit the base", "q_proj"]),
        (
            json_fields("adapter_config.json", target_modules=["query_key_value", "dense"]),
            ["4 tensors missing", "dense"],
        ),
        (remove("adapter_model.safetensors"), ["no weights of the adapter"]),
        (cut("adapter_model.safetensors"), ["adapter_model.safetensors: the file is damaged"]),
        (adapter_tensors(lambda state, name: state.pop(name)), ["1 tensors missing", "of another base"]),
        (adapter_tensors(lambda state, name: state.update(extra=state.pop(name))), ["1 tensors missing", "['extra']"]),
        (write("train_config.json", b"{"), ["train_config.json: not valid JSON"]),
        (json_fields("train_config.json", mode="glm9"), ["--mode (glm, glm2, glm3)"]),
    ],
)
def test_a_damaged_adapter_is_named_with_what_is_wrong(adapter, damage, parts):
    damage(adapter)
    refused(lambda: build.load_model_folder(build.find_model_folder(adapter), "fp32", CPU), *parts)


@pytest.mark.parametrize("changes", [{"num_layers": 1}, {"num_layers": 3}, {"hidden_size": 64}])
def test_an_adapter_of_another_base_is_refused(adapter, tmp_path, changes):
    base = make_checkpoint("glm3", tmp_path / "other", **changes)
    refused(
        lambda: build.load_model_folder(build.find_model_folder(adapter, base=base, force=True), "fp32", CPU),
        "does not fit the base",
    )


def test_an_adapter_on_other_weights_of_the_same_shape_is_refused_unless_forced(adapter, tmp_path, capsys):
    base = make_checkpoint("glm3", tmp_path / "other")
    tensors = load_file(base / "model.safetensors")
    name = "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"
    save_file(
        {**tensors, name: tensors[name] + 0.001}, base / "model.safetensors"
    )  # as after a LoRA was merged into it
    parts = str(base), "are others now", "--ori_model_dir", "--force"
    refused(lambda: build.find_model_folder(adapter, base=base), *parts)
    assert build.find_model_folder(adapter, base=base, force=True).base == base
    assert "--force takes them" in capsys.readouterr().err
    torch.save(tensors, base / "pytorch_model.bin")  # the right weights in another kind of file
    (base / "model.safetensors").unlink()
    assert build.find_model_folder(adapter, base=base).base == base and not capsys.readouterr().err
    json_fields("train_config.json", base_fingerprint=None)(adapter)  # of an earlier version
    build.find_model_folder(adapter, base=base)
    assert "does not say what its base was like" in capsys.readouterr().err


def test_an_adapter_whose_base_is_gone_says_where_it_was_and_which_flag_helps(adapter):
    json_fields("train_config.json", base="old/base", base_absolute="old/base")(adapter)
    json_fields("adapter_config.json", base_model_name_or_path="old/base")(adapter)
    refused(lambda: build.find_model_folder(adapter), "old/base", "--ori_model_dir")


def test_the_folder_of_a_run_is_answered_with_the_checkpoints_in_it(adapter):
    refused(lambda: build.find_model_folder(adapter.parent), "Give one of the folders in it: epoch-1-step-1")
    refused(lambda: build.find_model_folder(adapter, mode_name="glm4"), "--mode 'glm4'")


@pytest.mark.parametrize(
    "target", ["run/epoch-1-step-1", "run/epoch-1-step-1/merged", "run/x/../epoch-1-step-1/merged", "mine", "half"]
)
def test_merging_touches_no_folder_that_exists(adapter, tmp_path, monkeypatch, capsys, target):
    shutil.copytree(adapter, tmp_path / "run/epoch-1-step-1")
    for folder in ("mine", "tmp-half", "run/x"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "notes.txt").write_text("mine")
    before = contents(tmp_path)
    code, error = run_main(
        merge_lora,
        monkeypatch,
        capsys,
        "--model_dir",
        tmp_path / "run/epoch-1-step-1",
        "--output_dir",
        tmp_path / target,
    )
    assert code == 2 and "--output_dir" in error and contents(tmp_path) == before


def test_merging_onto_a_full_disk_leaves_nothing(adapter, tmp_path, monkeypatch, capsys):
    def full(tensors, path, metadata):
        raise weights.SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(weights, "save_file", full)
    code, error = run_main(merge_lora, monkeypatch, capsys, "--model_dir", adapter, "--output_dir", tmp_path / "merged")
    assert code == 2 and "No space left" in error and not contents(tmp_path)


def test_merging_what_is_no_adapter_is_refused(checkpoints, monkeypatch, capsys):
    code, error = run_main(merge_lora, monkeypatch, capsys, "--model_dir", checkpoints["glm3"])
    assert code == 2 and "no LoRA adapter" in error


@pytest.fixture
def ask(adapter, data_file, tmp_path, monkeypatch, capsys):
    """Function: flags of predict.py -> exit code, stderr. Answers the test's data file into out.jsonl."""

    def run(*arguments):
        flags = {
            "--model_path": adapter,
            "--test_path": data_file,
            "--output_path": tmp_path / "out.jsonl",
            "--device": "cpu",
            "--max_new_tokens": 4,
            "--batch_size": 4,
        }
        flags |= dict(zip(arguments[::2], arguments[1::2]))
        return run_main(predict, monkeypatch, capsys, *[part for item in flags.items() for part in item])

    return run


@pytest.mark.slow
def test_prediction_killed_within_a_line_or_a_character_goes_on_and_ends_the_same(ask, tmp_path):
    path = tmp_path / "out.jsonl"
    assert ask()[0] == 0
    whole = path.read_bytes()
    second = whole.index(b"\n") + 1
    for size in (whole.index("文".encode(), second) + 1, second, len(whole)):
        path.write_bytes(whole[:size])
        assert ask()[0] == 0 and path.read_bytes() == whole, size


@pytest.mark.parametrize(
    "content",
    [
        lines({**ROW, "prediction": "x"}) + b"\n",
        b"{oops\n",
        b"[1]\n",
        b"\xff\xfe\n",
        *(b"".join(lines({**ROW, "prediction": "x"}) + b"\n" for _ in range(count)) for count in (20,)),
    ],
)
def test_prediction_keeps_a_file_that_answers_something_else(ask, tmp_path, content):
    (tmp_path / "out.jsonl").write_bytes(content)
    code, error = ask()
    assert code == 2 and "out.jsonl" in error and "--output_path" in error and "--overwrite" in error
    assert (tmp_path / "out.jsonl").read_bytes() == content


def test_prediction_never_writes_over_the_questions(ask, data_file):
    before = data_file.read_bytes()
    for arguments in ((), ("--overwrite", "True")):
        code, error = ask("--output_path", data_file, *arguments)
        assert code == 2 and "--test_path" in error and data_file.read_bytes() == before


@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--device", "0"], ["--device 0", "--device cpu"]),
        (["--test_path", "none.json"], ["none.json: no such file"]),
        (["--model_path", "none"], ["none: no such folder"]),
        (["--mode", "glm"], ["config.json", "--mode"]),
    ],
)
def test_prediction_that_cannot_begin_writes_nothing(ask, tmp_path, monkeypatch, arguments, parts):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, error = ask(*arguments)
    assert code == 2 and all(part in error for part in parts) and not (tmp_path / "out.jsonl").exists()


# The scripts themselves


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--lora_module_name", "q_proj"], "no layer is called q_proj"),
        (["--ds_file", "ds.json"], "ds_file: ofload_optimizer"),
        (["--lerning_rate", "1"], "unknown flag --lerning_rate"),
    ],
)
def test_train_py_ends_with_one_error_and_the_old_results(checkpoints, tmp_path, data_file, arguments, part):
    (tmp_path / "ds.json").write_text('{"zero_optimization": {"stage": 2, "ofload_optimizer": {"device": "cpu"}}}')
    (tmp_path / "out/epoch-1-step-2").mkdir(parents=True)
    (tmp_path / "out/epoch-1-step-2/adapter_model.safetensors").write_bytes(b"weeks of work")
    (tmp_path / "out/epoch-1-step-2/manifest.json").write_text("{}")
    before = contents(tmp_path)
    run = subprocess.run(
        [
            sys.executable,
            ROOT / "train.py",
            "--mode",
            "glm3",
            "--model_name_or_path",
            checkpoints["glm3"],
            "--train_path",
            data_file,
            "--output_dir",
            "out",
            "--overwrite_output_dir",
            "--device",
            "cpu",
            *arguments,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 2 and run.stderr.count("error: ") == 1 and part in run.stderr
    assert "Traceback" not in run.stderr and contents(tmp_path) == before
