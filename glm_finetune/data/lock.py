"""A lock between processes of a machine that have no collective in common, or must not run into its time limit.

with locked("cache/abc.lock"): ...
"""

import fcntl
import time
from contextlib import contextmanager
from pathlib import Path

POLL_SECS = 0.1


@contextmanager
def locked(path):
    """Hold a lock file, waiting for whoever has it. It is the kernel's: it does not outlive the process."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(POLL_SECS)
        yield
