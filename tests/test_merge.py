"""Merging tensor by tensor: what it takes, what it refuses, and that what it refuses leaves nothing behind."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, get_peft_model

import merge_lora
import predict
from glm_finetune import MODE, build
from glm_finetune.models import prefixes
from glm_finetune.weights import iter_tensors, read_json, write_json, write_sharded
from tests.refusal import run_main
from tests.test_training import run

CPU = torch.device("cpu")
IDS = torch.tensor([[1, 2, 30, 40, 50]])


def adapter(base, folder, mode="glm3", **settings):
    """A plain adapter of peft for a base, with random values."""
    model = MODE[mode].model.from_pretrained(base)
    given = dict(target_modules=["query_key_value", "dense"], r=4, lora_alpha=8, task_type="CAUSAL_LM")
    model = get_peft_model(model, LoraConfig(**given | settings))
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    if mode == "glm3":
        torch.save(model.eval()(IDS).logits.detach(), folder / "logits.pt")  # what it gives
    return folder


def merged_logits(base, folder, mode, monkeypatch, capsys):
    """Logits of base + adapter, and of what merge_lora.py writes."""
    code, error = run_main(
        merge_lora, monkeypatch, capsys, "--model_dir", folder, "--ori_model_dir", base, "--mode", mode
    )
    assert code == 0, error
    sources = build.find_model_folder(folder, mode, base), build.find_model_folder(f"{folder}-merged", mode)
    loaded = [build.load_model_folder(source, "fp32", CPU) for source in sources]
    ids = MODE[mode].render(loaded[0][0], [{"role": "user", "content": "发动机水温高，是什么故障？"}]).input_ids
    return [model(torch.tensor([ids])).logits for _, model in loaded]


@pytest.mark.slow
@pytest.mark.parametrize(
    "mode, module", [("glm3", "output_layer"), ("glm", "final_layernorm"), ("glm2", "word_embeddings")]
)
def test_modules_that_were_trained_in_16_bit_are_merged(
    mode, module, checkpoints, data_file, tmp_path, monkeypatch, capsys
):
    flags = dict(modules_to_save=module, precision="bf16", max_steps=2)
    folder = run(mode, "lora", checkpoints, data_file, tmp_path / "out", **flags)[2]
    expected, found = merged_logits(checkpoints[mode], folder, mode, monkeypatch, capsys)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODE)
def test_a_base_with_a_prefix_in_it_is_merged_and_proved_with_it(mode, checkpoints, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(checkpoints[mode], tmp_path / "base", ignore=shutil.ignore_patterns("*.safetensors"))
    model = MODE[mode].model.from_pretrained(checkpoints[mode])
    prefixes.add_prefix(model, 5, False)
    torch.nn.init.normal_(model.transformer.prefix_encoder.embedding.weight)
    model.save_weights(base)
    write_json({**read_json(base / "config.json"), "pre_seq_len": 5, "prefix_projection": False}, base / "config.json")
    folder = adapter(base, tmp_path / "adapter", mode)
    expected, found = merged_logits(base, folder, mode, monkeypatch, capsys)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def refused_merge(base, folder, monkeypatch, capsys, *flags):
    """The message of a merge that leaves nothing."""
    given = ["--model_dir", folder, "--ori_model_dir", base, "--mode", "glm3", *flags]
    code, error = run_main(merge_lora, monkeypatch, capsys, *given)
    assert code == 2, error
    assert not list(folder.parent.glob("*merged*"))
    return error


UNLIKE = {
    "its start is of the base": (dict(init_lora_weights="olora"), "init_lora_weights olora"),
    "a bias of its own": (dict(lora_bias=True), "lora_bias True"),
    "single tokens": (dict(trainable_token_indices=[3, 7]), "trainable_token_indices"),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_an_adapter_that_is_no_plain_sum_is_asked_but_not_merged(name, checkpoints, tmp_path, monkeypatch, capsys):
    settings, words = UNLIKE[name]
    folder = adapter(checkpoints["glm3"], tmp_path / "adapter", **settings)
    assert words in refused_merge(checkpoints["glm3"], folder, monkeypatch, capsys)
    source = build.find_model_folder(folder, "glm3", checkpoints["glm3"])
    found = build.load_model_folder(source, "fp32", CPU)[1](IDS).logits
    torch.testing.assert_close(found, torch.load(folder / "logits.pt"), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("value, flags", [(float("nan"), []), (1e6, ["--dtype", "fp16"])], ids=["nan", "too large"])
def test_values_that_are_not_finite_are_not_written(value, flags, checkpoints, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(checkpoints["glm3"], tmp_path / "base")
    tensors = dict(iter_tensors(base))
    tensors["transformer.embedding.word_embeddings.weight"][700] = value
    write_sharded(tensors.items(), base)
    folder = adapter(checkpoints["glm3"], tmp_path / "adapter")
    error = refused_merge(base, folder, monkeypatch, capsys, *flags)
    assert "inf or nan among the values" in error and "word_embeddings.weight" in error


def test_room_is_asked_for_the_dtype_that_is_written(checkpoints, tmp_path, monkeypatch, capsys):
    size = (checkpoints["glm3"] / "model.safetensors").stat().st_size
    folder = adapter(checkpoints["glm3"], tmp_path / "adapter")
    free = shutil.disk_usage(tmp_path)._replace(free=size * 3 // 4)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    assert "GB left" in refused_merge(checkpoints["glm3"], folder, monkeypatch, capsys)
    given = ["--model_dir", folder, "--ori_model_dir", checkpoints["glm3"], "--mode", "glm3", "--dtype", "bf16"]
    assert run_main(merge_lora, monkeypatch, capsys, *given)[0] == 0
    assert json.loads((tmp_path / "adapter-merged/config.json").read_text())["torch_dtype"] == "bfloat16"


def test_flags_reach_the_base_that_is_merged_or_asked(checkpoints, data_file, tmp_path, monkeypatch, capsys):
    """--force, --rope_rule and --quantization_bit from the command line of both scripts to what they are for."""
    base = shutil.copytree(checkpoints["glm2"], tmp_path / "base")
    folder = adapter(base, tmp_path / "adapter", "glm2")
    write_json({"mode": "glm2", "base": str(base), "base_fingerprint": "of another"}, folder / "train_config.json")
    write_json({**read_json(base / "config.json"), "rope_ratio": 4}, base / "config.json")
    asked = ["--model_path", folder, "--ori_model_dir", base, "--instruction", "你好", "--max_new_tokens", 2]
    for script, flags in ((predict, asked), (merge_lora, ["--model_dir", folder, "--ori_model_dir", base])):
        code, error = run_main(script, monkeypatch, capsys, *flags)
        assert code == 2 and "--force" in error
        code, error = run_main(script, monkeypatch, capsys, *flags, "--force")
        assert code == 2 and "--rope_rule" in error
    assert run_main(merge_lora, monkeypatch, capsys, *flags, "--force", "--rope_rule", "position")[0] == 0
    assert read_json(tmp_path / "adapter-merged/config.json")["rope_rule"] == "position"
    places, own = [], build.load_base
    monkeypatch.setattr(
        build, "load_base", lambda *parts, **named: places.append((parts[2], named)) or own(*parts, **named)
    )
    more = ["--force", "--rope_rule", "position", "--quantization_bit", 8]
    assert run_main(predict, monkeypatch, capsys, *asked, *more)[0] == 0
    assert places[0][0].bits == 8 and places[0][1]["rope_rule"] == "position"
