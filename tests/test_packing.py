"""Packing: samples that share a row give the loss and the gradients of samples alone."""

import json
import random
import re

import pytest
import torch
import torch.nn.functional as F

from glm_finetune import MODE, build
from glm_finetune.config import TrainConfig
from glm_finetune.data import packing
from glm_finetune.data.dataset import collate
from glm_finetune.data.packing import best_fit
from glm_finetune.models import glm2, layers, prefixes
from glm_finetune.run.parts import choose_place
from glm_finetune.tuning import TRAIN_TYPE
from tests.original_data import original_dataset

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
        return original_dataset(mode, path, tokenizer, max_len=MAX_LEN, max_src_len=64)[:8], tokenizer

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


def padded_size(bins, lengths):
    """Tokens of a batch, padding included."""
    return len(bins) * max(sum(lengths[i] for i in packed) for packed in bins)


def tried_all(lengths, max_len):
    """The smallest batch of best-fit decreasing and of an even spread over any number of rows, with no short cut."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found = [packing._fill(lengths, order, max_len)]
    found += [packing._spread(lengths, order, count) for count in range(len(found[0]), len(lengths) + 1)]
    fitting = [bins for bins in found if max(sum(lengths[i] for i in packed) for packed in bins) <= max_len]
    return min(padded_size(bins, lengths) for bins in fitting)


def partitions(items):
    """Every way to lay items in rows."""
    if not items:
        yield []
        return
    for rest in partitions(items[1:]):
        yield [[items[0]], *rest]
        for i in range(len(rest)):
            yield [*rest[:i], [items[0], *rest[i]], *rest[i + 1 :]]


def test_best_fit_pads_no_more_than_every_number_of_rows_tried():
    rng = random.Random(1)
    for _ in range(300):
        max_len = rng.randint(50, 2000)
        lengths = [rng.randint(1, max_len // rng.randint(1, 6)) for _ in range(rng.randint(1, 64))]
        assert padded_size(best_fit(lengths, max_len), lengths) == tried_all(lengths, max_len)


def test_best_fit_is_near_the_best_of_all_arrangements():
    rng, found, least = random.Random(2), 0, 0
    for _ in range(40):
        lengths = [rng.randint(40, 300) for _ in range(rng.randint(2, 7))]
        fitting = [r for r in partitions(range(len(lengths))) if all(sum(lengths[i] for i in p) <= 600 for p in r)]
        best = min(padded_size(rows, lengths) for rows in fitting)
        size = padded_size(best_fit(lengths, 600), lengths)
        assert best <= size <= 1.15 * best
        found, least = found + size, least + best
    assert found <= 1.03 * least


@pytest.mark.parametrize("num_samples", [256, 512])
def test_a_large_micro_batch_tries_few_numbers_of_rows(num_samples, monkeypatch):
    rng, counts = random.Random(0), []
    lengths = [rng.randint(40, 300) for _ in range(num_samples)]
    width, spread = packing._spread_width, packing._spread
    monkeypatch.setattr(packing, "_spread_width", lambda *args: counts.append(args[1]) or width(*args))
    monkeypatch.setattr(packing, "_spread", lambda *args: counts.append(args[2]) or spread(*args))
    bins = best_fit(lengths, 2048)
    assert 1 < len(counts) <= packing.MAX_TRIED + 1 < num_samples / 2
    assert padded_size(bins, lengths) <= 1.01 * sum(lengths)


@pytest.mark.parametrize("mode", ["glm2", "glm3"])
@pytest.mark.parametrize("train_type", ["lora", "ptuning"])
def test_causal_modes_build_no_mask_and_no_product_wider_than_a_sample(
    mode, train_type, checkpoints, samples, monkeypatch
):
    _, packed = batches(mode, samples, 10**4)
    longest, shapes, attend = packed["segment_bounds"].diff().max(), [], layers.attend

    def spy(query, key, value, mask, again):
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
    def reference(query, key, value, query_bounds, key_bounds, max_q, max_k, *, window_size, enable_gqa=None):
        """The documented meaning of varlen_attn: sequences end to end, causal at (-1, 0) from the last key on."""
        expected = num_kv_heads != 4 if layers.VARLEN_ASKS_FOR_GQA else None
        assert window_size == (-1, 0) and enable_gqa == expected
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


def test_the_longest_segment_of_a_packed_batch_reaches_the_kernel(samples, monkeypatch):
    _, packed = batches("glm3", samples, 10**4)
    assert packed["longest_segment"] == int(packed["segment_bounds"].diff().max()) < packed["input_ids"].shape[1]
    tensors, bounds = segments(4, 2, 3)
    sizes = []
    monkeypatch.setattr(layers, "has_flash_attention", lambda query: True)
    monkeypatch.setattr(layers, "varlen_attn", lambda q, k, v, b, kb, *lengths, **_: sizes.append(lengths) or q)
    for longest, expected in ((5, (5, 8)), (None, (tensors[0].shape[2], tensors[0].shape[2] + 3))):
        layers.attend(*tensors, layers.Segments(bounds, longest))
        assert sizes.pop() == expected
