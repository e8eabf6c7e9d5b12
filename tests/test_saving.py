"""What a run keeps and what it refuses: in the background or not, on a full disk, beside damaged checkpoints."""

import errno
import json
import shutil
import signal
import time
from functools import partial
from pathlib import Path

import pytest

from glm_finetune.errors import NotFinite
from glm_finetune.run.checkpoint import damage
from glm_finetune.run.folder import checkpoints as checkpoints_in
from tests.conftest import EVERY_STEP
from tests.refusal import contents
from tests.test_interruptions import act_at, assert_same_end, send
from tests.test_lost_ranks import die
from tests.test_resume import stopped_copy


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


# In the background


def write_late():
    """Checkpoints are written half a second after training has gone on."""
    from glm_finetune.run import checkpoint

    original = checkpoint._write_model

    def write(*args):
        time.sleep(0.5)
        original(*args)

    checkpoint._write_model = write


@pytest.mark.slow
@pytest.mark.parametrize("train_type, ds_file", [("lora", None), ("all", None), ("all", "stage3.json")])
def test_written_while_training_goes_on_a_checkpoint_is_the_same(
    train_type, ds_file, arguments, start, every_step, tmp_path
):
    whole, out = every_step(train_type, ds_file), tmp_path / "out"
    flags = dict(num_train_epochs=2, save_model_step=4, train_type=train_type, async_save=True)
    flags |= {"ds_file": ds_file} if ds_file else {}
    job = start(arguments(out, **flags), write_late)
    job.wait_for(lambda: (out / "metrics.jsonl").is_file() and (out / "metrics.jsonl").read_text().count("\n") >= 6)
    assert names(out) == []  # two steps further the first one is still being written
    assert job.exit_codes() == [0, 0], job.printed()
    assert names(out) == [f"epoch-{1 + (step > 6)}-step-{step}" for step in (4, 6, 8, 12)]
    for folder in checkpoints_in(out):
        assert damage(folder) is None
        files, expected = contents(folder), contents(whole / folder.name)
        assert files.keys() == expected.keys()
        different = {name.name for name in files if files[name] != expected[name]}
        assert different == {"train_config.json", "manifest.json"}  # these name the flag
    again = stopped_copy(out, tmp_path / "again", step=4)
    job = start(arguments(again, **{**flags, "save_model_step": 1, "resume": "auto"}))
    assert job.exit_codes() == [0, 0] and "epoch-1-step-4: " in job.printed()
    assert_same_end(again, whole)


def count_copies(path):
    """Note how many weights of the first save are the model's own tensors, and how many are copies."""
    from glm_finetune.run import checkpoint

    original = checkpoint._write_model

    def write(model, tokenizer, train_type, folder, weights):
        same = {p.data_ptr() for p in model.parameters()}
        learns = {p.data_ptr() for p in model.parameters() if p.requires_grad}
        held = [tensor.data_ptr() for _, tensor in weights]
        if not path.exists():
            path.write_text(f"{len(held)} {len(same - learns)} {sum(p in same - learns for p in held)}")
            assert not learns & set(held)
        original(model, tokenizer, train_type, folder, weights)

    checkpoint._write_model = write


@pytest.mark.slow
def test_in_the_background_only_what_learns_is_copied(arguments, start, tmp_path):
    flags = dict(train_type="freeze", async_save=True, max_steps=2, save_model_step=1)
    job = start(arguments(tmp_path / "out", **flags), partial(count_copies, tmp_path / "count"))
    assert job.exit_codes() == [0, 0], job.printed()
    held, frozen, not_copied = map(int, (tmp_path / "count").read_text().split())
    assert held > frozen > 0 and not_copied == frozen


def fail_writing(step, error):
    """state.write, which writes the larger part of a checkpoint, raises `error` at a step."""
    from glm_finetune.run import state

    original = state.write

    def write(folder, tensors, randoms, numbers):
        if numbers["step"] == step:
            (folder.parent / "half.safetensors").write_bytes(b"x" * 100)
            raise error
        original(folder, tensors, randoms, numbers)

    state.write = write


FULL = OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags", [{}, {"async_save": True}, {"ds_file": "stage3.json"}], ids=["sync", "async", "zero3"]
)
@pytest.mark.parametrize("step", [3, 12])
def test_a_write_that_fails_ends_all_ranks_with_2_and_leaves_what_there_was(
    step, flags, arguments, start, every_step, tmp_path
):
    out = tmp_path / "out"
    job = start(arguments(out, **EVERY_STEP, **flags), partial(fail_writing, step, FULL))
    assert job.exit_codes() == [2, 2], job.printed()
    target = checkpoints_in(every_step())[step - 1].name
    assert job.printed().count("error") == 1 and "Traceback" not in job.printed()
    assert f"error: saving {out / target} failed: [Errno 28] No space left" in job.printed()
    assert names(out) == names(every_step())[: step - 1] and not list(out.glob("tmp-*"))
    assert not [folder for folder in checkpoints_in(out) if damage(folder)]
    assert (out / "latest").read_text() == names(out)[-1]
    again = start(arguments(out, **EVERY_STEP, **flags, resume="auto"))
    assert again.exit_codes() == [0, 0] and f"{names(every_step())[step - 2]}: " in again.printed()
    if "ds_file" not in flags:
        assert_same_end(out, every_step())


@pytest.mark.slow
@pytest.mark.parametrize("step", [3, 12])
def test_what_nobody_expected_in_the_background_ends_the_run_as_well(step, arguments, start, tmp_path):
    prepare = partial(fail_writing, step, TypeError("not a tensor"))
    job = start(arguments(tmp_path / "out", **EVERY_STEP, async_save=True), prepare)
    assert job.exit_codes() == [1, 1], job.printed()
    assert job.printed().rstrip().endswith("TypeError: not a tensor")


def end_while_writing(error, step, fails):
    """A checkpoint is written late, or not at all (fails), and the run ends with `error` in the step after it."""
    from glm_finetune.run.guard import Guard

    def accepts(self, at, *_):
        if at > step:
            raise error
        return True

    Guard.accepts = accepts
    write_late()
    if fails:
        fail_writing(step, FULL)


@pytest.mark.slow
@pytest.mark.parametrize("error, code", [(NotFinite("the loss is nan"), 2), (KeyError("a bug"), 1)])
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_ends_the_run_what_is_being_written_is_there_or_told(error, code, fails, arguments, start, tmp_path):
    out = tmp_path / "out"
    job = start(arguments(out, **EVERY_STEP, async_save=True), partial(end_while_writing, error, 2, fails))
    assert job.exit_codes() == [code, code] and str(error) in job.printed(), job.printed()
    told = f"saving {out / 'epoch-1-step-2'} failed: [Errno 28] No space left" in job.printed()
    assert told == fails and names(out) == ["epoch-1-step-1", "epoch-1-step-2"][: 2 - fails]
    assert not [folder for folder in checkpoints_in(out) if damage(folder)]


# Beside damaged ones


def truncate(folder):
    path = folder / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


def flip(folder):
    path = folder / "state/model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def forget_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 2])
@pytest.mark.parametrize("harm", [truncate, flip, forget_manifest])
def test_the_only_whole_checkpoint_stays_until_newer_ones_are_whole(
    harm, limit, arguments, start, every_step, tmp_path
):
    out = stopped_copy(every_step(), tmp_path / "out", step=12)
    for folder in checkpoints_in(out)[:4]:
        shutil.rmtree(folder)
    for folder in checkpoints_in(out)[1:]:  # steps 6 to 12
        harm(folder)
    again = arguments(out, **EVERY_STEP, save_total_limit=limit, resume="auto")
    whole = lambda: [folder.name for folder in checkpoints_in(out) if not damage(folder)]  # noqa: E731
    assert whole() == ["epoch-1-step-5"]
    job = start(again, partial(act_at, 5, [0, 1], die))
    assert job.exit_codes() == [-9, -9] and "epoch-1-step-5: " in job.printed() and whole() == ["epoch-1-step-5"]
    job = start(again, partial(act_at, 7, [0, 1], die))
    assert job.exit_codes() == [-9, -9] and "epoch-1-step-5: " in job.printed()
    assert whole() == ["epoch-1-step-6", "epoch-2-step-7"][-limit:]
    job = start(again)
    assert job.exit_codes() == [0, 0] and "epoch-2-step-7: " in job.printed()
    assert names(out) == whole() == ["epoch-2-step-11", "epoch-2-step-12"][-limit:]
    assert_same_end(out, every_step())


@pytest.mark.slow
def test_where_none_is_whole_auto_deletes_nothing_without_the_flag(arguments, start, every_step, tmp_path):
    out = stopped_copy(every_step(), tmp_path / "out", step=2)
    for folder in checkpoints_in(out):
        flip(folder)
    before = contents(out)
    job = start(arguments(out, **EVERY_STEP, resume="auto"))
    assert job.exit_codes() == [2, 2] and "--overwrite_output_dir" in job.printed()
    assert "epoch-1-step-2: state/model.safetensors is damaged" in job.printed()
    assert contents(out) == before
    job = start(arguments(out, **EVERY_STEP, resume="auto", overwrite_output_dir=True))
    assert job.exit_codes() == [0, 0]
    assert_same_end(out, every_step())


@pytest.mark.slow
def test_an_older_checkpoint_is_not_continued_beside_newer_ones(arguments, start, every_step, tmp_path):
    out = stopped_copy(every_step(), tmp_path / "out", step=4)
    before = contents(out)
    job = start(arguments(out, **EVERY_STEP, resume=out / "epoch-1-step-2"))
    assert job.exit_codes() == [2, 2] and "epoch-1-step-3, epoch-1-step-4" in job.printed()
    assert contents(out) == before
    job = start(arguments(tmp_path / "new", **EVERY_STEP, resume=out / "epoch-1-step-2"))
    assert job.exit_codes() == [0, 0] and contents(out) == before
    assert names(tmp_path / "new") == names(every_step())[2:]


@pytest.mark.slow
def test_a_folder_of_another_run_is_not_mixed_with_what_goes_on_in_it(arguments, start, every_step, tmp_path):
    one, other = stopped_copy(every_step(), tmp_path / "one", step=4), tmp_path / "other"
    other.mkdir()
    (other / ".lock").write_text("process 1 on a")
    (other / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(other)
    flags = {**EVERY_STEP, "resume": one / "epoch-1-step-4"}
    job = start(arguments(other, **flags))
    assert job.exit_codes() == [2, 2] and "holds results already (metrics.jsonl)" in job.printed()
    assert contents(other) == before
    job = start(arguments(other, **flags, overwrite_output_dir=True))
    assert job.exit_codes() == [0, 0], job.printed()
    steps = [json.loads(line)["step"] for line in (other / "metrics.jsonl").read_text().splitlines()]
    assert min(steps) == 5 and names(other) == names(every_step())[4:]


# The best one


def evaluate_as(losses):
    """The loss on the evaluation data after step i is losses[i - 1]."""
    import train

    train.evaluate = lambda run: losses[run.progress.step - 1]


@pytest.mark.slow
def test_the_best_is_kept_beside_the_newest_and_known_after_a_stop(arguments, start, tmp_path):
    out = tmp_path / "out"
    again = arguments(out, **EVERY_STEP, eval_path="data.jsonl", save_total_limit=2, resume="auto")

    def run_until(step, action, losses):
        job = start(again, partial(evaluate_and_act, losses, step, action))
        assert all(code in (-9, 75, 0) for code in job.exit_codes()), job.printed()
        return names(out), (out / "best").read_text(), (out / "latest").read_text()

    losses = [3, 1, 2, 2.5, 1.5, 1.2, 1.1, 0.5, 0.7, 0.5, 0.9, 0.8]
    first, second, fourth, fifth = (f"epoch-1-step-{step}" for step in (1, 2, 4, 5))
    assert run_until(1, die, losses) == ([first], first, first)
    assert run_until(5, die, losses) == ([second, fourth, fifth], second, fifth)
    assert run_until(7, partial(send, signal.SIGTERM), losses)[1:] == (second, "epoch-2-step-7")
    last = ["epoch-2-step-8", "epoch-2-step-11", "epoch-2-step-12"]
    assert run_until(None, None, losses) == (last, last[0], last[2])
    (found,) = {damage(Path(out / name)) for name in last}
    assert found is None


def evaluate_and_act(losses, step, action):
    evaluate_as(losses)
    act_at(step, [0, 1], action)


# Nothing left to do


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, code, said",
    [
        ({"max_steps": 12}, 0, "this run is complete"),
        ({"num_train_epochs": 2}, 0, "this run is complete"),
        ({"num_train_epochs": 1}, 0, "this run is complete"),
        ({"max_steps": 11}, 2, "--max_steps 11"),
    ],
)
def test_a_run_that_is_complete_says_so_and_changes_nothing(flags, code, said, arguments, start, every_step, tmp_path):
    out = shutil.copytree(every_step(), tmp_path / "out")
    before = contents(out)
    job = start(arguments(out, **{**EVERY_STEP, **flags, "resume": "auto"}))
    assert job.exit_codes() == [code, code] and said in job.printed(), job.printed()
    assert contents(out) == before
