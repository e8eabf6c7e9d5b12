"""How a script ends: a UserError as one message, a bug with its traceback, a lost rank with the other's words last.

exit_with_message(main)    # ends with 0, 2 for the user's fault, 1 for all else; a run also with 75 (`run.stop`)
"""

import errno
import json
import os
import re
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from contextlib import nullcontext, suppress

from tqdm import tqdm

from glm_finetune import dist
from glm_finetune.errors import UserError

# What gloo, nccl and the store of torch.distributed say when a rank is gone; each was seen, or is in their libraries.
LOST = (
    r"connection (was )?(likely )?(closed|reset|refused|timed out)|closed the connection|socket (unexpectedly )?closed|"
    r"broken pipe|timed? ?out|connectFullMesh failed|remote process"
)
SAME_SECS = 1  # within which ranks fail together
ALONE_SECS = 3
OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO)  # of OSErrors: no bug
KILLED = (
    "a rank ended without a word. It was killed, most often by the system for lack of memory (dmesg | tail tells); "
    "if it is on another machine, the output there may say more."
)


def exit_with_message(main):
    """Run a script's main(), which may return an exit code; a UserError becomes a message and exit code 2.

    Any other error keeps its traceback, exit code 1; all do with GLM_FINETUNE_TRACEBACK=1 in the environment.
    """
    try:
        code = main()
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read the output, such as head, has seen enough
        _leave_reader()
    except Exception as error:  # nothing is swallowed: it is printed, kept for the other ranks, and ends the process
        _end_with(error)
    if code:
        _finish_undisturbed()
        sys.exit(code)


def _leave_reader():
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what Python flushes at its end
    _leave(1)


def _end_with(error):
    if isinstance(error, UserError) or getattr(error, "errno", None) in OF_THE_DISK:
        if os.environ.get("GLM_FINETUNE_TRACEBACK"):
            traceback.print_exc()
        for bar in list(getattr(tqdm, "_instances", ())):  # the words begin on a line of their own
            bar.close()
        _say(str(error))
        _leave(2)
    if dist.world_size() == 1:
        raise error
    if isinstance(error, RuntimeError) and re.search(LOST, str(error), re.IGNORECASE):
        _say_lost(error)
    else:
        traceback.print_exc()
        _remember(traceback.format_exc().strip())
    _leave(1)


def share_words():
    """Open a file in which the ranks of a machine leave their last words. All ranks must call.

    It has no name once all have opened it, so that nothing is left of it however they end.
    """
    local = os.environ.get("LOCAL_RANK") == "0"
    with tempfile.NamedTemporaryFile() if local else nullcontext() as file:
        names = dist.gather_objects((socket.gethostname(), file and file.name))
        name = next((name for host, name in names if host == socket.gethostname() and name), os.devnull)
        _words.append(open(name, "a+", encoding="utf-8"))  # noqa: SIM115 (until the process ends)
        dist.barrier()


_words = []  # the file of `share_words`, once there is one


def _remember(words):
    """Leave words, or None for a rank that lost the others; returns [[rank, words, time]] of all so far, in order."""
    with suppress(OSError):  # a full disk must not hide the error that is to be told
        for file in _words[-1:]:
            file.write(json.dumps([dist.launched()[0], words, time.monotonic()]) + "\n")
            file.flush()
    return _remembered()


def _remembered():
    with suppress(OSError, ValueError):  # one may be half written
        for file in _words[-1:]:
            return [json.loads(line) for line in os.pread(file.fileno(), 2**20, 0).decode().splitlines()]
    return []


def _say(text):
    """The words of a rank that fails; of those that say the same together, only rank 0's."""
    rank, world_size = dist.launched()
    if world_size > 1 and _words:
        _finish_undisturbed()
        _remember(text)
        end = time.monotonic() + SAME_SECS
        while rank and time.monotonic() < end:
            if [0, text] in [entry[:2] for entry in _remembered()]:
                return
            time.sleep(0.01)
    elif rank:  # before they have joined all ranks check the same: the launcher ends this one when rank 0 has spoken
        time.sleep(ALONE_SECS)
    print("error" if rank == 0 else f"error on rank {rank}", text, sep=": ", file=sys.stderr, flush=True)


def _say_lost(error):
    """The words of a rank that only lost the others; repeats those of the rank that failed unless another does."""
    _finish_undisturbed()
    print(
        f"\nrank {dist.rank()} lost the others: {str(error).strip().splitlines()[0][:200]}", file=sys.stderr, flush=True
    )
    told = _remember(None)
    causes = [f"rank {rank}: {words}" for rank, words, _ in told if words is not None] or [KILLED]
    lost = [(rank, at) for rank, words, at in told if words is None]
    if not lost or (lost[0][0] == dist.launched()[0] or lost[-1][1] - lost[0][1] > SAME_SECS):
        time.sleep(SAME_SECS)  # others lose the rest now
        print(f"error: {causes[0]}", file=sys.stderr, flush=True)


def _finish_undisturbed():
    """Ignore SIGTERM: launchers send it to the rest when a rank has ended, which may still be speaking or writing."""
    if dist.launched()[1] > 1:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _leave(code):
    """Exit. Among several ranks without handlers, which may wait for ranks that are gone, but after what is written."""
    sys.stdout.flush()
    sys.stderr.flush()
    if dist.world_size() > 1:
        for thread in [t for t in threading.enumerate() if not t.daemon and t is not threading.main_thread()]:
            thread.join()
        os._exit(code)
    sys.exit(code)
