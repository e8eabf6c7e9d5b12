"""A DeepSpeed file and the flags -> the dict that DeepSpeed gets. Pure; does not import deepspeed.

The file owns the memory strategy (`zero_optimization`), the flags own the numbers. The numbers that ChatGLM-Finetuning
wrote over with its flags are written over here too (`not_used`); any other must say what the flag says. "auto" is
filled in.
"""

import json
from pathlib import Path

from glm_finetune.errors import UserError, did_you_mean, raise_together
from glm_finetune.weights import read_json

FOLDER = Path(__file__).parents[2] / "ds_configs"
SIZES = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "train_batch_size")
OWNED = {*SIZES, "optimizer", "scheduler"}  # what has numbers that flags write over
PASSED_ON = """
    zero_optimization zero_allow_untested_optimizer zero_force_ds_cpu_optimizer aio comms_logger
    communication_data_type flops_profiler wall_clock_breakdown memory_breakdown dump_state prescale_gradients
    gradient_predivide_factor data_types checkpoint seq_parallel_communication_data_type sparse_gradients
    activation_checkpointing
""".split()
KNOWN = [*SIZES, *"gradient_clipping bf16 fp16 optimizer scheduler steps_per_print".split(), *PASSED_ON]
SUBSECTIONS = {"zero_optimization": ("offload_param", "offload_optimizer")}
SUBSECTIONS |= {"optimizer": ("params",), "scheduler": ("params",)}


def read_ds_file(name):
    """The object in a DeepSpeed file: a path, or a bare name in ds_configs/. Raises UserError naming the file."""
    path = Path(name) if Path(name).is_file() or Path(name).name != name else FOLDER / name
    if not path.is_file():
        raise _no_file(name)
    value = read_json(path)
    raise_together(_malformed(value))
    return value


def _no_file(name):
    shipped = sorted(shipped.name for shipped in FOLDER.glob("*.json"))
    hint = did_you_mean(name, shipped)
    return UserError(f"--ds_file {name}: no such file. Shipped in ds_configs/: {', '.join(shipped)}.{hint}")


def _malformed(value, names=("zero_optimization", "bf16", "fp16", "optimizer", "scheduler", "data_types"), where=""):
    """Problems of sections that are no objects: everything after this may look into them."""
    for name in names:
        section = value.get(name, {})
        if not isinstance(section, dict):
            yield f"ds_file: {where}{name} must be an object, found {json.dumps(section)}; leave it out."
        elif section.get("enabled", "auto") not in (True, False, "auto"):
            yield f"ds_file: {where}{name}.enabled must be true or false, found {json.dumps(section['enabled'])}."
        elif name in SUBSECTIONS:
            yield from _malformed(section, SUBSECTIONS[name], f"{name}.")


def precision_of(ds_json):
    """The precision that a file of the original's kind switches on, or None."""
    return next((name for name in ("bf16", "fp16") if ds_json.get(name, {}).get("enabled") is True), None)


def resolve(ds_json, config, world_size, precision, device_type, learns_in_fp32=False):
    """DeepSpeed's configuration. Raises UserError listing unknown keys, contradictions, and what a stage cannot do.

    ds_json: `read_ds_file`. config: TrainConfig. precision: bf16, fp16 or fp32. device_type: "cuda" or "cpu".
    learns_in_fp32: what learns stays fp32 beside a bf16 base, so that DeepSpeed has nothing to convert.
    Stage 0 becomes stage 1, which gives its numbers: stage 0 applies a step whose gradient is not finite.
    """
    micro, accumulate = config.per_device_train_batch_size, config.gradient_accumulation_steps
    numbers = dict(zip(SIZES, (micro, accumulate, micro * accumulate * world_size)))
    adamw = {"lr": config.learning_rate, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": config.weight_decay}
    zero = _without_auto(ds_json.get("zero_optimization", {"stage": 0}))
    raise_together([*_contradictions(ds_json, config, precision), *_zero_problems(zero)])
    in_bf16 = precision == "bf16" and not learns_in_fp32
    zero, sums = _sums({**zero, "stage": max(1, zero["stage"])}, ds_json.get("data_types", {}), in_bf16)
    if device_type == "cpu":  # pinned memory and overlapping streams would have to be compiled first, and serve cards
        zero |= {key: zero[key] | {"pin_memory": False} for key in SUBSECTIONS["zero_optimization"] if key in zero}
    if device_type == "cpu" or world_size == 1:  # nothing to overlap with: it would wait after every micro-batch
        zero |= {"overlap_comm": False}
    return {
        **{key: ds_json[key] for key in PASSED_ON if key in ds_json},
        **numbers,
        "gradient_clipping": config.max_grad_norm,
        **sums,
        "zero_optimization": zero,
        "bf16": {"enabled": in_bf16},
        "fp16": {"loss_scale_window": 100, **_without_auto(ds_json.get("fp16", {})), "enabled": precision == "fp16"},
        # torch's fused AdamW: no compiler needed on any machine, no temporary copy of the weights, resumes bit for bit.
        "optimizer": {"type": "AdamW", "params": {**adamw, "torch_adam": True, "fused": True}},
        "steps_per_print": 2**31,
    }


def _sums(zero, data_types, in_bf16):
    """(zero_optimization, {"data_types": ...} or {}) with which bf16 gradients are added up in fp32.

    In bf16 itself, DeepSpeed's default, 1 + 64 x 1/512 stays 1. At stage 1 fp32 sums would select BF16_Optimizer
    (DeepSpeed 0.19.8), which `state` and `guard` do not know: stage 2 takes its place.
    """
    data_types = {"grad_accum_dtype": "fp32"} | _without_auto(data_types) if in_bf16 else data_types
    offloads = zero.get("offload_optimizer", {}).get("device", "none") != "none"
    if in_bf16 and zero["stage"] == 1 and data_types["grad_accum_dtype"] == "fp32" and not offloads:
        zero = {**zero, "stage": 2}
    return zero, {"data_types": data_types} if data_types else {}


def stage_of(ds_json):
    """The ZeRO stage of a file as it stands there."""
    return ds_json.get("zero_optimization", {}).get("stage", 0)


def not_used(ds_json, ds_config):
    """["train_batch_size 32", "optimizer lr 0.001", ...]: numbers of a file that are others in what it was resolved to.

    ChatGLM-Finetuning wrote its flags over these; its own files have values there that never counted.
    """
    sections = [("", ds_json, {name: ds_config[name] for name in SIZES})]
    for name in ("optimizer", "scheduler"):
        there = ds_json.get(name, {}).get("params", {})
        own = ds_config.get(name, {}).get("params", {})
        sections.append((f"{name} ", there, {**dict.fromkeys(there), **own}))
    return [
        f"{section}{name} {there[name]}"
        for section, there, here in sections
        for name in here
        if there.get(name, "auto") not in ("auto", here[name])
    ]


def _contradictions(ds_json, config, precision):
    yield from map(_unknown_key, [key for key in ds_json if key not in KNOWN])
    if (norm := ds_json.get("gradient_clipping", "auto")) not in ("auto", own := config.max_grad_norm):
        yield f"ds_file says gradient_clipping = {norm!r}, --max_grad_norm says {own}: leave it out or make them equal."
    if ds_json.keys() & {"optimizer", "scheduler", "bf16", "fp16"}:
        yield from _other_sections(ds_json, precision)


def _unknown_key(key):
    return f"ds_file: unknown key {key!r}.{did_you_mean(key, KNOWN)}"


def _other_sections(ds_json, precision):
    """Problems of sections that flags own: a file of the original's kind has them."""
    optimizer, scheduler = ({"type": None, **ds_json.get(name, {})} for name in ("optimizer", "scheduler"))
    if optimizer["type"] not in (None, "Adam", "AdamW"):
        yield f"ds_file has an optimizer {optimizer['type']!r}; training uses AdamW: leave the section out."
    if (wanted := precision_of(ds_json)) not in (None, precision):
        yield f"ds_file switches {wanted} on, --precision says {precision}: leave it out or make them equal."
    if scheduler["type"] not in (None, "WarmupDecayLR", "WarmupLR"):
        rate = "the learning rate is set by --lr_scheduler, --warmup_ratio and --min_lr_ratio"
        yield f"ds_file has a scheduler {scheduler['type']!r}; {rate}: leave the section out."


def _zero_problems(zero):
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        yield f"ds_file: zero_optimization.stage is {stage!r}, must be 0, 1, 2 or 3."
    if zero.get("compute_grad_norm", True) is not True:
        yield "ds_file: compute_grad_norm false would let a gradient that is not finite pass: leave it out."
    if stage != 3 and zero.get("offload_param", {}).get("device", "none") != "none":
        yield f"ds_file offloads parameters at stage {stage}: only stage 3 can (DeepSpeed would ignore it)."
    if not stage and zero.get("offload_optimizer", {}).get("device", "none") != "none":
        yield "ds_file offloads the optimizer without a stage: stages 1 to 3 can (DeepSpeed would ignore it)."


def _without_auto(section):
    """Drop "auto" values: inside zero_optimization DeepSpeed has a default for each."""
    kept = {key: value for key, value in section.items() if value != "auto"}
    return {key: _without_auto(value) if isinstance(value, dict) else value for key, value in kept.items()}
