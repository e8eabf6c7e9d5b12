"""What a run leaves: output_dir/epoch-E-step-S/ with weights or an adapter, tokenizer, train_config.json and `state`
(--save_state).

It is written under a temporary name and renamed when complete.
"""

import math
import os
import shutil
import sys
from itertools import chain
from pathlib import Path
from threading import Thread

from glm_finetune import dist
from glm_finetune.bars import counted
from glm_finetune.errors import NotWritten, UserError
from glm_finetune.record import copy_side_files, describe, write_record
from glm_finetune.run import state
from glm_finetune.run.engine import is_partitioned, whole
from glm_finetune.run.folder import MANIFEST, TEMPORARY, checkpoints, is_marked, step_of
from glm_finetune.tuning.adapter import exported
from glm_finetune.tuning.ptuning import write_prefix
from glm_finetune.weights import read_json, write_json, write_tensors, write_text


def gathered(model, trainable_only, to_keep=False):
    """Yield (name, whole tensor on the CPU), one at a time. All ranks must call and exhaust it.

    to_keep: training will not change the tensors. What is frozen and whole here is then no copy, on its device.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad or not trainable_only:
            stays = to_keep and not parameter.requires_grad and not is_partitioned(parameter)
            with whole(parameter):
                yield name, parameter.detach() if stays else parameter.detach().to("cpu", copy=to_keep)


class Saver:
    """Writes the checkpoints of a run, in the background where --async_save says so. All ranks must call its methods.

    record: `record.train_record`. best: {"step", "eval_loss", "checkpoint"} of the lowest loss on the evaluation data
    so far, or None.
    """

    def __init__(self, engine, tokenizer, train_type, config, record, best=None):
        self.engine, self.tokenizer, self.train_type, self.config = engine, tokenizer, train_type, config
        self.record, self.best = record, best
        self.thread = self.problem = self.newest = None

    def save(self, progress, run_state, eval_loss=None):
        """Write output_dir/epoch-E-step-S/, E counted from 1, and point `latest` to it; returns its path.

        progress: where to go on. run_state: of `state.of`. eval_loss: on the evaluation data, or None.
        Raises NotWritten on every rank when rank 0 cannot write; earlier checkpoints stay as they are.
        """
        epoch = max(1, progress.epoch + (progress.rows > 0))  # of the last row
        target = Path(self.config.output_dir) / f"epoch-{epoch}-step-{progress.step}"
        self.wait()
        if there := dist.from_main(self._there(progress.step) if dist.is_main() else None):
            return there
        if eval_loss is not None:
            self._compare(progress.step, eval_loss, target.name)
        tensors, randoms, numbers = run_state
        tensors = () if self.config.save_state == "no" else tensors
        known = randoms, {**numbers, "best": self.best}, {**self.record, "epoch": epoch, "step": progress.step}
        later = self.config.async_save and dist.is_main()
        weights = gathered(self.engine.module, self.train_type.saves != "weights", to_keep=later)
        if later:
            self.thread = Thread(target=self._write_later, args=(target, list(weights), list(tensors), *known))
            self.thread.start()
        elif dist.is_main():
            self._write(target, weights, tensors, *known)
        for _ in chain(weights, tensors):  # ranks that do not write take part in the gathering all the same
            pass
        if not self.config.async_save:
            self.wait()
        return target

    def _compare(self, step, eval_loss, name):
        if math.isfinite(eval_loss) and (self.best is None or eval_loss < self.best["eval_loss"]):
            self.best = {"step": step, "eval_loss": eval_loss, "checkpoint": name}

    def wait(self):
        """Until what is being written in the background is complete. Raises NotWritten on every rank if it failed."""
        if self.thread:
            self.thread.join()
        problem, self.problem = self.problem, None
        if problem and not isinstance(problem, NotWritten):
            raise problem
        dist.all_agree(problem)

    def _there(self, step):
        """The checkpoint of a step, or None: one that this run has written or went on from. Others are not whole."""
        found = [folder for folder in checkpoints(self.config.output_dir) if step_of(folder) == step]
        return next((folder for folder in found if folder == self.newest or damage(folder) is None), None)

    def _write_later(self, *parts):
        try:
            self._write(*parts)
        except Exception as error:  # what nobody expected must not end with the thread: `wait` raises it
            self.problem = error
        if self.problem:  # now: a run that ends for another reason may never come to `wait`
            print(f"\n{self.problem}", file=sys.stderr, flush=True)

    def _write(self, target, weights, tensors, randoms, numbers, record):
        temporary = target.with_name(TEMPORARY + target.name)
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            total, title = state.num_bytes(self.engine.module), f"save {target.name}"
            weights = counted(weights, f"{title}: weights", total[self.train_type.saves == "weights"])
            _write_model(self.engine.module, self.tokenizer, self.train_type, temporary, weights)
            if self.train_type.saves == "weights":
                copy_side_files(self.config.model_name_or_path, temporary)
            if self.config.save_state != "no":
                state.write(temporary / state.FOLDER, counted(tensors, f"{title}: state", total[-1]), randoms, numbers)
            write_record(record, temporary)
            write_manifest(temporary)
            if target.is_dir() and is_marked(target):
                shutil.rmtree(target)  # damaged: see `_there`
            os.replace(temporary, target)
            self.newest = target
            write_text(target.name, target.with_name("latest"))
            if numbers["best"]:
                write_text(numbers["best"]["checkpoint"], target.with_name("best"))
            if self.config.save_total_limit or self.config.save_state == "last":
                thin_out(target, self.config, numbers["best"])
        except OSError as error:
            shutil.rmtree(temporary, ignore_errors=True)
            self.problem = NotWritten(f"saving {target} failed: {error}. Earlier checkpoints are untouched.")


def thin_out(newest, config, best):
    """What --save_total_limit and --save_state take away once `newest` is whole."""
    if config.save_total_limit:
        forget_old(newest, config.save_total_limit, best)
    if config.save_state == "last":
        drop_states(newest)


def forget_old(newest, limit, best):
    """Delete all but the last `limit` whole checkpoints up to `newest`, just written, and the best (`Saver.best`).

    What is numbered higher was there before and was passed over as damaged: it counts for nothing.
    """
    whole = [folder for folder in checkpoints(newest.parent) if damage(folder, sizes_only=True) is None]
    for old in [folder for folder in whole if step_of(folder) <= step_of(newest)][:-limit]:
        if not best or old.name != best["checkpoint"]:
            gone = old.with_name(TEMPORARY + old.name)  # a half-deleted one must not look like a checkpoint
            os.replace(old, gone)
            shutil.rmtree(gone)


def drop_states(newest):
    """Delete the state of the whole checkpoints before `newest`, just written; without it they are whole all the same.

    The manifest forgets it first, then it gets a name that the next run deletes: killed at any moment all stay whole.
    """
    for folder in checkpoints(newest.parent):
        has_state = (folder / state.FOLDER).is_dir() and step_of(folder) < step_of(newest)
        if has_state and damage(folder, sizes_only=True) is None:
            kept = {name: entry for name, entry in _manifest(folder).items() if Path(name).parts[0] != state.FOLDER}
            write_json(kept, folder / MANIFEST)
            gone = folder.with_name(TEMPORARY + folder.name)
            os.replace(folder / state.FOLDER, gone)
            shutil.rmtree(gone)


def _write_model(model, tokenizer, train_type, folder, weights):
    folder.mkdir(parents=True)
    WRITE[train_type.saves](model, weights, folder)
    tokenizer.save_pretrained(folder)


def _write_adapter(model, weights, folder):
    tensors, settings = exported(model, dict(weights))
    write_tensors(tensors, folder / "adapter_model.safetensors")
    settings.save_pretrained(str(folder))


WRITE = {  # TrainType.saves -> what writes it
    "adapter": _write_adapter,
    "prefix": lambda model, weights, folder: write_prefix(model, dict(weights), folder),
    "weights": lambda model, weights, folder: model.save_weights(folder, weights),
}


def write_manifest(folder):
    """manifest.json: size and SHA-256 of every file of a checkpoint, the last file to be written."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json({str(path.relative_to(folder)): describe(path) for path in _hashed(files, folder)}, folder / MANIFEST)


def _hashed(files, folder):
    """The paths, with a bar of their bytes."""
    total = sum(path.stat().st_size for path in files if path.is_file())
    return counted(files, f"hash {folder.name.removeprefix(TEMPORARY)}", total, lambda path: path.stat().st_size)


def _manifest(folder):
    """{name of a file: what `describe` gave}. Raises UserError for a manifest that is damaged."""
    manifest = read_json(folder / MANIFEST)
    for name, entry in {"train_config.json": None, **manifest}.items():
        if not isinstance(entry, dict) or [type(entry.get(key)) for key in ("bytes", "sha256")] != [int, str]:
            raise UserError(f"{folder / MANIFEST}: has no size and hash of {name}.")
    return manifest


def damage(folder, sizes_only=False):
    """What is wrong with a checkpoint, or None. sizes_only: a look at names and sizes, fast."""
    if not (folder / MANIFEST).is_file():
        return f"{folder}: no {MANIFEST}; it is not a complete checkpoint of this project."
    try:
        manifest = _manifest(folder)
    except UserError as error:
        return f"{error} The checkpoint is damaged."
    if missing := [name for name in manifest if not (folder / name).is_file()]:
        return f"{folder}: {missing[0]} is missing."
    for path in _hashed([folder / name for name in manifest], folder):
        expected = manifest[str(path.relative_to(folder))]
        if path.stat().st_size != expected["bytes"] or not sizes_only and describe(path) != expected:
            return f"{folder}: {path.relative_to(folder)} is damaged (its size or hash is not that of {MANIFEST})."
    return None
