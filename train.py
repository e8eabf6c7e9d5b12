"""Fine-tune a ChatGLM model.

    deepspeed --master_port 520 train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ \\
        --train_path data/spo_0.json --output_dir output-glm3       # all cards; CUDA_VISIBLE_DEVICES picks some
    torchrun --nproc_per_node 2 train.py ...
    python train.py ...                                             # one card, or the CPU
    deepspeed --num_gpus 2 train.py ... --device cpu                # two CPU processes

One reading direction: main() checks everything, builds, then `train` is the loop. An optimizer step is
gradient_accumulation_steps micro-batches on every rank; its loss is the mean over all its target tokens.
"""

import dataclasses
import os
import sys
from pathlib import Path

import torch

from glm_finetune import build, dist, exits, tuning
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import to_device, without_targets
from glm_finetune.data.report import write_bad_rows
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.errors import raise_together
from glm_finetune.flags import parse
from glm_finetune.models.loss import IGNORE
from glm_finetune.record import train_record
from glm_finetune.run import checkpoint, engine, resume, state
from glm_finetune.run.ds_config import precision_of, read_ds_file, resolve, stage_of
from glm_finetune.run.guard import Guard
from glm_finetune.run.optim import lr_at, num_warmup_steps
from glm_finetune.run.run import check_paths, choose, choose_place, load_data
from glm_finetune.run.summary import start_lines
from glm_finetune.run.tracker import Meter, new_tracker, peak_gib


@dataclasses.dataclass
class Run:
    """What the loop needs. progress: where it stands; collate(rows) -> batch; stop: see `exits.stop_request`."""

    config: TrainConfig
    engine: object
    sampler: StepSampler
    rows: object
    eval_rows: object
    collate: object
    device: torch.device
    guard: Guard
    tracker: object
    saver: object
    total_steps: int
    progress: Progress
    stop: object


def train(run):
    """The training loop: optimizer steps from where the run stands to its end, or until it is asked to stop."""
    config, progress, meter = run.config, run.progress, Meter()
    warmup = num_warmup_steps(config.warmup_ratio, config.warmup_steps, run.total_steps)
    run.engine.train()
    while progress.step < run.total_steps:
        lr = lr_at(
            progress.step + 1, config.learning_rate, run.total_steps, warmup, config.lr_scheduler, config.min_lr_ratio
        )
        for group in run.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]

        slots = run.sampler.micro_batches(progress, dist.rank())
        # An empty micro-batch becomes a row without targets, so that no rank waits for another.
        batches = [run.collate([run.rows[i] for i in slot] or [without_targets(run.rows[0])]) for slot in slots]
        counts = [sum(b["target_index"].numel() for b in batches), sum(b["input_ids"].numel() for b in batches)]
        num_targets, num_tokens, stop = dist.sums_over_ranks([*counts, run.stop.requested], run.device)
        run.guard.check_targets(progress.step + 1, num_targets, slots)
        if stop:
            break
        losses = []
        for batch in batches:
            loss = run.engine(**to_device(batch, run.device), use_cache=False).token_losses.sum() / num_targets
            # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone.
            run.engine.backward(loss * (len(batches) * dist.world_size()))
            run.engine.step()  # the last one changes the weights, unless the gradient is not finite
            losses.append(loss.detach())

        (loss,) = dist.sums_over_ranks([torch.stack(losses).double().sum()], run.device)
        epoch = progress.epoch + 1
        ends_epoch = run.sampler.advance(progress) or progress.step == run.total_steps
        if run.guard.accepts(progress.step, loss, losses, slots):
            meter.add(loss, num_targets, num_tokens)
        run.tracker.step()
        saves = ends_epoch or (config.save_model_step and progress.step % config.save_model_step == 0)
        if saves or progress.step % config.show_loss_step == 0:
            log(run, lr, meter)
        if saves:
            save(run, epoch)
            meter.start()


def log(run, lr, meter):
    """One line of numbers. All ranks must call."""
    loss, tokens_per_s = meter.read()
    counts = {"skipped_fp16": run.guard.skipped, "skipped_nonfinite": run.guard.nonfinite}
    run.tracker.log(
        run.progress.step,
        epoch=run.progress.epoch + run.progress.rows / len(run.rows),
        loss=loss,
        lr=lr,
        grad_norm=float(run.engine.get_global_grad_norm() or 0.0),  # inf where fp16 overflowed
        tokens_per_s=tokens_per_s,
        peak_gib=peak_gib(run.device),
        **{name: count for name, count in counts.items() if count},
    )
    meter.start()


def save(run, epoch):
    """Evaluate where there is data for it, then write a checkpoint. All ranks must call."""
    if (eval_loss := None if run.eval_rows is None else evaluate(run)) is not None:
        run.tracker.log(run.progress.step, eval_loss=eval_loss)
    run.tracker.say(f"saved {run.saver.save(epoch, run.progress, eval_loss)}")


@torch.no_grad()
def evaluate(run):
    """Mean loss of a target token of the evaluation data. All ranks must call."""
    run.engine.eval()
    rows, size, world = run.eval_rows, run.config.per_device_train_batch_size, dist.world_size()
    sums = torch.zeros(2, device=run.device, dtype=torch.float64)  # loss, targets
    for start in range(0, len(rows), size * world):
        part = [rows[i] for i in range(start + dist.rank(), min(start + size * world, len(rows)), world)]
        batch = to_device(run.collate(part or [without_targets(rows[0])]), run.device)
        loss = run.engine(**batch, use_cache=False).token_losses.sum()
        sums += torch.stack((loss.double(), (batch["labels"][:, 1:] != IGNORE).sum().double()))
    loss, targets = dist.sum_over_ranks(sums).tolist()
    run.engine.train()
    return loss / max(targets, 1)


def main():
    config = parse(TrainConfig, sys.argv[1:], __doc__)
    mode, train_type = choose(config)
    check_paths(config)
    engine.launch_environment()
    world_size, device = int(os.environ["WORLD_SIZE"]), dist.choose_device(config.device)
    ds_json = read_ds_file(config.ds_file)
    raise_together(tuning.problems(config, train_type, stage_of(ds_json)))
    precision = dist.choose_precision(config.precision or precision_of(ds_json), device)
    ds_config = resolve(ds_json, config, world_size, precision, device.type, train_type.fp32)
    with exits.memory_advice(config, ds_config["zero_optimization"], train_type.quantizes):
        return build_and_train(config, mode, train_type, ds_config, precision, device)


def build_and_train(config, mode, train_type, ds_config, precision, device):
    """Everything from the data to the last checkpoint. Returns the exit code."""
    tokenizer, _ = build.check_base(mode, config.model_name_or_path, config.max_len)
    rows, eval_rows, sampler, collate_rows = load_data(config, mode, tokenizer)
    exits.forget_errors()
    engine.start(device)
    engine.check(ds_config)
    record = train_record(config, train_type, tokenizer, dist.world_size())
    resume_from = resume.choose_resume(config, record)
    if resume_from and resume.is_complete(resume_from, config, sampler):
        return 0
    dist.seed_all(config.seed)
    place = choose_place(config, train_type, ds_config, precision, device)
    model = build.load_base(mode, config.model_name_or_path, place, config.gradient_checkpointing)
    model = train_type.apply(model, config, mode)
    progress, numbers, lock = Progress(), {}, checkpoint.lock(config.output_dir)  # sees a lost rank before the engine
    ds_engine = engine.new_engine(model, ds_config, config.weight_decay, config.loraplus_ratio)
    if resume_from:
        nothing = to_device(collate_rows([without_targets(rows[0])]), device)
        progress, numbers = state.restore(ds_engine, resume_from / state.FOLDER, nothing, config.seed, device)
    else:
        checkpoint.create_output_dir(config.output_dir, config.overwrite_output_dir or config.resume)
        dist.seed_all(config.seed + dist.rank())  # dropout differs between ranks
    total_steps = config.max_steps or sampler.total_steps(progress, config.num_train_epochs)
    if dist.is_main():
        write_bad_rows(Path(config.output_dir) / "bad_rows.txt", rows, eval_rows)
    settings = (config, train_type, ds_config, model, rows, eval_rows, tokenizer, sampler, total_steps)
    dist.print_main(start_lines(*settings, device, precision, resume_from, progress))
    guard = Guard(ds_engine, config, train_type, rows.where)
    tracker = new_tracker(config, total_steps, progress.step)
    saver = checkpoint.Saver(ds_engine, tokenizer, train_type, config, record, lock, numbers.get("best"))
    parts = (config, ds_engine, sampler, rows, eval_rows, collate_rows, device, guard, tracker, saver)
    with exits.stop_request() as stop:
        run = Run(*parts, total_steps, progress, stop)
        train(run)
        stopped = progress.step < total_steps
        if stopped:
            saved = saver.save(progress.epoch + 1, progress)
            tracker.say(f"asked to stop after step {progress.step}: saved {saved}; --resume auto goes on from there")
        saver.wait()
    tracker.close()
    engine.finish(ds_engine)
    return exits.RESUME_ME if stopped else 0


if __name__ == "__main__":
    exits.exit_with_message(main)
