"""What a refusal of bad input looks like: one message, exit code 2, the folders as they were, the words as recorded.

    python -m pytest tests -m "not slow" --record-refusals      # after wording was changed on purpose

tests/fixtures/refusals.json: {test: [each refusal that it met, in order]}. A test that stands there must meet the same
ones, word for word (see `conftest.pytest_runtest_call`); one that does not is new.
"""

import difflib
import functools
import json
import re
import sys
from pathlib import Path

import pytest

from glm_finetune import exits, weights

ROOT = Path(__file__).parents[1]
RECORD = ROOT / "tests/fixtures/refusals.json"
heard = []  # refusals that the running test has met


@functools.cache
def recorded():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def record(met):
    """Write {test: refusals} over what was recorded of these tests; one that met none is no longer recorded."""
    kept = {test: refusals for test, refusals in sorted({**recorded(), **met}.items()) if refusals}
    RECORD.write_text(json.dumps(kept, indent=0, ensure_ascii=False) + "\n")


def normalised(text, session_folder, test_folder=None):
    """A message without what differs from run to run.

    That is temporary folders, and so how far into a file that names them an error is; the checkout; process numbers;
    the version of torch.
    """
    if test_folder:
        text = text.replace(str(test_folder), "<tmp>")
    text = re.sub(rf"{re.escape(str(session_folder))}/([\w-]*?)\d+(?=\W|$)", r"<\1>", text)
    text = re.sub(r"\(char \d+\)", "(char <number>)", text)
    text = re.sub(r"\(torch [^\s,]+", "(torch <version>", text)
    return re.sub(r"\bprocess \d+ on [^\s)]+", "process <number> on <host>", text.replace(str(ROOT), "<root>"))


def assert_worded_as_recorded(test, messages):
    """Fail with a diff unless the refusals that a test has met are those recorded of it, if any are."""
    before = recorded().get(test, messages)
    changes = "\n".join(difflib.unified_diff(before, messages, "recorded", "now", lineterm=""))
    assert before == messages, f"refusals are worded anew (--record-refusals, if meant; new cases go last):\n{changes}"


def refused(function, *parts):
    """Call `function`, which must raise a ValueError whose message holds all `parts`; returns the message."""
    with pytest.raises(ValueError) as caught:
        function()
    missing = [part for part in parts if str(part) not in str(caught.value)]
    assert not missing, f"{missing} not in: {caught.value}"
    heard.append(str(caught.value))
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
        printed = capsys.readouterr().err
        heard.extend(re.findall(r"(?ms)^error: .*", printed))
        return stop.code, printed
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
