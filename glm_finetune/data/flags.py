"""Flags of the data: where it is, how rows become samples, how samples become batches; those of the data report."""

from dataclasses import dataclass

from glm_finetune.flags import NOT_NEGATIVE, POSITIVE, Flags, flag

TEMPLATES = ("train", "official", "official_rounds", "raw")
SHUFFLE_BUFFER = 10_000  # rows of a stream that are shuffled together


SEPARATOR_HELP = r"put between instruction and input where a row has both; \n is a line break, \t a tab"


def unescaped(text):
    r"""--input_separator as it was meant: a shell hands \n on as two characters."""
    return text.replace("\\n", "\n").replace("\\t", "\t")


NOT_TOGETHER = (
    ("streaming", "overwrite_cache", "a stream prepares nothing"),
    ("streaming", "group_by_length", "a stream does not know the lengths"),
    ("packing", "group_by_length", "packed rows have next to no padding, whatever the lengths"),
)


@dataclass(kw_only=True)
class DataFlags(Flags):
    """How rows become samples: flags of train.py and of the data report."""

    max_len: int = flag("tokens of a sample; longer answers are cut", 1024, POSITIVE, "how rows become samples")
    max_src_len: int = flag("tokens of the question before an answer; more are cut (--truncation)", 256, POSITIVE)
    is_skip: bool = flag("leave out samples that do not fit instead of cutting them", False)
    truncation: str = flag(
        "what of a question longer than max_src_len is cut: its tail (as ChatGLM-Finetuning), head or middle (a "
        "conversation longer than max_len forgets its oldest rounds); or drop (leave the sample out, as --is_skip), "
        "error (stop)",
        "tail",
        ("tail", "head", "middle", "drop", "error"),
    )
    end_cut_answers: bool = flag(
        "train the end token also after an answer that was cut (ChatGLM-Finetuning did)", False
    )
    data_format: str | None = flag("format of the rows (data/README.md); default: told from their fields", None)
    columns: str | None = flag("other names of fields in the files: instruction=question,output=reply", None)
    roles: str | None = flag("other names of who speaks in a conversation: client=user,counselor=assistant", None)
    repair_turns: bool = flag(
        "join texts of one role in a row by a line break, leave out an answer before any question (else an error)",
        False,
    )
    prompt_text: str | None = flag("put before every text of the format text_answer", None)
    input_separator: str | None = flag(SEPARATOR_HELP, None)
    template: str = flag(
        "prompt to train with: train (ChatGLM-Finetuning's), official (the released model's chat), official_rounds "
        "(its chat training scripts: ChatGLM-6B's first question is counted too), raw (the question as it is, for base "
        "models)",
        "train",
        TEMPLATES,
    )
    train_on: str = flag("answers of a conversation that are trained: all or last", "all", ("all", "last"))
    on_bad_row: str = flag("stop at a bad row, or skip: leave it out and list it in a file", "stop", ("stop", "skip"))

    def problems(self):
        yield from super().problems()
        if self.is_skip and self.truncation == "error":
            yield "--is_skip leaves out what --truncation error stops at: give one of them."


@dataclass(kw_only=True)
class BatchFlags(Flags):
    """Where the data of a run is, and how samples become batches."""

    train_path: str = flag(
        "training data: files, folders or hf://owner/name, commas between them, weights behind (a.json:2,b.jsonl)"
    )
    eval_path: str | None = flag("data to compute the loss on at every save, in any of the same formats", None)
    packing: bool = flag(
        "lay the samples of a micro-batch end to end in rows of at most max_len tokens; samples do not see each other",
        False,
        group="batches and large data",
    )
    group_by_length: bool = flag("batches of samples of similar length, for less padding", False)
    cache_dir: str | None = flag("folder for prepared data; default: ~/.cache/glm_finetune", None)
    overwrite_cache: bool = flag("prepare the data again although it lies prepared in cache_dir", False)
    streaming: bool = flag("prepare nothing: read and tokenize each row of JSON lines when it is its turn", False)
    shuffle_buffer: int | None = flag(
        f"with --streaming: shuffle within so many consecutive rows; default: {SHUFFLE_BUFFER}", None, POSITIVE
    )

    def problems(self):
        yield from super().problems()
        for first, second, why in NOT_TOGETHER:
            if getattr(self, first) and getattr(self, second):
                yield f"--{second} goes without --{first}: {why}. Leave one of them out."
        if self.streaming or self.shuffle_buffer:
            yield from self._stream_problems()

    def _stream_problems(self):
        if not self.streaming:
            yield "--shuffle_buffer goes with --streaming only: prepared data is shuffled as a whole."
            return
        if self.on_bad_row == "skip":
            yield "--on_bad_row skip goes without --streaming: a stream does not know its bad rows beforehand."
        if self.is_skip or self.truncation == "drop":
            drops = "--is_skip" if self.is_skip else "--truncation drop"
            yield f"{drops} goes without --streaming: a stream does not know beforehand what is too long."


@dataclass(kw_only=True)
class ReportConfig(DataFlags):
    """Flags of python -m glm_finetune.data."""

    train_path: str = flag("the data; may be given without its flag", group="report")
    mode: str = flag("glm, glm2 or glm3; may be left out where the folder says that it is of the default", "glm2")
    model_name_or_path: str = flag("folder with the tokenizer; no weights are read")
    eval_path: str | None = flag("data that training must not have seen: rows that are in both are counted", None)
    preview: int = flag("samples to show, targets marked", 0, NOT_NEGATIVE)
    output_path: str = flag("where the histogram of lengths goes", "lengths.png")
    bad_rows_path: str = flag("with --on_bad_row skip: where the bad rows are listed", "bad_rows.txt")

    def problems(self):
        yield from super().problems()
        if not self.output_path.lower().endswith(".png"):
            yield f"--output_path {self.output_path}: must end in .png."
