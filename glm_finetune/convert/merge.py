"""Base + LoRA adapter -> a checkpoint folder like any other, proved before it gets its name.

merge(folder, Path("output-merged"))        # folder: ModelFolder of an adapter
"""

import os
import shutil
from collections import Counter
from contextlib import contextmanager

import torch
from tqdm import tqdm

from glm_finetune import build
from glm_finetune.convert.proof import TOLERANCE, check_sum, check_written, compare, sample
from glm_finetune.errors import UserError
from glm_finetune.models.original import DTYPE_NAMES, DTYPES
from glm_finetune.record import merged_record, write_record
from glm_finetune.weights import file_dtypes


def check_target(target, adapter):
    """Raise UserError if the merged folder exists or lies in the adapter's."""
    if target.exists():
        raise UserError(f"--output_dir {target} exists. Give another folder or remove it.")
    if adapter.resolve() in [target.resolve(), *target.resolve().parents]:
        raise UserError(f"--output_dir {target} lies in the adapter's folder, which is never written to.")


@contextmanager
def claimed(temporary):
    """Make a folder that is this process's own, and remove it at the end. Raises UserError if it exists."""
    try:
        temporary.mkdir(parents=True)
    except FileExistsError:
        owner = "another merge_lora.py is writing it, or was killed"
        raise UserError(f"{temporary} exists: {owner}. Wait for it, remove it, or give another --output_dir.") from None
    try:
        yield
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def merge(folder, target, dtype_name=None):
    """Write the sum to `target`, a Path, and print how far it is from base + adapter.

    dtype_name: of all weights; default: each tensor's as in the base. Raises UserError if the target exists already or
    the sum is not base + adapter; then nothing is left of it.
    """
    check_target(target, folder.adapter)
    temporary = target.with_name(f"tmp-{target.name}")
    dtypes = file_dtypes(folder.base)
    dtype = DTYPES[dtype_name] if dtype_name else Counter(dtypes.values()).most_common(1)[0][0]
    with claimed(temporary):
        tokenizer, model = build.load_model_folder(folder, "fp32", "cpu")
        samples = sample(model, tokenizer, folder)
        model = model.merge_and_unload()
        check_sum(model, samples)
        write(model, folder, temporary, tokenizer, dtype, {} if dtype_name else dtypes)
        check_written(model, temporary)
        del model  # 4 bytes a parameter; the written one is loaded next
        written = folder.mode.model.from_pretrained(temporary, dtype=torch.float32)
        difference, scale, agreement = compare(written, samples)
        print(
            f"merged vs adapter: largest logit difference {difference:.2e} (largest logit {scale:.1f}, written as "
            f"{DTYPE_NAMES[dtype]}), greedy agreement {100 * agreement:.1f}%"
        )
        if not difference <= TOLERANCE[dtype] * scale:
            raise UserError(f"{target}: the merged model is not base + adapter; it was removed.")
        check_target(target, folder.adapter)  # somebody may have made it meanwhile
        os.replace(temporary, target)


def write(model, source, folder, tokenizer, dtype, dtypes):
    """The merged model, tokenizer, record and what else the base has (the original's code as *.py files)."""
    tensors = tqdm([*model.named_parameters()], desc="write", unit=" tensors")
    model.save_weights(folder, tensors, dtype, dtypes)
    tokenizer.save_pretrained(folder)
    for path in [*source.base.glob("*.py"), *source.base.glob("generation_config.json")]:
        shutil.copyfile(path, folder / path.name)
    write_record(merged_record(source.adapter, source.mode, source.base, source.prompt), folder)
