"""The only file that starts and ends DeepSpeed. Prediction and merging never import it.

start(device); engine = new_engine(model, ds_config, weight_decay); ...; finish(engine)
"""

import copy
import ctypes
import datetime
import os
import platform
import tempfile
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

from glm_finetune.bars import bar
from glm_finetune.data.dataset import to_device
from glm_finetune.dist import from_main, local_size, print_main
from glm_finetune.errors import UserError
from glm_finetune.run.optim import parameter_groups
from glm_finetune.weights import OnDevice, is_finite

M_MMAP_THRESHOLD = -3  # of malloc.h


def start(device):
    """Join the other ranks: nccl on cards, gloo on CPUs. Needs `dist.launch_environment`."""
    if device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    print_main("starting DeepSpeed ...")
    import deepspeed

    if device.type == "cpu":
        # The shared-memory all-reduce serves inference only, and leaves 69 MB for each rank in /dev/shm for good.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    else:
        torch.cuda.set_device(device)
    backend = "gloo" if device.type == "cpu" else "nccl"
    deepspeed.init_distributed(backend, timeout=datetime.timedelta(minutes=30), verbose=False)


def check(ds_config):
    """Raise UserError naming what DeepSpeed refuses inside a section of `ds_config`, or cannot do with NVMe here."""
    from deepspeed.runtime.config import DeepSpeedConfig
    from pydantic import ValidationError  # what DeepSpeed itself is built on

    try:
        DeepSpeedConfig(copy.deepcopy(ds_config))
    except ValidationError as error:
        raise _refused(error) from None
    for name in ("offload_optimizer", "offload_param"):
        if (section := ds_config["zero_optimization"].get(name, {})).get("device") == "nvme":
            _check_nvme(section.get("nvme_path"))


def _refused(error):
    places = ((".".join(map(str, problem["loc"])), problem["msg"]) for problem in error.errors())
    return UserError("\n".join(f"ds_file: {place}: {text} ({error.title})." for place, text in places))


def _check_nvme(folder):
    import deepspeed

    if not folder:
        raise UserError('ds_file: offloading to nvme needs "nvme_path", a folder on a fast local disk.')
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"ds_file: nvme_path {folder} cannot be written to ({error}); name another folder.") from None
    print_main(
        "offloading to nvme: DeepSpeed compiles async_io at its first use, which takes minutes. If it waits for "
        "longer, an earlier start was killed while compiling: delete the files called `lock` in TORCH_EXTENSIONS_DIR "
        "(default: ~/.cache/torch_extensions)."
    )
    if not deepspeed.ops.__compatible_ops__.get("async_io"):
        needs = "DeepSpeed's async_io, which needs libaio and a compiler (Debian: apt-get install libaio-dev g++)"
        raise UserError(f"ds_file: offloading to nvme needs {needs}. Offload to cpu instead, or install them.")


@dataclass(frozen=True)
class Partitioned(OnDevice):
    """A place for weights (see `weights.OnDevice`) under ZeRO-3: each parameter is divided as it is created.

    Rank 0 reads the files and the ranks share out one tensor at a time. All ranks must call.
    """

    ds_config: dict
    verb = "divide"

    def host_bytes(self, num_elements):
        offloads_to = self.ds_config["zero_optimization"].get("offload_param", {}).get("device")
        share = dist.get_world_size() if dist.is_initialized() else 1
        whole = num_elements * self.dtype.itemsize if "cpu" in (self.device.type, offloads_to) else 0
        return whole * local_size() / share

    def construct(self, build):
        offloads_to = self.ds_config["zero_optimization"].get("offload_param", {}).get("device")
        if "cpu" in (self.device.type, offloads_to) and platform.libc_ver()[0] == "glibc":
            # Return large blocks when they are freed: glibc keeps those between the parts that stay, until each rank
            # has taken as much as the whole model.
            ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 256 * 1024)
        import deepspeed
        from transformers.initialization import no_init_weights
        from transformers.integrations import HfDeepSpeedConfig

        hf_config = HfDeepSpeedConfig(self.ds_config)  # while it lives, peft gathers the weights it looks at
        # The dtype goes through the configuration: the argument `dtype` is overruled by what the device supports.
        config = {**self.ds_config, "bf16": {"enabled": self.dtype == torch.bfloat16}}
        with bar("divide: before it is read"), no_init_weights(), deepspeed.zero.Init(config_dict_or_path=config):
            model = build()
        model.hf_deepspeed_config = hf_config
        return model

    def assign(self, model, name, tensor):
        parameter, finite = model.get_parameter(name), True
        with torch.no_grad(), whole(parameter, modifier_rank=0):
            if dist.get_rank() == 0:
                parameter.copy_(tensor)
                finite = is_finite(parameter)
        return from_main(finite)


def new_engine(model, ds_config, weight_decay, loraplus_ratio=None):
    """Wrap `model` for training. All ranks must call."""
    import deepspeed

    groups = parameter_groups(model, weight_decay, loraplus_ratio)
    with bar("DeepSpeed: masters and moments"):
        engine, *_ = deepspeed.initialize(model=model, model_parameters=groups, config=ds_config)
    if engine.fp16_enabled() and engine.optimizer.loss_scaler.dynamic:
        engine.optimizer.loss_scaler.raise_error_at_min_scale = False  # the guard says what happened, or skips
    return engine


def accumulate(engine, objective, batches, num_targets):
    """Forward and backward of the micro-batches of a step, then the step. Returns their losses. All ranks must call.

    num_targets: of all ranks' micro-batches, of whose mean a loss is a share. A gradient not finite changes no weight.
    """
    # 2 ranks x 2 micro-batches with 5 3 | 8 4 targets: num_targets 20, and a micro-batch of sum s counts s / 20.
    losses = []
    for batch in batches:
        batch = to_device(batch, engine.device)
        loss = objective.loss(engine(**batch, use_cache=False).token_losses, batch) / num_targets
        # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone.
        engine.backward(loss * (len(batches) * dist.get_world_size()))
        engine.step()
        losses.append(loss.detach())
    return losses


def is_partitioned(parameter):
    """Whether ZeRO-3 keeps a part of a parameter on each rank."""
    return getattr(parameter, "ds_id", None) is not None


def whole(parameter, modifier_rank=None):
    """Context in which a parameter is whole here: ZeRO-3 keeps a part of it on each rank. All ranks must enter.

    modifier_rank: changes that this rank makes reach the others.
    """
    if not is_partitioned(parameter):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=modifier_rank)


def finish(engine):
    """Leave in order: a rank that exits with ZeRO-3's hooks in place may abort after success. All ranks must call."""
    engine.destroy()
    dist.barrier()
    dist.destroy_process_group()
