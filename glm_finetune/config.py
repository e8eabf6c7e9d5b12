"""Every flag of every script, once. A field of a dataclass is a flag; `flags.parse` generates the parser from them."""

from dataclasses import dataclass

from glm_finetune.errors import UserError, unknown_choice
from glm_finetune.flags import flag

DEFAULT_DS_FILE = "ds_zero2_no_offload.json"
TEMPLATES = ("train", "official", "official_rounds")
SHUFFLE_BUFFER = 10_000  # rows of a stream that are shuffled together
MIN_PROMPT = 32  # tokens of a prompt in prediction, at least; fewer would cut every question to nothing


@dataclass(kw_only=True)
class DataFlags:
    """How rows become samples: flags of train.py and of the data report."""

    max_len: int = flag("tokens of a sample; longer answers are cut", 1024, "how rows become samples")
    max_src_len: int = flag("tokens of what stands before an answer; more are cut (--truncation)", 256)
    is_skip: bool = flag("leave out samples that do not fit instead of cutting them", False)
    truncation: str = flag(
        "what of a long question is cut: its tail (as ChatGLM-Finetuning), head (the oldest rounds first) or middle; "
        "or drop (leave the sample out, as --is_skip), error (stop)",
        "tail",
    )
    end_cut_answers: bool = flag(
        "train the end token also after an answer that was cut (ChatGLM-Finetuning did)", False
    )
    data_format: str | None = flag("format of the rows (data/README.md); default: told from their fields", None)
    columns: str | None = flag("other names of fields in the files: instruction=question,output=reply", None)
    prompt_text: str | None = flag("put before every text of the format text_answer", None)
    template: str = flag(
        "prompt to train with: train (ChatGLM-Finetuning's), official (the released model's chat), official_rounds "
        "(its chat training scripts: ChatGLM-6B's first question is counted too)",
        "train",
    )
    train_on: str = flag("answers of a conversation that are trained: all or last", "all")
    on_bad_row: str = flag("stop at a bad row, or skip: leave it out and list it in a file", "stop")

    def data_problems(self):
        """Everything wrong with these flags, one line each."""
        for name in ("max_len", "max_src_len"):
            if getattr(self, name) <= 0:
                yield f"--{name} {getattr(self, name)}: must be above 0."
        for name, allowed in (
            ("truncation", ("tail", "head", "middle", "drop", "error")),
            ("template", TEMPLATES),
            ("train_on", ("all", "last")),
            ("on_bad_row", ("stop", "skip")),
        ):
            yield from unknown_choice(name, getattr(self, name), allowed)
        if self.is_skip and self.truncation == "error":
            yield "--is_skip leaves out what --truncation error stops at: give one of them."


@dataclass(kw_only=True)
class TrainConfig(DataFlags):
    """Flags of train.py. Names and defaults are ChatGLM-Finetuning's, except where its default could not run."""

    given = frozenset()  # names of the flags that were set; see `flags.parse`

    config: str | None = flag(
        "YAML or JSON file of flags, or train_config.json of a run; the command line wins", None, "settings"
    )

    mode: str = flag("glm (ChatGLM-6B), glm2 (ChatGLM2-6B, CodeGeeX2) or glm3 (ChatGLM3-6B)", "glm2", "model and data")
    model_name_or_path: str = flag("folder of the base checkpoint (config.json, weights, tokenizer)")
    train_path: str = flag(
        "training data: files, folders or hf://owner/name, commas between them, weights behind (a.json:2,b.jsonl)"
    )
    eval_path: str | None = flag("data to compute the loss on at every save, in any of the same formats", None)

    packing: bool = flag(
        "lay the samples of a micro-batch end to end in rows of at most max_len tokens; samples do not see each other",
        False,
        "batches and large data",
    )
    group_by_length: bool = flag("batches of samples of similar length, for less padding", False)
    cache_dir: str | None = flag("folder for prepared data; default: ~/.cache/glm_finetune", None)
    overwrite_cache: bool = flag("prepare the data again although it lies prepared in cache_dir", False)
    streaming: bool = flag("prepare nothing: read and tokenize each row of JSON lines when it is its turn", False)
    shuffle_buffer: int | None = flag(
        f"with --streaming: shuffle within so many consecutive rows; default: {SHUFFLE_BUFFER}", None
    )

    output_dir: str = flag("folder for checkpoints, logs and TensorBoard files", group="output and resuming")
    overwrite_output_dir: bool = flag("start although output_dir holds results; they are deleted", False)
    resume: str | None = flag("auto (newest whole checkpoint in output_dir, if any) or a folder epoch-E-step-S", None)
    force: bool = flag("with --resume: go on although data, tokenizer, base or lengths differ", False)
    show_loss_step: int = flag("optimizer steps between two log lines", 10)
    save_model_step: int | None = flag("also save every so many optimizer steps, not only after each epoch", None)
    save_total_limit: int | None = flag("keep this many of the newest checkpoints, and the best", None)
    async_save: bool = flag("write checkpoints in the background; takes a copy of what is saved in host memory", False)
    logging_dir: str | None = flag("folder for TensorBoard; default: output_dir/runs", None)

    train_type: str = flag(
        "what is trained: lora, qlora (base in 4 or 8 bit), ptuning (a prefix), freeze (some layers) or all",
        "lora",
        "what is trained",
    )
    lora_dim: int = flag("LoRA rank", 8)
    lora_alpha: float = flag("LoRA scale: the update is multiplied by alpha / rank", 30)
    lora_dropout: float = flag("dropout in front of the LoRA matrices", 0.1)
    lora_module_name: str | None = flag(
        "comma list of layers that get LoRA, or all-linear; default: the mode's (query_key_value)", None
    )
    lora_variant: str = flag("lora, dora, rslora (scale alpha / sqrt(rank)) or pissa", "lora")
    loraplus_ratio: float | None = flag("LoRA+: the B matrices' learning rate, as a multiple of the A matrices'", None)
    modules_to_save: str | None = flag("comma list of modules that are trained whole beside LoRA", None)
    quantization_bit: int = flag("bits of the base under qlora: 4 (nf4, double quantisation) or 8", 4)
    freeze_module_name: str | None = flag(
        "comma list of parts of parameter names that stay trainable under freeze; default: layers.27.", None
    )
    freeze_last: int | None = flag("instead: the last so many layers stay trainable", None)
    ptuning_version: int = flag("2: keys and values in front of every layer; 1: embeddings at the input only", 2)
    pre_seq_len: int = flag("tokens of the P-tuning prefix", 16)
    prefix_projection: bool = flag("compute the P-tuning prefix through an encoder (version 1: LSTM and MLP)", True)
    prefix_dropout: float = flag("dropout of the P-tuning prefix", 0.1)

    per_device_train_batch_size: int = flag("samples of a micro-batch on each card", 16, "optimization")
    gradient_accumulation_steps: int = flag("micro-batches of an optimizer step", 1)
    num_train_epochs: int = flag("passes over the data", 1)
    max_steps: int | None = flag("stop after this many optimizer steps; the schedule ends there", None)
    learning_rate: float | None = flag("peak learning rate; default: that of the train type's recipe", None)
    lr_scheduler: str = flag("shape after the warm-up: linear, cosine or constant", "linear")
    warmup_ratio: float = flag("share of all steps in which the learning rate rises", 0.1)
    warmup_steps: int | None = flag("instead: steps in which the learning rate rises", None)
    min_lr_ratio: float = flag("the schedule ends at this share of the peak", 0.1)
    weight_decay: float = flag("decoupled weight decay of matrices (biases and norms have none)", 0.1)
    max_grad_norm: float = flag("gradients are scaled down to this norm; 0 = never", 1.0)
    on_nonfinite: str = flag("when loss or gradient is inf or nan: stop, or skip the step on all ranks", "stop")
    max_nonfinite: int = flag("with --on_nonfinite skip: stop after so many skipped steps", 10)
    seed: int = flag("of data order, dropout and new weights", 1234)

    precision: str | None = flag(
        "bf16, fp16 or fp32; default: the best the card can do (fp32 on a CPU)", None, "memory and devices"
    )
    gradient_checkpointing: bool = flag("compute activations again in the backward pass instead of keeping them", False)
    ds_file: str = flag("DeepSpeed file (memory strategy); a bare name is looked up in ds_configs/", DEFAULT_DS_FILE)
    device: str | None = flag("cuda or cpu; default: cuda where there is a card", None)
    local_rank: int = flag("set by the deepspeed launcher", -1)
    deepspeed: bool = flag("accepted for old scripts; training always uses DeepSpeed", False)
    deepspeed_config: str | None = flag("another name for --ds_file", None)

    def __post_init__(self):
        if self.deepspeed_config:
            if self.ds_file not in (DEFAULT_DS_FILE, self.deepspeed_config):
                raise UserError(
                    f"--ds_file {self.ds_file} and --deepspeed_config {self.deepspeed_config} are two "
                    "names of one flag: give one of them."
                )
            self.ds_file = self.deepspeed_config

    def problems(self):
        """Everything wrong with the numbers and names, one line each."""
        yield from self.data_problems()
        positive = (
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
            "loraplus_ratio",
            "freeze_last",
            "max_nonfinite",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and value <= 0:
                yield f"--{name} {value}: must be above 0."
        for name in ("warmup_ratio", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                yield f"--{name} {getattr(self, name)}: must be between 0 and 1."
        for name in ("lora_dropout", "prefix_dropout"):
            if not 0 <= getattr(self, name) < 1:
                yield f"--{name} {getattr(self, name)}: must be at least 0 and below 1 (1 drops everything)."
        for name in ("weight_decay", "max_grad_norm", "warmup_steps"):
            if (getattr(self, name) or 0) < 0:
                yield f"--{name} {getattr(self, name)}: must not be negative."
        for name in ("lora_module_name", "freeze_module_name", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not value.strip(", "):
                yield f"--{name} {value!r}: names nothing. Give names with commas between them, or leave the flag out."
        yield from bad_seed(self.seed)
        yield from conflicting_data_flags(self)
        for name, allowed in (
            ("lr_scheduler", ("linear", "cosine", "constant")),
            ("device", ("cuda", "cpu")),
            ("precision", ("bf16", "fp16", "fp32")),
            ("on_nonfinite", ("stop", "skip")),
            ("ptuning_version", (1, 2)),
            ("quantization_bit", (4, 8)),
        ):
            yield from unknown_choice(name, getattr(self, name), allowed)
        if self.warmup_steps is not None and "warmup_ratio" in self.given:
            yield "--warmup_steps and --warmup_ratio both say how long the warm-up is: give one of them."


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
    test_path: str | None = flag("answer every row of these files, in any format of the training data", None)
    output_path: str | None = flag(
        "where the answers go, one JSON line each; default: <model_path>/predictions.jsonl", None
    )
    chat: bool = flag("talk to the model in the terminal", False)
    data_format: str | None = flag("format of the rows (data/README.md); default: told from their fields", None)
    columns: str | None = flag("other names of fields in the file: instruction=question,output=reply", None)
    prompt_text: str | None = flag("put before every text of the format text_answer; default: as in training", None)
    truncation: str = flag("what of a long question is cut: tail, head (the oldest rounds first) or middle", "tail")
    template: str | None = flag(
        "train, official (the released model's chat) or official_rounds (its chat training); default: that of the "
        "training for what was trained here, official for a bare base",
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
        yield from unknown_choice("template", self.template, TEMPLATES)
        yield from unknown_choice("truncation", self.truncation, ("tail", "head", "middle"))
        if sum((self.chat, self.test_path is not None, self.instruction is not None)) != 1:
            yield "give exactly one of --instruction TEXT, --test_path FILE and --chat."
        if self.input and self.instruction is None:
            yield "--input goes with --instruction only."


@dataclass(kw_only=True)
class ReportConfig(DataFlags):
    """Flags of python -m glm_finetune.data."""

    train_path: str = flag("the data; may be given without its flag", group="report")
    mode: str = flag("glm, glm2 or glm3", "glm2")
    model_name_or_path: str = flag("folder with the tokenizer; no weights are read")
    preview: int = flag("samples to show, targets marked", 0)
    output_path: str = flag("where the histogram of lengths goes", "lengths.png")
    bad_rows_path: str = flag("with --on_bad_row skip: where the bad rows are listed", "bad_rows.txt")

    def problems(self):
        yield from self.data_problems()
        if self.preview < 0:
            yield f"--preview {self.preview}: must not be negative."
        if not self.output_path.lower().endswith(".png"):
            yield f"--output_path {self.output_path}: must end in .png."


def conflicting_data_flags(config):
    """Yield a problem for each pair of flags of which one would go unheard."""
    for first, second, why in (
        ("streaming", "overwrite_cache", "a stream prepares nothing"),
        ("streaming", "group_by_length", "a stream does not know the lengths"),
        ("packing", "group_by_length", "packed rows have next to no padding, whatever the lengths"),
    ):
        if getattr(config, first) and getattr(config, second):
            yield f"--{second} goes without --{first}: {why}. Leave one of them out."
    if config.streaming and config.on_bad_row == "skip":
        yield "--on_bad_row skip goes without --streaming: a stream does not know its bad rows beforehand."
    if config.streaming and (config.is_skip or config.truncation == "drop"):
        flag_name = "is_skip" if config.is_skip else "truncation drop"
        yield f"--{flag_name} goes without --streaming: a stream does not know beforehand what is too long."
    if config.shuffle_buffer and not config.streaming:
        yield "--shuffle_buffer goes with --streaming only: prepared data is shuffled as a whole."


def bad_seed(seed):
    """Yield a problem unless numpy and torch both take the seed."""
    if not 0 <= seed < 2**32:
        yield f"--seed {seed}: must be between 0 and {2**32 - 1}."
