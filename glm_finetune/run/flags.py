"""Flags of a run: where it leaves its results, its optimizer steps, precision and memory."""

from dataclasses import dataclass

from glm_finetune.errors import UserError
from glm_finetune.flags import NOT_NEGATIVE, POSITIVE, PRECISIONS, SEED, SHARE, Flags, flag

DEFAULT_DS_FILE = "ds_zero2_no_offload.json"


@dataclass(kw_only=True)
class OutputFlags(Flags):
    """What a run leaves, and what it goes on from."""

    output_dir: str = flag("folder for checkpoints, logs and TensorBoard files", group="output and resuming")
    overwrite_output_dir: bool = flag("start although output_dir holds results; they are deleted", False)
    resume: str | None = flag("auto (newest whole checkpoint in output_dir, if any) or a folder epoch-E-step-S", None)
    force: bool = flag("with --resume: although data, tokenizer, base or lengths differ; --init_from: the base", False)
    show_loss_step: int = flag("optimizer steps between two log lines", 10, POSITIVE)
    save_model_step: int | None = flag(
        "also save every so many optimizer steps, not only after each epoch", None, POSITIVE
    )
    save_total_limit: int | None = flag("keep this many of the newest checkpoints, and the best", None, POSITIVE)
    save_state: str = flag(
        "which checkpoints have the optimizer state that --resume goes on from, 12 bytes a parameter that learns: all, "
        "last (the newest only) or no",
        "all",
        ("no", "last", "all"),
    )
    async_save: bool = flag("write checkpoints in the background; takes a copy of what is saved in host memory", False)
    verbose: bool = flag("show all flags and the DeepSpeed configuration at the start", False)
    logging_dir: str | None = flag("folder for TensorBoard; default: output_dir/runs", None)


@dataclass(kw_only=True)
class OptimizationFlags(Flags):
    """The steps of a run."""

    per_device_train_batch_size: int = flag("samples of a micro-batch on each card", 16, POSITIVE, "optimization")
    gradient_accumulation_steps: int = flag("micro-batches of an optimizer step", 1, POSITIVE)
    num_train_epochs: int = flag("passes over the data", 1, POSITIVE)
    max_steps: int | None = flag("stop after this many optimizer steps; the schedule ends there", None, POSITIVE)
    learning_rate: float | None = flag("peak learning rate; default: that of the train type's recipe", None, POSITIVE)
    lr_scheduler: str = flag(
        "shape after the warm-up: linear, cosine or constant", "linear", ("linear", "cosine", "constant")
    )
    warmup_ratio: float = flag("share of all steps in which the learning rate rises", 0.1, SHARE)
    warmup_steps: int | None = flag("instead: steps in which the learning rate rises", None, NOT_NEGATIVE)
    min_lr_ratio: float = flag("the schedule ends at this share of the peak", 0.1, SHARE)
    weight_decay: float = flag("decoupled weight decay of matrices (biases and norms have none)", 0.1, NOT_NEGATIVE)
    max_grad_norm: float = flag("gradients are scaled down to this norm; 0 = never", 1.0, NOT_NEGATIVE)
    on_nonfinite: str = flag(
        "when loss or gradient is inf or nan: stop, or skip the step on all ranks", "stop", ("stop", "skip")
    )
    max_nonfinite: int = flag("with --on_nonfinite skip: stop after so many skipped steps", 10, POSITIVE)
    seed: int = flag("of data order, dropout and new weights", 1234, SEED)

    def problems(self):
        yield from super().problems()
        if self.warmup_steps is not None and "warmup_ratio" in self.given:
            yield "--warmup_steps and --warmup_ratio both say how long the warm-up is: give one of them."
        yield from long_warmup(self.warmup_steps, self.max_steps)


def long_warmup(warmup_steps, total):
    """Yield a problem for a warm-up that the run does not see the end of."""
    if warmup_steps and total and warmup_steps > total:
        early = f"the run has {total} steps and would end before the learning rate has risen to its peak"
        yield f"--warmup_steps {warmup_steps}: {early}. Lower it, or leave it out."


@dataclass(kw_only=True)
class MemoryFlags(Flags):
    """What a run computes with and where it keeps it."""

    precision: str | None = flag(
        "bf16, fp16 or fp32; default: the best the card can do; on a CPU bf16 for large models, fp32 for small ones",
        None,
        PRECISIONS,
        "memory and devices",
    )
    gradient_checkpointing: bool = flag("compute activations again in the backward pass instead of keeping them", False)
    lean: bool = flag(
        "keep less for the backward pass, of the last layer what has a target: the same numbers, or rounded otherwise",
        True,
    )
    compile: bool = flag(
        "compile the layers (torch.compile; minutes at the start, not for ZeRO-3 and qlora) instead of --lean", False
    )
    cudnn_attention: bool = flag("let torch prefer cuDNN's attention on cards that have it", False)
    ds_file: str = flag("DeepSpeed file (memory strategy); a bare name is looked up in ds_configs/", DEFAULT_DS_FILE)
    device: str | None = flag("cuda or cpu; default: cuda where there is a card", None, ("cuda", "cpu"))
    local_rank: int = flag("set by the deepspeed launcher", -1)
    deepspeed: bool = flag("accepted for old scripts; training always uses DeepSpeed", False)
    deepspeed_config: str | None = flag("another name for --ds_file", None)

    def __post_init__(self, given):
        super().__post_init__(given)
        name = self.deepspeed_config or self.ds_file
        if self.ds_file not in (DEFAULT_DS_FILE, name):
            raise _two_names(self.ds_file, name)
        self.ds_file = name


def _two_names(first, second):
    both = f"--ds_file {first} and --deepspeed_config {second}"
    return UserError(f"{both} are two names of one flag: give one of them.")
