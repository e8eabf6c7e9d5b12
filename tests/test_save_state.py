"""--save_state: which checkpoints have what a run goes on from; whole they are in any case."""

import shutil
import signal
from functools import partial

import pytest

from glm_finetune.config import TrainConfig
from glm_finetune.flags import parse
from glm_finetune.run import checkpoint
from glm_finetune.run.checkpoint import damage, drop_states
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.resume import find_resume
from glm_finetune.run.stop import RESUME_ME
from glm_finetune.weights import read_json
from tests.conftest import EVERY_STEP
from tests.refusal import refused
from tests.test_interruptions import act_at, assert_same_end, send
from tests.test_lost_ranks import die
from tests.test_resume import stopped_copy

NEEDED = ["--model_name_or_path", "base", "--train_path", "data", "--output_dir", "out"]
WAYS = [{}, {"async_save": True}, {"async_save": True, "save_total_limit": 3}, {"ds_file": "stage3.json"}]


def with_state(folder):
    """Numbers of the steps whose checkpoint has its state; all must be whole, and name each of their files."""
    for path in checkpoints_in(folder):
        assert damage(path) is None
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert files == {*read_json(path / "manifest.json"), "manifest.json"}
    assert not list(folder.glob("tmp-*"))
    return [int(path.name.rpartition("-")[2]) for path in checkpoints_in(folder) if (path / "state").is_dir()]


def test_another_value_is_answered_with_those_that_exist():
    said = ["--save_state 'lst': must be one of no, last, all.", "Did you mean last?"]
    refused(lambda: parse(TrainConfig, [*NEEDED, "--save_state", "lst"]), *said)
    assert parse(TrainConfig, NEEDED).save_state == "all"


@pytest.mark.slow
@pytest.mark.parametrize("flags", WAYS, ids=str)
def test_of_last_only_the_newest_has_its_state_and_the_run_goes_on_from_it(
    flags, arguments, start, every_step, tmp_path
):
    out = tmp_path / "out"
    given = arguments(out, **EVERY_STEP, **flags, save_state="last", resume="auto")
    job = start(given, partial(act_at, 5, [0, 1], die))
    assert job.exit_codes() == [-9, -9]
    job = start(given, partial(act_at, 8, [0], partial(send, signal.SIGTERM)))
    assert job.exit_codes() == [RESUME_ME] * 2 and "--resume auto goes on from there" in job.printed()
    assert with_state(out) == [int(checkpoints_in(out)[-1].name.rpartition("-")[2])]
    job = start(given)
    assert job.exit_codes() == [0, 0] and with_state(out) == [12], job.printed()
    assert len(checkpoints_in(out)) == flags.get("save_total_limit", 12)
    if "ds_file" not in flags:
        assert_same_end(out, every_step())


@pytest.mark.slow
def test_killed_while_a_state_is_deleted_all_checkpoints_stay_whole(every_step, tmp_path, monkeypatch):
    for name in ("write_json", "os.replace", "shutil.rmtree"):
        out = stopped_copy(every_step(), tmp_path / name, step=3)
        before = {path.name: find_resume(str(path), out) for path in checkpoints_in(out)}
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, *_failing(name))
            with pytest.raises(KeyboardInterrupt):
                drop_states(checkpoints_in(out)[-1])
        assert [damage(path) for path in checkpoints_in(out)] == [None] * 3 and before
        for path in out.glob("tmp-*"):  # as `folder.lock` does
            shutil.rmtree(path)
        drop_states(checkpoints_in(out)[-1])
        assert with_state(out) == [3]


def _failing(name):
    """What to put where in `checkpoint`, so that a call of `name` is the last thing that is done."""

    def fail(*args):
        raise KeyboardInterrupt

    module, _, function = name.rpartition(".")
    if not module:
        return function, fail
    return module, type("failing", (), {**vars(getattr(checkpoint, module)), function: staticmethod(fail)})


@pytest.mark.slow
def test_a_damaged_checkpoint_does_not_become_whole_by_losing_its_state(every_step, tmp_path):
    out = stopped_copy(every_step(), tmp_path / "out", step=3)
    first = checkpoints_in(out)[0]
    (first / "adapter_model.safetensors").write_bytes(b"x")
    drop_states(checkpoints_in(out)[-1])
    assert damage(first) and (first / "state").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"async_save": True}, {"ds_file": "stage3.json"}], ids=str)
def test_without_state_a_run_is_saved_when_it_is_asked_to_stop_and_says_that_it_cannot_go_on(
    flags, arguments, start, tmp_path
):
    out = tmp_path / "out"
    given = arguments(out, **EVERY_STEP, **flags, save_state="no")
    job = start(given, partial(act_at, 3, [0], partial(send, signal.SIGTERM)))
    assert job.exit_codes() == [RESUME_ME] * 2
    assert "this run cannot be gone on from (--save_state no); --init_from that folder" in job.printed()
    assert "--resume auto goes on" not in job.printed()
    assert with_state(out) == [] and len(checkpoints_in(out)) >= 3
    newest = checkpoints_in(out)[-1]
    for resume in ("auto", newest):
        job = start([*given, "--resume", str(resume)])
        assert job.exit_codes() == [2, 2]
        assert f"--init_from {newest} trains its weights further" in job.printed()
        assert "--save_state" in job.printed().partition("error: ")[2] and "is damaged" not in job.printed()
    assert len(checkpoints_in(out)) >= 3
