"""Dataclass fields -> command line flags, with help in groups, a configuration file behind them, and helpful errors.

config = parse(TrainConfig, sys.argv[1:])   # or a UserError that lists every problem at once
config.given                                # names of the flags that were set, on the command line or in --config
"""

import argparse
import dataclasses
import difflib
import json
import math
import types
import typing
from dataclasses import InitVar, dataclass, field
from pathlib import Path

from glm_finetune.errors import UserError, raise_together

NOT_FROM_RECORD = ("config", "resume", "force", "overwrite_output_dir", "local_rank", "deepspeed", "deepspeed_config")


def flag(help, default=dataclasses.MISSING, group=None):
    """A dataclass field with what `--help` says of it. group: heading of this flag and those after it."""
    return field(default=default, metadata={"help": help, "group": group})


@dataclass(kw_only=True)
class Flags:
    """What every class of flags has. given: names of those that were set."""

    given: InitVar[frozenset] = frozenset()

    def __post_init__(self, given):
        self.given = given

    def problems(self):
        """Everything wrong with these flags, one line each."""
        return ()


def not_positive(config, *names):
    """Yield a problem for each number that is set and not above 0."""
    for name in names:
        value = getattr(config, name)
        if value is not None and value <= 0:
            yield f"--{name} {value}: must be above 0."


def bad_seed(seed):
    """Yield a problem unless numpy and torch both take the seed."""
    if not 0 <= seed < 2**32:
        yield f"--seed {seed}: must be between 0 and {2**32 - 1}."


def parse(config_class, arguments, description=None):
    """Arguments -> config_class; of a flag given twice the last counts, so that scripts can end in "$@".

    A class with a field `config` also takes a file of flags, which those on the command line override.
    Raises UserError naming every unknown flag (with the nearest) and every problem.
    """
    fields = {item.name: item for item in dataclasses.fields(config_class)}
    values, unknown = _parser(config_class, fields, description).parse_known_args(arguments)
    values, problems = vars(values), [*_unknown_flags(unknown, fields)]
    given = set(values)
    if values.get("config"):
        from_file, set_there, more = read_config_file(values["config"], fields)
        values, problems, given = {**from_file, **values}, [*more, *problems], given | set_there
    for name, item in fields.items():
        if item.default is dataclasses.MISSING and not values.get(name):
            problems.append(f"--{name} must be given: {item.metadata['help']}.")
            values[name] = ""
    config = config_class(**values, given=frozenset(given))
    raise_together([*problems, *config.problems()])
    return config


def _parser(config_class, fields, description):
    parser = _Parser(
        description=description or config_class.__doc__.splitlines()[0],
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    group = parser
    for name, item in fields.items():
        if item.metadata["group"]:
            group = parser.add_argument_group(item.metadata["group"])
        kind, text = _value_type(item.type), item.metadata["help"].replace("%", "%%")
        if item.default is dataclasses.MISSING:
            text += " (must be given)"
        elif item.default is not None:
            text += f" (default: {item.default})"
        options = {"nargs": "?", "const": True} if kind is bool else {}
        group.add_argument(f"--{name}", type=_reader(kind), help=text, metavar=kind.__name__.upper(), **options)
    return parser


def read_config_file(path, fields):
    """({name: value}, names that were set, problems) of a YAML or JSON file of flags, or of a run's train_config.json.

    A record has every flag and the names of those that were set; flags that belong to one start only (NOT_FROM_RECORD)
    are left out. Raises UserError naming a file that is missing or unreadable.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"--config {path}: no such file.")
    found = _read(path)
    if not isinstance(found, dict):
        raise UserError(f"--config {path}: expected names of flags with their values, found {str(found)[:60]!r}.")
    given = None
    if "format_version" in found and isinstance(found.get("flags"), dict):
        given = set(found.get("given", found["flags"]))
        found = {name: value for name, value in found["flags"].items() if name not in NOT_FROM_RECORD}
    values, problems = {}, []
    for name, value in found.items():
        name = str(name).removeprefix("--")
        if name not in fields:
            problems.append(f"--config {path}: {_nearest(name, fields, f'unknown flag {name}.')}")
        elif value is not None:
            try:
                values[name] = _from_file(value, _value_type(fields[name].type))
            except (ValueError, argparse.ArgumentTypeError) as error:
                problems.append(f"--config {path}: {name} is {value!r}: {error}")
    return values, set(values) if given is None else given & set(values), problems


def _read(path):
    text = path.read_text(encoding="utf-8-sig")
    if path.suffix == ".json":
        try:
            return json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"--config {path}: not valid JSON ({error}).") from None
    import yaml

    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"--config {path}: not valid YAML ({' '.join(str(error).split())}).") from None


def _from_file(value, kind):
    """A value of a file as its flag takes it; a list becomes the comma list that the flag would be."""
    if isinstance(value, list):
        value = ",".join(map(str, value))
    if isinstance(value, dict) or (isinstance(value, bool) and kind is not bool):
        raise UserError(f"expected something like --flag {kind.__name__.upper()}")
    return _reader(kind)(str(value))


def _unknown_flags(unknown, fields):
    names = [f"--{name}" for name in fields]
    flags = [text for text in unknown if text.startswith("-")]
    yield from (_nearest(text.split("=")[0], names, f"unknown flag {text}.") for text in flags)
    yield from (f"{text!r} belongs to no flag." for text in unknown if not flags)


def _nearest(text, names, message):
    near = difflib.get_close_matches(text, names, 1)
    return message + (f" Did you mean {near[0]}?" if near else " --help lists them.")


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(f"{message.removeprefix('argument ')}. --help says what each flag takes.")


def _value_type(annotation):
    """int | None -> int."""
    if isinstance(annotation, types.UnionType):
        return next(part for part in typing.get_args(annotation) if part is not type(None))
    return annotation


def _reader(kind):
    return {bool: parse_bool, float: parse_float}.get(kind, kind)


def parse_float(text):
    """Text -> float; Python's own float() also takes nan and inf, which pass comparisons and poison every weight."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"expected a finite number, not {text!r}")
    return value


def parse_bool(text):
    """True, false, 1, no, ... as text -> bool; the original took any non-empty text for True."""
    if text.lower() in ("true", "1", "yes", "y", "on"):
        return True
    if text.lower() in ("false", "0", "no", "n", "off"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")
