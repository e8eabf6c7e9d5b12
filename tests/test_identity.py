"""Folders given as a base that are none, and bases whose mode was not asked for: each is named for what it is."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import merge_lora
import predict
import train
from glm_finetune import MODE, build
from glm_finetune.data import __main__ as report
from glm_finetune.models.rope import choose_rule
from glm_finetune.modes.identity import check_default, fields_of_base
from glm_finetune.weights import write_json
from tests.refusal import json_fields, refused, run_main
from tests.tiny import make_checkpoint

TIKTOKEN = b"IQ== 0\nIg== 1\nIw== 2\n"
GLM4 = {"num_layers": 40, "padded_vocab_size": 151552, "rope_ratio": 500, "seq_length": 131072}


@pytest.fixture
def base(checkpoints, tmp_path):
    """A copy of a mode's checkpoint that does not say of which mode it is."""

    def copy(mode="glm2", name="base", **fields):
        folder = Path(shutil.copytree(checkpoints[mode], tmp_path / name))
        json_fields("config.json", _name_or_path="x", **fields)(folder)
        return folder

    return copy


@pytest.fixture
def start(data_file, tmp_path, monkeypatch, capsys):
    """Function: flags -> what train.py says when it refuses to begin."""

    def start(folder, *flags):
        needed = ["--train_path", data_file, "--output_dir", tmp_path / "out", "--device", "cpu"]
        code, said = run_main(train, monkeypatch, capsys, "--model_name_or_path", folder, *needed, *flags)
        assert code == 2 and "Traceback" not in said and not (tmp_path / "out").exists()
        return said

    return start


@pytest.fixture
def look(data_file, tmp_path, monkeypatch, capsys):
    """Function: flags -> exit code of the data report and what it says."""

    def look(folder, *flags):
        needed = [data_file, "--output_path", tmp_path / "lengths.png", "--model_name_or_path", folder]
        return run_main(report, monkeypatch, capsys, *needed, *flags)

    return look


# The mode that was not asked for


def test_the_default_is_taken_where_the_base_says_so(checkpoints, base, look):
    check_default(MODE["glm2"], checkpoints["glm2"])
    check_default(MODE["glm2"], base(name="chatglm2-6b"))
    assert look(checkpoints["glm2"])[0] == 0


@pytest.mark.parametrize("mode", ["glm", "glm3"])
def test_a_base_of_another_mode_asks_for_the_flag(mode, checkpoints, start, look):
    said = f"is a model for --mode {mode}, the default is glm2"
    assert said in start(checkpoints[mode]) and said in look(checkpoints[mode])[1]


def test_a_base_that_leaves_its_mode_open_asks_for_the_flag(base, start, look):
    folder = base()
    for said in (start(folder), look(folder)[1]):
        assert f"{folder}: does not say which member of the family it is. Give --mode: glm (ChatGLM-6B)" in said
    assert look(folder, "--mode", "glm2")[0] == 0


def test_a_folder_with_the_tokenizer_alone_asks_for_the_flag(base, look):
    folder = base()
    for path in folder.iterdir():
        if path.name != "tokenizer.model":
            path.unlink()
    assert "Give --mode" in look(folder)[1] and look(folder, "--mode", "glm2")[0] == 0


# Other families


def of_another(folder, fields, tokenizer=TIKTOKEN):
    folder.mkdir(exist_ok=True)
    write_json(fields, folder / "config.json")
    if tokenizer:
        (folder / "tokenizer.model").write_bytes(tokenizer)
    save_file({"x": torch.zeros(2)}, folder / "model.safetensors")
    return folder


OTHERS = {
    "glm-4-9b-chat": ({"model_type": "chatglm", **GLM4}, "this is GLM-4"),
    "glm-4-9b-chat-hf": ({"model_type": "glm", "architectures": ["GlmForCausalLM"]}, "this is GLM-4 or later (GlmFor"),
    "glm-4-0414": ({"model_type": "glm4", "architectures": ["Glm4ForCausalLM"]}, "this is GLM-4 or later (Glm4For"),
    "qwen": ({"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"]}, "this is qwen2 (Qwen2ForCausalLM)"),
    "llama": ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, "this is llama (LlamaForCausalLM)"),
    "bare": ({"model_type": "mistral"}, "this is mistral"),
    "strange": ({"model_type": ["x"], "architectures": 3}, "not a ChatGLM: not supported"),
    "visualglm": ({"model_type": "chatglm", "inner_hidden_size": 8, "eva_config": {}}, "this is VisualGLM-6B"),
}


@pytest.mark.parametrize("mode", [None, "glm", "glm2", "glm3"])
@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_another_family_is_named(name, mode, tmp_path, start, look, monkeypatch, capsys):
    fields, words = OTHERS[name]
    folder, flags = of_another(tmp_path / name, fields), ["--mode", mode] if mode else []
    for said in (start(folder, *flags), look(folder, *flags)[1]):
        assert words in said and "not a ChatGLM: not supported. Supported are ChatGLM-6B, " in said, said
        assert "32k" not in said and "rope" not in said
    asked = run_main(predict, monkeypatch, capsys, "--model_path", folder, "--instruction", "x", *flags)
    assert asked[0] == 2 and words in asked[1]


def test_the_vocabulary_of_glm4_is_named(base, look):
    folder = base()
    (folder / "tokenizer.model").write_bytes(TIKTOKEN)
    refused(
        lambda: build.check_base(MODE["glm2"], folder), "tokenizer.model: a vocabulary of tiktoken, as GLM-4 has it"
    )
    (folder / "config.json").unlink()
    assert "as GLM-4 has it" in look(folder, "--mode", "glm2")[1]


def test_long_context_variants_are_named_by_their_own_ratio(tmp_path):
    message = refused(lambda: choose_rule(tmp_path, {"rope_ratio": 8}), "rope_ratio is 8")
    for words in ("the 16 of ChatGLM2-6B-32k", "the 50 of ChatGLM3-6B-32k", "500 of ChatGLM3-6B-128k"):
        assert words in message


# Parts of models, and folders around them


def adapter(folder):
    folder.mkdir(parents=True)
    write_json({"peft_type": "LORA", "base_model_name_or_path": "ChatGLM3-6B/"}, folder / "adapter_config.json")
    save_file({"x": torch.zeros(2)}, folder / "adapter_model.safetensors")
    return folder


def prefix(folder):
    make_checkpoint("glm3", folder, pre_seq_len=4)
    (folder / "model.safetensors").unlink()
    torch.save({"transformer.prefix_encoder.embedding.weight": torch.zeros(4, 8)}, folder / "pytorch_model.bin")
    return folder


def output(folder):
    for step in (9, 10):
        adapter(folder / f"epoch-1-step-{step}")
    return folder


def whole_output(folder):
    make_checkpoint("glm3", folder / "epoch-1-step-3")
    return folder


def state(folder):
    make_checkpoint("glm3", folder)
    (folder / "config.json").unlink()
    write_json({}, folder / "progress.json")
    return folder


def weights_only(folder):
    make_checkpoint("glm3", folder)
    (folder / "config.json").unlink()
    return folder


def deepspeed(folder):
    (folder / "global_step9").mkdir(parents=True)
    return folder


def hub_cache(folder):
    make_checkpoint("glm3", folder / "snapshots/abc")
    return folder


def file(folder):
    folder.write_bytes(b"x")
    return folder


FOLDERS = {
    "adapter": (
        adapter,
        ["is a LoRA adapter, not a base", "--init_from", "(ChatGLM3-6B/)", "merge_lora.py"],
    ),
    "prefix": (
        prefix,
        ["is a P-tuning prefix, not a base", "not part of the weights", "ptuning --init_from"],
    ),
    "output": (
        output,
        ["the output folder of a run", "in it: epoch-1-step-9, epoch-1-step-10.", "step-10 further"],
    ),
    "whole output": (whole_output, ["the output folder of a run", "Give one of the folders in it: epoch-1-step-3."]),
    "state": (state, ["is the state of a checkpoint", "Give "]),
    "weights": (weights_only, ["config.json: no such file", "weights only (model.safetensors)", "Copy config.json"]),
    "deepspeed": (deepspeed, ["checkpoint of DeepSpeed", "zero_to_fp32.py"]),
    "cache of the hub": (hub_cache, ["Give one of the folders in it: snapshots/abc."]),
    "empty": (
        lambda folder: folder.mkdir() or folder,
        ["config.json: no such file. Expected the folder"],
    ),
    "file": (file, ["is a file. Give the folder of a checkpoint"]),
    "nothing": (lambda folder: folder, ["no such folder"]),
}


@pytest.mark.parametrize("flags", [(), ("--mode", "glm3"), ("--mode", "glm2", "--train_type", "ptuning")], ids=str)
@pytest.mark.parametrize("name", FOLDERS)
def test_a_folder_that_is_no_base_is_named_with_what_to_do(name, flags, tmp_path, start):
    make, parts = FOLDERS[name]
    said = start(make(tmp_path / "given"), *flags)
    assert all(part in said for part in (*parts, "given")), said


@pytest.mark.parametrize("name", FOLDERS.keys() - {"nothing", "adapter", "prefix"})
def test_predict_and_merge_name_it_too(name, tmp_path, monkeypatch, capsys):
    make, parts = FOLDERS[name]
    folder = make(tmp_path / "given")
    if name != "file":
        code, said = run_main(predict, monkeypatch, capsys, "--model_path", folder, "--instruction", "x")
        assert code == 2 and all(part in said for part in parts), said
    adapter(tmp_path / "own")
    given = ["--model_dir", tmp_path / "own", "--ori_model_dir", folder, "--output_dir", tmp_path / "merged"]
    code, said = run_main(merge_lora, monkeypatch, capsys, *given)
    assert code == 2 and all(part in said for part in parts), said


def test_an_adapter_as_the_base_of_an_adapter_is_named(tmp_path, monkeypatch, capsys):
    own, other = adapter(tmp_path / "own"), adapter(tmp_path / "other")
    code, said = run_main(merge_lora, monkeypatch, capsys, "--model_dir", own, "--ori_model_dir", other)
    assert code == 2 and f"{other} is a LoRA adapter, not a base" in said


def test_a_prefix_is_not_merged_and_the_message_says_what_to_do(tmp_path, monkeypatch, capsys):
    base, folder = make_checkpoint("glm3", tmp_path / "base"), prefix(tmp_path / "prefix")
    code, said = run_main(merge_lora, monkeypatch, capsys, "--model_dir", folder, "--ori_model_dir", base)
    assert code == 2 and "a prefix is not part of the weights and cannot be merged" in said


@pytest.mark.parametrize("mode", MODE)
def test_a_base_is_no_stranger(mode, checkpoints, base):
    fields_of_base(checkpoints[mode])
    own = base(mode, architectures=["PeftModelForCausalLM"], pre_seq_len=None)
    fields_of_base(own)
    fields = json.loads((own / "config.json").read_text())
    write_json({name: value for name, value in fields.items() if name != "model_type"}, own / "config.json")
    fields_of_base(own)
