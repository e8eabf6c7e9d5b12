"""A rank that dies or fails ends the others within seconds, and its own words come last."""

import os
import re
import signal
import sys
from functools import partial

import pytest

from glm_finetune import exits
from glm_finetune.errors import UserError
from glm_finetune.exits import LOST
from tests.test_interruptions import act_at


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail(error):
    raise error


def act_in(module, name, rank, count, action):
    """Call action() on `rank` where the function `name` of `module` is called for the count-th time."""
    owner = sys.modules[module]
    original, calls = getattr(owner, name), []

    def replaced(*args, **kwargs):
        calls.append(1)
        if len(calls) == count and int(os.environ["RANK"]) == rank:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, replaced)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "module, name, count, stage",
    [
        ("glm_finetune.run.engine", "to_device", 3, 2),
        ("train", "log", 2, 3),
        ("glm_finetune.build", "load_base", 1, 3),
        ("glm_finetune.build", "load_base", 1, 2),
        ("glm_finetune.run.checkpoint", "gathered", 2, 3),
        ("glm_finetune.dist", "all_agree", 1, 2),
        ("glm_finetune.dist", "all_agree", 2, 2),
    ],
)
def test_a_killed_rank_ends_the_others_who_say_so(module, name, count, stage, rank, arguments, start, tmp_path):
    flags = dict(num_train_epochs=2, save_model_step=1) | ({"ds_file": "stage3.json"} if stage == 3 else {})
    job = start(arguments(tmp_path / "out", **flags), partial(act_in, module, name, rank, count, die))
    codes = job.exit_codes()
    assert codes == ([-9, 1] if rank == 0 else [1, -9]), job.printed()
    lines = job.printed().splitlines()
    assert lines[-1].startswith("error: a rank ended without a word. It was killed, most often")
    assert f"rank {1 - rank} lost the others: " in lines[-2] and "Traceback" not in job.printed()


@pytest.mark.slow
@pytest.mark.parametrize(
    "error, code, rank",
    [
        (UserError("line 7 is bad"), 2, 0),
        (UserError("line 7 is bad"), 2, 1),
        (RuntimeError("mat1 and mat2"), 1, 2),
        (KeyError("lost key"), 1, 0),
    ],
)
def test_the_words_of_the_rank_that_failed_come_last_from_one_of_the_others(
    error, code, rank, arguments, start, tmp_path
):
    job = start(arguments(tmp_path / "out"), partial(act_at, 2, [rank], partial(fail, error)), world_size=3)
    codes = job.exit_codes()
    assert codes.pop(rank) == code and codes == [1, 1], job.printed()
    text = job.printed()
    assert text.count("lost the others: ") == 2 and "without a word" not in text
    own, repeated = text.rsplit(f"error: rank {rank}: ", 1)
    assert str(error) in own and repeated.splitlines()[-1].endswith(str(error))
    assert ("Traceback" in own) == ("Traceback" in repeated) == (code == 1)


def test_only_the_loss_of_a_rank_is_taken_for_it():
    lost = """[pair.cc:553] Connection closed by peer [127.0.0.1]:34706. This is typically caused by a remote worker
        [pair.cc:537] Read error [127.0.0.1]:18581: Connection reset by peer. This is typically caused by a remote
        Broken pipe
        Application timeout caused pair closure
        Timed out waiting 1800000ms for recv operation to complete
        Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?
        Socket unexpectedly closed 127.0.0.1
        Gloo connectFullMesh failed with [pair.cc:144] no error
        ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.
        wait timeout after 1800000ms, keys: /default_pg/0//store_based_barrier_key:1"""
    other = """mat1 and mat2 shapes cannot be multiplied
        NCCL error in: NCCLUtils.cpp:77, invalid usage. Last error: Duplicate GPU detected : rank 0 and rank 1
        CUDA error: device-side assert triggered"""
    assert all(re.search(LOST, text, re.IGNORECASE) for text in lost.splitlines())
    assert not [text for text in other.splitlines() if re.search(LOST, text, re.IGNORECASE)]


def test_one_of_the_ranks_that_lost_the_others_repeats_what_came_first(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(exits.signal, "signal", lambda *args: None)
    monkeypatch.setattr(exits.time, "sleep", lambda secs: None)
    monkeypatch.setattr(exits, "_words", [open(tmp_path / "words", "a+")])  # noqa: SIM115 (as it is shared)
    said = {}
    for rank, words in ((3, "line 7 is bad"), (5, "another matter"), (1, None), (2, None), (0, None)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "6")
        exits._say(words) if words else exits._say_lost(RuntimeError("Connection closed by peer"))
        said[rank] = capfd.readouterr().err.splitlines()[-1]
    assert said[3] == "error on rank 3: line 7 is bad"
    assert said[1] == "error: rank 3: line 7 is bad"
    assert "lost the others: Connection closed by peer" in said[0] and "lost the others" in said[2]  # rank 1 has spoken


def test_what_all_ranks_say_together_is_said_by_the_first(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(exits.signal, "signal", lambda *args: None)
    monkeypatch.setattr(exits, "_words", [open(tmp_path / "words", "a+")])  # noqa: SIM115 (as it is shared)
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        exits._say("--output_dir out is taken")
    assert capfd.readouterr().err == "error: --output_dir out is taken\n"


@pytest.mark.slow
@pytest.mark.parametrize("error", [ValueError("a bug"), UserError("a refusal"), None], ids=["bug", "refusal", "killed"])
def test_a_failed_launch_leaves_nothing_behind(error, arguments, start, tmp_path):
    before = {path.name for path in tmp_path.iterdir()}
    action = die if error is None else partial(fail, error)
    job = start(arguments(tmp_path / "out"), partial(act_at, 2, [1], action))
    assert job.exit_codes() == [1, -9 if error is None else 2 if isinstance(error, UserError) else 1]
    assert {path.name for path in tmp_path.iterdir()} - before == {"out", job.log.name}  # the temp folder, in tests
