"""A training run: its parts by name, opened and closed by one call.

with Run.open(config) as run:           # None where nothing is left to do; all ranks must call
    losses = run.step(batches, num_targets)
    run.save()
"""

from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace

from glm_finetune import build, dist, exits
from glm_finetune.data.dataset import to_device, without_targets
from glm_finetune.data.report import write_bad_rows
from glm_finetune.data.sampler import Progress
from glm_finetune.errors import StandsStill, raise_together
from glm_finetune.record import fingerprint, train_record
from glm_finetune.run import engine, folder, origin, resume, state
from glm_finetune.run.checkpoint import Saver
from glm_finetune.run.flags import long_warmup
from glm_finetune.run.guard import Guard
from glm_finetune.run.memory import check_fits, memory_advice
from glm_finetune.run.parts import choose_place, load_data, output_folder, settle
from glm_finetune.run.stop import RESUME_ME, stop_request
from glm_finetune.run.summary import start_lines
from glm_finetune.run.tracker import new_tracker
from glm_finetune.weights import LARGE_BYTES, weight_bytes


class Run(SimpleNamespace):
    """The parts of a run, by name.

    config (its defaults filled in), mode, objective, train_type, device, precision, why, ds_config: `parts.settle`.
    tokenizer, rows, eval_rows (None without --eval_path), sampler, collate(rows) -> batch: see `parts.load_data`.
    progress, total_steps: where it stands and ends. resumed_from: a checkpoint, or None. hold: rank 0's `folder.Hold`.
    engine, guard, saver, step(batches, num_targets): see `engine.accumulate`. tracker, stop: while it is open.
    """

    @staticmethod
    @contextmanager
    def open(config):
        """Build a run, and end it in order. Raises UserError for whatever is wrong, as early as it can be known."""
        known = settle(config)
        with memory_advice(known["config"], known["ds_config"]["zero_optimization"], known["train_type"].quantizes):
            run = assemble(known)
            if run is None:
                yield None
                return
            if dist.is_main():
                write_bad_rows(Path(config.output_dir) / "bad_rows.txt", run.rows, run.eval_rows)
                print(start_lines(run), flush=True)
            run.tracker = new_tracker(run.config, run.total_steps, run.progress.step)
            with stop_request() as run.stop:
                try:
                    yield run
                except StandsStill:
                    run.save()
                    raise
                run.close()

    def save(self, eval_loss=None, said="saved {}"):
        """Write a checkpoint and say so. All ranks must call."""
        self.tracker.say(said.format(self.saver.save(self.progress, state.of(self.engine, self.progress), eval_loss)))

    @property
    def exit_code(self):
        return RESUME_ME if self.progress.step < self.total_steps else 0

    def close(self):
        """Save if it was asked to stop, then end its parts in order. All ranks must call."""
        if self.exit_code:
            goes_on = resume.NEVER if self.config.save_state == "no" else "--resume auto goes on from there"
            self.save(said=f"asked to stop after step {self.progress.step}: saved {{}}; {goes_on}")
        self.saver.wait()
        self.tracker.close()
        engine.finish(self.engine)


def assemble(known):
    """A Run of what `settle` gave, ready for its next step; None where none is left. All ranks must call."""
    config, device = known["config"], known["device"]
    max_len = 0 if config.allow_longer else config.max_len
    tokenizer, base = build.check_base(known["mode"], config.model_name_or_path, config.rope_rule, max_len)
    config.rope_rule = base.rope_rule  # what is recorded
    data = load_data(config, known["mode"], known["objective"], tokenizer)
    engine.start(device)
    if dist.world_size() > 1:
        exits.share_words()
    engine.check(known["ds_config"])
    record = train_record(config, known["train_type"], tokenizer, dist.world_size(), data["rows"].report.formats)
    with ExitStack() as refused:  # a run that does not begin leaves the folder as it was
        if hold := dist.on_main(folder.lock, *output_folder(config, not config.resume)):
            refused.callback(hold.give_back)
        resumed_from = resume.choose_resume(config, record) if config.resume else None
        progress, best = state.progress_in(resumed_from) if resumed_from else (Progress(), None)
        total_steps = config.max_steps or data["sampler"].total_steps(progress, config.num_train_epochs)
        if resumed_from and progress.step >= total_steps:
            return resume.say_done(resumed_from, total_steps, record)
        raise_together(long_warmup(config.warmup_steps, total_steps))
        if begins_there := config.init_from and not resumed_from:
            dist.on_main(origin.check_base, config, tokenizer)
        ds_engine = load_engine(**known)
        if resumed_from:
            nothing = to_device(data["collate"]([without_targets(data["rows"][0])]), device)
            state.restore(ds_engine, resumed_from, nothing, config.seed, device)
        if begins_there:
            origin.fill(ds_engine, config.init_from)
        refused.pop_all()
    if not resumed_from:
        dist.seed_all(config.seed + dist.rank())  # dropout differs between ranks
    if resume.begins_anew(resumed_from, config.output_dir):
        folder.clear(config.output_dir)
    run = Run(**known, **data, hold=hold, resumed_from=resumed_from, progress=progress, total_steps=total_steps)
    run.engine, run.step = ds_engine, partial(engine.accumulate, ds_engine, run.objective)
    run.guard = Guard(ds_engine, config, run.train_type, run.rows.where)
    record |= fingerprint(config.model_name_or_path) if dist.is_main() else {}
    run.saver = Saver(ds_engine, tokenizer, run.train_type, config, record, best)
    return run


def load_engine(config, mode, objective, train_type, ds_config, precision, device, why):
    """The model with its weights and what learns of it, in DeepSpeed's engine. All ranks must call."""
    dist.seed_all(config.seed)
    place = choose_place(config, train_type, ds_config, precision, device)
    model = build.load_base(mode, config.model_name_or_path, place, config.gradient_checkpointing, config.rope_rule)
    model = train_type.apply(model, config, mode)
    model.choose_ways(config.lean, config.compile)
    if device.type == "cuda" or weight_bytes(config.model_name_or_path) > LARGE_BYTES:
        dist.on_main(check_fits, model, ds_config["zero_optimization"], dist.world_size(), device)
    dist.barrier()  # a rank that is lost is noticed here, not while DeepSpeed starts
    return engine.new_engine(model, ds_config, config.weight_decay, config.loraplus_ratio)
