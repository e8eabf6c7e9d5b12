"""Tokens that were added to a tokenizer: the originals' own are fine, others are refused wherever one is loaded."""

import shutil
from pathlib import Path

import pytest
import torch

import merge_lora
import predict
import train
from glm_finetune import MODE, build
from glm_finetune.data import __main__ as report
from glm_finetune.weights import write_json
from tests.refusal import json_fields, refused, run_main
from tests.test_identity import adapter

GLM3_OWN = ("[gMASK]", "sop", "<|user|>", "<|assistant|>", "<|observation|>")  # listed by the released ChatGLM3-6B
OWN = {
    "glm": ["<sop>", "<eop>", "[MASK]", "[gMASK]", "[sMASK]", "<ENC>", "<dBLOCK>", "<unk>", "<pad>", "<n>", "</s>"],
    "glm2": ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<unk>", "<s>", "</s>", "<pad>"],
    "glm3": [*GLM3_OWN, "[MASK]", "[sMASK]", "eop", "<|system|>", "<unk>", "</s>"],
}


def decoder(tokens):
    entries = {str(64790 + i): {"content": token, "special": True} for i, token in enumerate(tokens)}
    return json_fields("tokenizer_config.json", added_tokens_decoder=entries)


FORMS = {
    "added_tokens.json": lambda tokens, folder: write_json(
        {token: 64790 + i for i, token in enumerate(tokens)}, folder / "added_tokens.json"
    ),
    "decoder": lambda tokens, folder: decoder(tokens)(folder),
    "texts": lambda tokens, folder: json_fields("tokenizer_config.json", additional_special_tokens=tokens)(folder),
    "objects": lambda tokens, folder: json_fields(
        "tokenizer_config.json", additional_special_tokens=[{"content": token, "lstrip": False} for token in tokens]
    )(folder),
}


@pytest.fixture
def base(checkpoints, tmp_path):
    def copy(mode, form, tokens):
        folder = Path(shutil.copytree(checkpoints[mode], tmp_path / "base"))
        FORMS[form](tokens, folder)
        return folder

    return copy


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODE)
def test_the_originals_own_tokens_are_fine_and_travel(mode, form, base, tmp_path):
    tokenizer, _ = build.check_base(MODE[mode], folder := base(mode, form, OWN[mode]))
    (tmp_path / "saved").mkdir()
    tokenizer.save_pretrained(tmp_path / "saved")
    for name in ("tokenizer_config.json", "added_tokens.json"):
        assert (folder / name).is_file() == (tmp_path / "saved" / name).is_file()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mode", MODE)
def test_others_are_named_with_their_file(mode, form, base):
    folder = base(mode, form, [*OWN[mode], *(f"<|new{i}|>" for i in range(9))])
    file = "added_tokens.json" if form == "added_tokens.json" else "tokenizer_config.json"
    said = ["<|new0|>, <|new1|>, <|new2|>, <|new3|>, <|new4|> and 4 more", "ordinary text", "not supported yet"]
    refused(lambda: MODE[mode].tokenizer.from_pretrained(folder), str(folder / file), "Remove them", *said)


def test_role_tokens_are_new_to_a_mode_without_roles(base):
    refused(lambda: MODE["glm2"].tokenizer.from_pretrained(base("glm2", "decoder", ["<|user|>"])), "adds <|user|> to")


def test_every_script_refuses_them(base, data_file, tmp_path, monkeypatch, capsys):
    folder, own = base("glm3", "added_tokens.json", ["<|tool|>"]), adapter(tmp_path / "own")
    data = ["--train_path", data_file]
    for script, arguments in (
        (train, ["--model_name_or_path", folder, *data, "--output_dir", tmp_path / "out", "--device", "cpu"]),
        (predict, ["--model_path", folder, "--instruction", "x", "--device", "cpu"]),
        (report, [*data, "--model_name_or_path", folder]),
        (merge_lora, ["--model_dir", own, "--ori_model_dir", folder]),
    ):
        code, said = run_main(script, monkeypatch, capsys, "--mode", "glm3", *arguments)
        assert code == 2 and "added_tokens.json: adds <|tool|> to the vocabulary" in said, said


def test_an_adapter_that_learnt_other_tokens_is_refused(checkpoints, tmp_path):
    own = adapter(tmp_path / "own")
    FORMS["added_tokens.json"](["<|tool|>"], own)
    folder = build.find_model_folder(own, "glm3", checkpoints["glm3"])
    refused(lambda: build.load_model_folder(folder, "fp32", torch.device("cpu")), str(own), "adds <|tool|> to")
