"""The output folder of a run: held by one run at a time, and nothing deleted in it but what carries a run's marks.

    hold = lock(output_dir)                    # rank 0; before a checkpoint in it is chosen
    clear(output_dir)                          # all ranks must call; a run that begins anew

Marks: a checkpoint epoch-E-step-S has a manifest or train_config.json; metrics.jsonl, latest, best, runs and
tmp-epoch-E-step-S are a run's where the folder has a run's `.lock` or a checkpoint; in runs only the events are.
"""

import fcntl
import os
import re
import shutil
import socket
import time
from contextlib import ExitStack, suppress
from pathlib import Path

from glm_finetune import dist
from glm_finetune.errors import UserError

TEMPORARY = "tmp-"
MANIFEST = "manifest.json"
CHECKPOINT = r"epoch-\d+-step-\d+"  # name of its folder
OWN = ("metrics.jsonl", "latest", "best", "bad_rows.txt", "runs")
HOLDER = r"process \d+ on .*"  # what a run writes into .lock
TAKING_SECS = 0.5  # between taking a lock and saying so, at most


def check_output_dir(output_dir, overwrite, inputs=()):
    """Raise UserError if output_dir holds what is not a run's, or results that are not to be deleted (`overwrite`), or
    are among the paths that the run reads (inputs).
    """
    path = Path(output_dir)
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {output_dir} is a file.")
    results, is_foreign = sorted(filter(_is_result, path.glob("*"))), _holder(path) and not was_run(path)
    if results or is_foreign:
        _check_results(output_dir, results, is_foreign, overwrite, inputs)


def _check_results(output_dir, results, is_foreign, overwrite, inputs):
    foreign = [result.name for result in results if not is_marked(result)]
    if foreign or is_foreign:
        found = f"{', '.join(foreign[:5]) or '.lock'}, which no run of this project wrote"
        safe = "nothing there is deleted or written over. Choose another folder, or move it away."
        raise UserError(f"--output_dir {output_dir} holds {found}: {safe}")
    for name in filter(None, inputs):
        if {path.resolve() for path in results} & {Path(name).resolve(), *Path(name).resolve().parents}:
            raise UserError(f"--output_dir {output_dir}: {name} lies in it and is needed. Choose another folder.")
    if results and not overwrite:
        found = f"holds results already ({', '.join(result.name for result in results[:5])})"
        remedy = "Choose another folder, or add --overwrite_output_dir to delete them."
        raise UserError(f"--output_dir {output_dir} {found}. {remedy}")


def _is_result(path):
    return path.name in OWN or bool(re.fullmatch(f"({TEMPORARY})?{CHECKPOINT}", path.name))


def is_marked(path):
    """Whether something in an output folder is a run's."""
    if not re.fullmatch(CHECKPOINT, path.name):
        return was_run(path.parent)
    return any((path / name).is_file() for name in (MANIFEST, "train_config.json"))


def was_run(folder):
    """Whether a folder is or was the output folder of a run."""
    return bool(re.fullmatch(HOLDER, _holder(folder))) or any(map(is_marked, checkpoints(folder)))


def _holder(folder):
    """What .lock says of who has it or had it; nothing for the blink in which a first run makes it."""
    with suppress(OSError):
        return (folder / ".lock").read_text(encoding="utf-8", errors="replace")
    return ""


def clear(output_dir):
    """Delete the results of runs, on rank 0, which holds the lock. All ranks must call."""
    for path in filter(_is_result, Path(output_dir).glob("*")) if dist.is_main() else ():
        _delete(path)
    dist.barrier()


def _delete(path):
    if path.name == "runs":
        for events in path.glob("events.out.tfevents.*"):
            events.unlink()
        with suppress(OSError):  # somebody keeps something of his own in it
            path.rmdir()
    elif is_marked(path):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


class Hold:
    """Rank 0's lock of an output folder: until its process ends, or `give_back`. It is the kernel's, no file's."""

    def __init__(self, path):
        """path: a Path. Raises BlockingIOError while another run has it."""
        self.path, self.made = path, not path.exists()
        path.mkdir(parents=True, exist_ok=True)
        self.file = open(os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o666), "r+")  # noqa: SIM115 (the run's)
        fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(self.file.fileno()).st_nlink == 0:
            raise BlockingIOError("another run has given it back since it was opened: it has no name any more")
        self.before = _holder(path)
        self._write(f"process {os.getpid()} on {socket.gethostname()}")

    def _write(self, text):
        os.pwrite(self.file.fileno(), text.encode(), 0)
        self.file.truncate(len(text.encode()))

    def give_back(self):
        """Leave the folder as it was, for a run that is refused before it begins."""
        self._write(self.before)
        if not self.before:
            (self.path / ".lock").unlink()
        if self.made:
            with suppress(OSError):
                self.path.rmdir()
        self.file.close()


def lock(output_dir, overwrite=True, inputs=()):
    """Hold output_dir for this run, on rank 0, without what a killed run was still writing or deleting; returns a Hold.
    overwrite, inputs: as `check_output_dir`'s. Raises UserError if another run holds it.
    """
    try:
        with ExitStack() as refused:
            hold = _take(Path(output_dir))
            refused.callback(hold.give_back)
            check_output_dir(output_dir, overwrite, inputs)  # now: the run that had it may have left something
            for path in Path(output_dir).glob(TEMPORARY + "*"):
                if re.fullmatch(TEMPORARY + CHECKPOINT, path.name):  # not what merge_lora.py may be writing
                    shutil.rmtree(path)
            refused.pop_all()
    except OSError as error:  # a file system without locks, for one
        raise UserError(f"--output_dir {output_dir}: cannot be written or locked ({error}). Choose another.") from None
    return hold


def _take(folder):
    with suppress(BlockingIOError):
        return Hold(folder)
    return _take_later(folder)


def _take_later(folder):
    time.sleep(TAKING_SECS)  # it may be given back
    try:
        return Hold(folder)
    except BlockingIOError:
        text = f"--output_dir {folder}: another run ({_holder(folder)}) is writing to it. Choose another folder."
        raise UserError(text) from None


def step_of(folder):
    """The optimizer steps behind a checkpoint, from its name."""
    return int(folder.name.rpartition("-")[2])


def checkpoints(output_dir):
    """Complete checkpoints of a run, oldest first."""
    found = [p for p in Path(output_dir).glob("epoch-*") if re.fullmatch(CHECKPOINT, p.name)]
    return sorted(found, key=step_of)
