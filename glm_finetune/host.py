"""Memory of this machine: what is free, and whether a model fits before it is read.

check_fits(num_bytes, "ChatGLM3-6B as fp32")        # UserError with the figures, and what would help
"""

from contextlib import suppress
from pathlib import Path

from glm_finetune.errors import UserError

CGROUP = Path("/sys/fs/cgroup")  # of a container, version 2


def free_bytes():
    """What this machine can still give, swap included; inside a container what that may still take, if it is less."""
    import psutil

    free = psutil.virtual_memory().available + psutil.swap_memory().free
    with suppress(OSError, ValueError):  # no container, or no limit ("max")
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        counts = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(counts["inactive_file"]) + int(counts["active_file"]))
    return free


def check_fits(num_bytes, what, tips):
    """Raise UserError for what takes more than is free; the system would kill the process in the middle."""
    if num_bytes > (free := free_bytes()):
        needs = f"{what} takes {num_bytes / 2**30:.1f} GiB of memory, {free / 2**30:.1f} GiB are free"
        raise UserError(f"{needs}. {tips}")
