"""Fixtures: one tiny checkpoint of each mode for the whole session, and small data files."""

import json
import os
from pathlib import Path

import pytest

from glm_finetune import MODE
from tests import refusal
from tests.ranks import Job, run_ranks, train_arguments
from tests.tiny import make_checkpoint

DATA = Path(__file__).parents[1] / "data"
EVERY_STEP = dict(num_train_epochs=2, save_model_step=1)


@pytest.fixture(scope="session", autouse=True)
def cache_home(tmp_path_factory):
    """Prepared data of runs that do not say where goes here, in this process and those it starts."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory):
    """The folder of all temporary folders."""
    return tmp_path_factory.getbasetemp()


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory):
    """{mode name: folder} of tiny random checkpoints in the original layout. Read only."""
    root = tmp_path_factory.mktemp("checkpoints")
    return {name: make_checkpoint(name, root / name, **long_enough(name)) for name in MODE}


def long_enough(mode_name):
    """The 6B models' context, so that their commands run unchanged."""
    return {"max_sequence_length" if mode_name == "glm" else "seq_length": 2048}


@pytest.fixture(scope="session")
def rows():
    """Eleven rows of the shipped data with answers of very different length, one of them empty."""
    lines = (DATA / "spo_0.json").read_text(encoding="utf-8").splitlines()[:11]
    rows = [json.loads(line) for line in lines]
    rows[3]["output"] = ""
    rows[5]["output"] = rows[5]["output"] * 4
    return rows


@pytest.fixture
def data_file(tmp_path, rows):
    """The rows as a JSONL file."""
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def pytest_collection_modifyitems(config, items):
    """Leave out most cells of the grid of sameness unless they are asked for by -m matrix."""
    if "matrix" not in config.getoption("-m"):
        cells = [(item, item.get_closest_marker("matrix")) for item in items]
        left_out = [item for item, marker in cells if marker and not marker.kwargs["always"]]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def pytest_addoption(parser):
    parser.addoption("--record-refusals", action="store_true", help="record the wording of refusals, not compare it")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """A test that passes has met refusals worded as they are recorded of it, or records them."""
    refusal.heard.clear()
    result = yield
    folders = item.funcargs["session_folder"], item.funcargs.get("tmp_path")
    messages = [refusal.normalised(message, *folders) for message in refusal.heard]
    if not item.config.getoption("--record-refusals"):
        refusal.assert_worded_as_recorded(item.nodeid, messages)
    elif messages or item.nodeid in refusal.recorded():
        refusal.record({item.nodeid: messages})
        refusal.recorded.cache_clear()
    return result


@pytest.fixture
def fork_server():
    """The server that tests of ranks use: the first to start it decides what it has imported."""
    run_ranks(os.getpid, 1)


def pytest_terminal_summary(terminalreporter):
    """Size and time of the part of the grid that was run."""
    passed = [report for report in terminalreporter.stats.get("passed", []) if report.when == "call"]
    cells = [report for report in passed if report.nodeid.startswith("tests/test_matrix.py")]
    if cells:
        secs = sum(report.duration for report in cells)
        terminalreporter.write_line(f"grid of sameness: {len(cells)} cells passed in {secs:.0f} s")


@pytest.fixture(scope="session")
def arguments(checkpoints, tmp_path_factory, rows):
    """Function: (output folder, flags) -> arguments of a LoRA run with dropout, 6 steps an epoch on two ranks.

    A file is a flag as well: eval_path="data.jsonl", ds_file="stage3.json".
    """
    root = tmp_path_factory.mktemp("data")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (root / "data.jsonl").write_text(text, encoding="utf-8")
    stage3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}
    (root / "stage3.json").write_text(json.dumps(stage3))

    def make(output_dir, train_type="lora", **flags):
        files = {name: root / flags[name] for name in ("eval_path", "ds_file") if name in flags}
        flags = {"per_device_train_batch_size": 1, "lora_dropout": 0.1, **flags, **files}
        return train_arguments("glm3", train_type, checkpoints["glm3"], root / "data.jsonl", output_dir, **flags)

    return make


@pytest.fixture
def start(tmp_path):
    """Function: (arguments, prepare, world_size) -> Job, which does not outlive the test."""
    jobs = []

    def start(arguments, prepare=None, world_size=2):
        jobs.append(Job(arguments, tmp_path / f"{len(jobs)}.log", world_size, prepare))
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()


def finished(arguments, output_dir, log, **flags):
    """The folder of a run that nothing disturbed."""
    job = Job(arguments(output_dir, **flags), log)
    assert job.exit_codes() == [0, 0], job.printed()
    return output_dir


@pytest.fixture(scope="session")
def every_step(arguments, tmp_path_factory):
    """Function: train type, DeepSpeed file -> folder of a run of 12 steps, saved after each."""
    runs = {}

    def run(train_type="lora", ds_file=None):
        if (train_type, ds_file) not in runs:
            root = tmp_path_factory.mktemp("every-step")
            flags = EVERY_STEP | ({"ds_file": ds_file} if ds_file else {})
            runs[train_type, ds_file] = finished(arguments, root / "out", root / "log", train_type=train_type, **flags)
        return runs[train_type, ds_file]

    return run
