"""A run that is asked to stop: it ends its step, saves and ends with 75.

    with stop_request() as stop: ...       # stop.requested is True after SIGTERM, SIGUSR1 or Ctrl-C

A rank ends with 75 when it saved because it was asked to stop. What launchers make of it (DeepSpeed 0.19.8, torch
2.13.0):

SIGTERM to       deepspeed                                             torchrun
a rank, or all   ends with 75                                          ends with 1; its report has "exitcode : 75"
the launcher     ends with 143 at once and tells nobody; the ranks     passes it on, waits, ends with 1
                 notice that it is gone, save and end

A launcher that passes the signal on, or that sees a rank end, kills what is left after 30 seconds; ranks that get it
from elsewhere have the time they need. Asked before the first step a rank ends at once by the signal. So a script that
wants the 75 signals the ranks (run_scripts/glm3_lora_preemptible_1card.sh); one that cannot starts again with --resume
auto until the code is 0. Ctrl-C reaches launcher and ranks: the run saves and ends; pressed again it ends at once,
under a launcher, which repeats the first one, after REPEAT_SECS.
"""

import os
import signal
import time
from contextlib import contextmanager, suppress
from pathlib import Path

RESUME_ME = 75  # exit code of a run that saved and stopped when it was asked to (EX_TEMPFAIL of sysexits.h)
REPEAT_SECS = 2  # within which a second Ctrl-C is the launcher's, which passes on what the ranks have got already


class StopRequest:
    """Whether somebody asked the run to stop: by a signal, or by ending the launcher above it, which tells nobody."""

    def __init__(self):
        self.signalled, self.launchers = None, _launchers()
        self.repeats_secs = REPEAT_SECS if self.launchers or "TORCHELASTIC_RUN_ID" in os.environ else 0

    def note(self, signum, frame):
        """The first signal asks; another Ctrl-C, that no launcher repeats, ends the process at once."""
        if signum == signal.SIGINT and self.signalled and time.monotonic() - self.signalled >= self.repeats_secs:
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        self.signalled = self.signalled or time.monotonic()

    @property
    def requested(self):
        return self.signalled is not None or _launchers() != self.launchers


def _launchers():
    """Process numbers of DeepSpeed's launcher and of what started it; () when this is not one of its ranks."""
    parent = Path(f"/proc/{os.getppid()}")
    with suppress(OSError):
        if b"deepspeed.launcher.launch" in (parent / "cmdline").read_bytes():
            return os.getppid(), int((parent / "stat").read_text().rpartition(")")[2].split()[1])
    return ()


@contextmanager
def stop_request():
    """A StopRequest that notes Ctrl-C, SIGTERM and SIGUSR1 (what schedulers send before they take a machine away)."""
    request = StopRequest()
    before = {n: signal.signal(n, request.note) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
