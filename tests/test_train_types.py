"""Every variant of every train type: it learns, what it saves gives its numbers again, it is what its paper says."""

import pytest
import torch

import merge_lora
from glm_finetune import MODE, build, weights
from glm_finetune.config import TrainConfig
from glm_finetune.flags import parse
from glm_finetune.models.prefixes import add_prompt
from glm_finetune.run.optim import parameter_groups
from glm_finetune.run.parts import choose, choose_place, with_defaults
from glm_finetune.tuning import TRAIN_TYPE
from glm_finetune.tuning.adapter import load_adapter
from glm_finetune.tuning.ptuning import write_prefix
from glm_finetune.tuning.quantize import Quantized
from tests.original_data import original_dataset
from tests.ranks import run_ranks
from tests.refusal import run_main
from tests.test_training import assert_close, run

CPU = torch.device("cpu")
EVERY_LINEAR = {"lora_module_name": "all-linear"}
ADAPTERS = {
    "lora all-linear": ("lora", EVERY_LINEAR),
    "dora": ("lora", {"lora_variant": "dora"}),
    "rslora": ("lora", {"lora_variant": "rslora"}),
    "pissa": ("lora", {"lora_variant": "pissa", **EVERY_LINEAR}),
    "lora+": ("lora", {"loraplus_ratio": 4}),
    "modules to save": ("lora", {"modules_to_save": "final_layernorm"}),
    "qlora 4": ("qlora", EVERY_LINEAR),
    "qlora 8": ("qlora", {"quantization_bit": 8}),
    "qlora dora": ("qlora", {"lora_variant": "dora"}),
}
PREFIXES = {
    f"version {version} {'encoder' if projection else 'flat'}": {
        "ptuning_version": version,
        "prefix_projection": projection,
    }
    for version in (1, 2)
    for projection in (True, False)
}
FLAGS = dict(num_train_epochs=2, learning_rate=1e-2)


def mean_loss(model, mode, tokenizer, data_file):
    """Mean loss of a target token of a file, sample by sample."""
    data = original_dataset(mode, data_file, tokenizer, max_len=128, max_src_len=64)
    samples = [{name: torch.tensor([row[name]]) for name in ("input_ids", "labels")} for row in data]
    with torch.no_grad():
        return sum(model(**sample, use_cache=False).token_losses.sum().item() for sample in samples) / (
            data.report.targets
        )


def load_trained(folder, train_type, flags):
    """(mode name, tokenizer, model) of a checkpoint; a quantised base is quantised again."""
    source = build.find_model_folder(folder)
    if not TRAIN_TYPE[train_type].quantizes:
        return source.mode.name, *build.load_model_folder(source, "fp32", CPU)
    place = Quantized(torch.float32, CPU, flags.get("quantization_bit", 4))
    model = load_adapter(build.load_base(source.mode, source.base, place), source.adapter)
    return source.mode.name, source.mode.tokenizer.from_pretrained(folder), model


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
@pytest.mark.parametrize("mode", MODE)
def test_an_adapter_learns_and_gives_its_loss_again(mode, name, checkpoints, data_file, tmp_path):
    train_type, flags = ADAPTERS[name]
    records, _, folder, _ = run(
        mode, train_type, checkpoints, data_file, tmp_path / "out", 2, **FLAGS, **flags, eval_path=data_file
    )
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert evaluated[1] < evaluated[0]
    mode_name, tokenizer, model = load_trained(folder, train_type, flags)
    assert mean_loss(model, mode_name, tokenizer, data_file) == pytest.approx(evaluated[-1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "rslora", "pissa", "modules to save", "qlora 4"])
def test_an_adapter_merges_into_a_16_bit_base(name, checkpoints, data_file, tmp_path, monkeypatch, capsys):
    train_type, flags = ADAPTERS[name]
    _, _, folder, _ = run("glm3", train_type, checkpoints, data_file, tmp_path / "out", **FLAGS, **flags)
    code, error = run_main(merge_lora, monkeypatch, capsys, "--model_dir", folder, "--dtype", "fp16")
    assert code == 0, error
    merged = folder.with_name(folder.name + "-merged")
    _, base_and_adapter = build.load_model_folder(build.find_model_folder(folder), "fp32", CPU)
    tokenizer, model = build.load_model_folder(build.find_model_folder(merged), "fp32", CPU)
    expected = mean_loss(base_and_adapter, "glm3", tokenizer, data_file)
    assert mean_loss(model, "glm3", tokenizer, data_file) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dora", "rslora", "pissa", "lora+", "modules to save"])
def test_a_variant_gives_the_same_numbers_divided_by_zero3(name, checkpoints, data_file, tmp_path):
    train_type, flags = ADAPTERS[name]
    results = [
        run("glm2", train_type, checkpoints, data_file, tmp_path / file, 2, **FLAGS, **flags, ds_file=file)
        for file in ("ds_zero2_no_offload.json", "ds_zero3_no_offload.json")
    ]
    assert [r["loss"] for r in results[1][0]] == pytest.approx([r["loss"] for r in results[0][0]], rel=1e-5)
    assert_close(results[1][1], results[0][1], 1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", PREFIXES)
@pytest.mark.parametrize("mode", MODE)
def test_a_prefix_learns_is_small_and_gives_its_loss_again(mode, name, checkpoints, data_file, tmp_path):
    flags = PREFIXES[name]
    records, tensors, folder, _ = run(
        mode, "ptuning", checkpoints, data_file, tmp_path / "out", 2, **FLAGS, **flags, eval_path=data_file
    )
    evaluated = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert evaluated[1] < evaluated[0]
    start = "transformer.prompt_encoder." if flags["ptuning_version"] == 1 else "transformer.prefix_encoder."
    assert all(key.startswith(start) for key in tensors)
    assert len(tensors) == (5 if name == "version 2 encoder" else 1)
    mode_name, tokenizer, model = load_trained(folder, "ptuning", flags)
    assert mean_loss(model, mode_name, tokenizer, data_file) == pytest.approx(evaluated[-1], rel=1e-5)


def base_dtypes(folder, stage):
    """What the base's and the prefix's weights are held in, on a rank of a bf16 run."""
    import os

    from glm_finetune.run import engine
    from glm_finetune.run.ds_config import read_ds_file, resolve

    needed = ["--mode", "glm2", "--train_type", "ptuning", "--model_name_or_path", folder, "--train_path", "x"]
    config = parse(TrainConfig, [*needed, "--output_dir", "y", "--learning_rate", "0.1"])
    mode, train_type = choose(config)
    engine.start(CPU)
    ds_json = read_ds_file(f"ds_zero{stage}_no_offload.json")
    ds_config = resolve(ds_json, config, int(os.environ["WORLD_SIZE"]), "bf16", "cpu", train_type.fp32)
    place = choose_place(config, train_type, ds_config, "bf16", CPU)
    model = train_type.apply(build.load_base(mode, folder, place), config, mode)
    module = engine.new_engine(model, ds_config, 0.1).module
    return {("prefix" if "prefix_encoder" in name else "base"): p.dtype for name, p in module.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_a_bf16_base_is_held_in_bf16_beside_an_fp32_prefix(stage, checkpoints):
    expected = {"base": torch.bfloat16, "prefix": torch.float32}
    assert run_ranks(base_dtypes, 2, str(checkpoints["glm2"]), stage) == [expected, expected]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_the_prefix_stays_fp32_beside_a_bf16_base(stage, checkpoints, data_file, tmp_path):
    flags = dict(FLAGS, precision="bf16", ds_file=f"ds_zero{stage}_no_offload.json")
    records, tensors, folder, _ = run("glm2", "ptuning", checkpoints, data_file, tmp_path / "out", 2, **flags)
    state = dict(weights.iter_tensors(folder / "state"))
    assert records[-1]["loss"] < records[0]["loss"]
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32 and torch.equal(tensor, state[f"master.{name}"])
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in tensors.values())


def test_an_official_prefix_folder_is_recognised_and_answers(checkpoints, tmp_path):
    base = checkpoints["glm"]
    config = weights.read_json(base / "config.json") | {"pre_seq_len": 4, "prefix_projection": False}
    weights.write_json(config, tmp_path / "config.json")
    prefix = torch.randn(4, 2 * 2 * 32)
    torch.save({"transformer.prefix_encoder.embedding.weight": prefix}, tmp_path / "pytorch_model.bin")
    source = build.find_model_folder(tmp_path, base=base)
    assert source.is_prefix and source.mode.name == "glm"
    _, model = build.load_model_folder(source, "fp32", CPU)
    assert torch.equal(model.transformer.prefix_encoder.embedding.weight, prefix)


@pytest.mark.parametrize(
    "tensors, words",
    [
        ({"transformer.prefix_encoder.embedding.weight": (4, 99)}, "does not fit the base"),
        ({"transformer.prefix_encoder.trans.0.weight": (4, 4)}, "not the checkpoint of a prefix"),
        ({"transformer.prompt_encoder.embedding.weight": (4, 99)}, "does not fit the base"),
    ],
)
def test_a_prefix_of_another_base_is_refused(tensors, words, checkpoints, tmp_path):
    config = weights.read_json(checkpoints["glm2"] / "config.json") | {"pre_seq_len": 4}
    weights.write_json(config, tmp_path / "config.json")
    torch.save({name: torch.zeros(shape) for name, shape in tensors.items()}, tmp_path / "pytorch_model.bin")
    source = build.find_model_folder(tmp_path, "glm2", checkpoints["glm2"])
    with pytest.raises(ValueError, match=words):
        build.load_model_folder(source, "fp32", CPU)


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--pre_seq_len", "2048"], "--pre_seq_len 2048: must be below the context of 2048"),
        (["--pre_seq_len", "2000", "--ptuning_version", "1"], "a version 1 prompt takes positions"),
    ],
)
def test_a_prefix_longer_than_the_context_is_refused(flags, words, checkpoints):
    with pytest.raises(ValueError, match=words):
        trained_model(checkpoints, "glm3", "--train_type", "ptuning", *flags)


@pytest.mark.parametrize("mode", MODE)
def test_a_version_1_prompt_is_text_that_was_always_there(mode, checkpoints):
    """Embeddings of real tokens as the prompt: the same as these tokens in front of the text, in a causal model."""
    torch.manual_seed(0)
    model = MODE[mode].model.from_pretrained(checkpoints[mode], dtype=torch.float32)
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    ids = torch.tensor([tokenizer.encode("发动机水温高，风扇不转")] * 2)
    plain = model(input_ids=ids, use_cache=False).logits
    tokens = torch.tensor([7, 8, 9])
    add_prompt(model, 3, projection=False)
    with torch.no_grad():
        model.transformer.prompt_encoder.embedding.weight.copy_(model.get_input_embeddings()(tokens))
    prompted = model(input_ids=ids, use_cache=False).logits
    assert prompted.shape == plain.shape and (prompted - plain).abs().max() > 1e-4
    if mode != "glm":  # there the prompt does not see the text behind it
        model.config.prompt_len = None
        in_front = model(input_ids=torch.cat((tokens.expand(2, -1), ids), 1), use_cache=False).logits[:, 3:]
        assert torch.allclose(prompted, in_front, atol=1e-5)


@pytest.mark.parametrize("mode", MODE)
def test_a_version_1_prompt_generates_the_same_with_a_cache_and_with_padding(mode, checkpoints):
    torch.manual_seed(0)
    model = MODE[mode].model.from_pretrained(checkpoints[mode], dtype=torch.float32)
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    add_prompt(model, 4, projection=True)
    model.eval()
    rows = [tokenizer.encode(text) for text in ("发动机水温高，风扇不转，请检查", "你好")]
    batch = {
        name: torch.stack([torch.as_tensor(v) for v in values])
        for name, values in tokenizer.pad(rows, max(map(len, rows)), "left").items()
    }
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=tokenizer.pad_token_id, eos_token_id=-1)
    together = model.generate(**batch, **options)[:, -8:]
    for row, expected in zip(rows, together):
        for use_cache in (True, False):
            model.config.use_cache = model.generation_config.use_cache = use_cache
            alone = model.generate(input_ids=torch.tensor([row]), use_cache=use_cache, **options)
            assert alone[0, -8:].tolist() == expected.tolist()


def trained_model(checkpoints, mode, *arguments):
    """The model with a train type applied, as train.py does it, whole on the CPU."""
    needed = ["--mode", mode, "--model_name_or_path", str(checkpoints[mode]), "--train_path", "x", "--output_dir", "y"]
    config = parse(TrainConfig, [*needed, *arguments])
    chosen, train_type = choose(config)
    model = build.load_base(chosen, checkpoints[mode], weights.OnDevice(torch.float32, CPU))
    return train_type.apply(model, config, chosen), config


@pytest.mark.parametrize("variant", ["lora", "dora", "rslora", "pissa"])
def test_every_lora_variant_begins_at_the_base(variant, checkpoints):
    flags = ("--lora_variant", variant, "--lora_module_name", "all-linear", "--lora_dropout", "0")
    model, _ = trained_model(checkpoints, "glm2", *flags)
    base = MODE["glm2"].model.from_pretrained(checkpoints["glm2"], dtype=torch.float32)
    ids = torch.arange(20)[None] + 5
    assert torch.allclose(model(input_ids=ids).logits, base(input_ids=ids).logits, atol=1e-4)


def test_pissa_of_a_rank_that_a_matrix_does_not_have_is_refused(checkpoints):
    with pytest.raises(ValueError, match="--lora_dim 500: .* has 32 singular values"):
        trained_model(checkpoints, "glm2", "--lora_variant", "pissa", "--lora_dim", "500")


def test_saving_a_version_1_prompt_takes_no_random_numbers(checkpoints, tmp_path):
    model, _ = trained_model(checkpoints, "glm3", "--train_type", "ptuning", "--ptuning_version", "1")
    tensors = {name: p.detach() for name, p in model.named_parameters() if "prompt_encoder" in name}
    before = torch.get_rng_state()
    write_prefix(model, tensors, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_freeze_last_is_the_names_of_the_last_layers(checkpoints):
    by_number, _ = trained_model(checkpoints, "glm", "--train_type", "freeze", "--freeze_last", "1")
    by_name, _ = trained_model(checkpoints, "glm", "--train_type", "freeze", "--freeze_module_name", "layers.1.")
    learns = [[name for name, p in model.named_parameters() if p.requires_grad] for model in (by_number, by_name)]
    assert learns[0] == learns[1] and learns[0] and all(".layers.1." in name for name in learns[0])


def test_loraplus_multiplies_the_learning_rate_of_the_b_matrices(checkpoints):
    model, config = trained_model(checkpoints, "glm3", "--loraplus_ratio", "16")
    ratios = {id(p): group["lr_ratio"] for group in parameter_groups(model, 0.1, 16.0) for p in group["params"]}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            assert ratios[id(parameter)] == (16.0 if "lora_B" in name else 1.0), name


@pytest.mark.slow
@pytest.mark.parametrize("ratio", [1, 8])
def test_loraplus_reaches_the_optimizer(ratio, checkpoints, data_file, tmp_path):
    flags = dict(max_steps=1, learning_rate=1e-3, warmup_ratio=0, weight_decay=0, loraplus_ratio=ratio)
    _, tensors, _, _ = run("glm3", "lora", checkpoints, data_file, tmp_path / "out", **flags)
    moved = max(tensor.abs().max().item() for name, tensor in tensors.items() if "lora_B" in name)
    assert moved == pytest.approx(ratio * 1e-3, rel=1e-2)  # B begins at 0, and Adam's first step is the learning rate


@pytest.mark.parametrize("bits, most", [(4, 0.35), (8, 0.6)])
def test_a_quantised_base_takes_the_memory_it_promises(bits, most, checkpoints):
    model = build.load_base(MODE["glm2"], checkpoints["glm2"], Quantized(torch.bfloat16, CPU, bits))
    layers = [p for name, p in model.named_parameters() if ".layers." in name and name.endswith(".weight")]
    matrices = [p for p in layers if p.dtype in (torch.uint8, torch.int8)]
    whole = MODE["glm2"].model.from_pretrained(checkpoints["glm2"], dtype=torch.bfloat16)
    in_16_bit = sum(p.numel() * 2 for n, p in whole.named_parameters() if ".layers." in n and p.dim() == 2)
    assert len(matrices) == 8 and sum(p.numel() * p.element_size() for p in matrices) <= most * in_16_bit
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16


def test_the_recipe_of_a_train_type_gives_its_learning_rate(checkpoints):
    rates = {
        ("lora",): 5e-4,
        ("qlora",): 2e-4,
        ("all",): 1e-4,
        ("freeze", "--freeze_last", "1"): 1e-4,
        ("ptuning",): 1e-3,
        ("ptuning", "--prefix_projection", "False"): 2e-2,
        ("ptuning", "--ptuning_version", "1"): 1e-3,
        ("ptuning", "--learning_rate", "0.5"): 0.5,
    }
    needed = ["--model_name_or_path", "b", "--train_path", "x", "--output_dir", "y", "--train_type"]
    for arguments, rate in rates.items():
        config = parse(TrainConfig, [*needed, *arguments])
        assert with_defaults(config, choose(config)[1]).learning_rate == rate
        assert parse(TrainConfig, [*needed, *arguments]) == config  # which is as it was given
