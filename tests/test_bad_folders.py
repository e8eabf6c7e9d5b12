"""Damaged, foreign or unfitting checkpoints and tokenizers, names that match nothing: one error that says why."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_finetune import MODE, build, host, weights
from glm_finetune.config import TrainConfig
from glm_finetune.flags import parse
from glm_finetune.run.parts import choose
from tests.refusal import cut, json_fields, refused, remove, write
from tests.tiny import tokenizer_model

NEEDED = ["--model_name_or_path", "base", "--train_path", "data", "--output_dir", "out"]
EMBEDDING = "transformer.embedding.word_embeddings.weight"
CPU = torch.device("cpu")
every_mode = pytest.mark.parametrize("mode", MODE)


@pytest.fixture
def damaged(checkpoints, tmp_path):
    """Function: (mode, what to do to a copy of its checkpoint, mode to load it with) -> load it as train.py does."""

    def load(mode, damage, under=None):
        folder = Path(shutil.copytree(checkpoints[mode], tmp_path / "base"))
        damage(folder)
        build.check_base(MODE[under or mode], folder, max_len=200)
        build.load_base(MODE[under or mode], folder, weights.OnDevice(torch.float32, CPU))

    return load


def fields(**changes):
    return json_fields("config.json", **changes)


def tensors(change):
    """Change the dict of tensors in model.safetensors."""

    def damage(folder):
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return damage


def shards(ending, then):
    """Split the weights in two shards with an index, then do `then`."""

    def damage(folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        parts = [dict(list(state.items())[i::2]) for i in range(2)]
        names = [f"part-{i}.{ending}" for i in range(2)]
        for part, name in zip(parts, names):
            (save_file if ending == "safetensors" else torch.save)(part, folder / name)
        index = "pytorch_model.bin.index.json" if ending == "bin" else "model.safetensors.index.json"
        weights.write_json({"weight_map": {k: n for part, n in zip(parts, names) for k in part}}, folder / index)
        then(folder)

    return damage


def pickled(value):
    """Replace the weights by a pickle of value(weights)."""

    def damage(folder):
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        torch.save(value(state), folder / "pytorch_model.bin")

    return damage


class Code:
    """Unpickling it calls os.mkdir."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_shards_are_loaded_and_a_missing_or_truncated_one_is_named(damaged, ending, tmp_path):
    damaged("glm3", shards(ending, lambda folder: None))
    for damage, part in (
        (remove, "not there: ['part-1"),
        (cut, f"part-1.{ending}: the file is damaged"),
        (lambda name: cut(name, 0), f"part-1.{ending}: the file is damaged"),
    ):
        shutil.rmtree(tmp_path / "base")
        refused(lambda damage=damage: damaged("glm3", shards(ending, damage(f"part-1.{ending}"))), part, "Copy")


@pytest.mark.parametrize(
    "damage, parts",
    [
        (remove("model.safetensors"), ["no weights", "model.safetensors"]),
        (remove("config.json"), ["config.json: no such file"]),
        (cut("config.json"), ["config.json: not valid JSON"]),
        (write("config.json", b"[]"), ["config.json: expected a JSON object"]),
        (cut("model.safetensors"), ["model.safetensors: the file is damaged", "Copy it again"]),
        (write("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n"), ["model.safetensors", "git lfs"]),
        (write("model.safetensors.index.json", b"{}"), ["model.safetensors.index.json: no weight_map"]),
        (
            write("model.safetensors.index.json", b'{"weight_map": ["x"]}'),
            ["model.safetensors.index.json: no weight_map"],
        ),
        (tensors(lambda state: state.update({EMBEDDING: torch.zeros(3, 4)})), ["wrong shape", EMBEDDING, "(3, 4)"]),
        (
            tensors(lambda state: state.update({EMBEDDING: state[EMBEDDING].to(torch.int8)})),
            ["wrong", EMBEDDING, "int8"],
        ),
        (tensors(lambda state: state.pop(EMBEDDING)), ["missing (1)", EMBEDDING]),
        (tensors(lambda state: state.update(extra=torch.zeros(2))), ["unexpected (1): extra"]),
        (fields(num_layers=3), ["missing", "layers.2."]),
        (fields(num_layers="two"), ["config.json: num_layers is 'two'"]),
        (fields(kv_channels=-8), ["config.json: kv_channels is -8"]),
        (fields(seq_length=None), ["config.json: seq_length is None"]),
        (fields(torch_dtype="float17"), ["config.json: torch_dtype is 'float17'", "float16"]),
        (fields(quantization_bit=4), ["quantised to 4 bits", "16 bit"]),
        (fields(seq_length=100), ["--max_len 200", "100 tokens"]),
        (pickled(lambda state: list(state.values())), ["pytorch_model.bin: refused"]),
        (pickled(lambda state: {"state_dict": state}), ["pytorch_model.bin: refused"]),
        (pickled(lambda state: torch.nn.Linear(2, 2)), ["pytorch_model.bin: refused"]),
        (remove("tokenizer.model"), ["tokenizer.model", "Found in the folder", "model.safetensors"]),
        (write("tokenizer.model", b"not a model" * 9), ["tokenizer.model: not a readable SentencePiece model"]),
        (cut("tokenizer.model", 0), ["tokenizer.model: not a readable SentencePiece model"]),
        (cut("tokenizer_config.json"), ["tokenizer_config.json: not valid JSON"]),
        (fields(padded_vocab_size=5000), ["the tokenizer has 909 ids, the model 5,000", "another checkpoint"]),
        (write("tokenizer.model", tokenizer_model("glm")), ["the tokenizer has 1,009 ids", "another checkpoint"]),
        (fields(eos_token_id=7), ["eos_token_id is 7", "another checkpoint"]),
        (
            write("tokenizer.model", b"version https://git-lfs.github.com/spec/v1\n"),
            ["tokenizer.model", "git lfs pull"],
        ),
    ],
)
def test_a_bad_checkpoint_is_named_with_what_is_wrong(damaged, damage, parts):
    refused(lambda: damaged("glm3", damage), "base", *parts)


def test_a_tokenizer_without_the_mode_s_pieces_is_refused(damaged):
    refused(lambda: damaged("glm", write("ice_text.model", tokenizer_model("glm2"))), "ice_text.model", "[MASK]")


def both(first, second):
    return lambda folder: (first(folder), second(folder))


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(damaged, tmp_path, legacy):
    damage = pickled(lambda state: state | {"x": Code(tmp_path / "ran")})
    if legacy:
        content = pickle.dumps(Code(tmp_path / "ran"), protocol=2)
        damage = both(remove("model.safetensors"), write("pytorch_model.bin", content))
    message = refused(lambda: damaged("glm3", damage), "pytorch_model.bin: refused", "could run any code")
    assert not (tmp_path / "ran").exists() and "weights_only" not in message


@pytest.mark.parametrize("mode, under", [(a, b) for a in MODE for b in MODE if a != b])
def test_a_checkpoint_under_another_mode_is_refused(damaged, mode, under):
    refused(lambda: damaged(mode, lambda folder: None, under), "base", f"--mode {under}")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
@pytest.mark.parametrize("error", [RuntimeError("DefaultCPUAllocator: can't allocate memory: 9"), MemoryError("9")])
def test_a_host_without_memory_is_no_damaged_file(error, ending, damaged, monkeypatch):
    def full(*args, **kwargs):
        raise error

    monkeypatch.setattr(weights, "read_tensor", full)
    monkeypatch.setattr(torch, "load", full)
    monkeypatch.setattr(host, "free_bytes", lambda: 3 * 2**30)
    damage = shards(ending, lambda folder: None)
    message = refused(lambda: damaged("glm3", damage), f"part-0.{ending}: out of host memory while reading it")
    assert "damaged" not in message


# What is trained


@every_mode
@pytest.mark.parametrize(
    "arguments, parts",
    [
        (["--lora_module_name", "q_proj,query_key_value"], ["--lora_module_name", "called q_proj.", "query_key_value"]),
        (["--lora_module_name", "input_layernorm"], ["--lora_module_name", "called input_layernorm.", "dense"]),
        (["--train_type", "freeze"], ["--freeze_module_name", "'layers.27.'", "layers.1"]),
        (["--train_type", "freeze", "--freeze_module_name", "layers.1.,layers.99."], ["'layers.99.'"]),
        (["--lora_module_name", "query_key_valeu"], ["called query_key_valeu.", "Did you mean query_key_value?"]),
    ],
)
def test_names_that_match_nothing_are_answered_with_those_that_exist(checkpoints, mode, arguments, parts):
    config = parse(TrainConfig, [*NEEDED, "--mode", mode, *arguments])
    with torch.device("meta"):
        model = MODE[mode].model(MODE[mode].config.from_pretrained(checkpoints[mode]))
    refused(lambda: choose(config)[1].apply(model, config, MODE[mode]), *parts)
