"""How a script ends: the user's fault as one message, SIGTERM with a save, a lost rank with its own words last.

with stop_request() as stop: ...       # stop.requested is True after SIGTERM or SIGUSR1
exit_with_message(main)
"""

import os
import re
import signal
import sys
import tempfile
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from glm_finetune import dist

RESUME_ME = 75  # exit code of a run that saved and stopped when it was asked to (EX_TEMPFAIL of sysexits.h)
LOST = r"connection (was )?(closed|reset|refused|timed out)|socket (closed|timeout)|NCCL|broken pipe|timed out"


class StopRequest:
    """Whether somebody asked the run to stop."""

    requested = False

    def note(self, signum, frame):
        self.requested = True


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
    """Run a script's main(), which may return an exit code; the user's fault becomes a message and exit code 2.

    Until the ranks have joined those of a machine fail alike, and the first speaks for them; after that each speaks for
    itself, and a rank that only lost the others repeats the words of the one that failed.
    With GLM_FINETUNE_TRACEBACK=1 in the environment there is a traceback after all.
    """
    try:
        code = main()
    except (ValueError, OSError, FloatingPointError, MemoryError) as error:
        if os.environ.get("GLM_FINETUNE_TRACEBACK"):
            raise
        _say(str(error))
        _leave(2)
    except RuntimeError as error:  # what torch raises when another rank is gone; anything else keeps its traceback
        if dist.world_size() == 1 or not re.search(LOST, str(error), re.IGNORECASE):
            _remember(traceback.format_exc())
            raise
        _say_lost(error)
        _leave(1)
    if code:
        sys.exit(code)


def _say(text):
    joined = dist.world_size() > 1
    if joined:
        _remember(f"rank {dist.rank()}: {text}")
    if dist.is_main():
        print(f"error: {text}", file=sys.stderr, flush=True)
    elif joined or os.environ.get("LOCAL_RANK") == "0":  # the first rank of another machine
        print(f"error on rank {os.environ['RANK']}: {text}", file=sys.stderr, flush=True)
    if not dist.is_main():
        time.sleep(1)  # launchers stop all ranks at the first exit: let rank 0 speak before


def _say_lost(error):
    time.sleep(1)  # the rank that failed may still be writing
    first_line = str(error).strip().splitlines()[0][:200]
    print(f"rank {dist.rank()} lost the others: {first_line}", file=sys.stderr, flush=True)
    if not dist.is_main():
        return
    path = _memory()
    words = (
        path.read_text(encoding="utf-8")
        if path.is_file()
        else (
            "another rank ended without a word: it was killed, most often by the system for lack of memory "
            "(dmesg | tail tells)."
        )
    )
    print(f"error: {words}", file=sys.stderr, flush=True)


def _memory():
    """The file in which a failing rank leaves its words for the others of its machine and launch."""
    name = f"glm-finetune-{os.getppid()}-{os.environ.get('MASTER_PORT', 0)}.error"
    return Path(tempfile.gettempdir()) / name


def _remember(text):
    if dist.world_size() > 1 and not _memory().is_file():
        _memory().write_text(text, encoding="utf-8")


def forget_errors():
    """Remove what an earlier launch may have left under the same name. Called at the start, on rank 0."""
    if dist.is_main():
        _memory().unlink(missing_ok=True)


def _leave(code):
    """Exit. Among several ranks at once: handlers at exit may wait for ranks that are gone."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.world_size() > 1:
        os._exit(code)
    sys.exit(code)


@contextmanager
def memory_advice(config, zero, quantized):
    """Turn running out of memory into a MemoryError with the flags that would help, in order.

    config: TrainConfig; zero: the zero_optimization section of the DeepSpeed configuration; quantized: the base is.
    """
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        tips = "".join(f"\n  {i}. {tip}" for i, tip in enumerate(_tips(config, zero, quantized), 1))
        reason = str(error).strip().splitlines()[0][:300]
        raise MemoryError(f"out of memory on rank {dist.rank()} ({reason}). What would help, in order:{tips}") from None


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
