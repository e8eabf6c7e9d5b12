"""train_config.json: what is known of a model folder. Written by training, copied and added to by merging, read by all.

    write_record(train_record(config, train_type, tokenizer, world_size), folder)
    prompt_of(read_record(folder), {})      # (Prompt(template="train", prompt_text=None), True)

Only these functions know the file. What a later step must know belongs into it, not into a file of its own.
"""

import dataclasses
import hashlib
import importlib.metadata
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from glm_finetune.data.blocks import fingerprint as fingerprint_of_data
from glm_finetune.data.cache import default_cache_dir
from glm_finetune.data.flags import DataFlags, unescaped
from glm_finetune.weights import fingerprint as fingerprint_of
from glm_finetune.weights import read_json, write_json

FILE = "train_config.json"
FORMAT_VERSION = 1
PACKAGES = ("torch", "transformers", "peft", "deepspeed", "sentencepiece")
# The data flags, all of which shape a run's samples, with what was done in checkpoints from before a flag was there.
SAMPLES = {item.name: item.default for item in dataclasses.fields(DataFlags)}
SAMPLES |= {"end_cut_answers": True, "objective": "instruct"}
# Flags of the identity, where they are set.
WHERE_SET = ("group_by_length", "streaming", "shuffle_buffer", "rope_rule", "init_from")


@dataclass(frozen=True)
class Prompt:
    """What of a training shapes a prompt, each under the name of its flag; the defaults are a bare base's.

    Recorded by training, copied by merging, asked with by predict.py, where the flag replaces it.
    """

    template: str = "official"
    prompt_text: str | None = None
    input_separator: str | None = None

    def question(self, instruction, text=""):
        """What is asked, as the rows of the training were: their one prompt in front. text: of --input."""
        between = unescaped(self.input_separator or "") if instruction and text else ""
        return (self.prompt_text or "") + instruction + between + text


def train_record(config, train_type, tokenizer, world_size, formats=()):
    """What is known of a run besides epoch, step and its base's `fingerprint`. formats: Report.formats."""
    return {
        "format_version": FORMAT_VERSION,
        **{name: getattr(config, name) for name in ("mode", "train_type", "init_from", *Prompt.__dataclass_fields__)},
        **({"template": "text"} if {*formats} == {"text"} else {}),  # it is asked to go on with a text
        "saves": train_type.saves,
        **_base(config.model_name_or_path),
        "world_size": world_size,
        "identity": {
            "training data": fingerprint_of_data(config.train_path, config.cache_dir or default_cache_dir())[:16],
            "tokenizer": describe(tokenizer.folder / tokenizer.model_file)["sha256"][:16],
            "base": describe(Path(config.model_name_or_path) / "config.json")["sha256"][:16],
            **{name: getattr(config, name) for name in (*SAMPLES, "seed", *train_type.identity)},
            **{name: getattr(config, name) for name in WHERE_SET if getattr(config, name)},
        },
        "flags": dataclasses.asdict(config),
        "given": sorted(config.given),
        "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
    }


def merged_record(adapter, mode, base, prompt):
    """What is known of the sum of `base` and the folder `adapter`: what was known of the adapter, and its origin."""
    known = {"format_version": FORMAT_VERSION, **read_record(adapter), "mode": mode.name, **dataclasses.asdict(prompt)}
    return {**known, "saves": "weights", "merged_from": str(adapter), **_base(base), **fingerprint(base)}


def _base(folder):
    return {"base": str(folder), "base_absolute": os.path.abspath(folder)}


def fingerprint(base):
    """What tells the weights of a base from others."""
    return {"base_fingerprint": fingerprint_of(base)}


def describe(path):
    """Size in bytes and SHA-256 of a file."""
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}


def write_record(record, folder):
    write_json(record, Path(folder) / FILE)


def copy_side_files(base, folder):
    """What else a checkpoint has: the original's code, with which transformers reads it, and generation settings."""
    for path in [*Path(base).glob("*.py"), *Path(base).glob("generation_config.json")]:
        shutil.copyfile(path, Path(folder) / path.name)


def read_record(folder):
    """The record in a folder, or {}. Raises UserError for a file that is no JSON object."""
    path = Path(folder) / FILE
    return read_json(path) if path.is_file() else {}


def prompt_of(record, asked):
    """(Prompt of a training, whether all of it is known). asked: values that replace what is recorded.

    Earlier versions recorded some of it among the flags of a run, and in merged folders the template only.
    """
    known = {**record.get("flags", {}), **record, **asked}
    prompt = Prompt(**{item.name: known.get(item.name, item.default) for item in dataclasses.fields(Prompt)})
    return prompt, all(name in known for name in ("template", "prompt_text"))
