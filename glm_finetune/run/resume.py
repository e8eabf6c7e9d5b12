"""Which checkpoint a run goes on from: the newest whole one, or the one that was named; and whether it is its own.

folder = choose_resume(config, record)      # with --resume; all ranks must call; None: begin anew
"""

from pathlib import Path

from glm_finetune import dist
from glm_finetune.errors import UserError
from glm_finetune.record import FORMAT_VERSION, SAMPLES, read_record
from glm_finetune.run import state
from glm_finetune.run.checkpoint import damage
from glm_finetune.run.folder import check_output_dir, checkpoints, step_of
from glm_finetune.run.parts import output_folder

NEVER = "this run cannot be gone on from (--save_state no); --init_from that folder trains its weights further"


def find_resume(resume, output_dir):
    """The checkpoint that --resume asks for, or None: "auto" takes the newest whole one in output_dir, if any.

    Damaged ones are named and passed over. Raises UserError for a path that is damaged, has no state, or is of a newer
    format.
    """
    if resume != "auto":
        if problem := damage(Path(resume)) or _unfit(Path(resume)):
            raise UserError(f"--resume {resume}: {problem}")
        return Path(resume)
    for folder in reversed(checkpoints(output_dir)):
        problem = damage(folder) or _unfit(folder)
        if problem is None:
            return folder
        print(f"--resume auto: {problem} It is passed over.", flush=True)
    return None


def choose_resume(config, record):
    """The folder that --resume goes on from, or None; rank 0 looks. All ranks must call.

    Raises UserError on every rank if --resume names nothing to go on from, or another run.
    """
    folder = dist.from_main(dist.on_main(_choose, config, record))
    there = dist.gather_objects(folder is None or (folder / state.FOLDER / "progress.json").is_file())
    if not all(there):
        shared = "On several nodes --output_dir must be a folder that all of them share, with the same path."
        raise UserError(f"--resume: rank {there.index(False)} does not see {folder}. {shared}")
    return folder


def _choose(config, record):
    folder = find_resume(config.resume, config.output_dir)
    if folder:
        check_same_run(folder, record, config.force)
        if config.max_steps and config.max_steps < (done := read_record(folder)["step"]):
            behind = f"{folder} has {done} steps behind it already"
            raise UserError(f"--max_steps {config.max_steps}: {behind}. Raise it, or leave out.")
    _check_others(folder, config)
    if begins_anew(folder, config.output_dir):  # what is there will be deleted
        check_output_dir(*output_folder(config, begins=True))
    return folder


def say_done(folder, total_steps, record):
    """Say that nothing is left to do. Raises UserError where the data are others: nothing of them would be learnt."""
    done = f"{folder}: all {total_steps} steps are done, this run is complete"
    before, now = (one.get("identity", {}).get("training data") for one in (read_record(folder), record))
    if before not in (None, now):
        raise UserError(f"--resume: {done}, with other training data than those given. {_further(folder)}")
    dist.print_main(f"{done}. Nothing was changed.")


def _further(folder):
    return f"To train its weights on other data give --init_from {folder} and another --output_dir."


def begins_anew(resumed_from, output_dir):
    """Whether what output_dir holds is of another run than one that goes on from `resumed_from` (None: from none)."""
    return not resumed_from or resumed_from.resolve().parent != Path(output_dir).resolve()


def _unfit(folder):
    """What keeps a whole checkpoint from being gone on from, or None."""
    if not (folder / state.FOLDER / "progress.json").is_file():
        return _stateless(folder)
    version = read_record(folder).get("format_version", 0)
    if not isinstance(version, int):
        return f"{folder}: train_config.json has no format_version, it is not of this project."
    if version > FORMAT_VERSION:
        return f"{folder}: format {version}, this version reads up to {FORMAT_VERSION}."
    return None


def _stateless(folder):
    kept = read_record(folder).get("flags", {}).get("save_state")
    if kept not in ("no", "last"):
        return f"{folder}: has no {state.FOLDER}/ to go on from; give a folder epoch-E-step-S of a run."
    left = f"has no {state.FOLDER}/ to go on from, as --save_state {kept} asked"
    return f"{folder}: {left}. --init_from {folder} trains its weights further, with a new optimizer and schedule."


def check_same_run(folder, record, force):
    """Raise UserError naming what differs between a checkpoint and this run in what must not (`record.train_record`).

    force: allow other data and another base all the same; mode and train type must be equal in any case.
    """
    old = read_record(folder)
    names = ["mode", "train_type"] + ([] if force else list({**record["identity"], **old.get("identity", {})}))
    before, now = ({**SAMPLES, **r, **r.get("identity", {})} for r in (old, record))
    values = [(name, before.get(name), now.get(name)) for name in names]
    if different := [f"{name}: {there} there, {here} here" for name, there, here in values if there != here]:
        hint = "" if force else " Where that is meant, add --force (not for mode and train type)."
        hint += f" {_further(folder)}" if any(line.startswith("training data") for line in different) else ""
        raise UserError(f"--resume {folder} is of another run: {'; '.join(different)}.{hint}")


def _check_others(folder, config):
    """Raise UserError if output_dir holds checkpoints that would be lost, or mixed with those to come."""
    found = checkpoints(config.output_dir)
    if config.resume == "auto" and found and not folder and not config.overwrite_output_dir:
        raise _nothing_left(config.output_dir, found)
    if config.resume != "auto":
        anew = begins_anew(folder, config.output_dir)
        if others := [path.name for path in found if anew or step_of(path) > step_of(folder)]:
            holds = f"--output_dir {config.output_dir} holds {', '.join(others[:5])}, of another continuation"
            remedy = "Go on from those with --resume auto, choose another folder, or move them away."
            raise UserError(f"--resume {folder}: {holds}. {remedy}")


def _nothing_left(output_dir, found):
    """The UserError of checkpoints that are all damaged, or whole without state."""
    remedy = "Choose another folder, or add --overwrite_output_dir to delete them and begin anew."
    if whole := [path for path in found if damage(path, sizes_only=True) is None]:
        why = f"no checkpoint in {output_dir} has its state (--save_state)"
        return UserError(f"--resume auto: {why}. --init_from {whole[-1]} trains its weights further. {remedy}")
    return UserError(f"--resume auto: no checkpoint in {output_dir} is whole. {remedy}")
