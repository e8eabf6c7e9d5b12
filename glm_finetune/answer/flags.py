"""Flags of predict.py."""

from dataclasses import dataclass

from glm_finetune.data.flags import SEPARATOR_HELP, TEMPLATES
from glm_finetune.flags import POSITIVE, PRECISIONS, SEED, Flags, flag
from glm_finetune.models.rope import RULES
from glm_finetune.modes.flags import ROPE_HELP

METRICS = ("triples",)
MIN_PROMPT = 32  # tokens of a prompt in prediction, at least; fewer would cut every question to nothing


def is_text(text):
    """Whether a text can be encoded; what a terminal sent in another encoding than UTF-8 cannot."""
    return not any(0xD800 <= ord(character) <= 0xDFFF for character in text)


@dataclass(kw_only=True)
class PredictConfig(Flags):
    """Flags of predict.py."""

    model_path: str = flag("a base checkpoint, a trained or merged folder, or an adapter folder", "output_dir/")
    mode: str | None = flag("glm, glm2 or glm3; default: recorded at training", None)
    ori_model_dir: str | None = flag("base of an adapter; default: the one recorded with it", None)
    rope_rule: str | None = flag(f"{ROPE_HELP}; of an adapter as in its training", None, RULES)
    force: bool = flag("take a base whose weights are not those of the training", False)
    instruction: str | None = flag("ask this one question", None)
    input: str = flag("appended to --instruction", "")
    test_path: str | None = flag("answer every row of these files, in any format of the training data", None)
    output_path: str | None = flag(
        "where the answers go, one JSON line each; default: <model_path>/predictions.jsonl", None
    )
    chat: bool = flag("talk to the model in the terminal", False)
    data_format: str | None = flag("format of the rows (data/README.md); default: told from their fields", None)
    columns: str | None = flag("other names of fields in the file: instruction=question,output=reply", None)
    roles: str | None = flag("other names of who speaks in a conversation: client=user,counselor=assistant", None)
    repair_turns: bool = flag(
        "join texts of one role in a row by a line break, leave out an answer before any question",
        False,
    )
    prompt_text: str | None = flag("put before every text of the format text_answer; default: as in training", None)
    input_separator: str | None = flag(f"{SEPARATOR_HELP}; default: as in training", None)
    truncation: str = flag(
        "what of a question that is too long is cut, after the oldest rounds before it: tail, head or middle",
        "tail",
        ("tail", "head", "middle"),
    )
    template: str | None = flag(
        "train, official (the released model's chat), official_rounds (its chat training), raw (the question as it "
        "is) or text (a text that goes on); default: that of the training, for a bare base official",
        None,
        (*TEMPLATES, "text"),
    )
    metrics: str | None = flag("score the answers of --test_path: triples (head_relation_tail lines)", None, METRICS)
    batch_size: int = flag("rows answered together", 8, POSITIVE)
    max_length: int = flag("tokens of prompt and answer together", 2048, POSITIVE)
    allow_longer: bool = flag("let --max_length be more than the base was made for", False)
    max_new_tokens: int | None = flag("tokens of an answer; default: what --max_length leaves", None, POSITIVE)
    do_sample: bool = flag("sample instead of taking the likeliest token", False)
    top_p: float = flag("sample from the likeliest tokens that make up this probability", 0.8)
    temperature: float = flag("divide logits by this before sampling", 0.8, POSITIVE)
    num_beams: int = flag("beam search with this many beams", 1, POSITIVE)
    seed: int = flag("of sampling", 1234, SEED)
    precision: str | None = flag(
        "bf16, fp16 or fp32; default: the best the card can do; on a CPU bf16 for large models, fp32 for small ones",
        None,
        PRECISIONS,
    )
    quantization_bit: int | None = flag("bits of the base's weights, for small cards; default: 16", None, (4, 8))
    device: str | None = flag("number of a card, cuda or cpu; default: a card where there is one", None)
    overwrite: bool = flag("answer all rows again although --output_path has some", False)

    def problems(self):
        yield from super().problems()
        if not 0 < self.top_p <= 1:
            yield f"--top_p {self.top_p}: must be above 0 and at most 1."
        if self.max_length < (self.max_new_tokens or 0) + MIN_PROMPT:
            beside = f" beside --max_new_tokens {self.max_new_tokens}" if self.max_new_tokens else ""
            few = f"leaves fewer than {MIN_PROMPT} tokens for the prompt"
            yield f"--max_length {self.max_length} {few}{beside}: raise it."
        if sum((self.chat, self.test_path is not None, self.instruction is not None)) != 1:
            yield "give exactly one of --instruction TEXT, --test_path FILE and --chat."
        if self.input and self.instruction is None:
            yield "--input goes with --instruction only."
        if not is_text((self.instruction or "") + self.input):
            yield "--instruction or --input is no UTF-8: set the terminal to UTF-8, or ask with --test_path."
        if self.metrics and self.test_path is None:
            yield "--metrics goes with --test_path only."
