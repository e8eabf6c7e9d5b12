"""The registry of modes. A new one is a file here and a line below.

from glm_finetune import MODE
tokenizer = MODE["glm3"].tokenizer.from_pretrained(folder)
"""

from glm_finetune.errors import UserError
from glm_finetune.modes.glm import GLM
from glm_finetune.modes.glm2 import GLM2
from glm_finetune.modes.glm3 import GLM3

MODE = {mode.name: mode for mode in (GLM, GLM2, GLM3)}


def mode_of(fields, folder_name):
    """The Mode of a checkpoint from its config.json (a dict): the only one of its architecture, or that it is named
    after, there or by its folder. None if both leave it open.

        {"inner_hidden_size": ...}                        -> glm, whatever it is called
        {"kv_channels": ..., "_name_or_path": "x"}, "x"   -> None: ChatGLM2 and 3 have the same fields
    """
    fitting = [mode for mode in MODE.values() if not mode.missing_in(fields)] or [*MODE.values()]
    if len(fitting) == 1:
        return fitting[0]
    text = f"{fields.get('_name_or_path', '')} {folder_name}"
    named = [mode for mode in fitting if mode.named_in(text) is not None]
    return min(named, key=lambda mode: mode.named_in(text), default=None)


def refuse_architecture(mode, path, fields):
    """Raise UserError if a config.json (its path and what it holds) is of another architecture than the mode's."""
    if missing := mode.missing_in(fields):
        raise UserError(f"{path}: not a configuration of this --mode: it has no {missing}. {_released()}.")


def _released():
    known = [(" and ".join(m.released), "are" if len(m.released) > 1 else "is", m.name) for m in MODE.values()]
    return ", ".join(f"{models} {verb} --mode {name}" for models, verb, name in known)


def refuse_others(mode, folder, fields):
    """Raise UserError if the `_name_or_path` of a folder's config.json (a dict) is a model of another mode."""
    name = str(fields.get("_name_or_path", ""))
    if any(other.named_in(name) is not None for other in MODE.values() if other is not mode):
        raise _of_another(mode, folder, name)


def _of_another(mode, folder, name):
    problem = f"its config.json says it is {name}, not a model for --mode {mode.name}"
    return UserError(f"{folder}: {problem}. If that is wrong, correct _name_or_path there.")
