"""Blocks of a file -> arrays of tokens, in worker processes, in the order of the file and in constant memory.

Workers are started from a fork server, not forked: the process that asks may hold CUDA and threads. They get the recipe
once and a `Block` at a time, and give back plain arrays, about 5 bytes a token; no more than PENDING_PER_WORKER blocks
are under way for each, so that memory does not grow with the file. More than half of the time is SentencePiece's own;
rendering a block twice, to encode all its texts in one call, was tried and took as long.

    for samples in tokenize(layout.blocks, recipe, num_workers=8): ...
"""

import multiprocessing
import os
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing.connection import wait

import numpy as np

from glm_finetune.data.files import BLOCK_BYTES, rows_of
from glm_finetune.data.recipe import Report
from glm_finetune.loss import IGNORE

PENDING_PER_WORKER = 2
SLOW_IMPORTS = ("torch", "transformers", "peft")  # what a worker would import again because the main script does
MIN_BYTES_OF_WORKER = 8 * BLOCK_BYTES  # one or two seconds of work; starting processes takes as long

# The arrays of prepared samples. N samples, T tokens of all of them together.
COLUMNS = {
    "input_ids": np.int32,  # (T,)
    "is_target": np.bool_,  # (T,) where the label is the token itself; elsewhere it is -100
    "ends": np.int64,  # (N,) where a sample ends in them; it begins where the one before ends
    "num_prefix": np.int32,  # (N,)
    "numbers": np.int64,  # (N,) line or entry of the file, from 1
}


@dataclass
class Samples:
    """columns: an array for each of COLUMNS. report: of the rows they came from. unit: what `numbers` counts."""

    columns: dict
    report: Report
    unit: str

    def after(self, num_tokens):
        """The columns of these samples when `num_tokens` tokens of others lie in front of them."""
        return {**self.columns, "ends": self.columns["ends"] + num_tokens}


def tokenize_block(recipe, block):
    """The samples of a block. Raises ValueError naming file and line for a row that is none."""
    report, ids, labels, ends, num_prefix, numbers = Report(), [], [], [], [], []
    for number, row in rows_of(block):
        for sample in recipe.samples(row, f"{block.path}, {block.unit} {number}", report):
            ids += sample.input_ids
            labels += sample.labels
            ends.append(len(ids))
            report.longest = max(report.longest, len(sample.input_ids))
            num_prefix.append(sample.num_prefix)
            numbers.append(number)
    lists = {"input_ids": ids, "ends": ends, "num_prefix": num_prefix, "numbers": numbers}
    columns = {name: np.fromiter(values, COLUMNS[name], len(values)) for name, values in lists.items()}
    labels = np.fromiter(labels, np.int32, len(labels))
    columns["is_target"] = labels != IGNORE
    same = labels == columns["input_ids"]
    assert (same | ~columns["is_target"]).all(), "a label that is neither -100 nor the token itself cannot be stored"
    report.kept, report.tokens, report.targets = len(ends), len(ids), int(columns["is_target"].sum())
    return Samples(columns, report, block.unit)


def tokenize(blocks, recipe, num_workers):
    """Yield the Samples of each block, in order. num_workers: 0 = in this process."""
    if not num_workers:
        for block in blocks:
            yield tokenize_block(recipe, block)
        return
    context = multiprocessing.get_context("forkserver")
    slow = [name for name in SLOW_IMPORTS if name in sys.modules]
    context.set_forkserver_preload([*slow, recipe.render.__module__])  # once, in the server, not in every worker
    with ProcessPoolExecutor(num_workers, context, _start_worker, (recipe,)) as pool:
        pending = deque()
        try:
            for block in blocks:
                pending.append(pool.submit(_work, block))
                if len(pending) >= PENDING_PER_WORKER * num_workers:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that prepares the data was killed (out of memory?). Start again."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def in_memory(blocks, recipe):
    """The Samples of all blocks together, prepared in this process."""
    parts, report = [], Report()
    for samples in tokenize(blocks, recipe, 0):
        parts.append(samples.after(report.tokens))
        report.add(samples.report)
    return Samples({name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}, report, samples.unit)


def choose_workers(num_bytes):
    """Processes for so much data: all cores this one may use (the other ranks wait meanwhile), none for little."""
    return min(len(os.sched_getaffinity(0)), num_bytes // MIN_BYTES_OF_WORKER)


_recipe = None  # of this worker process


def _start_worker(recipe):
    global _recipe
    _recipe = recipe
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent():
    """A killed parent would leave its workers waiting for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(block):
    return tokenize_block(_recipe, block)
