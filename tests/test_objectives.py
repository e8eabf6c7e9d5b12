"""Objectives: what they store, what they draw from it, and what the loop asks them."""

import json
import random
from dataclasses import replace

import pytest
import torch

from glm_finetune import MODE
from glm_finetune.data.columns import COLUMNS, SPECIAL
from glm_finetune.data.dataset import InstructionDataset, collate
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.data.samples import Settings
from glm_finetune.models.layers import visible
from glm_finetune.modes.spec import Limits
from glm_finetune.modes.template import FIXED, Draft, Template
from glm_finetune.objectives import OBJECTIVE
from glm_finetune.objectives.instruct import INSTRUCT

# Figure 2 of the GLM paper (arXiv 2103.10360): x1 .. x6 with the spans [x3] and [x5, x6]. Tokens by name -> id.
X1, X2, X3, X4, X5, X6, MASK, START, END = range(101, 110)
PART_A = (X1, X2, MASK, X4, MASK)
PART_B = (START, X5, X6, START, X3, END)  # the last END is only a label: the paper's ten tokens end before it
LABELS = [-100] * 6 + [X5, X6, END, X3, END]
POSITIONS = [[1, 2, 3, 4, 5, 5, 5, 5, 3, 3, 3], [0, 0, 0, 0, 0, 1, 2, 3, 1, 2, 3]]
SEEN = """
    1 1 1 1 1 0 0 0 0 0
    1 1 1 1 1 0 0 0 0 0
    1 1 1 1 1 0 0 0 0 0
    1 1 1 1 1 0 0 0 0 0
    1 1 1 1 1 0 0 0 0 0
    1 1 1 1 1 1 0 0 0 0
    1 1 1 1 1 1 1 0 0 0
    1 1 1 1 1 1 1 1 0 0
    1 1 1 1 1 1 1 1 1 0
    1 1 1 1 1 1 1 1 1 1
"""
ROW = {"input_ids": [*PART_A, *PART_B], "labels": LABELS, "num_prefix": 5, "position_ids": POSITIONS}


def paper_drafts(template, tokenizer, messages, style, train_on):
    """The paper's example in place of each text that says so, other rows as ever."""
    if messages[0]["content"] != "paper":
        return template.drafts(tokenizer, messages, style, train_on)
    parts, is_target = (PART_A, PART_B[:1], PART_B[1:]), (False, False, True)
    return [Draft(messages, [], parts, (FIXED,) * 3, is_target, 1, LABELS, POSITIONS)]


def settings_of(mode, checkpoints, drafts=Template.drafts):
    tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    return Settings(MODE[mode].template, tokenizer, Limits(64, 32), drafts=drafts)


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.jsonl"
    texts = ["水温高", "paper", "漏水", "paper", "异响"]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.mark.parametrize("weight", [1, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_the_example_of_the_glm_paper_goes_from_a_file_into_a_batch(cached, weight, checkpoints, texts, tmp_path):
    settings, plain = (settings_of("glm", checkpoints, drafts) for drafts in (paper_drafts, Template.drafts))
    cache_dir = tmp_path / "cache" if cached else None
    data = InstructionDataset(f"{texts}:{weight}", settings, cache_dir=cache_dir)
    expected = InstructionDataset(f"{texts}:{weight}", plain)
    papers = [i for i in range(len(data)) if data.where(i).endswith(("line 2", "line 4"))]
    assert len(data) == 5 * weight and len(papers) == 2 * weight
    assert all(data[i] == (ROW if i in papers else expected[i]) for i in range(len(data)))
    for max_len in (None, 64):
        batch = collate([data[papers[0]]], 0, MODE["glm"].positions, max_len)
        assert batch["input_ids"].tolist() == [[*PART_A, *PART_B]] and batch["labels"].tolist() == [LABELS]
        assert batch["position_ids"].tolist() == [POSITIONS]
        seen = visible(batch["segment_ids"], batch["is_prefix"], 11)[0].squeeze()
        matrix = [[int(cell) for cell in line.split()] for line in SEEN.strip().splitlines()]
        assert seen[:10, :10].int().tolist() == matrix


def test_samples_with_and_without_positions_of_their_own_are_packed_together(checkpoints, texts):
    data = InstructionDataset(texts, settings_of("glm", checkpoints, paper_drafts))
    batch = collate(data[:3], 0, MODE["glm"].positions, 200)
    (longest_first,) = [batch["input_ids"][0].tolist()]
    start = longest_first.index(X1)
    assert batch["position_ids"][0, :, start : start + 11].tolist() == POSITIONS
    assert batch["labels"][0, start : start + 11].tolist() == LABELS
    assert batch["position_ids"].shape == (1, 2, sum(len(row["input_ids"]) for row in data[:3]))


@pytest.mark.parametrize("mode", MODE)
def test_instruction_data_takes_five_bytes_a_token_and_its_samples(mode, checkpoints, data_file, tmp_path):
    data = InstructionDataset(data_file, settings_of(mode, checkpoints), cache_dir=tmp_path / "cache")
    header = next((tmp_path / "cache").glob("*/header.json"))
    counts = json.loads(header.read_text())["counts"]
    assert all(not counts[name + part] for name in SPECIAL for part in ("", "_of", "_ends"))
    num_bytes = sum((header.parent / name).stat().st_size for name in COLUMNS)
    num_tokens, per_sample = int(data.lengths().sum()), 8 + 8 + 4 + 4 + 8
    assert num_bytes == 5 * num_tokens + per_sample * len(data)


def test_what_a_sample_has_of_its_own_is_never_cut_in_silence(checkpoints, texts):
    settings = replace(settings_of("glm", checkpoints, paper_drafts), limits=Limits(10, 5))
    with pytest.raises(AssertionError, match="11 tokens"):
        InstructionDataset(texts, settings)


def test_instruct_trains_the_stored_sample_and_sums_the_loss_of_every_target(checkpoints, data_file):
    data = InstructionDataset(data_file, settings_of("glm3", checkpoints, INSTRUCT.drafts))
    numbers = [4, 0, 7]
    assert OBJECTIVE["instruct"].rows(data, numbers, 1, 0) == [data[i] for i in numbers]
    batch = collate(INSTRUCT.rows(data, numbers, 1, 5), 0, MODE["glm3"].positions)
    num_targets = sum(label != -100 for i in numbers for label in data[i]["labels"][1:])
    losses = torch.rand(num_targets)
    assert INSTRUCT.count(batch) == num_targets
    assert INSTRUCT.loss(losses, batch) == losses.sum() and losses.sum().dtype == torch.float32


def masks(sample, seed, epoch):
    """A toy: each target is kept with probability 1/2."""
    rng = random.Random(f"{seed} {epoch}")
    return {**sample, "labels": [label if rng.random() < 0.5 else -100 for label in sample["labels"]]}


def test_what_is_drawn_follows_from_seed_epoch_and_row_on_any_number_of_ranks(checkpoints, data_file):
    data = InstructionDataset(data_file, settings_of("glm3", checkpoints))
    toy, found = replace(INSTRUCT, name="toy", draw=masks), {}
    for world_size in (1, 2, 3):
        sampler = StepSampler(len(data), 1, 2, world_size, seed=7)
        for epoch in range(2):
            progress, drawn = Progress(epoch=epoch), {}
            while progress.epoch == epoch:
                for rank in range(world_size):
                    for numbers in sampler.micro_batches(progress, rank):
                        drawn |= zip(numbers, toy.rows(data, numbers, 7, epoch))
                sampler.advance(progress)
            assert len(drawn) == len(data)
            found[world_size, epoch] = [drawn[i] for i in range(len(data))]
    for epoch in range(2):
        assert found[1, epoch] == found[2, epoch] == found[3, epoch]
    differ = [a != b for a, b in zip(found[1, 0], found[1, 1])]
    assert sum(differ) > len(data) / 2
    assert toy.rows([data[0]] * 4, range(4), 7, 0) != [toy.rows([data[0]], [0], 7, 0)[0]] * 4  # each row its own
