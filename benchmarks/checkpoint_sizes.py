"""Sizes of a checkpoint of each train type at 6B shapes, in bf16: computed from the model itself, on the meta device.

    python benchmarks/checkpoint_sizes.py       # prints a table; no weights, no card, some seconds

model: what predicts (adapter, prefix or all weights). state: fp32 masters and moments of what learns, to go on from.
"""

import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.train_types import TYPES  # noqa: E402 (the repository is not installed)
from benchmarks.zero3_loading import shape  # noqa: E402
from glm_finetune.config import TrainConfig  # noqa: E402
from glm_finetune.flags import parse  # noqa: E402
from glm_finetune.run.parts import choose  # noqa: E402

SAME_AS = {"pissa": 2, "qlora 4": 1, "qlora 8": 1}  # the size of the adapter in those of lora
STATE_BYTES = 12  # an fp32 master and two fp32 moments


def sizes(flags):
    """(parameters that learn, bytes of the model's files, bytes of the state) of a train type."""
    needed = ["--mode", "glm3", "--model_name_or_path", "b", "--train_path", "t", "--output_dir", "o"]
    config = parse(TrainConfig, [*needed, *flags])
    mode, train_type = choose(config)
    fields = mode.config(**shape(4096))
    fields.source = shape(4096)
    with torch.device("meta"):
        model = mode.model(fields).to(torch.bfloat16)
        total = sum(parameter.numel() for parameter in model.parameters())
        model = train_type.apply(model, config, mode)
    learning = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    learns = sum(learning.values())
    saved = {"weights": 2 * total, "adapter": 2 * learns, "prefix": 4 * learns}[train_type.saves]
    if config.ptuning_version == 1:
        saved = 4 * config.pre_seq_len * 4096  # the embeddings that the encoder gave
    return learns, saved, STATE_BYTES * learns


def main():
    print(f"{'train type':20}{'learn':>15}{'model MiB':>12}{'state MiB':>12}")
    for name, flags in TYPES.items():
        plain = TYPES["lora"] if name in SAME_AS else flags
        learns, saved, state = sizes(plain)
        saved *= SAME_AS.get(name, 1)
        print(f"{name:20}{learns:15,}{saved / 2**20:12,.1f}{state / 2**20:12,.1f}")


if __name__ == "__main__":
    main()
