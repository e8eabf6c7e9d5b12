"""Runs that are killed, are asked to stop or lose a rank: nothing hangs, and going on gives the numbers of one run.

The log of the kills: python -m pytest tests/test_interruptions.py -k killed -s
"""

import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import psutil
import pytest

from glm_finetune.run.checkpoint import damage
from glm_finetune.run.folder import checkpoints as checkpoints_in
from glm_finetune.run.folder import step_of
from glm_finetune.run.stop import REPEAT_SECS, RESUME_ME
from tests.conftest import finished
from tests.ranks import Job, free_port
from tests.refusal import contents

ROOT = Path(__file__).parents[1]
NUM_KILLS = 20
LONG = dict(num_train_epochs=12, save_total_limit=2)


def records(folder):
    """metrics.jsonl without what is measured."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in ("tokens_per_s", "peak_gib")} for line in lines]


def assert_same_end(folder, whole):
    """Logged numbers, last weights and state, `latest` and `best` are, bit for bit, those of another run."""
    assert records(folder) == records(whole)
    last, expected = checkpoints_in(folder)[-1], checkpoints_in(whole)[-1]
    assert last.name == expected.name and damage(last) is None
    last, expected = contents(last), contents(expected)
    for name in (Path("train_config.json"), Path("manifest.json")):  # these hold --resume
        last.pop(name), expected.pop(name)
    assert last.keys() == expected.keys() and not [name for name in last if last[name] != expected[name]]
    for name in ("latest", "best"):
        assert (folder / name).is_file() == (whole / name).is_file()
        assert not (folder / name).is_file() or (folder / name).read_text() == (whole / name).read_text()
    assert not list(folder.glob("tmp-*"))


# Kills


def unfinished(folder):
    return [path.name for path in folder.glob("tmp-*")]


def kill_somewhere(job, folder, where, share, load_secs, step_secs):
    """Kill all ranks of a job while it loads, between saves, or within one; share: from 0 to 1, how late in that.

    Seconds were measured before and may be too many: a job gets no further than two steps beyond its first.
    """
    first = last_step(folder) + 1
    if where == "loading":
        job.wait_for(lambda: job.seconds() > share * load_secs or last_step(folder) >= first)
    else:
        job.wait_for(lambda: last_step(folder) >= first)
        end = job.seconds() + share * 2 * step_secs
        job.wait_for(lambda: job.seconds() > end or last_step(folder) >= first + 2)
    if where == "saving":
        job.wait_for(lambda: unfinished(folder))
    job.kill()
    return job.seconds()


def last_step(folder):
    return step_of(checkpoints_in(folder)[-1]) if checkpoints_in(folder) else 0


@pytest.fixture(params=[{}, {"async_save": True}], ids=["sync", "async"])
def undisturbed(request, arguments, tmp_path):
    """(Function: resume or nothing -> arguments of a run that saves all the time; its folder when nothing disturbs it;
    seconds until its first checkpoint; seconds a step)."""
    flags = dict(num_train_epochs=10, save_model_step=1, save_total_limit=3, eval_path="data.jsonl", **request.param)
    finished(arguments, tmp_path / "warm-up", tmp_path / "warm-up.log", max_steps=1)  # starts the fork server
    job = Job(arguments(tmp_path / "whole", **flags), tmp_path / "whole.log")
    job.wait_for(lambda: checkpoints_in(tmp_path / "whole"))
    load_secs = job.seconds()
    assert job.exit_codes() == [0, 0]
    step_secs = (job.seconds() - load_secs) / 60
    return partial(arguments, **flags), tmp_path / "whole", load_secs, step_secs


@pytest.mark.slow
def test_killed_twenty_times_at_any_moment_it_ends_with_the_numbers_of_one_run(undisturbed, start, tmp_path):
    arguments, whole, load_secs, step_secs = undisturbed
    folder, choice = tmp_path / "out", random.Random(7)
    moments = ["loading"] * 5 + ["training"] * 7 + ["saving"] * 8
    choice.shuffle(moments)
    resumed_from, log = None, []
    for where in moments:
        job = start(arguments(folder, resume="auto"))
        seconds = kill_somewhere(job, folder, where, choice.random(), load_secs, step_secs)
        said = re.search(r"resumed from .*/(epoch-\S+):", job.printed())
        assert said is None or said[1] == resumed_from
        assert not [name for name in checkpoints_in(folder) if damage(name)]
        log.append((where, seconds, said[1] if said else "-", newest(folder), ", ".join(unfinished(folder)) or "-"))
        resumed_from = newest(folder)
    job = start(arguments(folder, resume="auto"))
    assert job.exit_codes() == [0, 0] and f"/{resumed_from}: " in job.printed()
    show(log, resumed_from)
    assert len(log) == NUM_KILLS and sum(line[-1] != "-" for line in log) >= 5
    assert_same_end(folder, whole)


def newest(folder):
    return checkpoints_in(folder)[-1].name if checkpoints_in(folder) else None


def show(log, last):
    print(f"\n{'kill':>4}  {'while':8}  {'after s':>7}  {'had resumed from':16}  {'newest saved':16}  left unfinished")
    for i, (where, seconds, resumed, saved, left) in enumerate(log, 1):
        print(f"{i:4}  {where:8}  {seconds:7.2f}  {resumed:16}  {saved or '-':16}  {left}")
    print(f"Then resumed from {last} and ended: numbers and files are those of the run that nothing disturbed.")


# Asked to stop


def act_at(step, ranks, action):
    """Call action() on `ranks` where step + 1 begins."""
    from glm_finetune.data.sampler import StepSampler

    original = StepSampler.micro_batches

    def micro_batches(self, progress, rank):
        if progress.step == step and int(os.environ["RANK"]) in ranks:
            action()
        return original(self, progress, rank)

    StepSampler.micro_batches = micro_batches


def send(number):
    os.kill(os.getpid(), number)


@pytest.fixture(scope="module")
def whole_epochs(arguments, tmp_path_factory):
    """The folder of a run of two epochs, saved after each."""
    root = tmp_path_factory.mktemp("whole")
    return finished(arguments, root / "out", root / "log", num_train_epochs=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    "step, epoch, ranks, number",
    [(8, 2, [0], signal.SIGTERM), (6, 1, [1], signal.SIGUSR1), (0, 1, [0, 1], signal.SIGTERM)],
    ids=["within an epoch", "at its end", "before the first step"],
)
def test_asked_to_stop_it_saves_says_75_and_goes_on_bit_equal(
    step, epoch, ranks, number, arguments, start, whole_epochs, tmp_path
):
    out = tmp_path / "out"
    job = start(arguments(out, num_train_epochs=2), partial(act_at, step, ranks, partial(send, number)))
    assert job.exit_codes() == [RESUME_ME, RESUME_ME]
    assert f"asked to stop after step {step}: saved {checkpoints_in(out)[-1]}" in job.printed()
    names = [path.name for path in checkpoints_in(out)]
    assert names == (["epoch-1-step-6"] if step >= 6 else []) + ([f"epoch-{epoch}-step-{step}"] if step != 6 else [])
    assert [record["step"] for record in records(out)] == list(range(1, step + 1))
    again = arguments(out, num_train_epochs=2, resume="auto")
    assert start(again, partial(act_at, step, ranks, partial(send, number))).exit_codes() == [RESUME_ME, RESUME_ME]
    assert [path.name for path in checkpoints_in(out)] == names  # asked before it did anything
    assert start(again).exit_codes() == [0, 0]
    assert_same_end(out, whole_epochs)


@pytest.mark.slow
def test_asked_to_stop_in_its_last_step_it_is_complete(arguments, start, whole_epochs, tmp_path):
    job = start(arguments(tmp_path / "out", num_train_epochs=2), partial(act_at, 11, [0], stop_later))
    assert job.exit_codes() == [0, 0] and "asked to stop" not in job.printed()
    assert_same_end(tmp_path / "out", whole_epochs)


def stop_later():
    """SIGTERM after the ranks have asked one another whether to stop before this step."""
    from glm_finetune.run import engine

    original = engine.to_device

    def to_device(*args):
        send(signal.SIGTERM)
        return original(*args)

    engine.to_device = to_device


def press_twice_at(step, ranks, secs, launcher):
    """Ctrl-C where step + 1 begins, and again after `secs`; torchrun repeats what its ranks have got already."""

    def press_twice():
        send(signal.SIGINT)
        time.sleep(secs)
        send(signal.SIGINT)

    if launcher == "torchrun":
        os.environ["TORCHELASTIC_RUN_ID"] = "1"
    act_at(step, ranks, press_twice)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[0], [0, 1]])
def test_ctrl_c_saves_and_goes_on_bit_equal(ranks, arguments, start, whole_epochs, tmp_path):
    out = tmp_path / "out"
    job = start(arguments(out, num_train_epochs=2), partial(press_twice_at, 8, ranks, 0, "torchrun"))
    assert job.exit_codes() == [RESUME_ME, RESUME_ME], job.printed()
    assert f"asked to stop after step 8: saved {out / 'epoch-2-step-8'}" in job.printed()
    assert start(arguments(out, num_train_epochs=2, resume="auto")).exit_codes() == [0, 0]
    assert_same_end(out, whole_epochs)


@pytest.mark.slow
@pytest.mark.parametrize("launcher, secs", [("torchrun", REPEAT_SECS + 0.1), (None, 0)])
def test_a_second_ctrl_c_that_no_launcher_repeats_ends_at_once(launcher, secs, arguments, start, tmp_path):
    out = tmp_path / "out"
    job = start(arguments(out, num_train_epochs=2), partial(press_twice_at, 8, [0, 1], secs, launcher))
    assert job.exit_codes() == [-signal.SIGINT, -signal.SIGINT]
    assert [path.name for path in checkpoints_in(out)] == ["epoch-1-step-6"] and "Traceback" not in job.printed()


# Launchers

LAUNCHERS = {
    "deepspeed": ["deepspeed", "--num_gpus", "2", "--master_port"],
    "torchrun": ["torchrun", "--nproc_per_node", "2", "--master_port"],
}


class Launch:
    """train.py as users start it on two ranks, in a session of its own."""

    def __init__(self, launcher, arguments, log):
        program, *options = LAUNCHERS[launcher]
        command = [Path(sys.executable).with_name(program), *options, str(free_port()), ROOT / "train.py", *arguments]
        self.log = log
        with open(log, "w") as file:
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        self.below = []

    def wait_for(self, condition, secs=120):
        end = time.monotonic() + secs
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.01)

    def ranks(self):
        """Processes of the ranks that have started, in their order."""
        self.below = psutil.Process(self.process.pid).children(recursive=True)
        found = {}
        for process in self.below:
            with suppress(psutil.NoSuchProcess):
                found[process.environ().get("RANK")] = process
        return [found[rank] for rank in sorted(filter(None, found))]

    def has_gone(self, secs=60):
        """Whether no process of the session is left, after some seconds at most."""
        _, alive = psutil.wait_procs(self.below, timeout=secs)
        return not [process for process in alive if process.status() != psutil.STATUS_ZOMBIE]

    def kill(self):
        for process in [*self.below, self.process]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.wait()


@pytest.fixture
def launch(tmp_path):
    """Function: launcher, arguments -> Launch, which does not outlive the test."""
    launches = []

    def launch(launcher, arguments):
        launches.append(Launch(launcher, arguments, tmp_path / f"launch-{len(launches)}.log"))
        launches[-1].wait_for(lambda: len(launches[-1].ranks()) == 2)
        return launches[-1]

    yield launch
    for process in launches:
        process.kill()


@pytest.fixture(scope="module")
def whole_long(arguments, tmp_path_factory):
    """The folder of a run of 72 steps: a second or two to be stopped in."""
    root = tmp_path_factory.mktemp("whole-long")
    return finished(arguments, root / "out", root / "log", **LONG)


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, to, code",
    [
        ("deepspeed", "a rank", 75),
        ("deepspeed", "launcher", -15),
        ("torchrun", "a rank", 1),
        ("torchrun", "launcher", 1),
    ],
)
def test_what_launchers_make_of_sigterm(launcher, to, code, launch, arguments, start, whole_long, tmp_path):
    out = tmp_path / "out"
    run = launch(launcher, arguments(out, **LONG))
    run.wait_for(lambda: (out / "metrics.jsonl").is_file() and len(records(out)) >= 3)
    run.ranks()[1].terminate() if to == "a rank" else run.process.terminate()
    assert run.process.wait(60) == code
    assert run.has_gone()
    step = len(records(out))
    assert step < 72 and f"asked to stop after step {step}: saved {checkpoints_in(out)[-1]}" in run.log.read_text()
    if launcher == "torchrun" and to == "a rank":
        assert len(re.findall(r"exitcode *: 75 ", run.log.read_text())) == 2
    assert start(arguments(out, **LONG, resume="auto")).exit_codes() == [0, 0]
    assert_same_end(out, whole_long)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ctrl_c_in_the_terminal_of_a_launcher_saves(launcher, launch, arguments, tmp_path):
    out = tmp_path / "out"
    run = launch(launcher, arguments(out, **LONG))
    run.wait_for(lambda: (out / "metrics.jsonl").is_file() and len(records(out)) >= 3)
    os.killpg(run.process.pid, signal.SIGINT)  # a terminal sends it to all processes of the launch
    assert run.process.wait(60) != 0 and run.has_gone()
    step = len(records(out))
    assert step < 72 and f"asked to stop after step {step}: saved {checkpoints_in(out)[-1]}" in run.log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_launchers_end_ranks_that_wait_for_one_that_died_before_it_joined(launcher, launch, arguments, tmp_path):
    run = launch(launcher, arguments(tmp_path / "out"))
    run.ranks()[1].kill()
    assert run.process.wait(60) not in (0, RESUME_ME)
    assert run.has_gone()
