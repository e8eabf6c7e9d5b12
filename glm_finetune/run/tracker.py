"""Numbers of a run: a fixed-column line in the terminal, metrics.jsonl, TensorBoard; nothing on ranks other than 0."""

import json
import math
import resource
import time
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from glm_finetune import dist
from glm_finetune.weights import write_text

COLUMNS = dict(epoch="7.3f", step="7d", loss="9.5f", lr="9.3e", grad_norm="9.4f", tokens_per_s="9.0f", peak_gib="7.2f")


class Tracker:
    """Rank 0's. `step` moves the bar; `log` writes a record; `say` prints a line above the bar."""

    def __init__(self, output_dir, logging_dir, total_steps, first_step=0):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(logging_dir or str(Path(output_dir) / "runs"), purge_step=first_step + 1)
        self.file = open(Path(output_dir) / "metrics.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed by close)
        self.bar = tqdm(total=total_steps, initial=first_step, desc="train", unit=" steps", dynamic_ncols=True)
        self.step, self.say = self.bar.update, self.bar.write

    def log(self, step, **values):
        """values: numbers by name; those in COLUMNS are shown in this order, all are written."""
        record = {"step": step, **values}
        shown = [f"{name} {record[name]:{form}}" for name, form in COLUMNS.items() if name in record]
        shown += [f"{name} {value:.5f}" for name, value in record.items() if name not in COLUMNS]
        self.say("  ".join(shown))
        finite = {name: value if math.isfinite(value) else None for name, value in record.items()}  # JSON has no inf
        self.file.write(json.dumps(finite) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(f"train/{name}" if name in COLUMNS else name, value, step)

    def close(self):
        for part in (self.bar, self.file, self.writer):
            part.close()


class SilentTracker:
    """The same calls on every other rank."""

    step = log = say = close = lambda self, *values, **named: None


def new_tracker(config, total_steps, first_step):
    """The tracker of this rank. first_step: steps that an earlier run did; what it logged beyond them is dropped."""
    if not dist.is_main():
        return SilentTracker()
    forget_peak()
    if (metrics := Path(config.output_dir) / "metrics.jsonl").is_file():
        _forget_after(metrics, first_step)
    return Tracker(config.output_dir, config.logging_dir, total_steps, first_step)


def _forget_after(path, step):
    """Keep the lines of metrics.jsonl up to a step; a line that was half written is dropped too."""
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    write_text("".join(line + "\n" for line in lines if json.loads(line)["step"] <= step), path)


class Meter:
    """Sums over all ranks since the last log line."""

    def __init__(self):
        self.start()

    def start(self):
        self.loss = self.targets = self.tokens = 0
        self.since = time.perf_counter()

    def add(self, loss, num_targets, num_tokens):
        """A step: mean loss of its target tokens, their number, and that of all tokens with padding."""
        self.loss += loss * num_targets
        self.targets += num_targets
        self.tokens += num_tokens

    def read(self):
        """Mean loss of a target token (nan when no step counted), and tokens (with padding) a second."""
        return self.loss / self.targets if self.targets else math.nan, self.tokens / (time.perf_counter() - self.since)


def forget_peak():
    """Count the resident peak of a CPU from here on, without the files that were mapped while they were read."""
    with suppress(OSError):  # no /proc
        Path("/proc/self/clear_refs").write_text("5")


def peak_gib(device):
    """Peak memory of this rank in GiB: allocated on the card, or resident on a CPU since `forget_peak`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # which is in KiB
