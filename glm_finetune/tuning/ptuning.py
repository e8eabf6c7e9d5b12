"""P-Tuning: a trainable prefix, the model itself frozen.

Version 2 (arXiv 2110.07602, the official ChatGLM code): keys and values in front of every layer. Version 1 (arXiv
2103.10385): embeddings in front of the text, from the paper's prompt encoder. A checkpoint holds what comes of it
alone: `pytorch_model.bin` with the official parameter names (version 2) or the P embeddings (version 1), and
config.json.
"""

import io
from pathlib import Path

import torch

from glm_finetune.errors import UserError
from glm_finetune.models import prefixes
from glm_finetune.models.prefixes import PromptEncoder
from glm_finetune.weights import iter_tensors, open_tensors, read_json, write_json

PREFIX = "transformer.prefix_encoder."
PROMPT = "transformer.prompt_encoder."
WEIGHT_FILE = "pytorch_model.bin"  # the official code reads a prefix from this name


def add_prefix(model, pre_seq_len, projection, dropout):
    """Freeze `model` and give it a prefix of `pre_seq_len` tokens; projection: through an MLP. dropout: of the prefix.

    Raises UserError if it is longer than the context or the model has one already.
    """
    _freeze(model, pre_seq_len)
    prefixes.add_prefix(model, pre_seq_len, projection, dropout)
    return model


def add_prompt(model, prompt_len, projection, dropout, max_len):
    """Freeze `model` and give it a version 1 prompt of `prompt_len` embeddings; projection: from the LSTM encoder.

    max_len: tokens of text, which share the positions with the prompt. Raises UserError like `add_prefix`.
    """
    _freeze(model, prompt_len)
    if prompt_len + max_len > model.config.max_positions:
        raise UserError(
            f"--pre_seq_len {prompt_len} and --max_len {max_len} are more than the context of "
            f"{model.config.max_positions}: a version 1 prompt takes positions. Lower one of them."
        )
    prefixes.add_prompt(model, prompt_len, projection, dropout)
    return model


def _freeze(model, length):
    """Nothing of a model learns that is to get a prefix of `length` tokens."""
    if model.config.pre_seq_len or model.config.prompt_len:
        raise UserError("--train_type ptuning: the base has a prefix already; give the base it was made from.")
    if length >= model.config.max_positions:
        raise UserError(f"--pre_seq_len {length}: must be below the context of {model.config.max_positions}.")
    model.requires_grad_(False)


def write_prefix(model, tensors, folder):
    """Write what learnt. tensors: {name: whole CPU tensor} of the prefix encoder or the prompt encoder."""
    if model.config.prompt_len:
        tensors = {PROMPT + "embedding.weight": _prompt(model, tensors)}
    file = io.BytesIO()  # torch.save itself turns a full disk into a RuntimeError
    torch.save({name: tensor.clone() for name, tensor in tensors.items()}, file)
    (folder / WEIGHT_FILE).write_bytes(file.getbuffer())
    write_json(model.config.to_original(), folder / "config.json")


@torch.no_grad()
def _prompt(model, tensors):
    """The (P, D) fp32 embeddings that the trained prompt encoder gives: the encoder itself is not needed any more."""
    tensors = {name.removeprefix(PROMPT): tensor.float() for name, tensor in tensors.items()}
    num, size = tensors["embedding.weight"].shape
    with torch.device("meta"):  # initial values would take random numbers that belong to the training
        encoder = PromptEncoder(num, size, model.transformer.prompt_encoder.projection, dropout=0.0)
    encoder.load_state_dict(tensors, assign=True)
    return encoder().contiguous()


def is_prefix_folder(folder):
    """Whether a folder holds a prefix and no model: one of this project, or of the official P-Tuning code."""
    path = Path(folder) / "config.json"
    if not path.is_file() or not {"pre_seq_len", "prompt_len"} & set(read_json(path)):
        return False
    if not any((Path(folder) / name).is_file() for name in (WEIGHT_FILE, "model.safetensors")):
        return False
    return all(name.startswith((PREFIX, PROMPT)) for name in open_tensors(folder))


def prefix_sizes(folder):
    """{flag: value} of what shapes the prefix in `folder`. The encoder of a version 1 prompt is not kept: what it gave
    is trained further without one. Raises UserError for a folder that holds no prefix.
    """
    tensors = open_tensors(folder)
    name = next((part + "embedding.weight" for part in (PROMPT, PREFIX) if part + "embedding.weight" in tensors), None)
    if name is None:
        raise UserError(f"{Path(folder)}: holds no embedding of a prefix; the file is damaged, copy it again.")
    has_encoder = any(name.startswith(PREFIX + "trans.") for name in tensors)
    version = 1 if name.startswith(PROMPT) else 2
    return {"ptuning_version": version, "pre_seq_len": len(tensors[name]()), "prefix_projection": has_encoder}


def load_prefix(model, folder):
    """Put the prefix in `folder` on `model`. Raises UserError when names or shapes do not fit the base."""
    tensors = {name: tensor for name, tensor in iter_tensors(folder) if name.startswith((PREFIX, PROMPT))}
    is_prompt, has_encoder = (any(name.startswith(part) for name in tensors) for part in (PROMPT, PREFIX + "trans."))
    name = (PROMPT if is_prompt else PREFIX) + "embedding.weight"
    if name not in tensors:
        raise UserError(f"{Path(folder)}: holds no {name}; it is not the checkpoint of a prefix.")
    add = prefixes.add_prompt if is_prompt else prefixes.add_prefix
    add(model, len(tensors[name]), has_encoder and not is_prompt)
    expected = {name: p for name, p in model.named_parameters() if name.startswith((PREFIX, PROMPT))}
    if {n: p.shape for n, p in expected.items()} != {n: t.shape for n, t in tensors.items()}:
        raise UserError(f"{Path(folder)}: the prefix does not fit the base model. Is it of another base?")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return model.eval()
