"""What a training run leaves: output_dir/epoch-E-step-S/ with weights or an adapter, tokenizer and train_config.json.

The only file that knows how ZeRO-3 gathers. A checkpoint is written under a temporary name and renamed when complete.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import re
import shutil
from itertools import chain
from pathlib import Path

from peft import get_peft_model_state_dict

from glm_finetune import dist, state
from glm_finetune.data.cache import default_cache_dir
from glm_finetune.data.files import layout_of
from glm_finetune.engine import whole
from glm_finetune.weights import read_json, write_json, write_tensors, write_text

FORMAT_VERSION = 1
TEMPORARY = "tmp-"
MANIFEST = "manifest.json"
CHECKPOINT = r"epoch-\d+-step-\d+"  # name of its folder
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "sentencepiece")


def check_output_dir(output_dir, overwrite, inputs=()):
    """Raise ValueError if output_dir holds results and `overwrite` is False, or if deleting them would delete an input.

    inputs: paths that the run reads. Called before the ranks start together.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise ValueError(f"--output_dir {output_dir} is a file.")
    for result in filter(_is_result, path.glob("*")):
        for name in filter(None, inputs):
            if result.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
                raise ValueError(f"--output_dir {output_dir}: {name} lies in it and is needed. Choose another folder.")
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
        bool(re.fullmatch(CHECKPOINT, path.name))
        or path.name in ("metrics.jsonl", "runs", "latest")
        or (path.name.startswith(TEMPORARY))
    )


def train_record(config, train_type, tokenizer, world_size):
    """What train_config.json holds besides epoch and step: enough to know the run and to find its base."""
    return {
        "format_version": FORMAT_VERSION,
        "mode": config.mode,
        "train_type": config.train_type,
        "template": "train",
        "saves": train_type.saves,
        "base": config.model_name_or_path,
        "base_absolute": os.path.abspath(config.model_name_or_path),
        "world_size": world_size,
        "identity": {
            "training data": layout_of(config.train_path, config.cache_dir or default_cache_dir()).sha256[:16],
            "tokenizer": describe(tokenizer.folder / tokenizer.model_file)["sha256"][:16],
            "base": describe(Path(config.model_name_or_path) / "config.json")["sha256"][:16],
            "max_len": config.max_len,
            "max_src_len": config.max_src_len,
            "is_skip": config.is_skip,
            "seed": config.seed,
            **{name: getattr(config, name) for name in train_type.identity},
            **order_flags(config),
        },
        "flags": dataclasses.asdict(config),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def order_flags(config):
    """{flag: value} of those that are set and decide the order of the data."""
    names = ("group_by_length", "streaming", "shuffle_buffer")
    return {name: getattr(config, name) for name in names if getattr(config, name)}


def gathered(model, trainable_only):
    """Yield (name, whole tensor on the CPU), one at a time. All ranks must call and exhaust it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with whole(parameter):
                yield name, parameter.detach().cpu()


def save(engine, tokenizer, train_type, output_dir, epoch, progress, record, total_limit=None):
    """Write output_dir/epoch-E-step-S/ and point `latest` to it; returns its path. All ranks must call.

    epoch: counted from 1, of the last row. progress: where to go on. record: `train_record`.
    Raises OSError on every rank when rank 0 cannot write; earlier checkpoints stay as they are.
    """
    target = Path(output_dir) / f"epoch-{epoch}-step-{progress.step}"
    if dist.from_main(target.is_dir()):
        return target
    weights = gathered(engine.module, trainable_only=train_type.saves != "weights")
    tensors, randoms, problem = state.tensors_of(engine), state.random_states(engine.device), None
    if dist.is_main():
        temporary = Path(output_dir) / (TEMPORARY + target.name)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            _write_model(engine.module, tokenizer, train_type, temporary, weights)
            state.write(temporary / state.FOLDER, tensors, randoms, engine, progress)
            write_json({**record, "epoch": epoch, "step": progress.step}, temporary / "train_config.json")
            write_manifest(temporary)
            os.replace(temporary, target)
            write_text(target.name, Path(output_dir) / "latest")
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            problem = f"saving {target} failed: {error}. Earlier checkpoints are untouched."
    for _ in chain(weights, tensors):  # ranks that do not write take part in the gathering all the same
        pass
    dist.all_agree(problem)
    if dist.is_main() and total_limit:
        for old in checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return target


def _write_model(model, tokenizer, train_type, folder, weights):
    folder.mkdir(parents=True)
    if train_type.saves == "adapter":
        adapter = get_peft_model_state_dict(model, state_dict=dict(weights))
        write_tensors(adapter, folder / "adapter_model.safetensors")
        settings = dataclasses.replace(model.peft_config["default"], inference_mode=True)
        settings.save_pretrained(str(folder))
    else:
        model.save_weights(folder, weights)
    tokenizer.save_pretrained(folder)


def write_manifest(folder):
    """manifest.json: size and SHA-256 of every file of a checkpoint, the last file to be written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json({str(path.relative_to(folder)): describe(path) for path in files}, folder / MANIFEST)


def describe(path):
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    if not (folder / MANIFEST).is_file():
        return f"{folder}: no {MANIFEST}; it is not a complete checkpoint of this project."
    for name, expected in read_json(folder / MANIFEST).items():
        if not (folder / name).is_file():
            return f"{folder}: {name} is missing."
        if (folder / name).stat().st_size != expected["bytes"] or describe(folder / name) != expected:
            return f"{folder}: {name} is damaged (its size or hash is not that of {MANIFEST})."
    return None


def find_resume(resume, output_dir):
    """The checkpoint that --resume asks for, or None: "auto" takes the newest whole one in output_dir, if any.

    Only rank 0 needs to call. Damaged ones are named and passed over. Raises ValueError for a path that is damaged, has
    no state, or is of a newer format.
    """
    if resume != "auto":
        problem = damage(Path(resume)) or _unfit(Path(resume))
        if problem:
            raise ValueError(f"--resume {resume}: {problem}")
        return Path(resume)
    for folder in reversed(checkpoints(output_dir)):
        problem = damage(folder) or _unfit(folder)
        if problem is None:
            return folder
        print(f"--resume auto: {problem} The one before it is taken.", flush=True)
    return None


def choose_resume(config, record):
    """The folder to go on from, or None; rank 0 looks. All ranks must call.

    Raises ValueError on every rank if --resume names nothing to go on from, or another run.
    """
    if not config.resume:
        return None
    folder, problem = None, None
    if dist.is_main():
        try:
            folder = find_resume(config.resume, config.output_dir)
            if folder:
                check_same_run(folder, record, config.force)
        except ValueError as error:
            problem = str(error)
    folder, problem = dist.from_main((folder, problem))
    if problem:
        raise ValueError(problem)
    return folder


def _unfit(folder):
    if not (folder / state.FOLDER / "progress.json").is_file():
        return f"{folder}: has no {state.FOLDER}/ to go on from; give a folder epoch-E-step-S of a run."
    version = read_json(folder / "train_config.json").get("format_version", 0)
    return (
        f"{folder}: format {version}, this version reads up to {FORMAT_VERSION}." if version > FORMAT_VERSION else None
    )


def check_same_run(folder, record, force):
    """Raise ValueError naming what differs between a checkpoint and this run in what must not (`train_record`).

    force: allow other data and another base all the same; mode and train type must be equal in any case.
    """
    old = read_json(Path(folder) / "train_config.json")
    names = ["mode", "train_type"] + ([] if force else list({**record["identity"], **old.get("identity", {})}))
    before, now = ({**r, **r.get("identity", {})} for r in (old, record))
    different = [
        f"{name}: {before.get(name)} there, {now.get(name)} here" for name in names if before.get(name) != now.get(name)
    ]
    if different:
        hint = "" if force else " Where that is meant, add --force (not for mode and train type)."
        raise ValueError(f"--resume {folder} is of another run: {'; '.join(different)}.{hint}")


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("epoch-*") if re.fullmatch(CHECKPOINT, p.name)]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))
