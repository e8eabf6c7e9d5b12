"""What a run begins with: a base of the mode, and with --init_from the weights of a folder instead of new ones.

    config = settle(config, mode, train_type)    # sizes that the folder has; a whole model becomes the base
    check_base(config, tokenizer)                # rank 0
    fill(engine, config.init_from)               # all ranks; not when a run is resumed

The folder: a LoRA adapter or a P-tuning prefix, of this project or not, or a whole model. Optimizer, steps and
schedule are new.
"""

from dataclasses import replace
from pathlib import Path

from peft import get_peft_model_state_dict

from glm_finetune import build
from glm_finetune.dist import print_main
from glm_finetune.errors import UserError, raise_together
from glm_finetune.modes.added import refuse_added
from glm_finetune.modes.identity import check_default, fields_of_base, is_adapter_folder
from glm_finetune.record import Prompt, read_record
from glm_finetune.run import state
from glm_finetune.tuning import TRAIN_TYPE, names_in
from glm_finetune.tuning.adapter import adapter_file, adapter_sizes
from glm_finetune.tuning.lora import ALL_LINEAR
from glm_finetune.tuning.ptuning import is_prefix_folder, prefix_sizes
from glm_finetune.weights import full_shape, is_finite, iter_file, iter_tensors

IN_WORDS = {"adapter": "a LoRA adapter", "prefix": "a P-tuning prefix", "weights": "a whole model"}  # TrainType.saves


def kind_of(folder):
    """What a folder holds, as `TrainType.saves`. Raises UserError, naming what it is, for one that holds no model."""
    if is_adapter_folder(folder):
        return "adapter"
    if is_prefix_folder(folder):
        return "prefix"
    fields_of_base(folder)
    return "weights"


def settle(config, mode, train_type):
    """The config with what --init_from says. Raises UserError for a base that is not known to be of the default mode
    where --mode is not given, and as `_with_folder`.
    """
    if config.init_from:
        config = _with_folder(config, mode, train_type)
    if "mode" not in config.given:
        fields_of_base(config.model_name_or_path)
        check_default(mode, config.model_name_or_path)
    return config


def _with_folder(config, mode, train_type):
    """The config with the sizes of an adapter or a prefix that are not given as flags; a whole model becomes the base.

    Raises UserError for one of another mode or train type, or of other sizes than those given.
    """
    folder = Path(config.init_from)
    if config.resume and not folder.exists() and train_type.saves != "weights":  # a run that goes on can do without it
        return config
    kind, output = kind_of(folder), Path(config.output_dir).resolve()
    if folder.resolve() in (output, *output.parents):
        raise UserError(f"--output_dir {config.output_dir} lies in --init_from {folder}. Choose another folder.")
    raise_together(_of_another(folder, kind, mode, train_type))
    config = _asked_alike(config, folder)
    if kind == "weights":
        instead = f"read instead of --model_name_or_path {config.model_name_or_path}"
        print_main(f"--init_from {folder}: a whole model, {instead}; optimizer and schedule are new")
        return replace(config, model_name_or_path=str(folder), given=config.given)
    there = adapter_sizes(folder) if kind == "adapter" else prefix_sizes(folder)
    raise_together(_contradictions(folder, there, config))
    kept = {name: getattr(config, name) for name in config.given & there.keys()}
    shown = ", ".join(f"{name} {value}" for name, value in there.items() if value is not None)
    print_main(f"--init_from {folder}: {IN_WORDS[kind]} ({shown}) is trained further; optimizer and schedule are new")
    return replace(config, **{**there, **kept}, given=config.given)


def _asked_alike(config, folder):
    """The config with the template that a folder was trained with, unless one is given; its texts are said, since
    other data may have no use for them.
    """
    record = read_record(folder)
    known = {name: record[name] for name in Prompt.__dataclass_fields__ if record.get(name) is not None}
    changed = {name: value for name, value in known.items() if name not in config.given and value != "text"}
    template = changed.pop("template", config.template)
    for name, value in changed.items():
        print_main(f"--init_from {folder}: was trained with --{name} {value!r}; give it where the new data need it")
    if template != config.template:
        print_main(f"--init_from {folder}: --template {template}, as it was trained")
    return replace(config, template=template, given=config.given)


def _of_another(folder, kind, mode, train_type):
    if kind != train_type.saves:
        types = " or ".join(other.name for other in TRAIN_TYPE.values() if other.saves == kind)
        trains = f"--train_type {train_type.name} trains {IN_WORDS[train_type.saves]}"
        instead = "" if kind != "weights" else " Or give it as --model_name_or_path, and a new one is trained on it."
        yield f"--init_from {folder} is {IN_WORDS[kind]}, {trains}: it goes with --train_type {types}.{instead}"
    if (known := read_record(folder).get("mode")) not in (None, mode.name):
        yield f"--init_from {folder} is of --mode {known}, this training of --mode {mode.name}: a folder fits its own."


def _contradictions(folder, there, config):
    """Yield flags that were given with other values than a folder has."""
    for name in sorted(config.given & there.keys()):
        own, known = getattr(config, name), there[name]
        same = {*names_in(own)} == {*names_in(known)} if name.endswith(("_name", "_to_save")) else own == known
        if not same and own != ALL_LINEAR:  # which layers these are is seen in the tensors
            yield f"--init_from {folder}: {name} is {known} there, --{name} {own} was given. Leave the flag out."


def check_base(config, tokenizer):
    """Raise UserError if the folder of --init_from stands on another base or rule, or learnt other tokens."""
    folder, base = Path(config.init_from), config.model_name_or_path
    if kind_of(folder) == "weights":
        return
    record = read_record(folder)
    refuse_added(tokenizer, folder)
    if (rule := record.get("flags", {}).get("rope_rule")) not in (None, config.rope_rule):
        raise UserError(f"--init_from {folder}: was trained with --rope_rule {rule}, here it is {config.rope_rule}.")
    build.check_fingerprint(folder, record, base, config.force, "--model_name_or_path")


def fill(engine, folder):
    """Give what learns its values from a folder, and the optimizer its masters. Every rank reads it, all must call.

    Raises UserError for names or shapes that do not fit.
    """
    if (kind := kind_of(folder)) == "weights":
        return
    learn = dict(state.learning(engine.module))
    places = get_peft_model_state_dict(engine.module, state_dict=learn) if kind == "adapter" else learn
    tensors = dict(iter_file(adapter_file(folder)) if kind == "adapter" else iter_tensors(folder))
    shapes = {name: tuple(full_shape(parameter)) for name, parameter in places.items()}
    raise_together(_misfits(folder, shapes, {name: tuple(tensor.shape) for name, tensor in tensors.items()}))
    if strange := [name for name in places if not is_finite(tensors[name])]:
        raise UserError(f"--init_from {folder}: inf or nan among the values of {_shown(strange)}.")
    for name, parameter in places.items():
        state.set_weight(parameter, tensors[name].to(engine.device).float())


def _misfits(folder, own, there):
    """Yield what does not fit between {name: shape} of what learns here and of a folder's tensors."""
    if missing := sorted(own.keys() - there.keys()):
        yield f"--init_from {folder}: nothing there for {_shown(missing)}. Are its targets (--lora_module_name) others?"
    if unexpected := sorted(there.keys() - own.keys()):
        yield f"--init_from {folder}: {_shown(unexpected)} there do not learn here. Are its targets or its base others?"
    changed = [name for name in own if there.get(name, own[name]) != own[name]]
    if different := [f"{name} {there[name]}, here {own[name]}" for name in changed]:
        yield f"--init_from {folder}: other shapes than here: {_shown(different)}. Is it of another base?"


def _shown(names):
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
