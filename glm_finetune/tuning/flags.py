"""Flags of the train types. What does not go together in them is told by `tuning.problems`."""

from dataclasses import dataclass

from glm_finetune.flags import DROPOUT, POSITIVE, Flags, flag


@dataclass(kw_only=True)
class TuningFlags(Flags):
    """What of the model learns."""

    train_type: str = flag(
        "what is trained: lora, qlora (base in 4 or 8 bit), ptuning (a prefix), freeze (some layers) or all",
        "lora",
        group="what is trained",
    )
    objective: str = flag("what is learnt: instruct (the answers of conversations, or plain text)", "instruct")
    lora_dim: int = flag("LoRA rank", 8, POSITIVE)
    lora_alpha: float = flag("LoRA scale: the update is multiplied by alpha / rank", 30, POSITIVE)
    lora_dropout: float = flag("dropout in front of the LoRA matrices", 0.1, DROPOUT)
    lora_module_name: str | None = flag(
        "comma list of layers that get LoRA, or all-linear; default: the mode's (query_key_value)", None
    )
    lora_variant: str = flag("lora, dora, rslora (scale alpha / sqrt(rank)) or pissa", "lora")
    loraplus_ratio: float | None = flag(
        "LoRA+: the B matrices' learning rate, as a multiple of the A matrices'", None, POSITIVE
    )
    modules_to_save: str | None = flag("comma list of modules that are trained whole beside LoRA", None)
    quantization_bit: int = flag("bits of the base under qlora: 4 (nf4, double quantisation) or 8", 4, (4, 8))
    freeze_module_name: str | None = flag(
        "comma list of parts of parameter names that stay trainable under freeze; default: layers.27.", None
    )
    freeze_last: int | None = flag("instead: the last so many layers stay trainable", None, POSITIVE)
    ptuning_version: int = flag(
        "2: keys and values in front of every layer; 1: embeddings at the input only", 2, (1, 2)
    )
    pre_seq_len: int = flag("tokens of the P-tuning prefix", 16, POSITIVE)
    prefix_projection: bool = flag("compute the P-tuning prefix through an encoder (version 1: LSTM and MLP)", True)
    prefix_dropout: float = flag("dropout of the P-tuning prefix", 0.1, DROPOUT)

    def problems(self):
        yield from super().problems()
        for name in ("lora_module_name", "freeze_module_name", "modules_to_save"):
            value = getattr(self, name)
            if value is not None and not value.strip(", "):
                yield f"--{name} {value!r}: names nothing. Give names with commas between them, or leave the flag out."
