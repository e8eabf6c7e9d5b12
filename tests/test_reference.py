"""`train.py` against twenty lines of plain torch: every flag that makes a number arrives where the number is made.

Other tests compare train.py with itself; what is wrong everywhere alike is found here. No number is a round one, and
none is a default, so that one that is not passed on shows.
"""

import json
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch.func import functional_call

import merge_lora
from glm_finetune import MODE, build
from glm_finetune.models.again import Dropout
from tests.original_data import original_dataset
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import run_main
from tests.test_training import run

DECAY = 0.37
FLAGS = dict(
    per_device_train_batch_size=2,
    gradient_accumulation_steps=3,
    max_steps=7,
    learning_rate=3e-3,
    warmup_steps=3,
    min_lr_ratio=0.23,
    weight_decay=DECAY,
    lora_dim=5,
    lora_alpha=13,
)
CASES = {  # mode, train type, flags, at how many of the seven steps the gradient is scaled down
    "lora, clipped": ("glm3", "lora", dict(max_grad_norm=0.11, lr_scheduler="linear"), 7),
    "lora, not clipped": ("glm2", "lora", dict(max_grad_norm=77, lr_scheduler="cosine"), 0),
    "all, clipped": ("glm", "all", dict(max_grad_norm=0.07, lr_scheduler="cosine"), 7),
    "all, sometimes clipped": ("glm3", "all", dict(max_grad_norm=2.0, lr_scheduler="linear"), 4),
}
SCHEDULE = ("max_steps", "learning_rate", "warmup_steps", "min_lr_ratio", "lr_scheduler")


def rate(step, learning_rate, max_steps, warmup_steps, min_lr_ratio, lr_scheduler):
    if step < warmup_steps:
        return learning_rate * step / warmup_steps
    done = (step - warmup_steps) / (max_steps - warmup_steps)
    left = 1 - done if lr_scheduler == "linear" else (1 + math.cos(math.pi * done)) / 2
    return learning_rate * (min_lr_ratio + (1 - min_lr_ratio) * left)


def mean_loss(logits, rows):
    """Mean over all target tokens of the rows. logits(ids (1, T)) -> (1, T, V)."""
    num_targets = sum(label != -100 for row in rows for label in row["labels"][1:])
    losses = [
        F.cross_entropy(
            logits(torch.tensor([row["input_ids"]]))[0, :-1], torch.tensor(row["labels"][1:]), reduction="sum"
        )
        for row in rows
    ]
    return sum(losses) / num_targets


def train_plainly(logits, parameters, rows, flags):
    """Train {name: tensor} in place; returns [{"loss", "grad_norm", "lr"}] of the steps, each on all rows."""
    matrices, vectors = ([p for p in parameters.values() if (p.dim() > 1) == wanted] for wanted in (True, False))
    groups = [dict(params=matrices, weight_decay=flags["weight_decay"]), dict(params=vectors, weight_decay=0.0)]
    optimizer = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.95), eps=1e-8)
    steps = []
    for step in range(1, flags["max_steps"] + 1):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, **{name: flags[name] for name in SCHEDULE})
        optimizer.zero_grad()
        loss = mean_loss(logits, rows)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), flags["max_grad_norm"])
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": norm.item(), "lr": group["lr"]})
    return steps


def whole_model(model, parameters, ids):
    return functional_call(model, parameters, kwargs=dict(input_ids=ids, use_cache=False)).logits


def with_lora(model, scale, factors, ids):
    """Logits of W + scale B A. factors: {name in peft's file: A or B}."""
    weights = dict(model.named_parameters())
    for name, a in factors.items():
        if ".lora_A." in name:
            layer = name.removeprefix("base_model.model.").replace("lora_A.", "")
            weights[layer] = weights[layer] + scale * factors[name.replace("lora_A", "lora_B")] @ a
    return whole_model(model, weights, ids)


def rows_of(mode, checkpoints, data_file):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    return original_dataset(mode, data_file, tokenizer, max_len=128, max_src_len=64)


@pytest.fixture
def six_rows(rows, tmp_path):
    """A file of which a step takes all rows, so that their order is of no account."""
    path = tmp_path / "six.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows[:6]), encoding="utf-8")
    return path


@pytest.fixture
def begin(checkpoints, six_rows, tmp_path):
    """Function: (mode, train type, flags) -> (function: (parameters, ids) -> logits, parameters before a step)."""

    def begin(mode, train_type, flags):
        model = MODE[mode].model.from_pretrained(checkpoints[mode])
        if train_type == "all":
            return partial(whole_model, model), {n: p.detach().clone() for n, p in model.named_parameters()}
        still = dict(flags, learning_rate=1e-30, max_steps=1, warmup_steps=1)  # too little to change a weight
        factors = run(mode, train_type, checkpoints, six_rows, tmp_path / "still", **still)[1]
        return partial(with_lora, model, flags["lora_alpha"] / flags["lora_dim"]), factors

    return begin


def distance(parameters, weights):
    """Length of the difference of all parameters, taken as one vector, from the weights of these names."""
    return sum((weights[name] - tensor).double().pow(2).sum() for name, tensor in parameters.items()).sqrt().item()


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_is_that_of_plain_torch(case, checkpoints, six_rows, begin, tmp_path):
    mode, train_type, more, num_clipped = CASES[case]
    flags = {**FLAGS, **more}
    records, weights, _, _ = run(mode, train_type, checkpoints, six_rows, tmp_path / "out", **flags)
    logits, first = begin(mode, train_type, flags)
    last = {name: tensor.clone().requires_grad_() for name, tensor in first.items()}
    steps = train_plainly(partial(logits, last), last, rows_of(mode, checkpoints, six_rows), flags)
    assert sum(step["grad_norm"] > flags["max_grad_norm"] for step in steps) == num_clipped
    for name, tolerance in (("loss", 1e-6), ("grad_norm", 5e-5), ("lr", 1e-9)):
        assert [r[name] for r in records] == pytest.approx([step[name] for step in steps], rel=tolerance), name
    assert distance(last, weights) < 1e-4 * distance(last, first)  # seen: 2e-6


def train_without_gradients(arguments):
    """train_main, where every gradient is 0, so that decay alone changes weights."""
    import deepspeed

    original = deepspeed.initialize

    def initialize(model, **options):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_hook(torch.zeros_like)
        return original(model=model, **options)

    deepspeed.initialize = initialize
    return train_main(arguments)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODE)
def test_matrices_decay_norms_and_biases_do_not(mode, checkpoints, six_rows, tmp_path):
    flags = dict(FLAGS, lr_scheduler="linear")
    arguments = train_arguments(mode, "all", checkpoints[mode], six_rows, tmp_path / "out", **flags)
    run_ranks(train_without_gradients, 1, arguments)
    before = load_file(checkpoints[mode] / "model.safetensors")
    after = load_file(tmp_path / "out/epoch-7-step-7/model.safetensors")
    shrunk = math.prod(1 - DECAY * rate(step, **{name: flags[name] for name in SCHEDULE}) for step in range(1, 8))
    assert shrunk < 0.996
    learning = [name for name in before if not name.endswith("inv_freq")]
    assert {before[name].dim() for name in learning} == {1, 2}
    for name in learning:
        expected = before[name] * (shrunk if before[name].dim() == 2 else 1)
        torch.testing.assert_close(after[name], expected, rtol=1e-5 if before[name].dim() == 2 else 0, atol=0)


# Dropout


@pytest.mark.slow
def test_evaluation_drops_nothing(checkpoints, six_rows, begin, tmp_path):
    """Twice in a run with dropout 0.5, before and after a step whose learning rate is 0: one number, plain torch's."""
    flags = dict(FLAGS, lora_dropout=0.5, learning_rate=3e-2, min_lr_ratio=0, save_model_step=1, eval_path=six_rows)
    records, factors, _, _ = run("glm3", "lora", checkpoints, six_rows, tmp_path / "out", **flags)
    losses = [record["eval_loss"] for record in records if "eval_loss" in record]
    assert len(losses) == 7 and losses[5] == losses[6] < losses[4]
    logits, _ = begin("glm3", "lora", FLAGS)
    with torch.no_grad():
        expected = mean_loss(partial(logits, factors), rows_of("glm3", checkpoints, six_rows)).item()
    assert losses[6] == pytest.approx(expected, rel=1e-6)


def dropped(arguments):
    """train_main; returns (what was dropped by each Dropout that was at work, the share of it) on this rank."""
    original, masks = Dropout.forward, []

    def forward(self, values):
        result = original(self, values)
        masks.append((result == 0) & (values != 0))
        return result

    Dropout.forward = forward
    train_main(arguments)
    return [mask.numpy().tobytes() for mask in masks], torch.cat(
        [mask.flatten() for mask in masks]
    ).float().mean().item()


@pytest.mark.slow
def test_ranks_drop_different_things_as_many_as_they_are_told(checkpoints, rows, tmp_path):
    path = tmp_path / "same.jsonl"  # one row again and again: all masks have one shape
    path.write_text((json.dumps(rows[0], ensure_ascii=False) + "\n") * 4, encoding="utf-8")
    flags = dict(lora_dropout=0.29, per_device_train_batch_size=1)
    results = []
    for out in ("out", "again"):
        arguments = train_arguments("glm3", "lora", checkpoints["glm3"], path, tmp_path / out, **flags)
        results.append(run_ranks(dropped, 2, arguments))
    assert results[0] == results[1]  # the seed decides
    (first, share), (second, other_share) = results[0]
    assert len(first) == len(second) == 4  # 2 steps, 2 layers
    assert len(set(first + second)) == 8
    assert share == pytest.approx(0.29, abs=0.01) and other_share == pytest.approx(0.29, abs=0.01)


# What a merged folder keeps


@pytest.mark.slow
@pytest.mark.parametrize("template", ["train", "official_rounds"])
def test_a_merged_folder_is_asked_with_the_template_of_its_training(
    template, checkpoints, six_rows, tmp_path, monkeypatch, capsys
):
    folder = run("glm3", "lora", checkpoints, six_rows, tmp_path / "out", max_steps=1, template=template)[2]
    code, error = run_main(merge_lora, monkeypatch, capsys, "--model_dir", folder)
    assert code == 0, error
    merged = build.find_model_folder(folder.with_name(folder.name + "-merged"))
    assert (
        merged.adapter is None and merged.prompt.template == build.find_model_folder(folder).prompt.template == template
    )
