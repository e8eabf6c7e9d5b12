"""What a refusal of bad input looks like: one message, exit code 2, the folders as they were."""

import sys
from pathlib import Path

import pytest

from glm_finetune import exits, weights


def refused(function, *parts):
    """Call `function`, which must raise a ValueError whose message holds all `parts`; returns the message."""
    with pytest.raises(ValueError) as caught:
        function()
    missing = [part for part in parts if str(part) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    return str(caught.value)


def contents(folder):
    """{path: bytes} of everything under a folder."""
    return {path.relative_to(folder): path.read_bytes() for path in sorted(Path(folder).rglob("*")) if path.is_file()}


def run_main(module, monkeypatch, capsys, *arguments):
    """A script in this process, as `python script.py` runs it. Returns exit code and stderr."""
    for name, value in {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, arguments)])
    capsys.readouterr()
    try:
        exits.exit_with_message(module.main)
    except SystemExit as stop:
        return stop.code, capsys.readouterr().err
    return 0, capsys.readouterr().err


def cut(name, size=-9):
    """Truncate a file."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def remove(name):
    return lambda folder: (folder / name).unlink()


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def json_fields(name, **changes):
    """Change fields of a JSON file."""
    return lambda folder: weights.write_json(weights.read_json(folder / name) | changes, folder / name)
