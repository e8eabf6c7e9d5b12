"""Every flag of every script, once. A field of a dataclass is a flag; the parser is generated from the fields.

config = parse(TrainConfig, sys.argv[1:])   # or a ValueError that lists every problem at once
"""

import argparse
import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field

DEFAULT_DS_FILE = "ds_zero2_no_offload.json"
SHUFFLE_BUFFER = 10_000  # rows of a stream that are shuffled together
MIN_PROMPT = 32  # tokens of a prompt in prediction, at least; fewer would cut every question to nothing


def flag(help, default=dataclasses.MISSING, choices=None):
    """A dataclass field with what `--help` says of it."""
    return field(default=default, metadata={"help": help, "choices": choices})


@dataclass(kw_only=True)
class TrainConfig:
    """Flags of train.py. Names and defaults are ChatGLM-Finetuning's, except where its default could not run."""

    mode: str = flag(
        "member of the family: glm (ChatGLM-6B), glm2 (ChatGLM2-6B, CodeGeeX2), glm3 (ChatGLM3-6B)", "glm2"
    )
    model_name_or_path: str = flag("folder of the base checkpoint (config.json, weights, tokenizer)")
    train_path: str = flag("training data: JSONL or a JSON array of instruction / input / output")
    eval_path: str | None = flag("data to compute the loss on at every save, in the same format", None)
    output_dir: str = flag("folder for checkpoints, logs and TensorBoard files")
    overwrite_output_dir: bool = flag("start although output_dir holds results; they are deleted", False)

    resume: str | None = flag(
        "auto (the newest whole checkpoint in output_dir, if any) or a folder epoch-E-step-S", None
    )
    force: bool = flag("with --resume: go on although data, tokenizer, base or lengths differ", False)

    max_len: int = flag("tokens of a sample; longer answers are cut", 1024)
    max_src_len: int = flag("tokens of a question; longer ones are cut, keeping their ending", 256)
    is_skip: bool = flag("leave out samples that do not fit instead of cutting them", False)
    packing: bool = flag(
        "lay the samples of a micro-batch end to end in rows of at most max_len tokens; samples do not see each other",
        False,
    )
    group_by_length: bool = flag("batches of samples of similar length, for less padding", False)
    cache_dir: str | None = flag("folder for prepared data; default: ~/.cache/glm_finetune", None)
    overwrite_cache: bool = flag("prepare the data again although it lies prepared in cache_dir", False)
    streaming: bool = flag("prepare nothing: read and tokenize each sample when it is its turn", False)
    shuffle_buffer: int | None = flag(
        f"with --streaming: shuffle within so many consecutive rows; default: {SHUFFLE_BUFFER}", None
    )

    train_type: str = flag("what is trained: lora, ptuning (a prefix), freeze (some layers) or all", "lora")
    lora_dim: int = flag("LoRA rank", 8)
    lora_alpha: float = flag("LoRA scale: the update is multiplied by alpha / rank", 30)
    lora_dropout: float = flag("dropout in front of the LoRA matrices", 0.1)
    lora_module_name: str | None = flag(
        "comma list of layers that get LoRA; default: the mode's (query_key_value)", None
    )
    freeze_module_name: str = flag("comma list of parts of parameter names that stay trainable", "layers.27.")

    pre_seq_len: int = flag("tokens of the P-tuning prefix", 16)
    prefix_projection: bool = flag("compute the P-tuning prefix through an MLP", True)
    prefix_dropout: float = flag("dropout of the P-tuning prefix", 0.1)

    per_device_train_batch_size: int = flag("samples of a micro-batch on each card", 16)
    gradient_accumulation_steps: int = flag("micro-batches of an optimizer step", 1)
    num_train_epochs: int = flag("passes over the data", 1)
    max_steps: int | None = flag("stop after this many optimizer steps; the schedule ends there", None)
    learning_rate: float = flag("peak learning rate", 1e-3)
    lr_scheduler: str = flag("shape after the warm-up: linear, cosine or constant", "linear")
    warmup_ratio: float = flag("share of all steps in which the learning rate rises", 0.1)
    min_lr_ratio: float = flag("the schedule ends at this share of the peak", 0.1)
    weight_decay: float = flag("decoupled weight decay of matrices (biases and norms have none)", 0.1)
    max_grad_norm: float = flag("gradients are scaled down to this norm; 0 = never", 1.0)
    seed: int = flag("of data order, dropout and new weights", 1234)

    precision: str | None = flag("bf16, fp16 or fp32; default: the best the card can do (fp32 on a CPU)", None)
    gradient_checkpointing: bool = flag("compute activations again in the backward pass instead of keeping them", False)
    ds_file: str = flag("DeepSpeed file (memory strategy); a bare name is looked up in ds_configs/", DEFAULT_DS_FILE)
    device: str | None = flag("cuda or cpu; default: cuda where there is a card", None)

    show_loss_step: int = flag("optimizer steps between two log lines", 10)
    save_model_step: int | None = flag("also save every so many optimizer steps, not only after each epoch", None)
    save_total_limit: int | None = flag("keep this many of the newest checkpoints", None)
    logging_dir: str | None = flag("folder for TensorBoard; default: output_dir/runs", None)

    local_rank: int = flag("set by the deepspeed launcher", -1)
    deepspeed: bool = flag("accepted for old scripts; training always uses DeepSpeed", False)
    deepspeed_config: str | None = flag("another name for --ds_file", None)

    def __post_init__(self):
        if self.deepspeed_config:
            if self.ds_file not in (DEFAULT_DS_FILE, self.deepspeed_config):
                raise ValueError(
                    f"--ds_file {self.ds_file} and --deepspeed_config {self.deepspeed_config} are two "
                    "names of one flag: give one of them."
                )
            self.ds_file = self.deepspeed_config

    def problems(self):
        """Everything wrong with the numbers and names, one line each."""
        positive = (
            "max_len",
            "max_src_len",
            "lora_dim",
            "pre_seq_len",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "max_steps",
            "show_loss_step",
            "save_model_step",
            "save_total_limit",
            "shuffle_buffer",
            "learning_rate",
            "lora_alpha",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"--{name} {value}: must be above 0."
        for name in ("warmup_ratio", "min_lr_ratio", "lora_dropout", "prefix_dropout"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name} {getattr(self, name)}: must be between 0 and 1."
        for name in ("weight_decay", "max_grad_norm"):
            if getattr(self, name) < 0:
                yield f"--{name} {getattr(self, name)}: must not be negative."
        for name in ("lora_module_name", "freeze_module_name"):
            value = getattr(self, name)
            if value is not None and not value.strip(", "):
                yield f"--{name} {value!r}: names nothing. Give names with commas between them, or leave the flag out."
        yield from bad_seed(self.seed)
        yield from conflicting_data_flags(self)
        for name, allowed in (
            ("lr_scheduler", ("linear", "cosine", "constant")),
            ("device", ("cuda", "cpu")),
            ("precision", ("bf16", "fp16", "fp32")),
        ):
            yield from unknown_choice(name, getattr(self, name), allowed)


@dataclass(kw_only=True)
class MergeConfig:
    """Flags of merge_lora.py."""

    model_dir: str = flag("folder of the LoRA adapter")
    ori_model_dir: str | None = flag("base checkpoint; default: the one recorded with the adapter", None)
    mode: str | None = flag("glm, glm2 or glm3; default: recorded with the adapter", None)
    output_dir: str | None = flag("folder to write; default: <model_dir>-merged", None)
    dtype: str | None = flag("bf16, fp16 or fp32 of the written weights; default: the base's", None)

    def problems(self):
        yield from unknown_choice("dtype", self.dtype, ("bf16", "fp16", "fp32"))


@dataclass(kw_only=True)
class PredictConfig:
    """Flags of predict.py."""

    model_path: str = flag("a base checkpoint, a trained or merged folder, or an adapter folder", "output_dir/")
    mode: str | None = flag("glm, glm2 or glm3; default: recorded at training", None)
    ori_model_dir: str | None = flag("base of an adapter; default: the one recorded with it", None)
    instruction: str | None = flag("ask this one question", None)
    input: str = flag("appended to --instruction", "")
    test_path: str | None = flag("answer every row of this file (instruction / input, and output to score)", None)
    output_path: str | None = flag(
        "where the answers go, one JSON line each; default: <model_path>/predictions.jsonl", None
    )
    chat: bool = flag("talk to the model in the terminal", False)
    template: str | None = flag(
        "train (the prompt of fine-tuning) or official (the released model's chat); default: train "
        "for what was trained here, official for a bare base",
        None,
    )
    batch_size: int = flag("rows answered together", 8)
    max_length: int = flag("tokens of prompt and answer together", 2048)
    max_new_tokens: int | None = flag("tokens of an answer; default: what --max_length leaves", None)
    do_sample: bool = flag("sample instead of taking the likeliest token", False)
    top_p: float = flag("sample from the likeliest tokens that make up this probability", 0.8)
    temperature: float = flag("divide logits by this before sampling", 0.8)
    num_beams: int = flag("beam search with this many beams", 1)
    seed: int = flag("of sampling", 1234)
    precision: str | None = flag("bf16, fp16 or fp32; default: the best the card can do (fp32 on a CPU)", None)
    device: str | None = flag("number of a card, cuda or cpu; default: a card where there is one", None)
    overwrite: bool = flag("answer all rows again although --output_path has some", False)

    def problems(self):
        for name in ("batch_size", "max_length", "max_new_tokens", "num_beams", "temperature"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"--{name} {value}: must be above 0."
        if not 0 < self.top_p <= 1:
            yield f"--top_p {self.top_p}: must be above 0 and at most 1."
        if self.max_length < (self.max_new_tokens or 0) + MIN_PROMPT:
            yield (
                f"--max_length {self.max_length} leaves fewer than {MIN_PROMPT} tokens for the prompt"
                + (f" beside --max_new_tokens {self.max_new_tokens}" if self.max_new_tokens else "")
                + ": raise it."
            )
        yield from bad_seed(self.seed)
        yield from unknown_choice("precision", self.precision, ("bf16", "fp16", "fp32"))
        yield from unknown_choice("template", self.template, ("train", "official"))
        if sum((self.chat, self.test_path is not None, self.instruction is not None)) != 1:
            yield "give exactly one of --instruction TEXT, --test_path FILE and --chat."
        if self.input and self.instruction is None:
            yield "--input goes with --instruction only."


def unknown_choice(name, value, allowed):
    """Yield a problem, with the nearest allowed value, unless `value` is None or allowed."""
    if value is not None and value not in allowed:
        near = difflib.get_close_matches(str(value).lower(), allowed, 1, cutoff=0.7)
        yield f"--{name} {value!r}: must be one of {', '.join(allowed)}." + (
            f" Did you mean {near[0]}?" if near else ""
        )


def conflicting_data_flags(config):
    """Yield a problem for each pair of flags of which one would go unheard."""
    for first, second, why in (
        ("streaming", "overwrite_cache", "a stream prepares nothing"),
        ("streaming", "group_by_length", "a stream does not know the lengths"),
        ("packing", "group_by_length", "packed rows have next to no padding, whatever the lengths"),
    ):
        if getattr(config, first) and getattr(config, second):
            yield f"--{second} goes without --{first}: {why}. Leave one of them out."
    if config.shuffle_buffer and not config.streaming:
        yield "--shuffle_buffer goes with --streaming only: prepared data is shuffled as a whole."


def bad_seed(seed):
    """Yield a problem unless numpy and torch both take the seed."""
    if not 0 <= seed < 2**32:
        yield f"--seed {seed}: must be between 0 and {2**32 - 1}."


def parse_float(text):
    """Text -> float; Python's own float() also takes nan and inf, which pass comparisons and poison every weight."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, not {text!r}")
    return value


def parse_bool(text):
    """True, false, 1, no, ... as text -> bool; the original took any non-empty text for True."""
    if text.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise ValueError(f"{message.removeprefix('argument ')}. --help says what each flag takes.")


def parse(config_class, arguments, description=None):
    """Arguments -> config_class; of a flag given twice the last counts, so that scripts can end in "$@".

    Raises ValueError naming every unknown flag (with the nearest) and every problem.
    """
    parser = _Parser(
        description=description or config_class.__doc__.splitlines()[0],
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    required = {
        item.name: item.metadata["help"]
        for item in dataclasses.fields(config_class)
        if item.default is dataclasses.MISSING
    }
    for item in dataclasses.fields(config_class):
        kind = _value_type(item.type)
        options = {"type": {bool: parse_bool, float: parse_float}.get(kind, kind), "help": item.metadata["help"]}
        options |= {"nargs": "?", "const": True} if kind is bool else {}
        options["default"] = None if item.name in required else item.default
        parser.add_argument(f"--{item.name}", **options)
    values, unknown = parser.parse_known_args(arguments)
    names = [f"--{item.name}" for item in dataclasses.fields(config_class)]
    problems = [_unknown_flag(text, names) for text in unknown if text.startswith("-")]
    problems += [f"{text!r} belongs to no flag." for text in unknown if not text.startswith("-") and not problems]
    problems += [f"--{name} must be given: {what}." for name, what in required.items() if not getattr(values, name)]
    config = config_class(**vars(values))
    raise_together([*problems, *config.problems()])
    return config


def _unknown_flag(text, names):
    near = difflib.get_close_matches(text.split("=")[0], names, 1)
    return f"unknown flag {text}." + (f" Did you mean {near[0]}?" if near else " --help lists them.")


def _value_type(annotation):
    """int | None -> int."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def raise_together(problems):
    """Raise one ValueError with every problem, if there is any."""
    problems = list(problems)
    if problems:
        raise ValueError("\n".join(problems))
