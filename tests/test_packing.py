"""Packing: samples that share a row give the loss and the gradients of samples alone."""

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

from glm_finetune import MODE, build
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import collate
from glm_finetune.data.packing import best_fit
from glm_finetune.models import glm2, layers, prefixes
from glm_finetune.run.parts import choose_place
from glm_finetune.tuning import TRAIN_TYPE

every_mode = pytest.mark.parametrize("mode", MODE)
MAX_LEN, SCALE = 128, 10
NEEDS = dict(model_name_or_path="x", train_path="x", output_dir="x")
TRAINED = {name: {"train_type": name} for name in TRAIN_TYPE}
TRAINED["ptuning 1"] = {"train_type": "ptuning", "ptuning_version": 1, "prefix_projection": False}
TRAINED["ptuning 1 encoder"] = {"train_type": "ptuning", "ptuning_version": 1}


@pytest.fixture(scope="module")
def samples(checkpoints, tmp_path_factory, rows):
    """Function: mode name -> (eight samples of different lengths, tokenizer)."""
    path = tmp_path_factory.mktemp("packing") / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")

    def of(mode):
        tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
        return MODE[mode].dataset(path, tokenizer, max_len=MAX_LEN, max_src_len=64)[:8], tokenizer

    return of


def batches(mode, samples, max_len):
    """The same samples as a padded and as a packed batch."""
    rows, tokenizer = samples(mode)
    settings = tokenizer.pad_token_id, MODE[mode].positions
    return collate(rows, *settings), collate(rows, *settings, max_len)


def trainee(mode, trained, checkpoints, checkpointing=False):
    """A model in training mode with what learns set, the same at every call. trained: of TRAINED.

    Its weights are large: with those of a new model attention averages over everything, and hardly shows what it sees.
    """
    torch.manual_seed(5)
    config = TrainConfig(
        mode=mode,
        **TRAINED[trained],
        freeze_module_name="layers.1.",
        lora_dropout=0.0,
        prefix_dropout=0.0,
        pre_seq_len=5,
        **NEEDS,
    )
    train_type, ds_config = TRAIN_TYPE[config.train_type], {"zero_optimization": {"stage": 2}}
    place = choose_place(config, train_type, ds_config, "fp32", torch.device("cpu"))
    model = build.load_base(MODE[mode], checkpoints[mode], place, checkpointing)
    model = train_type.apply(model, config, MODE[mode])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.1)  # 0 at first: lora_A would have no gradient
            elif parameter.dim() == 2 and parameter.is_floating_point() and not re.search("lora|prefix|prompt", name):
                parameter.mul_(SCALE)
    return model.train()


def loss_and_gradients(model, batch):
    loss = model(**batch, use_cache=False).token_losses.sum() / 7
    loss.backward()
    return loss, {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("max_len", [MAX_LEN, 10**4], ids=["rows", "one-row"])
@pytest.mark.parametrize("trained", TRAINED)
@every_mode
def test_loss_and_every_gradient_are_those_of_samples_alone(
    mode, trained, max_len, checkpointing, checkpoints, samples
):
    padded, packed = batches(mode, samples, max_len)
    assert len(packed["input_ids"]) == 1 if max_len > MAX_LEN else 1 < len(packed["input_ids"]) < 8
    loss, gradients = loss_and_gradients(trainee(mode, trained, checkpoints, checkpointing), padded)
    packed_loss, packed_gradients = loss_and_gradients(trainee(mode, trained, checkpoints, checkpointing), packed)
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    assert gradients
    scale = max(gradient.norm() for gradient in gradients.values())
    for name, gradient in gradients.items():
        assert (packed_gradients[name] - gradient).norm() <= 1e-5 * gradient.norm() + 1e-7 * scale, name


@every_mode
def test_without_what_separates_them_packed_samples_would_see_each_other(mode, checkpoints, samples):
    padded, packed = batches(mode, samples, 10**4)
    model = trainee(mode, "all", checkpoints)
    expected = model(**padded, use_cache=False).loss
    merged = {name: value for name, value in packed.items() if name != "segment_bounds"}
    if "segment_ids" in packed:
        merged["segment_ids"] = torch.zeros_like(packed["segment_ids"])
    assert abs(model(**merged, use_cache=False).loss - expected) > 1e-4 * expected
    wrong = packed | {"position_ids": packed["position_ids"] + torch.arange(packed["position_ids"].shape[-1])}
    assert abs(model(**wrong, use_cache=False).loss - expected) > 1e-4 * expected


@every_mode
def test_a_packed_row_holds_each_sample_with_its_own_positions(mode, samples):
    rows, tokenizer = samples(mode)
    batch = collate(rows, tokenizer.pad_token_id, MODE[mode].positions, MAX_LEN)
    bins = best_fit([len(row["input_ids"]) for row in rows], MAX_LEN)
    for b, packed in enumerate(bins):
        start = 0
        for row in (rows[i] for i in packed):
            place = slice(start, start + len(row["input_ids"]))
            assert batch["input_ids"][b, place].tolist() == row["input_ids"]
            assert batch["labels"][b, place].tolist() == row["labels"]
            expected = MODE[mode].positions(len(row["input_ids"]), row["num_prefix"])
            assert torch.equal(batch["position_ids"][b, ..., place], expected)
            start = place.stop
        assert (batch["labels"][b, start:] == -100).all() and start <= batch["input_ids"].shape[1] <= MAX_LEN


def test_the_last_token_of_a_sample_never_predicts_the_first_of_the_next():
    rows = [{"input_ids": [5, 6], "labels": [5, 6], "num_prefix": 0}] * 3
    batch = collate(rows, 0, MODE["glm3"].positions, 100)
    assert batch["labels"].tolist() == [[-100, 6, -100, 6, -100, 6]]
    assert batch["target_index"].tolist() == [0, 2, 4]
    assert batch["segment_bounds"].tolist() == [0, 2, 4, 6]


def test_best_fit_places_every_sample_once_in_rows_that_are_not_too_long():
    rng = random.Random(0)
    for _ in range(200):
        max_len = rng.randint(50, 300)
        lengths = [rng.randint(1, max_len) for _ in range(rng.randint(1, 30))]
        bins = best_fit(lengths, max_len)
        assert sorted(i for packed in bins for i in packed) == list(range(len(lengths)))
        widths = [sum(lengths[i] for i in packed) for packed in bins]
        assert max(widths) <= max_len and bins == best_fit(lengths, max_len)
        assert len(bins) == 1 or sum(sorted(widths)[:2]) > max_len or max(widths) < max_len  # no two could be one


@pytest.mark.parametrize(
    "lengths, max_len, widths",
    [
        ([900, 300, 500], 1024, [800, 900]),
        ([5, 4, 3, 2], 7, [7, 7]),  # first-fit in this order needs three
        ([150] * 8, 1024, [600, 600]),  # not 900 and 300: rows are padded to the widest
        ([7], 7, [7]),
    ],
)
def test_best_fit_needs_few_rows_of_even_width(lengths, max_len, widths):
    assert sorted(sum(lengths[i] for i in packed) for packed in best_fit(lengths, max_len)) == widths


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
@pytest.mark.parametrize("train_type", ["lora", "ptuning"])
def test_causal_modes_build_no_mask_and_no_product_wider_than_a_sample(
    mode, train_type, checkpoints, samples, monkeypatch
):
    _, packed = batches(mode, samples, 10**4)
    longest, shapes, attend = packed["segment_bounds"].diff().max(), [], layers.attend

    def spy(query, key, value, mask):
        assert mask is None
        shapes.append((query.shape[2], key.shape[2]))
        return attend(query, key, value, mask)

    monkeypatch.setattr(layers, "attend", spy)  # what attend_segments calls; the model's own name for it stays
    monkeypatch.setattr(glm2, "visible", None)
    trainee(mode, train_type, checkpoints)(**packed, use_cache=False)
    assert shapes and max(t for t, _ in shapes) == longest < packed["input_ids"].shape[1] / 3
    assert max(s for _, s in shapes) <= longest + 5


def segments(num_heads, num_kv_heads, num_shared, **options):
    """Query, key, value of two rows of 20 tokens, and bounds of five segments."""
    torch.manual_seed(1)
    sizes = ((num_heads, 20), (num_kv_heads, 20 + num_shared), (num_kv_heads, 20 + num_shared))
    tensors = [torch.randn(2, heads, length, 16, **options) for heads, length in sizes]
    return tensors, torch.tensor([0, 7, 8, 20, 33, 40], dtype=torch.int32, device=tensors[0].device)


def masked(query, key, value, bounds):
    """The same attention by the one mask rule."""
    ids = torch.searchsorted(bounds, torch.arange(40, device=bounds.device), right=True).view(2, 20)
    mask = prefixes.with_prefix_columns(layers.visible(ids, None, 20), key.shape[2] - 20)
    return layers.attend(query, key, value, mask)


@pytest.mark.parametrize("num_shared", [0, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_segments_are_the_mask_rule(num_kv_heads, num_shared):
    tensors, bounds = segments(4, num_kv_heads, num_shared)
    torch.testing.assert_close(layers.attend(*tensors, layers.Segments(bounds)), masked(*tensors, bounds))


def test_segments_as_a_mask_are_the_mask_rule():
    tensors, bounds = segments(4, 2, 0)
    mask = layers.Segments(bounds).as_mask(num_rows=2)
    torch.testing.assert_close(layers.attend(*tensors, mask), masked(*tensors, bounds))
    assert mask.shape == (2, 1, 20, 20) and mask.any(-1).all()


@pytest.mark.parametrize("num_shared", [0, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_what_flash_attention_is_given_describes_the_same(num_kv_heads, num_shared, monkeypatch):
    def reference(query, key, value, query_bounds, key_bounds, max_q, max_k, *, window_size, enable_gqa):
        """The documented meaning of varlen_attn: sequences end to end, causal at (-1, 0) from the last key on."""
        assert window_size == (-1, 0) and enable_gqa == (num_kv_heads != 4)
        assert query_bounds.dtype == key_bounds.dtype == torch.int32
        sizes = query_bounds.diff().tolist(), key_bounds.diff().tolist()
        assert max(sizes[0]) <= max_q and max(sizes[1]) <= max_k and sum(sizes[1]) == len(key) == len(value)
        outs = []
        for q, k, v in zip(query.split(sizes[0]), key.split(sizes[1]), value.split(sizes[1])):
            sees = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q))
            q, k, v = (x.transpose(0, 1) for x in (q, k, v))
            outs.append(F.scaled_dot_product_attention(q, k, v, sees, enable_gqa=True).transpose(0, 1))
        return torch.cat(outs)

    tensors, bounds = segments(4, num_kv_heads, num_shared)
    monkeypatch.setattr(layers, "has_flash_attention", lambda query: True)
    monkeypatch.setattr(layers, "varlen_attn", reference)
    torch.testing.assert_close(layers.attend(*tensors, layers.Segments(bounds)), masked(*tensors, bounds))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a card")
@pytest.mark.parametrize("num_shared", [0, 3])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
def test_flash_attention_of_a_card_is_the_mask_rule_with_its_gradients(num_kv_heads, num_shared):
    options = dict(device="cuda", dtype=torch.bfloat16)
    tensors, bounds = segments(4, num_kv_heads, num_shared, **options)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    exact = [tensor.detach().float().requires_grad_() for tensor in tensors]
    out, expected = layers.attend(*leaves, layers.Segments(bounds)), masked(*exact, bounds)
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    weight = torch.randn_like(expected)
    gradients = torch.autograd.grad((out * weight).sum(), leaves)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weight).sum(), exact)):
        assert (gradient.float() - right).norm() <= 2e-2 * right.norm()
