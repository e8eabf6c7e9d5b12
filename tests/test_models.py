"""Models: properties that hold for every mode, against torch itself or against a second way to the same number."""

import shutil

import pytest
import torch
import torch.nn.functional as F

from glm_finetune import MODE
from glm_finetune.answer.chat import chat_ids
from glm_finetune.data.dataset import collate, without_targets
from glm_finetune.generator import generate
from glm_finetune.models import layers, loss
from glm_finetune.models.glm2 import inverse_frequencies
from glm_finetune.models.layers import rotary_angles
from glm_finetune.models.network import enable_checkpointing
from glm_finetune.models.prefixes import add_prefix
from glm_finetune.tuning.lora import add_lora
from glm_finetune.weights import read_json, write_json
from tests.original_data import original_dataset

every_mode = pytest.mark.parametrize("mode", MODE)


def load(mode, checkpoints, dtype=torch.float32):
    return MODE[mode].model.from_pretrained(checkpoints[mode], dtype=dtype)


def dataset(mode, checkpoints, data_file):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    return original_dataset(mode, data_file, tokenizer, max_len=128, max_src_len=64), tokenizer


def batch_of(rows, mode, tokenizer):
    return collate(rows, tokenizer.pad_token_id, MODE[mode].positions)


@every_mode
def test_loss_is_torchs_cross_entropy_of_the_logits(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model, batch = load(mode, checkpoints), batch_of(rows[:4], mode, tokenizer)
    output = model(**batch, return_logits=True)
    expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), batch["labels"][:, 1:].flatten())
    torch.testing.assert_close(output.loss, expected, rtol=1e-5, atol=1e-6)


@every_mode
def test_padding_changes_no_loss(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model = load(mode, checkpoints)
    together = model(**batch_of(rows[:6], mode, tokenizer)).token_losses.sum()
    alone = sum(model(**batch_of([row], mode, tokenizer)).token_losses.sum() for row in rows[:6])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-5)


@every_mode
def test_positions_and_mask_of_the_batch_are_those_the_model_derives(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model, batch = load(mode, checkpoints), batch_of(rows[:6], mode, tokenizer)
    derived = model(input_ids=batch["input_ids"], labels=batch["labels"]).loss
    torch.testing.assert_close(model(**batch).loss, derived, rtol=1e-5, atol=1e-6)


@every_mode
def test_a_batch_without_targets_gives_zero_and_reaches_every_weight(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model = load(mode, checkpoints)
    output = model(**batch_of([without_targets(rows[0])], mode, tokenizer)).token_losses.sum() / 7
    output.backward()
    assert output.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("rows_at_a_time", [1, 3, 100])
def test_chunked_loss_and_gradients_are_torchs(rows_at_a_time, monkeypatch):
    torch.manual_seed(0)
    hidden = torch.randn(10, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=True)
    targets = torch.randint(50, (10,))
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="sum") * 0.3
    expected_gradients = torch.autograd.grad(expected, (hidden, weight))
    monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", rows_at_a_time * 4 * 50)
    for total in (
        loss.token_losses(hidden, weight, targets).sum() * 0.3,
        loss.wrapped_head_losses(hidden, HeadOf(weight), targets).sum() * 0.3,
    ):
        torch.testing.assert_close(total, expected)
        torch.testing.assert_close(
            torch.autograd.grad(total, (hidden, weight)), expected_gradients, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize("rows_at_a_time", [3, 100])
@pytest.mark.parametrize("learns", [(True, True), (True, False), (False, True)], ids=["both", "hidden", "head"])
def test_each_token_can_weigh_what_it_likes(learns, rows_at_a_time, monkeypatch):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(10, 16), torch.randn(50, 16), torch.randint(50, (10,))
    weighs = torch.tensor([0.0, -1.5, 2.0, 0.1, 1.0, 0.0, 3.0, 1.0, -0.2, 0.7])
    inputs = [tensor.requires_grad_() for tensor, learn in zip((hidden, weight), learns) if learn]
    expected = F.cross_entropy(hidden @ weight.t(), targets, reduction="none")
    expected_gradients = torch.autograd.grad((expected * weighs).sum(), inputs)
    monkeypatch.setattr(loss, "MAX_LOGITS_BYTES", rows_at_a_time * 4 * 50)
    for losses in (
        loss.token_losses(hidden, weight, targets),
        loss.wrapped_head_losses(hidden, HeadOf(weight), targets),
    ):
        assert losses.dtype == torch.float32
        torch.testing.assert_close(losses, expected)
        gradients = torch.autograd.grad((losses * weighs).sum(), inputs)
        torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-5)


@every_mode
@pytest.mark.parametrize("max_len", [None, 256], ids=["padded", "packed"])
def test_three_parts_are_the_forward_pass(mode, max_len, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model = load(mode, checkpoints)
    batch = collate(rows[:5], tokenizer.pad_token_id, MODE[mode].positions, max_len)
    stream = model.begin(batch)
    hidden = stream.hidden
    for layer, prefix in zip(model.layers, stream.prefixes, strict=True):
        hidden = layer(hidden, stream.mask, stream.cos, stream.sin, prefix)
    output = model(**batch, use_cache=False, return_logits=True)
    assert torch.equal(model.end(hidden, batch), output.token_losses)
    assert torch.equal(model.logits(hidden), output.logits)
    logits, targets = output.logits.flatten(0, 1)[batch["target_index"]], batch["labels"].flatten()
    expected = F.cross_entropy(logits, targets[batch["target_index"] + 1], reduction="none")
    torch.testing.assert_close(output.token_losses, expected, rtol=1e-5, atol=1e-5)


class HeadOf(torch.nn.Module):
    """A head that is not the fused one, as LoRA on the output layer makes it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, hidden):
        return hidden @ self.weight.t()


def test_no_chunk_of_fp32_logits_is_above_the_bound():
    for vocab_size in (130528, 65024, 50, 10**9):
        rows = loss.chunk_rows(vocab_size)
        assert rows == 1 or rows * vocab_size * 4 <= loss.MAX_LOGITS_BYTES


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
def test_causal_modes_build_no_mask_for_padding_on_the_right(mode, checkpoints, data_file, monkeypatch):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    seen = []
    attend = layers.attend
    monkeypatch.setattr(
        f"{MODE[mode].model.__module__}.attend", lambda q, k, v, mask, *_: seen.append(mask) or attend(q, k, v, mask)
    )
    load(mode, checkpoints)(**batch_of(rows[:4], mode, tokenizer))
    assert seen and all(mask is None for mask in seen)


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
@pytest.mark.parametrize("num_rows", [1, 2])
def test_a_mask_is_built_in_generation_only_where_a_row_is_padded(num_rows, mode, checkpoints, monkeypatch):
    tokenizer, model = MODE[mode].tokenizer.from_pretrained(checkpoints[mode]), load(mode, checkpoints)
    texts, attend, seen = ("风扇不转", "发动机水温高，检查水泵")[:num_rows], layers.attend, []
    prompts = [chat_ids(MODE[mode], tokenizer, text, []) for text in texts]
    expected = generate(model, tokenizer, MODE[mode], prompts, [6] * num_rows)
    monkeypatch.setattr(
        f"{MODE[mode].model.__module__}.attend", lambda q, k, v, mask, *_: seen.append(mask) or attend(q, k, v, mask)
    )
    assert generate(model, tokenizer, MODE[mode], prompts, [6] * num_rows) == expected
    assert len(seen) == 6 * model.config.num_layers
    assert all(mask is None for mask in seen) if num_rows == 1 else all(mask is not None for mask in seen)


@every_mode
def test_checkpointing_never_goes_back_below_the_lowest_layer_that_learns(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    model = load(mode, checkpoints)
    enable_checkpointing(model)
    last = len(model.layers) - 1
    (name,) = [n for n, _ in model.named_modules() if n.endswith(f"layers.{last}.mlp.dense_4h_to_h")]
    lora = add_lora(model, 2, 4, 0.0, [name], "base").train()
    stream = model.begin(batch_of(rows[:2], mode, tokenizer))
    assert not stream.hidden.requires_grad
    lora(**batch_of(rows[:2], mode, tokenizer), use_cache=False).loss.backward()
    assert any(p.grad is not None for n, p in lora.named_parameters() if "lora_B" in n)


@every_mode
def test_gradient_checkpointing_gives_the_same_gradients(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    batch, gradients = batch_of(rows[:4], mode, tokenizer), []
    for checkpointing in (False, True):
        torch.manual_seed(1)  # the prefix encoder is new
        model = load(mode, checkpoints)
        add_prefix(model, 5, projection=True)
        model.train()
        if checkpointing:
            enable_checkpointing(model)
        model(**batch, use_cache=False).loss.backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0]["transformer.prefix_encoder.embedding.weight"].any()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-7)


@every_mode
@pytest.mark.parametrize("pre_seq_len", [None, 4])
def test_generation_is_the_same_with_cache_without_and_in_a_left_padded_batch(mode, pre_seq_len, checkpoints):
    torch.manual_seed(3)
    model = load(mode, checkpoints)
    if pre_seq_len:
        add_prefix(model, pre_seq_len, projection=False)
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    prompts = [
        chat_ids(MODE[mode], tokenizer, text, []) for text in ("风扇不转", "发动机水温高，节温器卡死，检查水泵", "好")
    ]
    options = dict(max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=tokenizer.pad_token_id)
    alone = [model.generate(input_ids=torch.tensor([ids]), **options)[0, len(ids) :].tolist() for ids in prompts]
    uncached = [
        model.generate(input_ids=torch.tensor([ids]), use_cache=False, **options)[0, len(ids) :].tolist()
        for ids in prompts
    ]
    width = max(map(len, prompts))
    batch = {
        name: torch.stack([torch.as_tensor(v) for v in rows]) for name, rows in tokenizer.pad(prompts, width).items()
    }
    assert uncached == alone
    assert model.generate(**batch, **options)[:, width:].tolist() == alone
    beams = model.generate(**batch, num_beams=2, **options)
    assert beams.shape == (3, width + 12)


@every_mode
def test_only_the_last_logits_are_computed_in_generation(mode, checkpoints, monkeypatch):
    model = load(mode, checkpoints)
    tokenizer, shapes = MODE[mode].tokenizer.from_pretrained(checkpoints[mode]), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape[:2]))
    )
    ids = chat_ids(MODE[mode], tokenizer, "风扇不转", [])
    model.generate(input_ids=torch.tensor([ids]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert shapes == [(1, 1)] * 3


@every_mode
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rotary_tables_of_16_bit_models_are_those_of_fp32_rounded_once(mode, dtype, checkpoints):
    # The originals' are wrong by up to 2.0 (bf16) and 1.0 (fp16) beyond position 1024.
    tokenizer, tables = MODE[mode].tokenizer.from_pretrained(checkpoints[mode]), []
    ids = torch.tensor([chat_ids(MODE[mode], tokenizer, "风扇不转，水温高。" * 180, [])])
    assert ids.shape[1] > 1200
    for d in (torch.float32, dtype):
        model = load(mode, checkpoints, d)
        layer = next(m for m in model.modules() if type(m).__name__ == "GLMBlock")
        layer.register_forward_pre_hook(lambda module, args: tables.append(args[2:4]))
        with torch.no_grad():
            model(input_ids=ids, logits_to_keep=1)
    for exact, short in zip(*tables):
        assert short.dtype == dtype and torch.equal(short, exact.to(dtype))


def test_rotary_angles_are_fp32_whatever_surrounds_them():
    positions = torch.tensor([0, 1, 1024, 2047])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cos, _ = rotary_angles(positions, inverse_frequencies(128))
    expected = torch.cos(positions.double()[:, None] * inverse_frequencies(128).double())
    assert cos.dtype == torch.float32
    torch.testing.assert_close(cos, expected.float(), rtol=0, atol=3e-4)


@every_mode
def test_weights_are_read_from_shards_and_pickles_into_any_dtype(mode, checkpoints, tmp_path):
    model = load(mode, checkpoints)
    state = dict(model.named_parameters()) | model.stored_buffers()
    (tmp_path / "config.json").write_bytes((checkpoints[mode] / "config.json").read_bytes())
    names = sorted(state)
    for i, part in enumerate((names[::2], names[1::2])):
        torch.save({name: state[name].detach().half() for name in part}, tmp_path / f"pytorch_model-{i}.bin")
    index = {name: f"pytorch_model-{i}.bin" for i, part in enumerate((names[::2], names[1::2])) for name in part}
    write_json({"weight_map": index}, tmp_path / "pytorch_model.bin.index.json")
    loaded = MODE[mode].model.from_pretrained(tmp_path, dtype=torch.bfloat16)
    for name, parameter in loaded.named_parameters():
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, state[name].detach().half().bfloat16()), name


def test_chatglm_6b_head_is_tied_unless_the_config_says_otherwise(checkpoints, tmp_path):
    shutil.copytree(checkpoints["glm"], tmp_path, dirs_exist_ok=True)
    write_json(read_json(tmp_path / "config.json") | {"tie_word_embeddings": False}, tmp_path / "config.json")
    tied, untied = load("glm", checkpoints), load("glm", {"glm": tmp_path})
    assert tied.lm_head.weight is tied.transformer.word_embeddings.weight
    assert untied.lm_head.weight is not untied.transformer.word_embeddings.weight
    assert torch.equal(untied.lm_head.weight, tied.lm_head.weight)


def test_a_mask_becomes_what_is_added_to_the_scores_once_for_all_layers(checkpoints, data_file, monkeypatch):
    rows, tokenizer = dataset("glm", checkpoints, data_file)
    attend, seen = layers.attend, []
    monkeypatch.setattr(
        "glm_finetune.models.glm.attend", lambda q, k, v, mask, *_: seen.append(mask) or attend(q, k, v, mask)
    )
    load("glm", checkpoints)(**batch_of(rows[:4], "glm", tokenizer))
    assert len(seen) > 1 and all(mask is seen[0] for mask in seen) and seen[0].dtype == torch.float32
    assert set(seen[0].unique().tolist()) == {0.0, float("-inf")}
