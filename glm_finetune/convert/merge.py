"""Base + LoRA adapter -> a checkpoint folder like any other, tensor by tensor, proved before it gets its name.

merge(folder, Path("output-merged"))        # folder: ModelFolder of an adapter

No model is built: of a 6B base a shard of the result and the sum being formed are in memory, whatever its size.
"""

import os
import shutil
from collections import Counter
from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn

from glm_finetune.bars import counted, keep_alive
from glm_finetune.convert.proof import TOLERANCE, check_sum, compare, empty_model, is_empty, probe
from glm_finetune.errors import UserError
from glm_finetune.models.original import DTYPE_NAMES, DTYPES
from glm_finetune.record import copy_side_files, merged_record, write_record
from glm_finetune.tuning.adapter import load_adapter
from glm_finetune.weights import do_not_fit, is_finite, matched, read_json, weight_bytes, write_json, write_sharded

SHARD_BYTES = 10**9  # of the result, of which one is held
PEFTS = ("base_model.model.", ".modules_to_save.default", ".base_layer")  # what peft puts into names


def check_target(target, adapter):
    """Raise UserError if the merged folder exists or lies in the adapter's."""
    if target.exists():
        raise UserError(f"--output_dir {target} exists. Give another folder or remove it.")
    if adapter.resolve() in [target.resolve(), *target.resolve().parents]:
        raise UserError(f"--output_dir {target} lies in the adapter's folder, which is never written to.")


def check_room(target, base, dtype_name=None):
    """Raise UserError unless the disk has room for another base, of weights of a dtype."""
    own = getattr(torch, read_json(base / "config.json").get("torch_dtype", "float32"))
    needed = weight_bytes(base) * DTYPES.get(dtype_name, own).itemsize // own.itemsize
    place = next(parent for parent in target.resolve().parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise UserError(f"--output_dir {target}: needs {needed / 1e9:.1f} GB, {place} has {free / 1e9:.1f} GB left.")


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
    check_adapter(folder.adapter)
    check_room(target, folder.base, dtype_name)
    print(f"{folder.adapter} + {folder.base} -> {target}", flush=True)
    temporary = target.with_name(f"tmp-{target.name}")
    tokenizer, config = folder.check_base()
    keep_alive()
    with claimed(temporary), torch.inference_mode():
        network = empty_model(folder.mode, config)
        shapes = {name: parameter.shape for name, parameter in network.named_parameters()}
        parts, counts = parts_of(load_adapter(network, folder.adapter, is_empty=True).float(), shapes), Counter()
        tensors = summed(parts, shapes, network, folder.base, DTYPES.get(dtype_name), counts)
        write_sharded(counted(tensors, "merge", weight_bytes(folder.base)), temporary, SHARD_BYTES)
        dtype = counts.most_common(1)[0][0]
        write_beside(folder, temporary, tokenizer, network.config.to_original(torch_dtype=DTYPE_NAMES[dtype]))
        difference, scale, agreement = compare(folder, network, temporary, tokenizer)
        print(
            f"merged vs adapter: largest logit difference {difference:.2e} (largest logit {scale:.1f}, written as "
            f"{DTYPE_NAMES[dtype]}), greedy agreement {100 * agreement:.1f}%"
        )
        if not difference <= TOLERANCE[dtype] * scale:
            raise UserError(f"{target}: the merged model is not base + adapter; it was removed.")
        check_target(target, folder.adapter)  # somebody may have made it meanwhile
        os.replace(temporary, target)


def check_adapter(folder):
    """Raise UserError for what cannot be summed tensor by tensor: these need the whole model, which peft can merge."""
    fields, start = read_json(folder / "adapter_config.json"), "init_lora_weights"
    parts = {name: fields[name] for name in ("lora_bias", "trainable_token_indices") if fields.get(name)}
    if str(fields.get(start, "")).startswith(("pissa", "olora", "corda", "loftq")):
        parts[start] = fields[start]  # such a base is not the one on disk: `exported` makes a plain adapter of ours
    for name, value in parts.items():
        raise UserError(
            f"{folder}: an adapter with {name} {value} cannot be merged here. predict.py asks it as it is; peft's own "
            "merge_and_unload() merges it, in memory for the whole model."
        )


def parts_of(adapted, shapes):
    """{parameter of the base: the LoRA layer that changes it, or the tensor that takes its place (modules to save)}.

    shapes: of the base's parameters. Raises UserError for a part that has no place among them.
    """
    parts = {}
    for name, module in adapted.named_modules():
        if isinstance(module, LoraLayer):
            parts[_plain(f"{name}.weight")] = module
    for name, parameter in adapted.named_parameters():
        if not is_empty(parameter) and "lora_" not in name:
            parts[_plain(name)] = parameter.data
    if strange := sorted(set(parts) - set(shapes)):
        raise UserError(
            f"the adapter changes {', '.join(strange[:3])}, no weight of its base: it cannot be merged here."
        )
    return parts


def _plain(name):
    for part in PEFTS:
        name = name.replace(part, "")
    return name


def summed(parts, shapes, network, base, dtype, counts):
    """Yield (name, tensor) of the merged files: the base's, or the fp32 sum, rounded once. counts: of the dtypes.

    Raises UserError for names and shapes that do not fit, and for a sum that is not finite or not base + adapter.
    """
    aliases, problems = network.tied_names(), ([], [], [], [])
    for name, _, tensor in matched(shapes, base, network.ignored_in_file, aliases, problems):
        target = aliases.get(name, name)
        result = sum_of(parts[target], tensor, name) if target in parts else tensor
        result = result.to(dtype or tensor.dtype) if tensor.is_floating_point() else result
        counts[result.dtype] += result.numel()
        if not is_finite(result):
            problems[-1].append(name)
        yield name, result.clone() if name in aliases else result  # files do not share memory
    if any(problems):
        raise do_not_fit(base, dtype or torch.float32, problems)


def sum_of(part, tensor, name):
    """The fp32 sum of a base's tensor and what the adapter has for it. part: of `parts_of`."""
    if isinstance(part, torch.Tensor):
        return part
    layer = part.get_base_layer()
    meta = {key: value for key, value in layer._parameters.items() if value is not None}
    layer._parameters.update(dict.fromkeys(meta))  # a bias is not part of the sum, and has no values here
    layer.weight = nn.Parameter(tensor.float(), requires_grad=False)
    before = probe(part)
    part.merge()
    result, after = layer.weight.data, probe(layer)
    part.merged_adapters.clear()
    layer._parameters.update(meta)
    check_sum(name, before, after)
    if not is_finite(result):
        raise UserError(f"{name}: base + adapter is not finite; nothing was written.")
    return result


def write_beside(source, folder, tokenizer, fields):
    """Configuration, tokenizer, record and what else the base has (the original's code as *.py files)."""
    write_json(fields, folder / "config.json")
    tokenizer.save_pretrained(folder)
    copy_side_files(source.base, folder)
    write_record(merged_record(source.adapter, source.mode, source.base, source.prompt), folder)
