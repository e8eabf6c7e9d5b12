"""Real ranks for tests: fresh processes from a warm fork server, which has imported everything already.

A two-rank job takes about a second instead of ten. The processes leave with os._exit, as the tests are over by then.
"""

import io
import multiprocessing
import os
import socket
import sys
import tempfile
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

PRELOAD = [
    "torch",
    "deepspeed",
    "transformers",
    "peft",
    "torch.utils.tensorboard",
    "glm_finetune.build",
    "train",
    "tests.ranks",
]


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_ranks(target, world_size, *args):
    """Start target(*args) on each rank; returns the processes in order of rank, which the caller may kill."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    port = free_port()
    processes = [
        context.Process(target=_as_rank, args=(target, args, rank, world_size, port)) for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    return processes


def end_ranks(processes, secs=0):
    """Kill what is still running after `secs`."""
    for process in processes:
        process.join(secs)
        process.kill()
        process.join()


def run_ranks(function, world_size, *args, timeout_secs=120):
    """Call function(*args) on each rank; returns the results in order of rank.

    Raises RuntimeError with a rank's error.
    """
    queue, results = multiprocessing.get_context("forkserver").Queue(), {}
    processes = start_ranks(_report, world_size, function, args, queue)
    try:
        for _ in processes:
            rank, ok, value = queue.get(timeout=timeout_secs)
            if not ok:
                raise RuntimeError(f"rank {rank} of {world_size}:\n{value}")
            results[rank] = value
    finally:
        end_ranks(processes, secs=5)
    return [results[rank] for rank in range(world_size)]


def _as_rank(target, args, rank, world_size, port):
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        LOCAL_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    import torch

    torch.set_num_threads(1)
    target(*args)


def _report(function, args, queue):
    rank = int(os.environ["RANK"])
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:  # the parent shows it; this process ends here
        queue.put((rank, False, traceback.format_exc()[-9000:]))
    queue.close()
    queue.join_thread()
    os._exit(0)


class Job:
    """`train.py arguments` on ranks that the caller may kill; what they print goes into one file, as to a terminal.

    prepare: called on each rank before, to change what shall fail there.
    """

    def __init__(self, arguments, log, world_size=2, prepare=None):
        self.log = Path(log)
        self.log.write_text("")
        self.started = time.monotonic()
        self.processes = start_ranks(_train_script, world_size, arguments, self.log, prepare)

    def seconds(self):
        return time.monotonic() - self.started

    def is_running(self):
        return any(process.is_alive() for process in self.processes)

    def wait_for(self, condition, secs=60):
        """Poll until condition() is true; an error when the job ends or the time is over before."""
        while not condition():
            assert self.is_running() and self.seconds() < secs, f"after {self.seconds():.1f} s:\n{self.printed()}"
            time.sleep(0.001)

    def exit_codes(self, secs=60):
        """Of each rank, -9 for a killed one; an error if one is still running after `secs`."""
        end = time.monotonic() + secs
        while self.is_running():
            assert time.monotonic() < end, f"it hangs:\n{self.printed()}"
            time.sleep(0.005)
        return [process.exitcode for process in self.processes]

    def kill(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def printed(self):
        return self.log.read_text(encoding="utf-8", errors="replace")


def _train_script(arguments, log, prepare):
    """Ends with the exit code of `python train.py`, which multiprocessing makes that of the process."""
    import train

    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    sys.stdout.flush()
    sys.stderr.flush()
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout, sys.stderr = (open(stream, "w", buffering=1, closefd=False) for stream in (1, 2))  # noqa: SIM115
    sys.argv = ["train.py", *map(str, arguments)]
    tempfile.tempdir = str(log.parent)  # where ranks leave their words
    if prepare:
        prepare()
    train.exits.exit_with_message(train.main)


def train_main(arguments):
    """train.py with these arguments, in this process; returns what it printed.

    Errors are raised, not turned into exits.
    """
    import train

    sys.argv = ["train.py", *map(str, arguments)]
    output = io.StringIO()
    with redirect_stdout(output), redirect_stderr(output):
        train.main()
    return output.getvalue()


def train_arguments(mode, train_type, checkpoint, data_file, output_dir, **flags):
    """Arguments of a short run; flags: others, True for a bare one."""
    flags = {
        "max_len": 128,
        "max_src_len": 64,
        "per_device_train_batch_size": 4,
        "show_loss_step": 1,
        "lora_dropout": 0,
        "learning_rate": 1e-2,
        **flags,
    }
    arguments = [
        "--mode",
        mode,
        "--train_type",
        train_type,
        "--model_name_or_path",
        checkpoint,
        "--train_path",
        data_file,
        "--output_dir",
        output_dir,
        "--device",
        "cpu",
    ]
    if train_type == "ptuning":
        arguments += ["--pre_seq_len", "5", "--prefix_dropout", "0"]
    if train_type == "freeze":
        arguments += ["--freeze_module_name", "layers.1."]
    for name, value in flags.items():
        arguments += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return [str(a) for a in arguments]
