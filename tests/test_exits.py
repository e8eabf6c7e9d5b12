"""How a script ends: what the user can mend is one message and exit code 2, a bug a traceback and exit code 1."""

import errno
from pathlib import Path

import numpy
import pytest
import torch

from glm_finetune import build
from glm_finetune.errors import NotFinite, NotWritten, OutOfMemory, UserError
from tests.refusal import run_main

BUGS = {
    "ours": lambda: int("two"),
    "numpy's": lambda: numpy.zeros((2, 3)) + numpy.zeros((4,)),
    "torch's": lambda: torch.zeros(2, 3) @ torch.zeros(2),
    "a missing file that nobody checked": lambda: Path("nowhere/at.all").read_text(),
    "no memory, without advice": lambda: bytearray(2**62),
}


def ending(function, monkeypatch, capsys):
    """Exit code (or the exception that ends the process with 1 and a traceback) and stderr of a script."""
    script = type("Script", (), {"__name__": "script.py", "main": staticmethod(function)})
    try:
        return run_main(script, monkeypatch, capsys)
    except Exception as error:  # noqa: BLE001 (Python prints it and ends with 1)
        return error, capsys.readouterr().err


@pytest.mark.parametrize("bug", BUGS)
def test_an_error_that_is_not_ours_keeps_its_traceback(bug, monkeypatch, capsys):
    error, printed = ending(BUGS[bug], monkeypatch, capsys)
    assert isinstance(error, Exception) and not isinstance(error, UserError)
    assert "error:" not in printed


@pytest.mark.parametrize("kind", [UserError, NotFinite, NotWritten, OutOfMemory])
def test_what_the_user_can_mend_is_one_message(kind, monkeypatch, capsys):
    def refuse():
        raise kind("--max_len 0: must be above 0.")

    assert ending(refuse, monkeypatch, capsys) == (2, "error: --max_len 0: must be above 0.\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EACCES])
def test_a_full_or_closed_disk_is_one_message(number, monkeypatch, capsys):
    def write():
        raise OSError(number, "as the system says", "out/answers.jsonl")

    code, printed = ending(write, monkeypatch, capsys)
    assert code == 2 and printed.startswith("error: ") and "out/answers.jsonl" in printed and "Traceback" not in printed


def break_loading():
    build.load_base = lambda *parts: BUGS["numpy's"]()


@pytest.mark.slow
@pytest.mark.parametrize("world_size", [1, 2])
def test_a_bug_inside_training_is_no_refusal(world_size, arguments, start, tmp_path):
    job = start(arguments(tmp_path / "out"), break_loading, world_size)
    assert set(job.exit_codes()) == {1}
    assert "Traceback" in job.printed() and "could not be broadcast together" in job.printed()
