"""Rows -> arrays of tokens, block by block, in worker processes, in the order of the files and in constant memory.

Workers are started from a fork server, not forked: the process that asks may hold CUDA and threads. They get the
settings once and a block at a time, and give back plain arrays, about 5 bytes a token; no more than PENDING_PER_WORKER
blocks are under way for each, so that memory does not grow with the file. Most of the time is SentencePiece's own.

    for samples in tokenize(list_data_files(path), settings, num_workers=8): ...
"""

import gc
import multiprocessing
import os
import sys
import threading
from collections import Counter, deque
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, replace
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from glm_finetune.data.blocks import BLOCK_BYTES, blocks_of, layout_of
from glm_finetune.data.columns import COLUMNS, Builder, Samples
from glm_finetune.data.files import DataFile, occurrences
from glm_finetune.data.report import Report
from glm_finetune.data.samples import drafts_in, fitted, of_files, reading_in
from glm_finetune.errors import UserError
from glm_finetune.modes.template import remembering

PENDING_PER_WORKER = 2
SLOW_IMPORTS = ("torch", "transformers", "peft")  # what a worker would import again because the main script does
MIN_BYTES_OF_WORKER = 128 * BLOCK_BYTES  # one or two seconds of work; starting processes takes as long


@dataclass(frozen=True)
class Task:
    """A block to tokenize. position: of its file among the files. reading: of the file, see `samples.reading_in`."""

    data_file: DataFile
    position: int
    reading: dict
    block: object


@contextmanager
def uncollected():
    """Garbage collection switched off: it would scan the many objects of a block again and again and free none."""
    switch_on = gc.enable if gc.isenabled() else gc.disable
    gc.disable()
    try:
        yield
    finally:
        switch_on()


@uncollected()
def tokenize_block(settings, task, num_threads=1):
    """The Samples of a block. Raises UserError naming file and line for a bad row, unless it is to be skipped.

    All texts of the block are encoded in one call. num_threads: SentencePiece's.
    """
    # row -> drafts -> ids of all parts -> samples within the limits -> columns; a bad row is its error until its turn
    settings, builder = replace(settings, **task.reading), Builder()
    report = Report(settings.too_long, formats=[settings.data_format])
    rows = list(task.block.rows())
    rows = [(number, _drafts_or_error(row, settings)) for number, row in rows]
    drafts = (draft for _, drafts in rows if type(drafts) is list for draft in drafts)
    parts = settings.template.all_parts(settings.tokenizer, drafts, settings.style)
    encode = remembering(settings.tokenizer, parts, num_threads)
    for index, (number, drafts) in enumerate(rows, task.block.first_row):
        try:
            if type(drafts) is not list:
                raise drafts
            rendered = fitted(drafts, settings, encode)
        except UserError as error:
            problem = f"{task.data_file.where(number)}: {error}"
            if settings.on_bad_row != "skip":
                raise UserError(problem) from None
            report.add_bad(problem)
            continue
        times = occurrences(index, task.data_file.weight)
        for one in report.keep(rendered, times):
            builder.add(number, times, one)
    columns = builder.columns(task.position)
    report.count(columns)
    return Samples(columns, report)


def _drafts_or_error(row, settings):
    try:
        return drafts_in(row, settings)
    except UserError as error:
        return error


def tokenize(data_files, settings, num_workers=0, cache_dir=None, progress=False, num_threads=None):
    """Yield the Samples of each block of each file, in order. num_workers: 0 = in this process, where SentencePiece
    has num_threads, by default as many as there are cores.

    cache_dir: where the layout of files is remembered. progress: show a bar. Raises UserError for a bad row or file.
    """
    tasks = _tasks(data_files, settings, cache_dir)
    if num_workers:
        blocks = _in_workers(tasks, settings, num_workers)
    else:
        blocks = (tokenize_block(settings, task, num_threads or num_cores()) for task in tasks)
    total = None
    if cache_dir and all(data_file.has_blocks for data_file in data_files):
        total = sum(layout_of(data_file, data_file.path, cache_dir).num_rows for data_file in data_files)
    title = f"tokenize {', '.join(data_file.path for data_file in data_files):.80}"
    with tqdm(total=total, desc=title, unit=" rows", disable=not progress) as bar:
        for samples in blocks:
            bar.update(samples.report.rows)
            yield samples


def _in_workers(tasks, settings, num_workers):
    context = multiprocessing.get_context("forkserver")
    slow = [name for name in SLOW_IMPORTS if name in sys.modules]
    context.set_forkserver_preload([settings.template.draft.__module__, *slow])  # once, not in every worker
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
            problem = "a process that prepares the data was killed (out of memory?). Start again."
            raise ChildProcessError(problem) from None
        finally:
            pool.shutdown(cancel_futures=True)


def _result(settings, task, future):
    try:
        return future.result()
    except RecursionError:  # JSON may be nested deeper than what can be sent to a process
        return tokenize_block(settings, task)


def _tasks(data_files, settings, cache_dir):
    for position, (data_file, known) in enumerate(zip(data_files, of_files(data_files, settings))):
        reading = reading_in(known)
        for block in blocks_of(data_file, cache_dir):
            yield Task(data_file, position, reading, block)


def in_memory(data_files, settings, progress=False):
    """The Samples of all files together, prepared in this process."""
    parts, report, counts = [], Report(settings.too_long), Counter()
    for samples in tokenize(data_files, settings, progress=progress):
        parts.append(samples.after(counts))
        counts.update({name: len(column) for name, column in parts[-1].items()})
        report.add(samples.report)
    return Samples({name: np.concatenate([part[name] for part in parts]) for name in COLUMNS}, report)


def num_cores():
    """Cores this process may use; the other ranks wait meanwhile."""
    return len(os.sched_getaffinity(0))


def choose_workers(data_files):
    """Processes for so much data: all cores for much; none for little, which this one tokenizes with threads."""
    if not all(data_file.files() for data_file in data_files):  # a data set of the hub: nobody knows its size
        return num_cores()
    num_bytes = sum(path.stat().st_size for data_file in data_files for path in data_file.files())
    num_workers = min(num_cores(), num_bytes // MIN_BYTES_OF_WORKER)
    return num_workers if num_workers > 1 else 0


_settings = None  # of this worker process


def _start_worker(settings):
    global _settings
    _settings = settings
    gc.freeze()  # a collection would write to all that the server imported, and each worker have its own copy of it
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent():
    """A killed parent would leave its workers waiting for ever."""
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


def _work(task):
    return tokenize_block(_settings, task)
