"""What a training run leaves: output_dir/epoch-E-step-S/ with weights or an adapter, tokenizer and train_config.json.

A checkpoint is written under a temporary name and renamed when complete; what a run needs to go on is `state`'s.
"""

import fcntl
import math
import os
import re
import shutil
import socket
from itertools import chain
from pathlib import Path
from threading import Thread

from glm_finetune import dist
from glm_finetune.errors import UserError
from glm_finetune.record import describe, write_record
from glm_finetune.run import state
from glm_finetune.run.engine import whole
from glm_finetune.tuning.adapter import exported
from glm_finetune.tuning.ptuning import write_prefix
from glm_finetune.weights import read_json, write_json, write_tensors, write_text

TEMPORARY = "tmp-"
MANIFEST = "manifest.json"
CHECKPOINT = r"epoch-\d+-step-\d+"  # name of its folder


def check_output_dir(output_dir, overwrite, inputs=()):
    """Raise UserError if output_dir holds results and `overwrite` is False, or if deleting them would delete an input.

    inputs: paths that the run reads. Called before the ranks start together.
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file.")
    for result in filter(_is_result, path.glob("*")):
        for name in filter(None, inputs):
            if result.resolve() in (Path(name).resolve(), *Path(name).resolve().parents):
                raise UserError(f"--output_dir {output_dir}: {name} lies in it and is needed. Choose another folder.")
    results = sorted(p.name for p in path.glob("*") if _is_result(p))
    if results and not overwrite:
        raise UserError(
            f"--output_dir {output_dir} holds results already ({', '.join(results[:5])}). "
            "Choose another folder, or add --overwrite_output_dir to delete them."
        )


def create_output_dir(output_dir, overwrite):
    """Delete old results and create the folder, on rank 0, which holds its `lock`. All ranks must call.

    Raises UserError on every rank if `overwrite` is False and another run has left results since `check_output_dir`.
    """
    problem = None
    if dist.is_main():
        try:
            check_output_dir(output_dir, overwrite)
            for result in filter(_is_result, Path(output_dir).glob("*")):
                shutil.rmtree(result) if result.is_dir() else result.unlink()
            Path(output_dir).mkdir(parents=True, exist_ok=True)
        except UserError as error:
            problem = str(error)
    problem = dist.from_main(problem)
    if problem:
        raise UserError(problem)


def _is_result(path):
    return (
        bool(re.fullmatch(CHECKPOINT, path.name))
        or path.name in ("metrics.jsonl", "runs", "latest", "best")
        or (path.name.startswith(TEMPORARY))
    )


def gathered(model, trainable_only):
    """Yield (name, whole tensor on the CPU), one at a time. All ranks must call and exhaust it."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            with whole(parameter):
                yield name, parameter.detach().cpu()


class Saver:
    """Writes the checkpoints of a run, in the background where --async_save says so. All ranks must call its methods.

    best: {"step", "eval_loss", "checkpoint"} of the lowest loss on the evaluation data so far, or None.
    """

    def __init__(self, engine, tokenizer, train_type, config, record, lock, best=None):
        """record: `record.train_record`. lock: of `lock`, held as long as this lives. best: of an earlier run."""
        self.engine, self.tokenizer, self.train_type, self.config = engine, tokenizer, train_type, config
        self.record, self.best = record, best
        self.lock, self.thread, self.problem, self.newest = lock, None, None, None

    def save(self, epoch, progress, eval_loss=None):
        """Write output_dir/epoch-E-step-S/ and point `latest` to it; returns its path.

        epoch: counted from 1, of the last row. progress: where to go on. eval_loss: on the evaluation data, or None.
        Raises NotWritten on every rank when rank 0 cannot write; earlier checkpoints stay as they are.
        """
        target = Path(self.config.output_dir) / f"epoch-{epoch}-step-{progress.step}"
        self.wait()
        there = dist.from_main(self._there(progress.step) if dist.is_main() else None)
        if there:
            return there
        is_number = eval_loss is not None and math.isfinite(eval_loss)
        if is_number and (self.best is None or eval_loss < self.best["eval_loss"]):
            self.best = {"step": progress.step, "eval_loss": eval_loss, "checkpoint": target.name}
        record = {**self.record, "epoch": epoch, "step": progress.step}
        numbers = {**state.numbers_of(self.engine, progress), "best": self.best}
        weights = gathered(self.engine.module, trainable_only=self.train_type.saves != "weights")
        tensors, randoms = state.tensors_of(self.engine), state.random_states(self.engine.device)
        if dist.is_main() and self.config.async_save:
            parts = (target, _copies(weights), _copies(tensors), randoms, numbers, record)
            self.thread = Thread(target=self._write_in_background, args=parts)
            self.thread.start()
        elif dist.is_main():
            self._write(target, weights, tensors, randoms, numbers, record)
        for _ in chain(weights, tensors):  # ranks that do not write take part in the gathering all the same
            pass
        if not self.config.async_save:
            self.wait()
        return target

    def wait(self):
        """Until what is being written in the background is complete. Raises NotWritten on every rank if it failed."""
        if self.thread:
            self.thread.join()
            self.thread = None
        problem, self.problem = self.problem, None
        if isinstance(problem, Exception):
            raise problem
        dist.all_agree(problem)

    def _there(self, step):
        """The checkpoint of a step, or None: one that this run has written or went on from. Others are not whole."""
        for folder in checkpoints(self.config.output_dir):
            if step_of(folder) == step and (folder == self.newest or damage(folder) is None):
                return folder
        return None

    def _write_in_background(self, *parts):
        try:
            self._write(*parts)
        except Exception as error:  # what nobody expected must not end with the thread: `wait` raises it
            self.problem = error

    def _write(self, target, weights, tensors, randoms, numbers, record):
        temporary = target.with_name(TEMPORARY + target.name)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            _write_model(self.engine.module, self.tokenizer, self.train_type, temporary, weights)
            state.write(temporary / state.FOLDER, tensors, randoms, numbers)
            write_record(record, temporary)
            write_manifest(temporary)
            if target.is_dir():
                shutil.rmtree(target)  # damaged: see `_there`
            os.replace(temporary, target)
            self.newest = target
            write_text(target.name, target.with_name("latest"))
            if numbers["best"]:
                write_text(numbers["best"]["checkpoint"], target.with_name("best"))
            if self.config.save_total_limit:
                forget_old(target, self.config.save_total_limit, numbers["best"])
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.problem = f"saving {target} failed: {error}. Earlier checkpoints are untouched."


def _copies(entries):
    """[(name, copy)] that training does not change; on CPUs what is gathered is the parameter itself."""
    return [(name, tensor.clone()) for name, tensor in entries]


def lock(output_dir):
    """Hold output_dir for this run until its process ends; returns rank 0's open file. All ranks must call.

    Removes what a killed run was still writing or deleting. Raises UserError on every rank if another run holds it.
    """
    file, problem = None, None
    if dist.is_main():
        try:
            Path(output_dir).mkdir(parents=True, exist_ok=True)
            file = open(Path(output_dir) / ".lock", "a+", encoding="utf-8")  # noqa: SIM115 (held as long as the run)
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
            for path in Path(output_dir).glob(TEMPORARY + "*"):
                if re.fullmatch(TEMPORARY + CHECKPOINT, path.name):  # not what merge_lora.py may be writing
                    shutil.rmtree(path)
        except BlockingIOError:
            file.seek(0)
            problem = f"--output_dir {output_dir}: another run ({file.read()}) is writing to it. Choose another folder."
        except OSError as error:  # a file system without locks, for one
            problem = f"--output_dir {output_dir}: cannot be written to or locked ({error}). Choose another folder."
    problem = dist.from_main(problem)
    if problem:
        raise UserError(problem)
    return file


def forget_old(newest, limit, best):
    """Delete all but the last `limit` whole checkpoints up to `newest`, just written, and the best (`Saver.best`).

    What is numbered higher was there before and was passed over as damaged: it counts for nothing.
    """
    whole = [folder for folder in checkpoints(newest.parent) if not _missing_bytes(folder)]
    for old in [folder for folder in whole if step_of(folder) <= step_of(newest)][:-limit]:
        if not best or old.name != best["checkpoint"]:
            gone = old.with_name(TEMPORARY + old.name)  # a half-deleted one must not look like a checkpoint
            os.replace(old, gone)
            shutil.rmtree(gone)


def _missing_bytes(folder):
    """Whether a file of a checkpoint is missing or of another size; a look at the names only, fast."""
    if not (folder / MANIFEST).is_file():
        return True
    sizes = ((folder / name, value["bytes"]) for name, value in read_json(folder / MANIFEST).items())
    return any(not path.is_file() or path.stat().st_size != size for path, size in sizes)


def _write_model(model, tokenizer, train_type, folder, weights):
    folder.mkdir(parents=True)
    if train_type.saves == "adapter":
        tensors, settings = exported(model, dict(weights))
        write_tensors(tensors, folder / "adapter_model.safetensors")
        settings.save_pretrained(str(folder))
    elif train_type.saves == "prefix":
        write_prefix(model, dict(weights), folder)
    else:
        model.save_weights(folder, weights)
    tokenizer.save_pretrained(folder)


def write_manifest(folder):
    """manifest.json: size and SHA-256 of every file of a checkpoint, the last file to be written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json({str(path.relative_to(folder)): describe(path) for path in files}, folder / MANIFEST)


def damage(folder):
    """What is wrong with a checkpoint, or None."""
    if not (folder / MANIFEST).is_file():
        return f"{folder}: no {MANIFEST}; it is not a complete checkpoint of this project."
    try:
        manifest = read_json(folder / MANIFEST)
    except UserError as error:
        return f"{error} The checkpoint is damaged."
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{folder}: {name} is missing."
        if (folder / name).stat().st_size != expected["bytes"] or describe(folder / name) != expected:
            return f"{folder}: {name} is damaged (its size or hash is not that of {MANIFEST})."
    return None


def step_of(folder):
    """The optimizer steps behind a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("epoch-*") if re.fullmatch(CHECKPOINT, p.name)]
    return sorted(found, key=step_of)
