"""Sameness: losses and weights of 20 steps do not depend on ZeRO stage, ranks, accumulation or checkpointing.

    python -m pytest tests -m matrix        # every cell of the grid; its size and time are printed
    python -m pytest tests                  # of each mode and train type four cells, which together vary everything

Every micro-batch has another number of targets, the last step of an epoch leaves one of four slots without a row.
"""

import itertools
import json

import pytest

from glm_finetune import MODE
from tests.conftest import DATA
from tests.test_training import assert_close, run

TYPES = {
    "lora": ("lora", {}),
    "qlora": ("qlora", {}),
    "freeze": ("freeze", {}),
    "ptuning 2": ("ptuning", {}),
    "ptuning 1": ("ptuning", {"ptuning_version": 1}),
    "all": ("all", {}),
}
SPLITS = {1: {"4": (4, 1), "2x2": (2, 2)}, 2: {"4": (2, 1), "2x2": (1, 2)}}  # ranks: (micro-batch, accumulation)
GRID = list(itertools.product((0, 1, 2, 3), (1, 2), ("4", "2x2"), (False, True)))
REFERENCE = (2, 1, "4", False)  # stage, ranks, split, gradient checkpointing
FEW = ((0, 2, "4", True), (1, 2, "2x2", False), (2, 1, "2x2", True), (3, 2, "2x2", True), (3, 1, "4", False))


def cells():
    """(mode, type, cell) of the whole grid; a few of each mode and type are always run (see conftest.py)."""
    for i, (mode, kind) in enumerate(itertools.product(MODE, TYPES)):
        few = [FEW[(i + k) % len(FEW)] for k in range(4)]
        for cell in GRID:
            if cell != REFERENCE and not (kind == "qlora" and cell[0] == 3):  # refused
                marks = [pytest.mark.slow, pytest.mark.matrix(always=cell in few)]
                name = "zero{}-{}ranks-{}-{}".format(*cell[:3], "checkpointed" if cell[3] else "kept")
                yield pytest.param(mode, kind, cell, marks=marks, id=f"{mode}-{kind}-{name}")


@pytest.fixture(scope="module")
def trained(checkpoints, tmp_path_factory):
    """Function: (mode, type, cell) -> losses, gradient norms, weights after 20 steps."""
    root, count = tmp_path_factory.mktemp("matrix"), itertools.count()
    lines = (DATA / "spo_0.json").read_text(encoding="utf-8").splitlines()[:43]
    (root / "data.jsonl").write_text("".join(line + "\n" for line in lines), encoding="utf-8")

    def train(mode, kind, cell):
        stage, ranks, split, checkpointing = cell
        zero = {"stage": stage, "stage3_param_persistence_threshold": 0}  # else a tiny model is not divided
        (root / "ds.json").write_text(json.dumps({"zero_optimization": zero}))
        train_type, flags = TYPES[kind]
        micro_batch, accumulate = SPLITS[ranks][split]
        flags |= dict(max_len=96, max_src_len=48, max_steps=20, learning_rate=2e-3, ds_file=root / "ds.json")
        flags |= dict(per_device_train_batch_size=micro_batch, gradient_accumulation_steps=accumulate)
        flags |= {"gradient_checkpointing": True} if checkpointing else {}
        out = root / str(next(count))
        records, weights, _, _ = run(mode, train_type, checkpoints, root / "data.jsonl", out, ranks, **flags)
        return [r["loss"] for r in records], [r["grad_norm"] for r in records], weights

    return train


@pytest.fixture(scope="module")
def reference(trained):
    """Function: (mode, type) -> what the reference cell gives, computed once."""
    known = {}

    def get(mode, kind):
        if (mode, kind) not in known:
            known[mode, kind] = trained(mode, kind, REFERENCE)
        return known[mode, kind]

    return get


@pytest.mark.parametrize("mode, kind, cell", cells())
def test_numbers_do_not_depend_on_how_a_step_is_computed(mode, kind, cell, trained, reference):
    losses, norms, weights = reference(mode, kind)
    assert len(losses) == 20 and min(norms) > 0
    other_losses, other_norms, other_weights = trained(mode, kind, cell)
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_norms == pytest.approx(norms, rel=1e-3)
    assert_close(other_weights, weights)
