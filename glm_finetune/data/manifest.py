"""dataset_info.json in a folder of data: what LLaMA-Factory is told of the columns, read for ours.

    entry_of("data/a.json")         # the JSON text of the entry whose file_name is a.json; None without one
    reading_of(entry)               # {"data_format", "columns", "roles", "tags"} for Settings

`datasets` writes a file of that name too; it has no file_name, and says nothing here.
"""

import json
from pathlib import Path

from glm_finetune.errors import UserError

FILE = "dataset_info.json"
ALPACA = {"prompt": "instruction", "query": "input", "response": "output", "system": "system", "history": "history"}
TALK = {"messages": "messages", "system": "system", "tools": "tools"}
TAGS = {  # of sharegpt, with what they are by default, and their roles
    "user_tag": ("human", "user"),
    "assistant_tag": ("gpt", "assistant"),
    "observation_tag": ("observation", "observation"),
    "function_tag": ("function_call", "function_call"),
    "system_tag": ("system", "system"),
}
KNOWN_TAGS = (("from", "value"), ("role", "content"))


def entry_of(path):
    """What the dataset_info.json beside a file says of it. Raises UserError if that is damaged, or says two things."""
    path = Path(path)
    note = path.parent / FILE
    if path.name == FILE or not note.is_file():
        return None
    entries = [entry for entry in _entries(note) if entry["file_name"] in (path.name, f"./{path.name}")]
    texts = {json.dumps(_checked(note, entry), sort_keys=True) for entry in entries}
    if len(texts) > 1:
        raise UserError(f"{note}: {len(texts)} entries say different things of {path.name}. Leave one.")
    return next(iter(texts), None)


def _entries(note):
    try:
        found = json.loads(note.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{note}: not JSON ({error}). Mend it, or take it out of the folder.") from None
    if not isinstance(found, dict):
        raise UserError(f"{note}: expected names of data sets with their entries, found {found!r:.60}.")
    return [e for e in found.values() if isinstance(e, dict) and isinstance(e.get("file_name"), str)]


def _checked(note, entry):
    """What of an entry is read. Raises UserError unless columns and tags are names."""
    kind, kept = entry.get("formatting") or "alpaca", {}
    if kind not in ("alpaca", "sharegpt", "openai"):
        raise UserError(f"{note}: formatting is {kind!r:.40} for {entry['file_name']}; it must be alpaca or sharegpt.")
    for part in ("columns", "tags"):
        names = entry.get(part) or {}
        if not isinstance(names, dict) or not all(isinstance(name, str | None) for name in names.values()):
            raise UserError(f"{note}: {part} is {names!r:.60} for {entry['file_name']}; expected names of columns.")
        kept[part] = {key: name for key, name in names.items() if name}
    return {"formatting": kind, **kept}


def reading_of(entry):
    """What an entry says -> the fields of Settings that it decides; {} where our names are those that it gives."""
    entry = json.loads(entry)
    columns, tags = entry["columns"], entry["tags"]
    if entry["formatting"] == "alpaca":
        return _alpaca(columns) if columns else {}
    own = ("role", "content") if entry["formatting"] == "openai" else ("from", "value")
    names = tags.get("role_tag", own[0]), tags.get("content_tag", own[1])
    roles = {tags.get(tag, name).lower(): role for tag, (name, role) in TAGS.items()}
    columns = {"messages": "conversations", **columns}
    return {
        "data_format": "messages",
        "columns": {TALK[key]: name for key, name in columns.items() if key in TALK},
        "roles": roles,
        "tags": () if names in KNOWN_TAGS else names,
    }


def _alpaca(columns):
    if "response" not in columns and "prompt" in columns:  # text to continue training on
        return {"data_format": "text", "columns": {"text": columns["prompt"]}}
    named = {"prompt": "instruction", "response": "output", **columns}  # those that are not listed are not read
    return {"data_format": "instruction", "columns": {name: named.get(key, "") for key, name in ALPACA.items()}}
