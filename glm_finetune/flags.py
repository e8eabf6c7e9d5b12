"""Dataclass fields -> command line flags, with help in groups, a configuration file behind them, and helpful errors.

config = parse(TrainConfig, sys.argv[1:])   # or a UserError that lists every problem at once
"""

import argparse
import dataclasses
import json
import math
import typing
from contextlib import suppress
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from glm_finetune.errors import UserError, did_you_mean, raise_together, unknown_choice

NOT_FROM_RECORD = ("config", "resume", "force", "overwrite_output_dir", "local_rank", "deepspeed", "deepspeed_config")
ALIASES = {"local_rank": ("--local-rank",)}  # as torch.distributed.launch gives it; LOCAL_RANK of the environment rules
PRECISIONS = ("bf16", "fp16", "fp32")
POSITIVE, NOT_NEGATIVE, SHARE = "must be above 0", "must not be negative", "must be between 0 and 1"
DROPOUT, SEED = "must be at least 0 and below 1 (1 drops everything)", f"must be between 0 and {2**32 - 1}"
RULES = {
    POSITIVE: lambda value: value > 0,
    NOT_NEGATIVE: lambda value: value >= 0,
    SHARE: lambda value: 0 <= value <= 1,
    DROPOUT: lambda value: 0 <= value < 1,
    SEED: lambda value: 0 <= value < 2**32,  # numpy and torch both take it
}


def flag(help, default=dataclasses.MISSING, allowed=(), group=None):
    """A dataclass field, its text in `--help`. allowed: choices, or one of RULES. group: heading from here on."""
    return field(default=default, metadata={"help": help, "group": group, "allowed": allowed})


@dataclass(kw_only=True)
class Flags:
    """What every class of flags has. given: names of those that were set, on the command line or in --config."""

    given: InitVar[frozenset] = frozenset()

    def __post_init__(self, given):
        self.given = given

    def problems(self):
        """Everything wrong with these flags, one line each."""
        for item in dataclasses.fields(self):
            value, allowed = getattr(self, item.name), item.metadata["allowed"]
            if allowed in RULES and value is not None and not RULES[allowed](value):
                yield f"--{item.name} {value}: {allowed}."
            elif allowed and allowed not in RULES:
                yield from unknown_choice(item.name, value, allowed)


def parse(config_class, arguments, description=None):
    """Arguments -> config_class; of a flag given twice the last counts, so that scripts can end in "$@".

    A class with a field `config` also takes a file of flags, which those on the command line override.
    Raises UserError naming every unknown flag (with the nearest) and every problem.
    """
    fields = {item.name: item for item in dataclasses.fields(config_class)}
    found, unknown = _parser(config_class, fields, description).parse_known_args(arguments)
    given, values, problems = set(vars(found)), {}, []
    if vars(found).get("config"):
        values, set_there, problems = read_config_file(found.config, fields)
        given |= set_there
    values |= vars(found)
    missing = [name for name, item in fields.items() if item.default is dataclasses.MISSING and not values.get(name)]
    config = config_class(**values | dict.fromkeys(missing, ""), given=frozenset(given))
    problems += _unknown_flags(unknown, fields)
    problems += (f"--{name} must be given: {fields[name].metadata['help']}." for name in missing)
    raise_together([*problems, *config.problems()])
    return config


def _parser(config_class, fields, description):
    shape = argparse.RawDescriptionHelpFormatter
    parser = group = _Parser(
        description=description or config_class.__doc__.splitlines()[0], allow_abbrev=False, formatter_class=shape
    )
    endings = {dataclasses.MISSING: " (must be given)", None: ""}
    for name, item in fields.items():
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        kind, text = _value_type(item.type), item.metadata["help"].replace("%", "%%")
        text += endings.get(item.default, f" (default: {item.default})")
        options = dict(type=_reader(kind), metavar=kind.__name__.upper(), default=argparse.SUPPRESS, help=text)
        group.add_argument(
            f"--{name}", *ALIASES.get(name, ()), **options, **({"nargs": "?", "const": True} if kind is bool else {})
        )
    return parser


def read_config_file(path, fields):
    """({name: value}, names that were set, problems) of a YAML or JSON file of flags, or of a run's train_config.json.

    A record has every flag and the names of those that were set; NOT_FROM_RECORD belong to one start only, and are left
    out. Raises UserError naming a file that is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    found = _read(path)
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: expected names of flags with their values, found {str(found)[:60]!r}.")
    values, problems, given = {}, [], None
    if "format_version" in found and isinstance(found.get("flags"), dict):
        given = set(found.get("given", found["flags"]))
        found = {name: value for name, value in found["flags"].items() if name not in NOT_FROM_RECORD}
    for name, value in found.items():
        name = str(name).removeprefix("--")
        if name not in fields:
            problems.append(f"--config {path}: {_unknown_flag(name, name, fields)}")
        elif value is not None:
            try:
                values[name] = _from_file(value, _value_type(fields[name].type))
            except (ValueError, argparse.ArgumentTypeError) as error:
                problems.append(f"--config {path}: {name} is {value!r}: {error}")
    return values, set(values) if given is None else given & set(values), problems


def _read(path):
    import yaml

    text = path.read_text(encoding="utf-8-sig")
    try:
        return json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except json.JSONDecodeError as error:
        raise UserError(f"--config {path}: not valid JSON ({error}).") from None
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())}).") from None


def _from_file(value, kind):
    """A value of a file as its flag takes it; a list becomes the comma list that the flag would be."""
    value = ",".join(map(str, value)) if isinstance(value, list) else value
    if isinstance(value, dict) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"expected something like --flag {kind.__name__.upper()}")
    return _reader(kind)(str(value))


def _unknown_flags(unknown, fields):
    flags, names = [text for text in unknown if text.startswith("-")], [f"--{name}" for name in fields]
    yield from (_unknown_flag(text, text.split("=")[0], names) for text in flags)
    yield from (f"{text!r} belongs to no flag." for text in unknown if not flags)


def _unknown_flag(text, name, names):
    return f"unknown flag {text}.{did_you_mean(name, names) or ' --help lists them.'}"


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}. --help says what each flag takes.")


def _value_type(annotation):
    """int | None -> int."""
    return next(iter(typing.get_args(annotation)), annotation)


def _reader(kind):
    return {bool: parse_bool, float: parse_float}.get(kind, kind)


def parse_float(text):
    """Text -> float; Python's own float() also takes nan and inf, which pass comparisons and poison every weight."""
    with suppress(ValueError):
        if math.isfinite(value := float(text)):
            return value
    raise argparse.ArgumentTypeError(f"expected a finite number, not {text!r}")


def parse_bool(text):
    """True, false, 1, no, ... as text -> bool; the original took any non-empty text for True."""
    if text.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
