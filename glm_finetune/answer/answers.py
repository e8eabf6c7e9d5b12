"""A file of answers: one JSON line each, beside it the settings they were made with; a killed run goes on from there.

    settings = settings_of(config, folder, precision)
    done = answered(path, rows, config, settings)           # of an earlier run; refuses what does not belong together
    begin(path, done, settings), then lines are appended

Never written over: the questions, and answers to others.
"""

import dataclasses
import json
import re
from pathlib import Path

from glm_finetune.data.files import paths_of
from glm_finetune.errors import UserError
from glm_finetune.weights import read_json, write_json, write_text

ELSEWHERE = "Give another --output_path, or --overwrite to answer everything again."
NAMES = ("max_length", "max_new_tokens", "do_sample", "top_p", "temperature", "num_beams", "seed", "truncation")
NAMES += ("data_format", "columns", "roles", "repair_turns", "quantization_bit")


def output_path(config, folder):
    """Where the answers go. Raises UserError for a bare base without --output_path: nothing is written into one."""
    if config.test_path and not config.output_path and folder.is_bare:
        raise UserError(f"--output_path must be given: {config.model_path} is a base, which is not written to.")
    return Path(config.output_path or Path(config.model_path) / "predictions.jsonl")


def settings_path(path):
    return path.with_name(path.name + ".settings.json")


def settings_of(config, folder, precision):
    """What an answer depends on besides its question; answers of other settings are not mixed into one file."""
    parts = filter(None, (folder.base, folder.adapter))
    files = [path for part in parts for path in sorted([*part.glob("*.safetensors"), *part.glob("*.bin")])]
    return {
        "model": str(Path(config.model_path).resolve()),
        "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        **dataclasses.asdict(folder.prompt),
        "precision": precision,
        "rope_rule": folder.settled_rule(),
        **{name: getattr(config, name) for name in NAMES},
    }


def answered(path, rows, config, settings):
    """The complete lines of an earlier run (a killed one ends within a line, or within a character).

    Raises UserError if they are not answers to `rows` in this order, were made with other settings, or would be
    written over the questions.
    """
    check_output(path, config.test_path)
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.overwrite or not path.exists():
        return []
    old = read_json(settings_path(path)) if settings_path(path).is_file() else {}
    different = [name for name, value in settings.items() if old.get(name) != value]
    if different:
        raise UserError(f"{path}: its answers were made with other settings ({', '.join(different)}). {ELSEWHERE}")
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) > len(rows):
        raise UserError(f"{path}: has {len(lines)} answers, --test_path {len(rows)} rows. {ELSEWHERE}")
    return [_answer_in(text, row, f"{path}, line {i}") for i, (text, (_, row, *_)) in enumerate(zip(lines, rows), 1)]


def check_output(path, test_path):
    """Raise UserError if `path`, or the settings beside it, is one of the files of --test_path, or would become one.

    --test_path questions      # a folder with a.jsonl: questions/out.jsonl would be asked the next time
    """
    text = str(test_path)
    inputs = [Path(name.partition("#")[0]) for name in paths_of(test_path)]  # behind #: the split of a saved data set
    for output in (path, settings_path(path)):
        if any(there.exists() and output.exists() and output.samefile(there) for there in inputs):
            raise UserError(f"--output_path {path} is the file of --test_path: give another one.")
    folders = [Path(part.strip()) for part in (text, *re.sub(r":-?[\d.]+(?=,|$)", "", text).split(","))]
    parents = path.resolve().parents
    if any(there.is_dir() and there.resolve() == parents[0] for there in folders) or any(
        there.is_dir() and there.resolve() in parents for there in inputs
    ):
        raise UserError(f"--output_path {path} lies in the folder of --test_path: give one elsewhere.")


def _answer_in(text, row, where):
    """The object in a line of an earlier run. Raises UserError naming `where` unless it is `row` with a prediction."""
    try:
        old = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{where}: not JSON. {ELSEWHERE}") from None
    if not isinstance(old, dict) or "prediction" not in old or {**row, "prediction": old["prediction"]} != old:
        raise UserError(f"{where}: answers another row than --test_path has there. {ELSEWHERE}")
    return old


def begin(path, done, settings):
    """Write the answers that are there already, without what a killed run left half written, and the settings."""
    write_json(settings, settings_path(path))
    write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in done), path)
