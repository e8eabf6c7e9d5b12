"""The only file that starts and ends DeepSpeed. Prediction and merging never import it.

start(device); engine = new_engine(model, ds_config, weight_decay); ...; finish(engine)
"""

import copy
import datetime
import os
import socket
from contextlib import nullcontext

import torch
import torch.distributed as dist

from glm_finetune.optim import parameter_groups


def launch_environment():
    """What launchers set, for a plain `python train.py`: one process, a free port.

    Called before anything is started.
    """
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        os.environ.update(
            RANK="0",
            LOCAL_RANK="0",
            WORLD_SIZE="1",
            LOCAL_SIZE="1",
            LOCAL_WORLD_SIZE="1",
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )
    os.environ.setdefault("LOCAL_RANK", os.environ["RANK"])


def start(device):
    """Join the other ranks: nccl on cards, gloo on CPUs. Needs `launch_environment`."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed

    if device.type == "cpu":
        # The shared-memory all-reduce serves inference only, is compiled at first use, and leaves 69 MB for each rank
        # and launch in /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed("gloo", timeout=datetime.timedelta(minutes=30), verbose=False)
    else:
        torch.cuda.set_device(device)
        deepspeed.init_distributed("nccl", timeout=datetime.timedelta(minutes=30), verbose=False)


def check(ds_config):
    """Raise ValueError naming what DeepSpeed refuses inside a section of `ds_config`, before a model is loaded."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError  # what DeepSpeed itself is built on

    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except ValidationError as error:
        raise ValueError(
            "\n".join(
                f"ds_file: {'.'.join(map(str, problem['loc']))}: {problem['msg']} ({error.title})."
                for problem in error.errors()
            )
        ) from None


def new_engine(model, ds_config, weight_decay):
    """Wrap `model` for training. All ranks must call."""
    import deepspeed

    groups = parameter_groups(model, weight_decay)
    engine, _, _, _ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    return engine


def whole(parameter, modifier_rank=None):
    """Context in which a parameter is whole here: ZeRO-3 keeps a part of it on each rank. All ranks must enter.

    modifier_rank: changes that this rank makes reach the others.
    """
    if getattr(parameter, "ds_id", None) is None:
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def finish(engine):
    """Leave in order: a rank that exits with ZeRO-3's hooks in place may abort after success. All ranks must call."""
    engine.destroy()
    dist.barrier()
    dist.destroy_process_group()
