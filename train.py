"""Fine-tune a ChatGLM model.

    deepspeed --master_port 520 train.py --mode glm3 --train_type lora --model_name_or_path ChatGLM3-6B/ \\
        --train_path data/spo_0.json --output_dir output-glm3       # all cards; CUDA_VISIBLE_DEVICES picks some
    torchrun --nproc_per_node 2 train.py ...
    python train.py ...                                             # one card, or the CPU
    deepspeed --num_gpus 2 train.py ... --device cpu                # two CPU processes

One reading direction: `Run.open` checks everything and builds, then `train` is the loop. An optimizer step is
gradient_accumulation_steps micro-batches on every rank; its loss is the mean over all its target tokens.
"""

import sys

import torch

from glm_finetune import dist, exits
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import to_device, without_targets
from glm_finetune.flags import parse
from glm_finetune.run.optim import lr_at, num_warmup_steps
from glm_finetune.run.run import Run
from glm_finetune.run.tracker import Meter, peak_gib


def train(run):
    """The training loop: optimizer steps from where the run stands to its end, or until it is asked to stop."""
    config, progress, meter = run.config, run.progress, Meter()
    warmup = num_warmup_steps(config.warmup_ratio, config.warmup_steps, run.total_steps)
    schedule = config.learning_rate, run.total_steps, warmup, config.lr_scheduler, config.min_lr_ratio
    run.engine.train()
    while progress.step < run.total_steps:
        lr = lr_at(progress.step + 1, *schedule)
        for group in run.engine.optimizer.param_groups:
            group["lr"] = lr * group["lr_ratio"]

        slots = run.sampler.micro_batches(progress, dist.rank())
        # An empty micro-batch becomes a row without targets, so that no rank waits for another.
        drawn = [run.objective.rows(run.rows, slot, config.seed, progress.epoch) for slot in slots]
        batches = [run.collate(rows or [without_targets(run.rows[0])]) for rows in drawn]
        counts = [sum(map(run.objective.count, batches)), sum(batch["input_ids"].numel() for batch in batches)]
        num_targets, num_tokens, stop = dist.sums_over_ranks([*counts, run.stop.requested], run.device)
        run.guard.check_targets(progress.step + 1, num_targets, slots)
        if stop:
            break
        losses = run.step(batches, num_targets)  # the weights change, unless the gradient is not finite
        loss = dist.sum_over_ranks(torch.stack(losses).double().sum()).item()
        ends_epoch = run.sampler.advance(progress) or progress.step == run.total_steps
        if run.guard.accepts(progress.step, loss, losses, slots):
            meter.add(loss, num_targets, num_tokens)
        run.tracker.step()
        saves = ends_epoch or (config.save_model_step and progress.step % config.save_model_step == 0)
        if saves or progress.step % config.show_loss_step == 0:
            log(run, lr, meter)
        if saves:
            save(run)
            meter.start()


def log(run, lr, meter):
    """One line of numbers. All ranks must call."""
    loss, tokens_per_s = meter.read()
    epoch = run.progress.epoch + run.progress.rows / len(run.rows)
    grad_norm = float(run.engine.get_global_grad_norm() or 0.0)  # inf where fp16 overflowed
    numbers = dict(epoch=epoch, loss=loss, lr=lr, grad_norm=grad_norm, tokens_per_s=tokens_per_s)
    skipped = {"skipped_fp16": run.guard.skipped, "skipped_nonfinite": run.guard.nonfinite}
    skipped = {name: count for name, count in skipped.items() if count}
    run.tracker.log(run.progress.step, **numbers, peak_gib=peak_gib(run.device), **skipped)
    meter.start()


def save(run):
    """Evaluate where there is data for it, then write a checkpoint. All ranks must call."""
    if (eval_loss := None if run.eval_rows is None else evaluate(run)) is not None:
        run.tracker.log(run.progress.step, eval_loss=eval_loss)
    run.save(eval_loss)


@torch.no_grad()
def evaluate(run):
    """Mean loss of a target token of the evaluation data. All ranks must call."""
    run.engine.eval()
    rows, size, world = run.eval_rows, run.config.per_device_train_batch_size, dist.world_size()
    sums = torch.zeros(2, device=run.device, dtype=torch.float64)  # loss, targets
    for start in range(0, len(rows), size * world):
        part = [rows[i] for i in range(start + dist.rank(), min(start + size * world, len(rows)), world)]
        batch = to_device(run.collate(part or [without_targets(rows[0])]), run.device)
        loss = run.objective.loss(run.engine(**batch, use_cache=False).token_losses, batch)
        sums += torch.stack((loss.double(), loss.new_tensor(run.objective.count(batch)).double()))
    loss, targets = dist.sum_over_ranks(sums).tolist()
    run.engine.train()
    return loss / max(targets, 1)


def main():
    config = parse(TrainConfig, sys.argv[1:], __doc__)
    with Run.open(config) as run:
        if run is None:  # all its steps are done
            return 0
        train(run)
    return run.exit_code


if __name__ == "__main__":
    exits.exit_with_message(main)
