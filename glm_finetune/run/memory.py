"""What would help a run that is out of memory."""

from contextlib import contextmanager

import torch

from glm_finetune import dist
from glm_finetune.errors import OutOfMemory
from glm_finetune.weights import is_out_of_memory


@contextmanager
def memory_advice(config, zero, quantized):
    """Turn running out of memory into an OutOfMemory with the flags that would help, in order.

    config: TrainConfig; zero: the zero_optimization section of the DeepSpeed configuration; quantized: the base is.
    """
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or is_out_of_memory(error):
            raise _out_of_memory(error, _tips(config, zero, quantized)) from None
        raise


def _out_of_memory(error, tips):
    tips = "".join(f"\n  {i}. {tip}" for i, tip in enumerate(tips, 1))
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
