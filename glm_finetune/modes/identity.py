"""What a folder is that was given as a base: one of this family, or something else, which is named.

    fields_of_base("output-glm3")           # UserError: the output folder of a run, with these checkpoints
    check_default(MODE["glm2"], "base")     # UserError: a base that is not, or does not say that it is, of the default

Not here: whether the files of a base are whole and fit each other, see `build.check_base`.
"""

from itertools import chain, islice
from pathlib import Path

from glm_finetune.errors import UserError, raise_together
from glm_finetune.modes import MODE, mode_of
from glm_finetune.tuning.ptuning import is_prefix_folder
from glm_finetune.weights import read_json

OWN_TYPE = "chatglm"  # model_type of the family, and of what was made from it
ROWS, GLM4_ROWS = "padded_vocab_size", 151552  # of the embedding of GLM-4 in the layout of ChatGLM3
TELLING = {"pre_seq_len", "prompt_len", "eva_config"}  # fields of a prefix, and of VisualGLM
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.index.json")


def fields_of_base(folder):
    """What config.json says in the folder of a base. Raises UserError naming what the folder is where it is no base."""
    fields = _fields(folder)
    if fields.get("model_type") != OWN_TYPE or fields.keys() & TELLING or fields.get(ROWS) == GLM4_ROWS:
        raise_together(islice(_kinds(Path(folder), fields), 1))
    return fields


def refuse_foreign(folder):
    """Raise UserError for a folder whose config.json is another family's; it need not have one."""
    raise_together(islice(chain(_no_folder(Path(folder)), _foreign(Path(folder), _fields(folder))), 1))


def check_default(mode, folder):
    """Raise UserError unless a folder says by its config.json or name that it is of `mode`, which is the default."""
    found = mode_of(_fields(folder), Path(folder).resolve().name)
    if found is None:
        choices = ", ".join(f"{name} ({', '.join(known.released)})" for name, known in MODE.items())
        raise UserError(f"{folder}: does not say which member of the family it is. Give --mode: {choices}.")
    if found is not mode:
        raise UserError(f"{folder} is a model for --mode {found.name}, the default is {mode.name}: give the flag.")


def _fields(folder):
    return read_json(path) if (path := Path(folder) / "config.json").is_file() else {}


def _kinds(folder, fields):
    """Yield what a folder is that is no base."""
    yield from _no_folder(folder)
    yield from _foreign(folder, fields)
    yield from _parts(folder)
    if not (folder / "config.json").is_file():
        yield from _unconfigured(folder)
        yield f"{folder / 'config.json'}: no such file. Expected the folder of a checkpoint.{_inside(folder)}"


def _no_folder(path):
    if path.is_file():
        yield f"{path} is a file. Give the folder of a checkpoint: {path.parent}."
    elif not path.is_dir():
        yield f"{path}: no such folder. Give the folder of a checkpoint on this machine."


def _foreign(folder, fields):
    """Yield what other family's model a config.json is of."""
    kind, names = str(fields.get("model_type", OWN_TYPE)), fields.get("architectures") or ["?"]
    name = str(names[0]) if isinstance(names, list) else str(names)
    found = f"{kind} ({name})"
    if fields.get(ROWS) == GLM4_ROWS:
        found = f"GLM-4, or made from it ({GLM4_ROWS:,} ids, the vocabulary of GLM-4)"
    elif kind != OWN_TYPE and name.startswith(("Glm", "ChatGlm")):
        found = f"GLM-4 or later ({name}, model_type {kind})"
    elif "eva_config" in fields:
        found = "VisualGLM-6B, a model of images and text"
    elif kind == OWN_TYPE:
        return
    released = ", ".join(model for mode in MODE.values() for model in mode.released)
    yield f"{folder}: this is {found}, not a ChatGLM: not supported. Supported are {released}."


def _parts(folder):
    """Yield what a folder holds that stands on a base."""
    if is_adapter_folder(folder):
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path") or "its base"
        yield (
            f"{folder} is a LoRA adapter, not a base. To train it further give --init_from {folder} and its base "
            f"({base}) as --model_name_or_path; merge_lora.py --model_dir {folder} makes both one checkpoint."
        )
    if is_prefix_folder(folder):
        yield (
            f"{folder} is a P-tuning prefix, not a base. A prefix is not part of the weights: train it further with "
            f"--train_type ptuning --init_from {folder} and its base as --model_name_or_path, or keep it beside its "
            "base (predict.py --model_path)."
        )


def is_adapter_folder(folder):
    """Whether a folder holds a LoRA adapter and no model."""
    return (Path(folder) / "adapter_config.json").is_file() and not (Path(folder) / "config.json").is_file()


def _unconfigured(folder):
    """Yield what a folder without config.json is."""
    if found := sorted(folder.glob("epoch-*-step-*"), key=lambda path: path.name.rpartition("-")[2].zfill(12)):
        stands = is_adapter_folder(found[-1]) or is_prefix_folder(found[-1])
        hint = f" To train {found[-1]} further give it as --init_from, with its base as --model_name_or_path."
        yield f"{folder} is the output folder of a run.{_inside(folder, found)}{hint if stands else ''}"
    if (folder / "progress.json").is_file():
        yield f"{folder} is the state of a checkpoint, from which --resume goes on. Give {folder.parent} itself."
    if (folder / "zero_to_fp32.py").is_file() or any(folder.glob("global_step*")):
        yield f"{folder} is a checkpoint of DeepSpeed, divided among ranks. Its zero_to_fp32.py makes weights of it."
    if weights := sorted(path.name for pattern in WEIGHTS for path in folder.glob(pattern)):
        needs = "Copy config.json and the tokenizer from where the weights came from."
        yield f"{folder / 'config.json'}: no such file. The folder has weights only ({', '.join(weights[:3])}). {needs}"


def _inside(folder, found=None):
    """ " Give one of the folders in it: ..." where there are checkpoints in a folder."""
    deeper = (*folder.glob("*/*config.json"), *folder.glob("snapshots/*/*config.json"))
    found = found or sorted({path.parent for path in deeper})
    names = ", ".join(str(path.relative_to(folder)) for path in found[:20])
    return f" Give one of the folders in it: {names}." if names else ""
