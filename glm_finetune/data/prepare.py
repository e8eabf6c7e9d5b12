"""Rows -> arrays of tokens, block by block, in worker processes, in the order of the files and in constant memory.

Workers are started from a fork server, not forked: the process that asks may hold CUDA and threads. They get the
settings once and a block at a time, and give back plain arrays, about 5 bytes a token; no more than PENDING_PER_WORKER
blocks are under way for each, so that memory does not grow with the file. Most of the time is SentencePiece's own.

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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate, chain
from multiprocessing.connection import wait

import numpy as np
from tqdm import tqdm

from glm_finetune.data.blocks import BLOCK_BYTES, blocks_of, layout_of
from glm_finetune.data.columns import COLUMNS, Builder, Samples, lengths_of
from glm_finetune.data.files import Source, occurrences
from glm_finetune.data.report import Report
from glm_finetune.data.samples import drafts_of, of_source, prepare_row
from glm_finetune.errors import UserError
from glm_finetune.modes.template import ANSWER, SOURCE

PENDING_PER_WORKER = 2
SLOW_IMPORTS = ("torch", "transformers", "peft")  # what a worker would import again because the main script does
MIN_BYTES_OF_WORKER = 32 * BLOCK_BYTES  # one or two seconds of work; starting processes takes as long


@dataclass(frozen=True)
class Task:
    """A block to tokenize. position: of its source among the sources. data_format: of the source."""

    source: Source
    position: int
    data_format: str
    block: object


@contextmanager
def uncollected():
    """No garbage collection meanwhile: it would look at every object of a block again and again, and find none."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@uncollected()
def tokenize_block(settings, task, num_threads=1):
    """The Samples of a block. Raises UserError naming file and line for a bad row, unless it is to be skipped.

    All texts are encoded together, and that is all for the rows of which nothing is cut. num_threads: SentencePiece's.
    """
    settings, report, builder = replace(settings, data_format=task.data_format), Report(settings.too_long), Builder()
    rows = list(task.block.rows())
    of_rows = drafts_of([row for _, row in rows], settings)
    drafts = [draft for of_row in of_rows for draft in of_row or ()]
    parts = [part for draft in drafts for part in draft.parts]
    ids = settings.tokenizer.encode_parts(parts, num_threads)
    ends = list(accumulate([len(draft.parts) for draft in drafts], initial=0))
    fits = _fits(drafts, lengths_of(ids), ends, settings)
    one_by_one = replace(settings, tokenizer=Encoded(settings.tokenizer, parts, ids))
    last, wholes = 0, []
    for place, ((number, row), of_row) in enumerate(zip(rows, of_rows), task.block.first_row):
        times = occurrences(place, task.source.weight)
        first, last = last, last + len(of_row or ())
        if of_row is not None and all(fits[first:last]):
            wholes.append((times, of_row))
            for draft, start, end in zip(of_row, ends[first:last], ends[first + 1 : last + 1]):
                builder.add(number, times, ids[start:end], draft.is_target, draft.num_prefix_parts)
            continue
        try:
            rendered = prepare_row(task.source.where(number), row, one_by_one)
        except UserError as error:
            if settings.on_bad_row != "skip":
                raise
            report.add_bad(error)
            continue
        for one in report.keep(rendered, times):
            builder.add_rendered(number, times, one)
    report.keep_whole(wholes)
    columns = builder.columns(task.position)
    report.count(columns)
    return Samples(columns, report)


def _fits(drafts, lengths, ends, settings):
    """Whether nothing of each draft is cut. lengths: of all parts; ends: where the parts of a draft end in them."""
    kinds = np.fromiter(chain.from_iterable(draft.kinds for draft in drafts), np.int8, len(lengths))
    num_source, num_answer = (
        np.diff(np.concatenate(([0], np.cumsum(lengths * (kinds == kind))))[ends]) for kind in (SOURCE, ANSWER)
    )
    return settings.form.fits(num_source, num_answer, settings.limits).tolist()


class Encoded:
    """A tokenizer that knows the ids of some texts already. parts, ids: see Tokenizer.encode_parts."""

    def __init__(self, tokenizer, parts, ids):
        self.tokenizer, self.parts, self.ids = tokenizer, parts, ids

    @cached_property
    def _known(self):
        return dict(zip(self.parts, self.ids))

    def encode_text(self, text):
        return self._known[text].tolist() if text in self._known else self.tokenizer.encode_text(text)

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)


def tokenize(sources, settings, num_workers=0, cache_dir=None, progress=False, num_threads=None):
    """Yield the Samples of each block of each source, in order. num_workers: 0 = in this process, where SentencePiece
    has num_threads, by default as many as there are cores.

    cache_dir: where the places of blocks are remembered. progress: show a bar. Raises UserError for a bad row or file.
    """
    tasks = _tasks(sources, settings, cache_dir)
    if num_workers:
        blocks = _in_workers(tasks, settings, num_workers)
    else:
        blocks = (tokenize_block(settings, task, num_threads or num_cores()) for task in tasks)
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
    context.set_forkserver_preload([settings.form.draft.__module__, *slow])  # once, in the server, not in every worker
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


def num_cores():
    """Cores this process may use; the other ranks wait meanwhile."""
    return len(os.sched_getaffinity(0))


def choose_workers(sources):
    """Processes for so much data: all cores for much; none for little, which this one tokenizes with threads."""
    if not all(source.files() for source in sources):  # a data set of the hub: nobody knows its size
        return num_cores()
    num_bytes = sum(path.stat().st_size for source in sources for path in source.files())
    num_workers = min(num_cores(), num_bytes // MIN_BYTES_OF_WORKER)
    return num_workers if num_workers > 1 else 0


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
