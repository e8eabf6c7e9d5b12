"""How much there is to read: the functions that a LoRA training really runs, counted whole, by tracing one.

    python tests/test_reading.py        # the table by file

The run is `python train.py --train_type lora` on a tiny ChatGLM3, one rank, the CPU, data that was prepared before. A
function counts from its `def` to its last line once it was entered, whatever part of it ran; what stands inside
another that counts is not counted again. What runs at import counts; class bodies and constants do not.
"""

import ast
import json
import os
import runpy
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_LINES = 2110  # of all functions that run; 2,000 before bars, the check of memory, fingerprints, kinds of files
MAX_LOOP_LINES = 600  # of those between entry and return of the loop, saving left out


class Tracer:
    """Notes the functions of the project as they are entered, and whether that is in the loop, or while it saves.

    seen: {(file, first line): ["", "train", "save"]}, each where the function was entered at least once there.
    """

    def __init__(self):
        self.seen, self.inside = {}, []

    def __call__(self, frame, event, argument):
        code = frame.f_code
        if event not in ("call", "return") or not code.co_filename.startswith(str(ROOT)):
            return
        path = os.path.relpath(code.co_filename, ROOT)
        if path.split(os.sep)[0] not in ("train.py", "glm_finetune"):
            return
        if event == "call":
            if path == "train.py" and code.co_name in ("train", "save"):
                self.inside.append(code.co_name)
            self.seen.setdefault((path, code.co_firstlineno), set()).add(self.inside[-1] if self.inside else "")
        elif path == "train.py" and code.co_name in ("train", "save"):
            self.inside.pop()


def trace(result, arguments):
    """`python train.py` with these arguments in this process, and what it entered as JSON in the file `result`."""
    tracer = Tracer()
    sys.path[0], sys.argv = str(ROOT), ["train.py", *arguments]
    threading.setprofile(tracer)
    sys.setprofile(tracer)
    try:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")
    finally:
        sys.setprofile(None)
        entries = [[*key, sorted(where)] for key, where in sorted(tracer.seen.items())]
        Path(result).write_text(json.dumps(entries))


def functions_of(path):
    """{first line, decorators included: range of the lines from `def` to the end} of a file's functions and lambdas."""
    found = {}
    for node in ast.walk(ast.parse((ROOT / path).read_text(encoding="utf-8"))):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            first = min([node.lineno, *(line.lineno for line in getattr(node, "decorator_list", []))])
            found.setdefault(first, range(node.lineno, node.end_lineno + 1))
    return found


def traced(folder):
    """Train in `folder`, the second time with a tracer: [(file, first line, places)] of what was entered."""
    from tests.tiny import DATA, make_checkpoint

    base = make_checkpoint("glm3", folder / "base", seq_length=2048)
    lines = DATA.read_text(encoding="utf-8").splitlines(keepends=True)[:11]
    (folder / "data.jsonl").write_text("".join(lines), encoding="utf-8")
    command = ["--mode", "glm3", "--train_type", "lora", "--model_name_or_path", str(base), "--device", "cpu"]
    command += ["--train_path", str(folder / "data.jsonl"), "--max_len", "128", "--max_src_len", "64"]
    command += ["--per_device_train_batch_size", "2", "--show_loss_step", "1"]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    for out, script in (("first", ["train.py"]), ("second", [__file__, "--trace", str(folder / "entered.json")])):
        arguments = [sys.executable, *script, *command, "--output_dir", str(folder / out)]
        done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((folder / "entered.json").read_text())


def count(entries, is_counted=lambda places: True):
    """{file: (functions, lines)} of the entries whose places are counted."""
    table = {}
    for path in sorted({path for path, _, _ in entries}):
        functions = functions_of(path)
        ranges = [
            functions[line]
            for other, line, places in entries
            if other == path and line in functions and is_counted(places)
        ]
        if ranges:
            table[path] = len(ranges), len({line for lines in ranges for line in lines})
    return table


def in_loop(places):
    return "train" in places


def total(table):
    return sum(lines for _, lines in table.values())


@pytest.fixture(scope="module")
def entries(tmp_path_factory):
    return traced(tmp_path_factory.mktemp("reading"))


@pytest.mark.slow
def test_what_a_lora_training_runs_can_be_read(entries):
    table = count(entries)
    assert {"train.py", "glm_finetune/run/run.py"} <= table.keys()
    assert total(table) <= MAX_LINES, table


@pytest.mark.slow
def test_what_the_loop_runs_can_be_read_in_one_sitting(entries):
    table = count(entries, in_loop)
    saving = total(count(entries, lambda places: "save" in places))
    assert "train.py" in table and saving > 0  # both were told apart
    assert total(table) <= MAX_LOOP_LINES, table


def main():
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory() as folder:
        entries = traced(Path(folder).resolve())
    whole, loop = count(entries), count(entries, in_loop)
    print(f"{'functions that run, lines of these':<40} whole command     the loop, without saving")
    for path, numbers in whole.items():
        print("{:<40} {:5} {:7} {:13} {:7}".format(path, *numbers, *loop.get(path, ("", ""))))
    sums = [sum(column) for table in (whole, loop) for column in zip(*table.values())]
    print("{:<40} {:5} {:7} {:13} {:7}".format(f"{len(whole)} files, {len(loop)} in the loop", *sums))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trace"]:
        trace(sys.argv[2], sys.argv[3:])
    else:
        main()
