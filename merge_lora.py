"""Merge a LoRA adapter into its base: a checkpoint folder like any other, which the original code loads too.

    python merge_lora.py --model_dir output-glm3/epoch-2-step-3900       # -> output-glm3/epoch-2-step-3900-merged

The sum is formed in fp32 on the CPU and written in the base's dtypes. Its logits must be those of base + adapter, every
tensor in the folder must be the sum's, rounded. The written folder is then loaded again and
compared with base + adapter; if they disagree it is removed and the exit code is not 0.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from glm_finetune import build, exits
from glm_finetune.answer.chat import chat_ids
from glm_finetune.config import MergeConfig
from glm_finetune.errors import UserError
from glm_finetune.flags import parse
from glm_finetune.models.original import DTYPE_NAMES, DTYPES
from glm_finetune.weights import file_dtypes, iter_tensors, write_json

PROMPTS = ("你好", "发动机水温高，风扇不转，是什么故障？", "Write a function that reverses a list.")
# Largest logit difference that rounding the merged weights explains, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def main():
    config = parse(MergeConfig, sys.argv[1:], __doc__)
    source = build.find_source(config.model_dir, config.mode, config.ori_model_dir)
    if source.adapter is None or source.is_prefix:
        raise UserError(
            f"--model_dir {config.model_dir}: no LoRA adapter (adapter_config.json without config.json beside it)."
        )
    target = Path(config.output_dir or f"{os.path.abspath(source.adapter)}-merged")
    temporary = target.with_name(f"tmp-{target.name}")
    check_target(target, temporary, source.adapter)
    dtypes = file_dtypes(source.base)
    dtype = DTYPES[config.dtype] if config.dtype else most_common(dtypes.values())

    tokenizer, model = build.load_source(source, "fp32", "cpu")
    samples = probe(model, tokenizer, source)
    model = model.merge_and_unload()
    check_sum(model, samples)
    try:
        write(model, source, temporary, tokenizer, dtype, {} if config.dtype else dtypes)
        check_written(model, temporary)
        del model  # 4 bytes a parameter; the written one is loaded next
        difference, scale, agreement = compare(
            source.mode.model.from_pretrained(temporary, dtype=torch.float32), samples
        )
        print(
            f"merged vs adapter: largest logit difference {difference:.2e} (largest logit {scale:.1f}, written as "
            f"{DTYPE_NAMES[dtype]}), greedy agreement {100 * agreement:.1f}%"
        )
        if not difference <= TOLERANCE[dtype] * scale:
            raise UserError(f"{target}: the merged model is not base + adapter; it was removed.")
        os.replace(temporary, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    print(f"wrote {target}")


def check_target(target, temporary, adapter):
    """Raise UserError if the merged folder or its temporary one exists, or it lies in the adapter's."""
    for folder in (target, temporary):
        if folder.exists():
            raise UserError(f"--output_dir {target}: {folder} exists. Give another folder or remove it.")
    if adapter.resolve() in [target.resolve(), *target.resolve().parents]:
        raise UserError(f"--output_dir {target} lies in the adapter's folder, which is never written to.")


def most_common(values):
    values = list(values)
    return max(set(values), key=values.count)


def write(model, source, folder, tokenizer, dtype, dtypes):
    """Weights, tokenizer, and what else the base's folder has that the original code needs (its own *.py files)."""
    folder.mkdir(parents=True)
    names = [name for name, _ in model.named_parameters()]
    tensors = tqdm(model.named_parameters(), total=len(names), desc="write", unit=" tensors")
    model.save_weights(folder, tensors, dtype, dtypes)
    tokenizer.save_pretrained(folder)
    for path in [*source.base.glob("*.py"), *source.base.glob("generation_config.json")]:
        shutil.copyfile(path, folder / path.name)
    write_json(
        {
            "format_version": 1,
            "mode": source.mode.name,
            "template": source.template,
            "merged_from": str(source.adapter),
            "base": str(source.base),
        },
        folder / "train_config.json",
    )


def probe(model, tokenizer, source):
    """[(ids, logits)]: each sample prompt with 16 greedy tokens, (1, T) int64 and (T, V) fp32, from base + adapter."""
    samples = []
    with torch.inference_mode():
        for prompt in PROMPTS:
            ids = torch.tensor([chat_ids(source.mode, tokenizer, prompt, [], template=source.template)])
            ids = model.generate(input_ids=ids, max_new_tokens=16, do_sample=False, pad_token_id=tokenizer.pad_token_id)
            samples.append((ids, model(input_ids=ids, use_cache=False).logits[0]))
    return samples


def check_sum(model, samples):
    """Raise UserError unless the merged model in fp32 gives the logits of base + adapter."""
    difference, scale, _ = compare(model, samples)
    if not difference <= TOLERANCE[torch.float32] * scale:
        raise UserError(f"merging changed the logits by {difference:.2e} of {scale:.1f} in fp32; nothing was written.")


def check_written(model, folder):
    """Raise UserError unless every tensor in `folder` is the merged one, rounded to the file's dtype."""
    merged = {**dict(model.named_parameters(remove_duplicate=False)), **model.stored_buffers()}
    for name, tensor in iter_tensors(folder):
        if not torch.equal(tensor, merged[name].detach().to(tensor.dtype)):
            raise UserError(f"{folder}: {name} was not written as it was merged; the folder was removed.")


@torch.inference_mode()
def compare(model, samples):
    """Largest logit difference, largest logit, share of equal likeliest tokens, of a model against `samples`."""
    difference, scale, equal = 0.0, 0.0, []
    for ids, expected in samples:
        logits = model(input_ids=ids, use_cache=False).logits[0]
        difference = max(difference, (logits - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        equal.append((logits.argmax(-1) == expected.argmax(-1)).float())
    return difference, scale, torch.cat(equal).mean().item()


if __name__ == "__main__":
    exits.exit_with_message(main)
