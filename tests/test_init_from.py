"""--init_from: a run begins with the weights of a folder, whatever it holds, at every ZeRO stage, on ranks."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from glm_finetune import MODE, build
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import collate
from glm_finetune.flags import parse
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.origin import settle
from glm_finetune.run.parts import choose
from glm_finetune.weights import read_json, write_json
from tests.original_data import original_dataset
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import json_fields, refused
from tests.tiny import make_checkpoint

NEEDED = ["--train_path", "data", "--output_dir", "out"]
STAYS = dict(learning_rate=1e-12, warmup_steps=0, max_steps=1, per_device_train_batch_size=11)
KINDS = {
    "lora": ("lora", {}),
    "lora to qlora and back": ("lora", {}),
    "dora": ("lora", dict(lora_variant="dora", lora_dim=3, lora_alpha=7, lora_module_name="dense,query_key_value")),
    "rslora": ("lora", dict(lora_variant="rslora", lora_module_name="all-linear")),
    "pissa": ("lora", dict(lora_variant="pissa", lora_dim=4)),
    "modules": ("lora", dict(modules_to_save="output_layer")),
    "ptuning, encoder": ("ptuning", {}),
    "ptuning, embeddings": ("ptuning", dict(prefix_projection="False")),
    "version 1": ("ptuning", dict(ptuning_version=1)),
    "freeze": ("freeze", {}),
    "all": ("all", {}),
}


def train(mode, train_type, base, data, out, world_size=1, **flags):
    """A run; returns (losses of its log, its last checkpoint, what rank 0 printed)."""
    arguments = train_arguments(mode, train_type, base, data, out, precision="fp32", **flags)
    if train_type == "ptuning" and "init_from" in flags:
        arguments = [part for part in arguments if part not in ("--pre_seq_len", "5")]
    printed = run_ranks(train_main, world_size, arguments)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [one["loss"] for one in records if "loss" in one], checkpoints_in(out)[-1], printed[0]


@torch.no_grad()
def loss_of(folder, mode, data, bits=None):
    """Mean loss of a target token over all rows, of a model folder as predict.py loads it; bits: of its base."""
    tokenizer, model = build.load_model_folder(build.find_model_folder(folder), "fp32", torch.device("cpu"), bits)
    rows = list(original_dataset(mode, str(data), tokenizer, max_len=128, max_src_len=64))
    batch = collate(rows, tokenizer.pad_token_id, MODE[mode].positions)
    return model(**batch, use_cache=False).token_losses.sum().item() / (batch["labels"] != -100).sum().item()


@pytest.fixture(scope="module")
def data(tmp_path_factory, rows):
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_loss_is_that_of_the_folder_as_predict_loads_it(kind, checkpoints, data, tmp_path):
    train_type, flags = KINDS[kind]
    _, first, _ = train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "a", **flags)
    for i, again in enumerate(("qlora", "lora") if "qlora" in kind else (train_type,)):
        given = dict(STAYS, init_from=first)
        losses, second, printed = train("glm3", again, checkpoints["glm3"], data, tmp_path / f"b{i}", **given)
        bits = 4 if again == "qlora" else None
        assert losses[0] == pytest.approx(loss_of(first, "glm3", data, bits), rel=1e-5)
        assert losses[0] != pytest.approx(loss_of(checkpoints["glm3"], "glm3", data), rel=5e-4)
        assert f"--init_from {first}: " in printed and second.name == "epoch-1-step-1"
        record = read_json(second / "train_config.json")
        assert record["init_from"] == record["identity"]["init_from"] == str(first)
        first = second
    # the same values, moved by a rate of 1e-12
    name = {"adapter": "adapter_model.safetensors", "weights": "model.safetensors"}.get(record["saves"])
    if name and again != "qlora":
        before, after = load_file(Path(record["init_from"]) / name), load_file(second / name)
        assert before.keys() == after.keys()
        assert all(torch.allclose(tensor, after[key], atol=1e-6) for key, tensor in before.items())


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("mode, train_type", [("glm3", "lora"), ("glm", "lora"), ("glm2", "ptuning"), ("glm2", "all")])
def test_on_two_ranks_at_every_stage_as_well(mode, train_type, stage, checkpoints, data, tmp_path):
    stage3 = {"zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0}}
    write_json(stage3, tmp_path / "ds.json")
    _, first, _ = train(mode, train_type, checkpoints[mode], data, tmp_path / "a")
    flags = dict(STAYS, per_device_train_batch_size=6, init_from=first, ds_file=tmp_path / "ds.json")
    losses, second, _ = train(mode, train_type, checkpoints[mode], data, tmp_path / "b", 2, **flags)
    assert losses[0] == pytest.approx(loss_of(first, mode, data), rel=1e-5)
    assert loss_of(second, mode, data) == pytest.approx(loss_of(first, mode, data), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "all"])
def test_resumed_it_goes_on_without_the_folder(train_type, checkpoints, data, tmp_path):
    _, first, _ = train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "a")
    flags = dict(init_from=first, save_model_step=1, learning_rate=1e-3)
    whole, end, _ = train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "b", **flags)
    shutil.copytree(tmp_path / "b", tmp_path / "c")
    shutil.rmtree(checkpoints_in(tmp_path / "c")[-1])
    if train_type == "lora":  # a whole model is the base, which is read again
        shutil.rmtree(first)
    given = {**flags, "lora_module_name": "query_key_value"} if train_type == "lora" else flags
    again, last, printed = train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "c", **given, resume="auto")
    assert again == whole and "resumed from" in printed
    name = "adapter_model.safetensors" if train_type == "lora" else "model.safetensors"
    assert (last / name).read_bytes() == (end / name).read_bytes()
    if train_type == "all":
        with pytest.raises(RuntimeError, match="none: no such folder"):
            flags_of_none = dict(flags, init_from=tmp_path / "none", max_steps=9)
            train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "c", **flags_of_none, resume="auto")
    other = dict(flags, init_from=checkpoints["glm3"]) if train_type == "all" else {**flags, "init_from": None}
    other = {name: value for name, value in other.items() if value}
    with pytest.raises(RuntimeError, match="init_from: .* there, .* here"):
        train("glm3", train_type, checkpoints["glm3"], data, tmp_path / "c", **other, resume="auto", max_steps=9)


# What does not fit


@pytest.fixture(scope="module")
def adapter(checkpoints, data, tmp_path_factory):
    """A checkpoint of a LoRA run on ChatGLM3. Read only."""
    return train("glm3", "lora", checkpoints["glm3"], data, tmp_path_factory.mktemp("lora") / "out", max_steps=1)[1]


@pytest.fixture(scope="module")
def prefixes(checkpoints, data, tmp_path_factory):
    """{version: checkpoint of a P-tuning run}. Read only."""
    root = tmp_path_factory.mktemp("ptuning")
    kinds = {version: dict(max_steps=1, ptuning_version=version) for version in (1, 2)}
    return {v: train("glm3", "ptuning", checkpoints["glm3"], data, root / str(v), **f)[1] for v, f in kinds.items()}


def settled(folder, *flags, mode="glm3", train_type="lora", base="base"):
    needed = [*NEEDED, "--model_name_or_path", str(base), "--init_from", str(folder)]
    config = parse(TrainConfig, [*needed, "--mode", mode, "--train_type", train_type, *flags])
    return settle(config, *choose(config))


@pytest.mark.slow
@pytest.mark.parametrize(
    "given, parts",
    [
        (dict(mode="glm2"), ["is of --mode glm3, this training of --mode glm2"]),
        (
            dict(train_type="ptuning"),
            ["is a LoRA adapter, --train_type ptuning trains a P", "lora or qlora"],
        ),
        (dict(train_type="all"), ["is a LoRA adapter", "it goes with --train_type lora or qlora."]),
        (["--lora_dim", "4"], ["lora_dim is 8 there, --lora_dim 4 was given"]),
        (["--lora_alpha", "4"], ["lora_alpha is 30 there, --lora_alpha 4.0 was given"]),
        (["--lora_module_name", "dense"], ["lora_module_name is query_key_value there, --lora_module_name dense"]),
        (["--lora_variant", "dora"], ["lora_variant is lora there, --lora_variant dora"]),
        (["--lora_variant", "pissa"], ["lora_variant is lora there, --lora_variant pissa"]),
        (["--modules_to_save", "x"], ["modules_to_save is None there, --modules_to_save x"]),
    ],
    ids=str,
)
def test_an_adapter_that_does_not_fit_is_named_with_both_values(given, parts, adapter):
    flags, given = ([], given) if isinstance(given, dict) else (given, {})
    refused(lambda: settled(adapter, *flags, **given), f"--init_from {adapter}", *parts)


@pytest.mark.slow
def test_what_is_equal_or_not_given_is_taken_from_the_folder(adapter, prefixes, tmp_path):
    config = settled(adapter, "--lora_dim", "8", "--lora_module_name", "query_key_value,", train_type="qlora")
    assert (config.lora_dim, config.lora_alpha, "lora_alpha" in config.given) == (8, 30, False)
    own = shutil.copytree(adapter, tmp_path / "own")
    json_fields("adapter_config.json", r=3, lora_alpha=5, use_dora=True, target_modules=["b", "a"])(own)
    config = settled(own)
    assert (config.lora_dim, config.lora_alpha, config.lora_variant, config.lora_module_name) == (3, 5, "dora", "a,b")
    config = settled(prefixes[1], train_type="ptuning")
    assert (config.ptuning_version, config.pre_seq_len, config.prefix_projection) == (1, 5, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    "version, flags, parts",
    [
        (2, ["--pre_seq_len", "7"], ["pre_seq_len is 5 there, --pre_seq_len 7"]),
        (2, ["--ptuning_version", "1"], ["ptuning_version is 2 there, --ptuning_version 1"]),
        (2, ["--prefix_projection", "False"], ["prefix_projection is True there, --prefix_projection False"]),
        (1, ["--prefix_projection", "True"], ["prefix_projection is False there, --prefix_projection True"]),
    ],
)
def test_a_prefix_that_does_not_fit_is_named_with_both_values(version, flags, parts, prefixes):
    refused(lambda: settled(prefixes[version], *flags, train_type="ptuning"), *parts)


@pytest.mark.slow
def test_a_prefix_or_a_whole_model_for_another_train_type_is_named(prefixes, checkpoints, tmp_path):
    refused(lambda: settled(prefixes[2]), "is a P-tuning prefix", "it goes with --train_type ptuning.")
    whole = checkpoints["glm3"]
    refused(lambda: settled(whole), "is a whole model", "freeze or all", "give it as --model_name_or_path")
    refused(lambda: settled(prefixes[2].parent, train_type="ptuning"), "is the output folder of a run")
    refused(lambda: settled(tmp_path / "none"), "none: no such folder")
    assert settled(whole, train_type="all", base=tmp_path / "other").model_name_or_path == str(whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields, parts",
    [
        (dict(rank_pattern={"dense": 3}), ["rank_pattern {'dense': 3} cannot be trained further"]),
        (dict(alpha_pattern={"dense": 3}), ["alpha_pattern"]),
        (dict(init_lora_weights="pissa_niter_4"), ["init_lora_weights pissa_niter_4 cannot"]),
        (dict(use_dora=True, use_rslora=True), ["use_rslora cannot"]),
        (dict(r=None), ["r is None: the file is damaged"]),
        (dict(peft_type="IA3"), ["peft_type is 'IA3'"]),
    ],
)
def test_a_foreign_adapter_that_cannot_be_trained_here_is_named(fields, parts, adapter, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    json_fields("adapter_config.json", **fields)(own)
    refused(lambda: settled(own), *parts)


@pytest.fixture
def begin(checkpoints, data, tmp_path):
    """Function: folder, flags -> start a run of one step with --init_from, on two ranks."""

    def begin(folder, mode="glm3", base=None, **flags):
        flags = dict(STAYS, per_device_train_batch_size=4, init_from=folder, **flags)
        return train(mode, "lora", base or checkpoints[mode], data, tmp_path / "out", 2, **flags)

    return begin


@pytest.mark.slow
def test_another_base_is_refused_unless_it_is_meant(adapter, begin, tmp_path):
    other = make_checkpoint("glm3", tmp_path / "other", seq_length=2048)
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1e-3 for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    with pytest.raises(RuntimeError, match="was trained on .*; the weights in .* are others now.*--model_name_or_path"):
        begin(adapter, base=other)
    assert not (tmp_path / "out").exists()
    begin(adapter, base=other, force=True)


@pytest.mark.slow
def test_a_plain_peft_folder_is_trained_further_and_a_pattern_of_targets_is_seen_in_the_tensors(
    adapter, begin, data, tmp_path
):
    own = shutil.copytree(adapter, tmp_path / "own")
    for name in ("train_config.json", "manifest.json"):
        (own / name).unlink()
    json_fields("adapter_config.json", target_modules=r".*\.query_key_value")(own)
    _, last, printed = begin(own)
    assert loss_of(last, "glm3", data) == pytest.approx(loss_of(adapter, "glm3", data), rel=1e-5)
    assert "does not say what its base was like" in printed
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(RuntimeError, match=r"nothing there for base_model.*dense.* and 1 more. Are its targets"):
        begin(own, lora_module_name="dense")


@pytest.mark.slow
@pytest.mark.parametrize("version", [1, 2])
def test_a_prefix_as_the_official_code_leaves_it_is_trained_further(version, prefixes, checkpoints, data, tmp_path):
    own = shutil.copytree(prefixes[version], tmp_path / "own")
    for path in own.iterdir():
        if path.name not in ("config.json", "pytorch_model.bin"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    losses, _, printed = train("glm3", "ptuning", checkpoints["glm3"], data, tmp_path / "out", **STAYS, init_from=own)
    assert losses[0] == pytest.approx(loss_of(prefixes[version], "glm3", data), rel=1e-5)
    assert "does not say what its base was like" in printed


@pytest.mark.slow
@pytest.mark.parametrize("harm", ["missing", "shape", "nan"])
def test_tensors_that_do_not_fit_are_named(harm, adapter, begin, tmp_path):
    own = shutil.copytree(adapter, tmp_path / "own")
    tensors = load_file(own / "adapter_model.safetensors")
    name = sorted(tensors)[0]
    changed = {"missing": None, "shape": torch.zeros(8, 9), "nan": tensors[name] * float("nan")}[harm]
    tensors = {key: (changed if key == name else tensor) for key, tensor in tensors.items()}
    save_file({key: tensor for key, tensor in tensors.items() if tensor is not None}, own / "adapter_model.safetensors")
    said = {"missing": "nothing there for", "shape": r"other shapes than here: .*\(8, 9\)", "nan": "inf or nan among"}
    with pytest.raises(RuntimeError, match=said[harm]):
        begin(own)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_folder_is_not_deleted_with_the_results_it_lies_among(adapter, checkpoints, data, tmp_path):
    out = shutil.copytree(adapter.parent, tmp_path / "out")
    flags = dict(STAYS, init_from=out / adapter.name, overwrite_output_dir=True)
    with pytest.raises(RuntimeError, match="lies in it and is needed"):
        train("glm3", "lora", checkpoints["glm3"], data, out, **flags)
    assert (out / adapter.name).is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("force", [{}, {"force": True}], ids=["", "force"])
def test_a_finished_run_with_other_data_is_not_complete_in_silence(force, checkpoints, data, tmp_path):
    _, first, _ = train("glm3", "lora", checkpoints["glm3"], data, tmp_path / "out")
    other = tmp_path / "other.jsonl"
    other.write_bytes(data.read_bytes() * 2)
    why = "this run is complete, with other training data than those given" if force else "training data: .* here"
    with pytest.raises(RuntimeError, match=f"{why}.*give --init_from {first} and another --output_dir"):
        train("glm3", "lora", checkpoints["glm3"], other, tmp_path / "out", resume="auto", **force)
    printed = train("glm3", "lora", checkpoints["glm3"], data, tmp_path / "out", resume="auto")[2]
    assert "this run is complete. Nothing was changed." in printed


def test_it_is_asked_as_it_was_trained_and_is_never_written_into(checkpoints, tmp_path, capsys):
    folder = make_checkpoint("glm3", tmp_path / "epoch-1-step-2")
    record = {"mode": "glm3", "template": "raw", "prompt_text": "抽取：", "input_separator": None}
    write_json(record, folder / "train_config.json")

    def settled(*flags):
        base = ["--model_name_or_path", str(checkpoints["glm3"]), "--mode", "glm3", "--init_from", str(folder)]
        config = parse(TrainConfig, [*NEEDED, *base, "--train_type", "all", *flags])
        return settle(config, *choose(config))

    assert (settled().template, settled().prompt_text) == ("raw", None)
    assert "--prompt_text '抽取：'; give it where the new data need it" in capsys.readouterr().out
    assert settled("--template", "official", "--prompt_text", "x").template == "official"
    assert "--prompt_text" not in capsys.readouterr().out
    for inside in (folder, folder / "out"):
        refused(lambda output=inside: settled("--output_dir", str(output)), "lies in --init_from")
