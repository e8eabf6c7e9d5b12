"""Rows -> arrays of tokens, block by block, in worker processes, in the order of the files and in constant memory.

Workers are started from a fork server, not forked: the process that asks may hold CUDA and threads. They get the
settings once and a block at a time, and give back plain arrays, about 5 bytes a token; no more than PENDING_PER_WORKER
blocks are under way for each, so that memory does not grow with the file. More than half of the time is SentencePiece's
own; rendering a block twice, to encode all its texts in one call, was tried and took as long.

    for samples in tokenize(list_sources(path), settings, num_workers=8): ...
"""

import gc
import multiprocessing
import os
import sys
import threading
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from itertools import accumulate, chain
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from glm_finetune.data.blocks import BLOCK_BYTES, blocks_of, layout_of
from glm_finetune.data.files import Source, occurrences
from glm_finetune.data.report import Report
from glm_finetune.data.samples import of_source, prepare_row
from glm_finetune.loss import IGNORE

PENDING_PER_WORKER = 2
SLOW_IMPORTS = ("torch", "transformers", "peft")  # what a worker would import again because the main script does
MIN_BYTES_OF_WORKER = 8 * BLOCK_BYTES  # one or two seconds of work; starting processes takes as long

# The arrays of prepared samples. N rows of the data set, which are S different samples, of T tokens together.
COLUMNS = {
    "index": np.int64,  # (N,) the sample of each row: a weight repeats samples here, not their tokens
    "input_ids": np.int32,  # (T,)
    "is_target": np.bool_,  # (T,) where the label is the token itself; elsewhere it is -100
    "ends": np.int64,  # (S,) where a sample ends in them; it begins where the one before ends
    "num_prefix": np.int32,  # (S,)
    "sources": np.uint16,  # (S,) which of the sources a sample is from
    "numbers": np.int64,  # (S,) line, entry or row of it, from 1
}


@dataclass
class Samples:
    """columns: an array for each of COLUMNS. report: of the rows they came from."""

    columns: dict
    report: Report

    def after(self, num_samples, num_tokens):
        """The columns of these samples when so many others lie in front of them."""
        moved = {"index": self.columns["index"] + num_samples, "ends": self.columns["ends"] + num_tokens}
        return {**self.columns, **moved}


@dataclass(frozen=True)
class Task:
    """A block to tokenize. position: of its source among the sources. data_format: of the source."""

    source: Source
    position: int
    data_format: str
    block: object


def tokenize_block(settings, task):
    """The Samples of a block. Raises ValueError naming file and line for a bad row, unless it is to be skipped."""
    settings, report = replace(settings, data_format=task.data_format), Report(settings.too_long)
    samples, index, numbers = [], [], []
    for place, (number, row) in enumerate(task.block.rows(), task.block.first_row):
        try:
            rendered = prepare_row(task.source.where(number), row, settings)
        except ValueError as error:
            if settings.on_bad_row != "skip":
                raise
            report.add_bad(error)
            continue
        times = occurrences(place, task.source.weight)
        for one in report.keep(rendered, times):
            if times:
                index += [len(samples)] * times
                samples.append(one)
                numbers.append(number)
    return Samples(_columns(samples, index, numbers, task.position), report)


def _columns(samples, index, numbers, position):
    labels = list(chain.from_iterable(one.labels for one in samples))
    columns = {
        "index": index,
        "input_ids": list(chain.from_iterable(one.input_ids for one in samples)),
        "ends": list(accumulate(len(one.input_ids) for one in samples)),
        "num_prefix": [one.num_prefix for one in samples],
        "sources": [position] * len(samples),
        "numbers": numbers,
    }
    columns = {name: np.fromiter(values, COLUMNS[name], len(values)) for name, values in columns.items()}
    labels = np.fromiter(labels, np.int32, len(labels))
    columns["is_target"] = labels != IGNORE
    same = labels == columns["input_ids"]
    assert (same | ~columns["is_target"]).all(), "a label that is neither -100 nor the token itself cannot be stored"
    return columns


def tokenize(sources, settings, num_workers=0, cache_dir=None, progress=False):
    """Yield the Samples of each block of each source, in order. num_workers: 0 = in this process.

    cache_dir: where the places of blocks are remembered. progress: show a bar. Raises ValueError for a bad row or file.
    """
    tasks = _tasks(sources, settings, cache_dir)
    if num_workers:
        blocks = _in_workers(tasks, settings, num_workers)
    else:
        blocks = (tokenize_block(settings, task) for task in tasks)
    total = None
    if cache_dir and all(source.has_blocks for source in sources):
        total = sum(layout_of(source, source.path, cache_dir).num_rows for source in sources)
    title = f"tokenize {', '.join(source.path for source in sources):.80}"
    with tqdm(total=total, desc=title, unit=" rows", disable=not progress) as bar:
        for samples in blocks:
            bar.update(samples.report.rows)
            yield samples


def _in_workers(tasks, settings, num_workers):
    context = multiprocessing.get_context("forkserver")
    slow = [name for name in SLOW_IMPORTS if name in sys.modules]
    context.set_forkserver_preload([*slow, settings.form.draft.__module__])  # once, in the server, not in every worker
    with ProcessPoolExecutor(num_workers, context, _start_worker, (settings,)) as pool:
        pending = deque()
        try:
            for task in tasks:
                pending.append((task, pool.submit(_work, task)))
                if len(pending) >= PENDING_PER_WORKER * num_workers:
                    yield _result(settings, *pending.popleft())
            while pending:
                yield _result(settings, *pending.popleft())
        except BrokenProcessPool:
            raise ChildProcessError(
                "a process that prepares the data was killed (out of memory?). Start again."
            ) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _result(settings, task, future):
    try:
        return future.result()
    except RecursionError:  # JSON may be nested deeper than what can be sent to a process
        return tokenize_block(settings, task)


def _tasks(sources, settings, cache_dir):
    for position, source in enumerate(sources):
        data_format = of_source(source, settings).data_format
        for block in blocks_of(source, cache_dir):
            yield Task(source, position, data_format, block)


def in_memory(sources, settings, progress=False):
    """The Samples of all sources together, prepared in this process."""
    parts, report, num_samples, num_tokens = [], Report(settings.too_long), 0, 0
    for samples in tokenize(sources, settings, progress=progress):
        parts.append(samples.after(num_samples, num_tokens))
        report.add(samples.report)
        num_samples, num_tokens = num_samples + len(parts[-1]["ends"]), num_tokens + len(parts[-1]["input_ids"])
    return Samples({name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}, report)


def choose_workers(sources):
    """Processes for so much data: all cores this one may use (the other ranks wait meanwhile), none for little."""
    num_cores = len(os.sched_getaffinity(0))
    if not all(source.files() for source in sources):  # a data set of the hub: nobody knows its size
        return num_cores
    num_bytes = sum(path.stat().st_size for source in sources for path in source.files())
    return min(num_cores, num_bytes // MIN_BYTES_OF_WORKER)


_settings = None  # of this worker process


def _start_worker(settings):
    global _settings
    _settings = settings
    gc.freeze()  # a collection would write to all that the server imported, and each worker have its own copy of it
    threading.Thread(target=_leave_with_parent, daemon=True).start()


def _leave_with_parent():
    """A killed parent would leave its workers waiting for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(task):
    return tokenize_block(_settings, task)
