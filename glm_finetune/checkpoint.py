"""What a training run leaves: output_dir/epoch-E-step-S/ with weights or an adapter, tokenizer and train_config.json.

The only file that knows how ZeRO-3 gathers. A checkpoint is written under a temporary name and renamed when complete.
"""

import dataclasses
import importlib.metadata
import os
import re
import shutil
from contextlib import nullcontext
from pathlib import Path

from peft import get_peft_model_state_dict

from glm_finetune import dist
from glm_finetune.weights import write_json, write_tensors

FORMAT_VERSION = 1
TEMPORARY = "tmp-"
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "sentencepiece")


def check_output_dir(output_dir, overwrite):
    """Raise ValueError if output_dir holds results and `overwrite` is False. Called before the ranks start together."""
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file.")
    results = sorted(p.name for p in path.glob("*") if _is_result(p))
    if results and not overwrite:
        raise ValueError(
            f"--output_dir {output_dir} holds results already ({', '.join(results[:5])}). "
            "Choose another folder, or add --overwrite_output_dir to delete them."
        )


def create_output_dir(output_dir):
    """Delete old results (`check_output_dir` has agreed) and create the folder, on rank 0. All ranks must call."""
    dist.barrier()
    if dist.is_main():
        for result in filter(_is_result, Path(output_dir).glob("*")):
            shutil.rmtree(result) if result.is_dir() else result.unlink()
        Path(output_dir).mkdir(parents=True, exist_ok=True)
    dist.barrier()


def _is_result(path):
    return (
        bool(re.fullmatch(r"epoch-\d+-step-\d+", path.name))
        or path.name in ("metrics.jsonl", "runs")
        or (path.name.startswith(TEMPORARY))
    )


def train_record(config, world_size):
    """What train_config.json holds besides epoch and step: enough to know the run and to find its base."""
    return {
        "format_version": FORMAT_VERSION,
        "mode": config.mode,
        "train_type": config.train_type,
        "template": "train",
        "base": config.model_name_or_path,
        "base_absolute": os.path.abspath(config.model_name_or_path),
        "world_size": world_size,
        "flags": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def gathered(model, trainable_only):
    """Yield (name, whole tensor on the CPU), one at a time. All ranks must call and exhaust it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with _whole(parameter):
                yield name, parameter.detach().cpu()


def _whole(parameter):
    """The parameter as a whole: ZeRO-3 keeps a part of it on each rank."""
    if getattr(parameter, "ds_id", None) is None:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter])


def save(model, tokenizer, train_type, output_dir, epoch, step, record, total_limit=None):
    """Write output_dir/epoch-E-step-S/ unless it is there; returns its path. All ranks must call.

    model: the module inside the engine. train_type: TrainType. record: `train_record`.
    Raises OSError on every rank when rank 0 cannot write; earlier checkpoints stay as they are.
    """
    target = Path(output_dir) / f"epoch-{epoch}-step-{step}"
    exists = target.is_dir()  # before the first barrier: every rank sees the same
    dist.barrier()
    if exists:
        return target
    tensors = gathered(model, trainable_only=train_type.saves_adapter)
    problem = None
    if dist.is_main():
        temporary = Path(output_dir) / (TEMPORARY + target.name)
        try:
            _write(model, tokenizer, train_type, temporary, tensors, {**record, "epoch": epoch, "step": step})
            os.replace(temporary, target)
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            problem = f"saving {target} failed: {error}. Earlier checkpoints are untouched."
    for _ in tensors:  # ranks that do not write take part in the gathering all the same
        pass
    dist.all_agree(problem)
    if dist.is_main() and total_limit:
        for old in checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return target


def _write(model, tokenizer, train_type, folder, tensors, record):
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if train_type.saves_adapter:
        adapter = get_peft_model_state_dict(model, state_dict=dict(tensors))
        write_tensors(adapter, folder / "adapter_model.safetensors")
        settings = dataclasses.replace(model.peft_config["default"], inference_mode=True)
        settings.save_pretrained(str(folder))
    else:
        model.save_weights(folder, tensors)
    tokenizer.save_pretrained(folder)
    write_json(record, folder / "train_config.json")


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("epoch-*-step-*") if (p / "train_config.json").is_file()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
