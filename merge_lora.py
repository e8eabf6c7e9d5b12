"""Merge a LoRA adapter into its base: a checkpoint folder like any other, which the original code loads too.

    python merge_lora.py --model_dir output-glm3/epoch-2-step-3900       # -> output-glm3/epoch-2-step-3900-merged

Tensor by tensor, on the CPU: what the adapter does not touch is copied, what it touches is summed in fp32 and rounded
once, to the base's dtype. Each summed layer must give the results of base + adapter, and the written folder its logits,
formed with one layer in memory at a time; if they disagree it is removed and the exit code is not 0.
"""

import os
import sys
from pathlib import Path

from glm_finetune import build, exits
from glm_finetune.convert.flags import MergeConfig
from glm_finetune.convert.merge import merge
from glm_finetune.errors import UserError
from glm_finetune.flags import parse


def main():
    config = parse(MergeConfig, sys.argv[1:], __doc__)
    given = dict(force=config.force, rope_rule=config.rope_rule)
    folder = build.find_model_folder(config.model_dir, config.mode, config.ori_model_dir, **given)
    if folder.is_prefix:
        raise UserError(
            f"--model_dir {config.model_dir}: a prefix is not part of the weights and cannot be merged. Train it "
            "further with --train_type ptuning --init_from, or keep it beside its base (predict.py --model_path)."
        )
    if folder.adapter is None:
        raise UserError(
            f"--model_dir {config.model_dir}: no LoRA adapter (adapter_config.json without config.json beside it)."
        )
    target = Path(config.output_dir or f"{os.path.abspath(folder.adapter)}-merged")
    merge(folder, target, config.dtype)
    print(f"wrote {target}")


if __name__ == "__main__":
    exits.exit_with_message(main)
