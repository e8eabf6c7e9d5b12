"""P-Tuning v2: trainable keys and values in front of every layer (arXiv 2110.07602), as in the official ChatGLM code.

A checkpoint holds the prefix alone, under the official parameter names, and config.json with `pre_seq_len`.
"""

from pathlib import Path

import torch

from glm_finetune.weights import iter_tensors

PREFIX = "transformer.prefix_encoder."


def add_prefix(model, pre_seq_len, projection, dropout):
    """Freeze `model` and give it a prefix of `pre_seq_len` tokens; projection: through an MLP.
    dropout: of the prefix in training.

    Raises ValueError if it is longer than the context or the model has one already.
    """
    if model.config.pre_seq_len:
        raise ValueError(f"--train_type ptuning: the base has a prefix of {model.config.pre_seq_len} tokens already.")
    if pre_seq_len >= model.config.max_positions:
        raise ValueError(f"--pre_seq_len {pre_seq_len}: must be below the context of {model.config.max_positions}.")
    model.requires_grad_(False)
    model.add_prefix(pre_seq_len, projection, dropout)
    return model


def load_prefix(model, folder):
    """Put the prefix in `folder` on `model`. Raises ValueError when names or shapes do not fit the base."""
    tensors = {name: tensor for name, tensor in iter_tensors(folder) if name.startswith(PREFIX)}
    pre_seq_len = tensors[PREFIX + "embedding.weight"].shape[0]
    model.add_prefix(pre_seq_len, any(name.startswith(PREFIX + "trans.") for name in tensors))
    expected = {name: p for name, p in model.named_parameters() if name.startswith(PREFIX)}
    if {n: p.shape for n, p in expected.items()} != {n: t.shape for n, t in tensors.items()}:
        raise ValueError(f"{Path(folder)}: the prefix does not fit the base model. Is it of another base?")
    with torch.no_grad():
        for name, parameter in expected.items():
            parameter.copy_(tensors[name])
    return model.eval()
