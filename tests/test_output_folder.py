"""The output folder: what is somebody else's stays, and only one run at a time is in it."""

import os
import shutil
import signal
import socket
import time
from functools import partial

import pytest

from glm_finetune.run.checkpoint import damage
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.folder import lock
from tests.conftest import EVERY_STEP
from tests.refusal import contents
from tests.test_interruptions import act_at, assert_same_end, send
from tests.test_lost_ranks import die
from tests.test_resume import stopped_copy
from tests.test_saving import names


def foreign(folder, *names):
    """Files of another program in a folder."""
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("of somebody else")
    return contents(folder)


FOREIGN = ["runs/other_experiment/events.1", "metrics.jsonl", "latest", "best", "bad_rows.txt", ".lock"]
FOREIGN += ["epoch-1-step-2/notes.txt", "tmp-epoch-1-step-2/notes.txt"]


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"resume": "auto"}, {"overwrite_output_dir": True}], ids=["resume", "overwrite"])
@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_belongs_to_something_else_is_refused_and_stays(name, flags, arguments, start, tmp_path):
    before = foreign(tmp_path / "out", name, "tmp-work/notes.txt")
    job = start(arguments(tmp_path / "out", **flags), world_size=1)
    assert job.exit_codes() == [2] and contents(tmp_path / "out") == before
    assert f"holds {name.split('/')[0]}, which no run of this project wrote" in job.printed()


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"resume": "auto"}, {"overwrite_output_dir": True}], ids=["resume", "overwrite"])
def test_beginning_anew_deletes_what_a_run_left_and_nothing_else(flags, arguments, start, every_step, tmp_path):
    out = stopped_copy(every_step(), tmp_path / "out", step=0 if "resume" in flags else 2)
    kept = "tmp-work/notes.txt", "runs/other_experiment/events.1", "runs/notes.txt", "notes.txt", "epochs/1"
    mine = foreign(tmp_path / "mine", *kept)
    shutil.copytree(tmp_path / "mine", out, dirs_exist_ok=True)
    old_events = set((out / "runs").glob("events.out*"))
    (out / "tmp-epoch-1-step-9").mkdir()
    job = start(arguments(out, **EVERY_STEP, **flags))
    assert job.exit_codes() == [0, 0], job.printed()
    assert {name: contents(out).get(name) for name in mine} == mine
    assert not old_events & set((out / "runs").glob("events.out*")) and not (out / "tmp-epoch-1-step-9").exists()
    shutil.rmtree(out / "tmp-work")
    assert_same_end(out, every_step())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{"lora_module_name": "q_proj"}, {"warmup_steps": 99, "resume": "auto"}])
def test_a_run_that_is_refused_leaves_no_trace(flags, arguments, start, every_step, tmp_path):
    out = stopped_copy(every_step(), tmp_path / "out", step=2)
    for folder, before in ((tmp_path / "new", None), (out, contents(out))):
        begin = {"overwrite_output_dir": True} if "resume" not in flags else {}
        assert start(arguments(folder, **flags, **begin)).exit_codes() == [2, 2]
        assert (contents(folder) if folder.exists() else None) == before


@pytest.mark.slow
def test_a_base_in_the_output_folder_is_not_deleted_by_a_resume_that_finds_nothing_whole(
    arguments, start, every_step, tmp_path
):
    out = stopped_copy(every_step(), tmp_path / "out", step=2)
    base = max(out.glob("epoch-*"), key=lambda path: path.stat().st_mtime)
    (base / "train_config.json").write_text("{}")  # damaged
    before = contents(out)
    more = ["--overwrite_output_dir", "--model_name_or_path"]
    job = start([*arguments(out, resume="auto"), *more, str(base)], world_size=1)
    assert job.exit_codes() == [2] and contents(out) == before, job.printed()


# Two runs on one folder


def hold_back(name, go):
    """Loading, or the writing of a checkpoint, waits for a file called `go`; `name` marks that it has begun."""
    from glm_finetune import build
    from glm_finetune.run import checkpoint

    owner, attribute = {"load": (build, "load_base"), "write": (checkpoint, "_write_model")}[name]
    original = getattr(owner, attribute)

    def wait(*args):
        go.with_suffix(".begun").touch()
        wait_for_file(go)
        return original(*args)

    setattr(owner, attribute, wait)


@pytest.mark.slow
def test_a_run_that_starts_while_another_makes_its_last_save_is_refused(arguments, start, every_step, tmp_path):
    out, go = tmp_path / "out", tmp_path / "go"
    first = start(arguments(out, num_train_epochs=2), partial(stop_and_hold, go))
    first.wait_for(go.with_suffix(".begun").exists)
    second = start(arguments(out, num_train_epochs=2, resume="auto"))
    assert second.exit_codes() == [2, 2] and "another run (process" in second.printed()
    go.touch()
    assert first.exit_codes() == [75, 75] and names(out) == ["epoch-1-step-3"]
    assert start(arguments(out, num_train_epochs=2, resume="auto")).exit_codes() == [0, 0]
    assert not damage(out / "epoch-1-step-3") and names(out)[-1] == "epoch-2-step-12"


def stop_and_hold(go):
    act_at(3, [0], partial(send, signal.SIGTERM))
    hold_back("write", go)


@pytest.mark.slow
def test_a_save_never_falls_between_the_choice_of_a_checkpoint_and_the_lock(arguments, start, every_step, tmp_path):
    """While a run that goes on still loads its model, no other may save into its folder."""
    out, go = stopped_copy(every_step(), tmp_path / "out", step=3), tmp_path / "go"
    first = start(arguments(out, **EVERY_STEP, resume="auto"), partial(hold_back, "load", go))
    first.wait_for(go.with_suffix(".begun").exists)
    second = start(arguments(out, **EVERY_STEP, resume="auto"))
    assert second.exit_codes() == [2, 2] and "another run (process" in second.printed()
    go.touch()
    assert first.exit_codes() == [0, 0] and "epoch-1-step-3: " in first.printed()
    assert_same_end(out, every_step())


@pytest.mark.slow
@pytest.mark.parametrize("flags", [{}, {"resume": "auto"}])
def test_of_two_runs_that_start_in_the_same_second_one_goes_on(flags, arguments, start, tmp_path):
    go = tmp_path / "go"  # one that is through before the other begins would be no race
    jobs = [start(arguments(tmp_path / "out", **flags), partial(hold_back, "load", go), world_size=1) for _ in range(2)]
    while all(job.is_running() for job in jobs) and jobs[0].seconds() < 60:
        time.sleep(0.01)
    go.touch()
    codes = [job.exit_codes()[0] for job in jobs]
    assert sorted(codes) == [0, 2], [job.printed() for job in jobs]
    winner, loser = jobs[codes.index(0)], jobs[codes.index(2)]
    assert f"another run (process {winner.processes[0].pid} on {socket.gethostname()})" in loser.printed()
    assert [damage(folder) for folder in checkpoints_in(tmp_path / "out")] == [None]


@pytest.mark.parametrize("before", ["process 7 on a", "process 123456789 on a-machine-with-a-long-name"])
def test_the_lock_names_who_has_it_and_when_given_back_who_had_it(before, tmp_path):
    (tmp_path / ".lock").write_text(before)
    hold = lock(tmp_path)
    assert (tmp_path / ".lock").read_text() == f"process {os.getpid()} on {socket.gethostname()}"
    hold.give_back()
    assert (tmp_path / ".lock").read_text() == before


# Several nodes


@pytest.mark.slow
def test_a_rank_that_does_not_see_the_checkpoint_ends_all_with_a_word(arguments, start, every_step, tmp_path):
    stopped_copy(every_step(), tmp_path / "out", step=2)
    job = start(arguments("out", **EVERY_STEP, resume="auto"), partial(elsewhere, tmp_path))
    assert job.exit_codes() == [2, 2] and "--resume: rank 1 does not see out/epoch-1-step-2" in job.printed()
    assert job.printed().count("error") == 1


def elsewhere(folder):
    os.chdir(folder if os.environ["RANK"] == "0" else folder.parent)


def wait_for_file(path):
    while not path.exists():
        time.sleep(0.01)


@pytest.mark.slow
def test_a_second_run_on_the_folder_is_refused_and_the_first_goes_on(arguments, start, every_step, tmp_path):
    out, go = tmp_path / "out", tmp_path / "go"
    first = start(arguments(out, **EVERY_STEP), partial(act_at, 8, [0, 1], partial(wait_for_file, go)))
    first.wait_for(lambda: (out / "latest").is_file() and (out / "latest").read_text() == "epoch-2-step-8")
    before = contents(out)
    for flags in ({"resume": "auto"}, {"overwrite_output_dir": True}):
        second = start(arguments(out, **EVERY_STEP, **flags))
        assert second.exit_codes() == [2, 2]
        holder = f"process {first.processes[0].pid} on {socket.gethostname()}"
        assert f"error: --output_dir {out}: another run ({holder}) is writing to it." in second.printed()
        assert second.printed().count("error") == 1 and contents(out) == before
    go.touch()
    assert first.exit_codes() == [0, 0]
    assert_same_end(out, every_step())


@pytest.mark.slow
def test_the_folder_of_a_killed_run_is_free_and_cleared_of_what_it_had_begun(arguments, start, every_step, tmp_path):
    out = tmp_path / "out"
    first = start(arguments(out, **EVERY_STEP), partial(act_at, 8, [0, 1], die))
    assert first.exit_codes() == [-9, -9]
    for name in ("tmp-epoch-1-step-3", "tmp-epoch-1-step-6-merged"):
        (out / name).mkdir()
        (out / name / "half").write_text("x")
    assert start(arguments(out, **EVERY_STEP, resume="auto")).exit_codes() == [0, 0]
    assert [path.name for path in out.glob("tmp-*")] == ["tmp-epoch-1-step-6-merged"]  # merge_lora.py's
    (out / "tmp-epoch-1-step-6-merged").rename(tmp_path / "merged")
    assert_same_end(out, every_step())
