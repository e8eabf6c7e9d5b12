"""Runs that do not fit: seen before the engine starts, or what would help one that is out of memory."""

from contextlib import contextmanager

import torch

from glm_finetune import dist, host
from glm_finetune.errors import OutOfMemory, raise_together
from glm_finetune.weights import full_bytes, full_size, is_out_of_memory


def check_fits(model, zero, world_size, device):
    """Raise UserError if weights and state alone are more than a card, or the host, has. zero: DeepSpeed's section."""
    if device.type == "cuda":
        room = torch.cuda.get_device_properties(device).total_memory
        return raise_together(too_large(model, zero, world_size, room))
    _, *state = needed(model, zero, world_size, ("nvme",)).values()  # the weights are there already
    what = f"{count_learning(model):,} parameters learn: their fp32 masters, moments and gradients on all ranks here"
    host.check_fits(sum(state) * dist.local_size(), what, "Let less learn (--train_type lora), or use another machine.")


def count_learning(model):
    """Number of the parameters that learn, whole ones."""
    return sum(full_size(parameter) for parameter in model.parameters() if parameter.requires_grad)


def needed(model, zero, world_size, elsewhere):
    """{what: bytes of each rank} that weights and state take. elsewhere: where what is offloaded counts for nothing."""
    ranks = [1 if zero["stage"] < stage else world_size for stage in range(4)]  # among which a stage divides
    learn, names = count_learning(model), ("offload_param", "offload_optimizer")
    counts = [zero.get(name, {}).get("device", "none") not in elsewhere for name in names]
    return {
        "weights": counts[0] * sum(map(full_bytes, model.parameters())) / ranks[3],
        "fp32 masters and moments": counts[1] * 12 * learn / ranks[1],
        "fp32 gradients": counts[1] * 4 * learn / ranks[2],
    }


def too_large(model, zero, world_size, num_bytes):
    """Yield the problem that a card of num_bytes cannot hold its part, whatever the batch (activations come on top)."""
    # all of ChatGLM3-6B, one card, stage 2: weights 11.6 GiB, masters and moments 69.8, gradients 23.3
    parts = needed(model, zero, world_size, ("cpu", "nvme"))
    if (total := sum(parts.values())) > num_bytes:
        shown = ", ".join(f"{name} {size / 2**30:.1f} GiB" for name, size in parts.items())
        learn = f"{count_learning(model):,} parameters learn: {total / 2**30:.1f} GiB on a card whatever the batch"
        yield (
            f"{learn} ({shown}); it has {num_bytes / 2**30:.1f} GiB. Use --train_type lora, --ds_file "
            "ds_zero3_offload.json, or more cards with ds_zero3_no_offload.json."
        )


@contextmanager
def memory_advice(config, zero, quantized):
    """Turn running out of memory into an OutOfMemory with the flags that would help, in order.

    config: TrainConfig; zero: the zero_optimization section of the DeepSpeed configuration; quantized: the base is.
    """
    try:
        yield
    except RuntimeError as error:
        raise _with_tips(error, config, zero, quantized) from None


def _with_tips(error, config, zero, quantized):
    """The error itself, unless it says that memory ran out."""
    if not isinstance(error, torch.OutOfMemoryError) and not is_out_of_memory(error):
        return error
    tips = "".join(f"\n  {i}. {tip}" for i, tip in enumerate(_tips(config, zero, quantized), 1))
    reason = str(error).strip().splitlines()[0][:300]
    return OutOfMemory(f"out of memory on rank {dist.rank()} ({reason}). What would help, in order:{tips}")


def _tips(config, zero, quantized):
    batch, accumulate = config.per_device_train_batch_size, config.gradient_accumulation_steps
    if batch > 1:
        halved = f"--per_device_train_batch_size {batch // 2} --gradient_accumulation_steps {accumulate * 2}"
        yield f"{halved} (the same steps, the same loss)"
    if not config.gradient_checkpointing:
        yield "--gradient_checkpointing (the same loss, a third slower)"
    if dist.world_size() > 1 and zero["stage"] < 3:
        yield "--ds_file ds_zero3_no_offload.json (weights divided among the cards, the same loss)"
    if zero.get("offload_optimizer", {}).get("device", "none") == "none":
        yield f"--ds_file ds_zero{max(2, zero['stage'])}_offload.json (optimizer in host memory, the same loss)"
    yield f"--max_len below {config.max_len} (longer samples are cut)"
    if not quantized:
        yield "--train_type qlora (LoRA on a base in 4 bit)"
