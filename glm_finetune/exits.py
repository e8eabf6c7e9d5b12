"""How a script ends: a UserError as one message, SIGTERM with a save, a lost rank with its own words last.

with stop_request() as stop: ...       # stop.requested is True after SIGTERM or SIGUSR1
exit_with_message(main)

A rank ends with 0 when the run is complete, 75 when it saved because it was asked to stop, 2 for the user's fault, 1
for any other error and when it lost the other ranks. What launchers make of it (DeepSpeed 0.19.8, torch 2.13.0, held
by tests/test_interruptions.py):

SIGTERM to       deepspeed                                             torchrun
a rank, or all   ends with 75                                          ends with 1; its report has "exitcode : 75"
the launcher     ends with 143 at once and tells nobody; the ranks     passes it on, waits, ends with 1
                 notice that it is gone, save and end

A launcher that passes the signal on, or that sees a rank end, kills what is left after 30 seconds; ranks that get it
from elsewhere have the time they need for their step, the evaluation of a save that is under way, and the save. Asked
before the first step, while the model is read, a rank ends at once by the signal: there is nothing to save. So a script
that wants the 75 signals the ranks (run_scripts/glm3_lora_preemptible_1card.sh); one that cannot starts again with
--resume auto whatever the code was, until it is 0.
"""

import errno
import json
import os
import re
import signal
import sys
import tempfile
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from tqdm import tqdm

from glm_finetune import dist
from glm_finetune.errors import OutOfMemory, UserError

RESUME_ME = 75  # exit code of a run that saved and stopped when it was asked to (EX_TEMPFAIL of sysexits.h)
# What gloo, nccl and the store of torch.distributed say when a rank is gone; each was seen, or is in their libraries.
LOST = (
    r"connection (was )?(likely )?(closed|reset|refused|timed out)|closed the connection|socket (unexpectedly )?closed|"
    r"broken pipe|timed? ?out|connectFullMesh failed|remote process"
)
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # of OSErrors: no bug
KILLED = (
    "a rank ended without a word. It was killed, most often by the system for lack of memory (dmesg | tail tells); "
    "if it is on another machine, the output there may say more."
)


class StopRequest:
    """Whether somebody asked the run to stop: by a signal, or by ending the launcher above it.

    DeepSpeed's `deepspeed` dies of SIGTERM and passes it to nobody; its ranks would train on without it.
    """

    def __init__(self):
        self.signalled, self.launchers = False, _launchers()

    def note(self, signum, frame):
        self.signalled = True

    @property
    def requested(self):
        return self.signalled or _launchers() != self.launchers


def _launchers():
    """Process numbers of DeepSpeed's launcher and of what started it; () when this is not one of its ranks."""
    parent = Path(f"/proc/{os.getppid()}")
    try:
        if b"deepspeed.launcher.launch" not in (parent / "cmdline").read_bytes():
            return ()
        return os.getppid(), int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return ()


@contextmanager
def stop_request():
    """A StopRequest that notes SIGTERM and SIGUSR1 (what schedulers send before they take a machine away)."""
    request = StopRequest()
    before = {number: signal.signal(number, request.note) for number in (signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def exit_with_message(main):
    """Run a script's main(), which may return an exit code; a UserError becomes a message and exit code 2.

    Of several ranks that say the same, as they do before they have joined, the first speaks. Any other error keeps its
    traceback, exit code 1. A rank that only lost the others says so, and one of these repeats the words of the rank
    that failed, so that they come last. With GLM_FINETUNE_TRACEBACK=1 in the environment there is always a traceback.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
        _leave(1)
    except Exception as error:  # nothing is swallowed: it is printed, kept for the other ranks, and ends the process
        if isinstance(error, UserError) or getattr(error, "errno", None) in OF_THE_DISK:
            if os.environ.get("GLM_FINETUNE_TRACEBACK"):
                traceback.print_exc()
            for bar in list(getattr(tqdm, "_instances", ())):  # the words begin on a line of their own
                bar.close()
            _say(str(error))
            _leave(2)
        if dist.world_size() == 1:
            raise
        if isinstance(error, RuntimeError) and re.search(LOST, str(error), re.IGNORECASE):
            _say_lost(error)
        else:
            traceback.print_exc()
            _remember(traceback.format_exc().strip())
        _leave(1)
    if code:
        _finish_undisturbed()
        sys.exit(code)


def _say(text):
    """The words of a rank that fails, unless one before it says the same."""
    if not _among_others():
        print(f"error: {text}", file=sys.stderr, flush=True)
        return
    _finish_undisturbed()
    _remember(text)
    if not dist.is_main():
        time.sleep(0.5)  # launchers stop all ranks at the first exit: let rank 0 speak before
    if not any(words == text and rank < _rank() for rank, words in _remembered()):
        print("error" if dist.is_main() else f"error on rank {_rank()}", text, sep=": ", file=sys.stderr, flush=True)


def _say_lost(error):
    """The words of a rank that only lost the others; the first of these also repeats those of the rank that failed."""
    _finish_undisturbed()
    _remember(None)
    time.sleep(1)  # the rank that failed may still be writing
    first_line = str(error).strip().splitlines()[0][:200]
    print(f"\nrank {_rank()} lost the others: {first_line}", file=sys.stderr, flush=True)
    remembered = _remembered()
    if any(words is None and rank < _rank() for rank, words in remembered):
        return
    time.sleep(0.5)
    causes = [f"rank {rank}: {words}" for rank, words in remembered if words is not None] or [KILLED]
    print(f"error: {causes[0]}", file=sys.stderr, flush=True)


def _rank():
    return int(os.environ.get("RANK", 0))


def _among_others():
    """Whether there are other ranks, also before they have joined and after they have parted."""
    return int(os.environ.get("WORLD_SIZE", 1)) > 1


def _finish_undisturbed():
    """Ignore SIGTERM: launchers send it to the rest when a rank has ended, which may still be speaking or writing."""
    if _among_others():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _memory():
    """The file in which the ranks of this machine and launch leave their words: a line [rank, words or null] each."""
    name = f"glm-finetune-{os.getuid()}-{os.getppid()}-{os.environ.get('MASTER_PORT', 0)}.error"
    return Path(tempfile.gettempdir()) / name


def _remember(words):
    with suppress(OSError):  # a full disk must not hide the error that is to be told
        file = os.open(_memory(), os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o600)
        os.write(file, (json.dumps([_rank(), words]) + "\n").encode())
        os.close(file)


def _remembered():
    """[(rank, words)] of this launch, those that failed first at the front."""
    with suppress(OSError):
        return [json.loads(line) for line in _memory().read_text(encoding="utf-8").splitlines()]
    return []


def forget_errors():
    """Remove what an earlier launch may have left under the same name. Called at the start, on rank 0."""
    if dist.is_main():
        with suppress(OSError):
            _memory().unlink()


def _leave(code):
    """Exit. Among several ranks without handlers, which may wait for ranks that are gone, but after what is written."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.world_size() > 1:
        for thread in threading.enumerate():
            if not thread.daemon and thread is not threading.main_thread():
                thread.join()
        os._exit(code)
    sys.exit(code)


@contextmanager
def memory_advice(config, zero, quantized):
    """Turn running out of memory into an OutOfMemory with the flags that would help, in order.

    config: TrainConfig; zero: the zero_optimization section of the DeepSpeed configuration; quantized: the base is.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        tips = "".join(f"\n  {i}. {tip}" for i, tip in enumerate(_tips(config, zero, quantized), 1))
        reason = str(error).strip().splitlines()[0][:300]
        raise OutOfMemory(f"out of memory on rank {dist.rank()} ({reason}). What would help, in order:{tips}") from None


def _tips(config, zero, quantized):
    batch, accumulate = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        yield (
            f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {accumulate * 2} "
            "(the same steps, the same loss)"
        )
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing (the same loss, a third slower)"
    if dist.world_size() > 1 and zero["stage"] < 3:
        yield "--ds_file ds_zero3_no_offload.json (weights divided among the cards, the same loss)"
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        stage = 3 if zero["stage"] == 3 else 2
        yield f"--ds_file ds_zero{stage}_offload.json (optimizer in host memory, the same loss)"
    yield f"--max_len below {config.max_len} (longer samples are cut)"
    if not quantized:
        yield "--train_type qlora (LoRA on a base in 4 bit)"
