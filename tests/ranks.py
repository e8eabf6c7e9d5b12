"""Real ranks for tests: fresh processes from a warm fork server, which has imported everything already.

A two-rank job takes about a second instead of ten. The processes leave with os._exit, as the tests are over by then.
"""

import io
import multiprocessing
import os
import socket
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout

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


def run_ranks(function, world_size, *args, timeout_secs=120):
    """Call function(*args) on each rank; returns the results in order of rank.

    Raises RuntimeError with a rank's error.
    """
    os.environ["DS_ACCELERATOR"] = "cpu"
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    queue, port = context.Queue(), free_port()
    processes = [
        context.Process(target=_rank, args=(function, args, rank, world_size, port, queue))
        for rank in range(world_size)
    ]
    for process in processes:
        process.start()
    results = {}
    try:
        for _ in processes:
            rank, ok, value = queue.get(timeout=timeout_secs)
            if not ok:
                raise RuntimeError(f"rank {rank} of {world_size}:\n{value}")
            results[rank] = value
    finally:
        for process in processes:
            process.join(5)
            process.kill()
    return [results[rank] for rank in range(world_size)]


def _rank(function, args, rank, world_size, port, queue):
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
    try:
        queue.put((rank, True, function(*args)))
    except BaseException:  # the parent shows it; this process ends here
        queue.put((rank, False, traceback.format_exc()[-9000:]))
    queue.close()
    queue.join_thread()
    os._exit(0)


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
