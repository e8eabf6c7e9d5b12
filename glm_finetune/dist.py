"""Ranks and devices: who am I, sums over all ranks, seeds. The only file that reads what launchers set.

Works without a launcher and without DeepSpeed: rank(), world_size(), choose_device() -> 0, 1, cpu
"""

import os
import random
import socket

import numpy
import torch
import torch.distributed as dist

from glm_finetune.errors import UserError


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def launched():
    """(rank, world size) as the launcher set them, also before the ranks have joined; (0, 1) without a launcher."""
    return tuple(int(value) if value.isdecimal() else 0 for value in map(os.environ.get, ("RANK", "WORLD_SIZE"), "01"))


def launch_environment():
    """What launchers set, for a plain `python train.py`: one process, a free port. Called before anything is started.
    Raises UserError for a launcher that set a part of it, or numbers that do not go together.
    """
    os.environ.update({} if "RANK" in os.environ else dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1"))
    rank, world_size = (os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE"))
    needed = ("WORLD_SIZE",) if world_size in ("", "1") else ("MASTER_ADDR", "MASTER_PORT")
    missing = ", ".join(name for name in needed if not os.environ.get(name))
    if missing or not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        _refuse_environment(rank, world_size, missing)
    default = {"LOCAL_RANK": rank}
    if world_size == "1":
        with socket.create_server(("127.0.0.1", 0)) as probe:
            default |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(probe.getsockname()[1]))
        default |= dict(LOCAL_SIZE="1", LOCAL_WORLD_SIZE="1")
    os.environ.update(default | os.environ)


def _refuse_environment(rank, world_size, missing):
    raise UserError(
        f"RANK={rank} is set in the environment, WORLD_SIZE={world_size or 'unset'}"
        + (f", without {missing}" if missing else ", which do not go together")
        + ". Start train.py with deepspeed or torchrun, or give each process RANK, LOCAL_RANK, WORLD_SIZE, "
        "MASTER_ADDR and MASTER_PORT (mpirun gives other names); for a single process unset RANK."
    )


def local_size():
    """Number of ranks on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def is_main():
    """Whether this is rank 0 of all nodes."""
    return launched()[0] == 0


def print_main(*values):
    """Print from rank 0."""
    if is_main():
        print(*values, flush=True)


def sum_over_ranks(tensor):
    """Sum a tensor over all ranks, in place. All ranks must call."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor


def sums_over_ranks(values, device):
    """Sums of numbers over all ranks, as floats (exact for whole ones). Several ranks: CPU-GPU sync, all must call."""
    if world_size() == 1:
        return list(map(float, values))
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64, device=device)).tolist()


def barrier():
    """Wait for all ranks. All ranks must call."""
    if world_size() > 1:
        dist.barrier()


def all_agree(error):
    """Raise rank 0's error, if it has one, on every rank, so that none waits for one that gave up. All must call."""
    if error := from_main(error):
        raise error


def on_main(function, *arguments):
    """function(*arguments) on rank 0, None elsewhere; its UserError is raised on every rank. All ranks must call."""
    result = error = None
    try:
        result = function(*arguments) if is_main() else None
    except UserError as problem:
        error = problem
    all_agree(error)
    return result


def gather_objects(value):
    """The values of all ranks, in their order. All ranks must call; `value` is pickled, keep it small."""
    values = [value] * world_size()
    if len(values) > 1:
        dist.all_gather_object(values, value)
    return values


def from_main(value):
    """Rank 0's value on every rank. All ranks must call."""
    return gather_objects(value)[0]


# cuDNN's attention, which torch prefers on compute capability 9 and 10 since 2.11: its gradients were seen to be nan
# with a mask at lengths % 128 == 64 (pytorch #196678, trl #7181), and it plans half a second for every new length
# (FunASR #3704).
def choose_device(wanted=None, cudnn_attention=False):
    """The device of this rank. wanted: None, "cpu", "cuda" or the number of a card.

    cudnn_attention: whether torch may take cuDNN's, see above. Raises UserError for a card that is not there.
    """
    num_cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cpu" or (wanted is None and num_cards == 0):
        return torch.device("cpu")
    torch.backends.cuda.enable_cudnn_sdp(cudnn_attention)
    return _choose_card(wanted or "cuda", num_cards)


def _choose_card(wanted, num_cards):
    index = int(os.environ.get("LOCAL_RANK", 0))
    last = max(index, local_size() - 1)  # every rank sees it if any has no card
    if wanted != "cuda":
        if not str(wanted).isdecimal():
            raise UserError(f"--device {wanted}: expected cpu, cuda or the number of a card.")
        index = last = int(wanted)
    if last >= num_cards:
        raise UserError(
            f"--device {wanted}: card {last} was asked for, this machine shows {num_cards} (torch "
            f"{torch.__version__}, CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'unset')}). "
            "Use --device cpu, or install the CUDA build of torch and a driver."
        )
    return torch.device("cuda", index)


def _no_precision(wanted, device):
    if wanted == "fp16":
        return UserError("--precision fp16: DeepSpeed has no fp16 on CPUs. Use bf16 or fp32.")
    return UserError(f"--precision bf16: {torch.cuda.get_device_name(device)} has no bf16. Use fp16 or fp32.")


def choose_precision(wanted, device, is_large=False):
    """(bf16, fp16 or fp32, why): as asked, or the best of `device`. Raises UserError for what it cannot train in."""
    # A card computes in bf16 from compute capability 8.0 (Ampere) on; torch also counts slow emulation.
    old_card = device.type == "cuda" and torch.cuda.get_device_capability(device)[0] < 8
    if (wanted == "fp16" and device.type == "cpu") or (wanted == "bf16" and old_card):
        raise _no_precision(wanted, device)
    if wanted:
        return wanted, "asked for"
    if device.type == "cpu" and not is_large:
        return "fp32", "a small model on a CPU"
    return _best_precision(device, old_card)


def _best_precision(device, old_card):
    if device.type == "cuda":
        return ("fp16", "the card has no bf16") if old_card else ("bf16", "the card has it")
    has_bf16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return ("bf16", "a large model on a CPU") if has_bf16 else ("fp32", "this processor has no bf16")


def seed_all(seed):
    """Seed Python, numpy and torch. Ranks share the seed: new weights must be equal; dropout is re-seeded after."""
    random.seed(seed)
    numpy.random.seed(seed % 2**32)
    torch.manual_seed(seed)
