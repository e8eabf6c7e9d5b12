"""Who sees which row when: a function of seed and epoch, every row once, whatever the ranks and the way of batching."""

import numpy as np
import pytest
import torch

from glm_finetune.data.dataset import collate
from glm_finetune.data.order import GROUP, POOL, by_length, shuffled
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.modes import MODE
from tests.test_resume import losses
from tests.test_training import assert_close, run

WAYS = ("shuffled", "grouped", "streamed")


def new_sampler(way, num_rows, batch, accumulate, world_size, seed=7):
    lengths = np.random.default_rng(num_rows).integers(5, 200, num_rows) if way == "grouped" else None
    window = 10 if way == "streamed" else None
    return StepSampler(num_rows, batch, accumulate, world_size, seed, lengths=lengths, window=window)


def steps(sampler, world_size, epoch=0):
    """The micro-batches of every step of an epoch: [step][rank][micro-batch] -> rows."""
    progress, found, ended = Progress(epoch=epoch), [], False
    while not ended:
        found.append([sampler.micro_batches(progress, rank) for rank in range(world_size)])
        ended = sampler.advance(progress)
    return found


@pytest.mark.parametrize("num_rows", [1, 2, 5, 23, 24, 25, 131])
@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_row_is_seen_once_and_no_rank_waits_for_another(way, world_size, num_rows):
    sampler = new_sampler(way, num_rows, 2, 2, world_size)
    found = steps(sampler, world_size)
    assert sorted(row for step in found for rank in step for slot in rank for row in slot) == list(range(num_rows))
    assert len(found) == sampler.steps_per_epoch
    for step in found:  # as many micro-batches on every rank, none larger than asked for
        assert {len(rank) for rank in step} == {2} and all(len(slot) <= 2 for rank in step for slot in rank)


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_of_a_step_do_not_depend_on_how_it_is_split(way):
    found = []
    for batch, accumulate, world_size in ((12, 1, 1), (6, 1, 2), (4, 1, 3), (2, 2, 3), (1, 12, 1), (3, 2, 2)):
        sampler = new_sampler(way, 131, batch, accumulate, world_size)
        found.append(
            [sorted(row for rank in step for slot in rank for row in slot) for step in steps(sampler, world_size)]
        )
    assert all(other == found[0] for other in found)


@pytest.mark.parametrize("way", WAYS)
def test_the_order_follows_from_seed_and_epoch_alone(way):
    def order(epoch, seed, *split):
        return new_sampler(way, 500, *split, seed=seed).order(epoch)

    assert order(0, 7, 2, 1, 1) == order(0, 7, 5, 3, 2)
    assert len({tuple(order(epoch, seed, 2, 1, 1)) for epoch in (0, 1) for seed in (7, 8)}) == 4


def test_the_order_is_that_of_earlier_versions():
    generator = torch.Generator().manual_seed(1234 * 1_000_003 + 1)  # runs begun then are resumed by it
    assert StepSampler(50, 1, 1, 1, seed=1234).order(1) == torch.randperm(50, generator=generator).tolist()


def test_grouping_puts_similar_lengths_into_a_batch_and_mixes_the_batches():
    lengths = np.random.default_rng(0).integers(10, 500, 3 * POOL + 100)
    order = by_length(shuffled(len(lengths), 1, 0), lengths, 1, 0)
    assert sorted(order) == list(range(len(lengths)))
    random_waste, waste = (padding_share(lengths[rows], 8) for rows in (shuffled(len(lengths), 1, 0), order))
    assert waste < 0.02 < 0.4 < random_waste
    means = np.array([lengths[order[i : i + GROUP]].mean() for i in range(0, POOL, GROUP)])
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.5  # a run does not go from short to long


def padding_share(lengths, batch):
    batches = [lengths[i : i + batch] for i in range(0, len(lengths), batch)]
    return 1 - sum(b.sum() for b in batches) / sum(b.max() * len(b) for b in batches)


def test_the_micro_batches_of_a_grouped_step_are_of_similar_length_on_all_ranks_at_a_time():
    sampler = new_sampler("grouped", 64, 4, 4, 2)
    ranks = [sampler.micro_batches(Progress(), rank) for rank in range(2)]
    longest = [[max(sampler.lengths[row] for row in slot) for slot in rank] for rank in ranks]
    assert [value for pair in zip(*longest) for value in pair] == sorted(longest[0] + longest[1])


def test_a_rank_without_a_row_can_pack_all_the_same():
    row = {"input_ids": [3, 4, 5], "labels": [-100] * 3, "num_prefix": 0}
    batch = collate([row], 0, MODE["glm3"].positions, 64)
    assert len(batch["target_index"]) == 0 and "segment_bounds" not in batch


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["packing", "group_by_length"])
@pytest.mark.parametrize("mode", MODE)
def test_a_run_has_the_losses_of_padded_batches_on_1_2_and_3_ranks(mode, flag, checkpoints, data_file, tmp_path):
    # 11 rows, 6 a step: the last step leaves a rank of three with a row less. Both epochs fit into one pool, so grouped
    # steps have other rows than shuffled ones, but the same on any number of ranks.
    def trained(name, world_size, **flags):
        flags |= dict(per_device_train_batch_size=6 // world_size, num_train_epochs=2, max_len=128)
        records, weights, *_ = run(mode, "all", checkpoints, data_file, tmp_path / name, world_size, **flags)
        return losses(records), weights

    expected, weights = trained("plain", 1, **({} if flag == "packing" else {flag: True}))
    assert len(expected) == 4
    for world_size in (1, 2, 3):
        found, found_weights = trained(f"{world_size}", world_size, **{flag: True})
        assert found == pytest.approx(expected, rel=1e-5)
        assert_close(found_weights, weights)


@pytest.mark.slow
def test_eleven_rows_on_three_ranks_leave_some_without_a_row(checkpoints, data_file, tmp_path):
    flags = dict(packing=True, per_device_train_batch_size=1, gradient_accumulation_steps=3)
    records = run("glm3", "lora", checkpoints, data_file, tmp_path / "three", 3, **flags)[0]  # 9 slots, then 2 rows
    alone = dict(per_device_train_batch_size=9)
    expected = run("glm3", "lora", checkpoints, data_file, tmp_path / "one", 1, **alone)[0]
    assert losses(records) == pytest.approx(losses(expected), rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODE)
def test_packed_samples_share_the_prompt_of_version_1_on_any_number_of_ranks(mode, checkpoints, data_file, tmp_path):
    found = []
    for world_size, flags in ((1, {}), (1, {"packing": True}), (2, {"packing": True})):
        flags |= dict(per_device_train_batch_size=6 // world_size, max_len=128, ptuning_version=1)
        folder = tmp_path / str(len(found))
        found.append(losses(run(mode, "ptuning", checkpoints, data_file, folder, world_size, **flags)[0]))
    assert found[1] == pytest.approx(found[0], rel=1e-5) and found[2] == pytest.approx(found[0], rel=1e-5)
