"""Train some of the base's own weights: those whose names contain a given part."""

import re

from glm_finetune.errors import UserError


def last_layers(model, num):
    """Parts of parameter names of the last `num` layers. Raises UserError when the model has fewer."""
    found = (re.search(r"\blayers\.(\d+)\.", name) for name, _ in model.named_parameters())
    num_layers = 1 + max(int(match[1]) for match in found if match)
    if num > num_layers:
        raise UserError(f"--freeze_last {num}: the model has {num_layers} layers.")
    return [f"layers.{i}." for i in range(num_layers - num, num_layers)]


def train_named(model, parts):
    """Only parameters whose name contains one of `parts` learn (the original's --freeze_module_name).

    Raises UserError naming the parts that match nothing, and examples of names that exist.
    """
    parameters = dict(model.named_parameters())
    if unmatched := [part for part in parts if not any(part in name for name in parameters)]:
        shown = sorted({".".join(name.split(".")[:-2]) for name in parameters})
        raise UserError(
            f"--freeze_module_name: no parameter name contains {' or '.join(map(repr, unmatched))}. "
            f"Names begin with: {', '.join(shown[:12])}, ..."
        )
    for name, parameter in parameters.items():
        parameter.requires_grad_(any(part in name for part in parts))
    return model
