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
from functools import partial

import torch

from glm_finetune import build, checkpoint, dist, engine
from glm_finetune.config import TrainConfig, parse
from glm_finetune.data.dataset import collate, without_targets
from glm_finetune.data.sampler import StepSampler
from glm_finetune.ds_config import precision_of, read_ds_file, resolve
from glm_finetune.loss import IGNORE
from glm_finetune.optim import lr_at, num_warmup_steps
from glm_finetune.summary import start_lines
from glm_finetune.tracker import Meter, SilentTracker, Tracker, peak_gib


@dataclasses.dataclass
class Run:
    """What the loop needs. collate(rows) -> batch; save(epoch, step) -> path."""

    config: TrainConfig
    engine: object
    sampler: StepSampler
    rows: object
    eval_rows: object
    collate: object
    device: torch.device
    tracker: object
    save: object
    total_steps: int


def train(run):
    """The training loop: every optimizer step of every epoch."""
    config, step, meter = run.config, 0, Meter(run.device)
    warmup = num_warmup_steps(config.warmup_ratio, run.total_steps)
    run.engine.train()
    for epoch in range(run.sampler.epochs_for(run.total_steps)):
        for step_of_epoch in range(run.sampler.steps_per_epoch):
            if step == run.total_steps:
                break
            step += 1
            lr = lr_at(step, config.learning_rate, run.total_steps, warmup, config.lr_scheduler, config.min_lr_ratio)
            for group in run.engine.optimizer.param_groups:
                group["lr"] = lr

            batches = step_batches(run, epoch, step_of_epoch)
            num_targets = torch.tensor(
                sum(len(b["target_index"]) for b in batches), device=run.device, dtype=torch.float32
            )
            num_targets = dist.sum_over_ranks(num_targets).clamp_min(
                1
            )  # of the whole step: all micro-batches and ranks
            for batch in batches:
                loss = run.engine(**to_device(batch, run.device), num_targets=num_targets, use_cache=False).loss
                # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone.
                run.engine.backward(loss * (len(batches) * dist.world_size()))
                run.engine.step()
                meter.add(loss.detach() * num_targets, batch)

            run.tracker.step()
            ends_epoch = step_of_epoch + 1 == run.sampler.steps_per_epoch or step == run.total_steps
            if step % config.show_loss_step == 0 or step == run.total_steps:
                epochs_done = epoch + (step_of_epoch + 1) / run.sampler.steps_per_epoch
                log(run, step, lr, epochs_done, meter)
            if ends_epoch or (config.save_model_step and step % config.save_model_step == 0):
                if run.eval_rows is not None:
                    run.tracker.log(step, eval_loss=evaluate(run))
                run.tracker.say(f"saved {run.save(epoch + 1, step)}")


def step_batches(run, epoch, step_of_epoch):
    """This rank's micro-batches of a step; an empty one becomes a row without targets, so that all ranks stay in
    step.
    """
    slots = run.sampler.micro_batches(epoch, step_of_epoch, dist.rank())
    return [run.collate([run.rows[i] for i in slot] or [without_targets(run.rows[0])]) for slot in slots]


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def log(run, step, lr, epoch, meter):
    """One line of numbers. All ranks must call. Raises FloatingPointError for a loss that is not a number."""
    loss, tokens_per_s = meter.read()
    grad_norm = float(run.engine.get_global_grad_norm() or 0.0)
    if not loss < float("inf"):
        raise FloatingPointError(
            f"the loss is {loss} at step {step}: lower --learning_rate, or use --precision bf16 or fp32."
        )
    run.tracker.log(
        step,
        epoch=epoch,
        loss=loss,
        lr=lr,
        grad_norm=grad_norm,
        tokens_per_s=tokens_per_s,
        peak_gib=peak_gib(run.device),
    )
    meter.start()


@torch.no_grad()
def evaluate(run):
    """Mean loss of a target token of the evaluation data. All ranks must call."""
    run.engine.eval()
    size, world = run.config.per_device_train_batch_size, dist.world_size()
    sums = torch.zeros(2, device=run.device, dtype=torch.float64)  # loss, targets
    for start in range(0, len(run.eval_rows), size * world):
        rows = [
            run.eval_rows[i] for i in range(start + dist.rank(), min(start + size * world, len(run.eval_rows)), world)
        ]
        batch = to_device(run.collate(rows or [without_targets(run.eval_rows[0])]), run.device)
        loss = run.engine(**batch, num_targets=1, use_cache=False).loss
        sums += torch.stack((loss.double(), (batch["labels"][:, 1:] != IGNORE).sum().double()))
    loss, targets = dist.sum_over_ranks(sums).tolist()
    run.engine.train()
    return loss / max(targets, 1)


def main():
    config = parse(TrainConfig, sys.argv[1:], __doc__)
    mode, train_type = build.choose(config)
    checkpoint.check_output_dir(config.output_dir, config.overwrite_output_dir)
    engine.launch_environment()
    world_size, device = int(os.environ["WORLD_SIZE"]), dist.choose_device(config.device)
    ds_json = read_ds_file(config.ds_file)
    precision = dist.choose_precision(config.precision or precision_of(ds_json), device)
    ds_config = resolve(ds_json, config, world_size, precision, device.type)
    tokenizer, base_config = build.check_base(mode, config.model_name_or_path, config.max_len)
    limits = dict(
        max_len=config.max_len, max_src_len=config.max_src_len, is_skip=config.is_skip, progress=dist.is_main()
    )
    rows = mode.dataset(config.train_path, tokenizer, **limits)
    eval_rows = mode.dataset(config.eval_path, tokenizer, **limits) if config.eval_path else None
    sampler = StepSampler(
        len(rows), config.per_device_train_batch_size, config.gradient_accumulation_steps, world_size, config.seed
    )
    total_steps = config.max_steps or config.num_train_epochs * sampler.steps_per_epoch

    engine.start(device)
    engine.check(ds_config)
    dist.seed_all(config.seed)
    model = build.load_base(mode, config.model_name_or_path, precision, device, config.gradient_checkpointing)
    model = train_type.apply(model, config, mode)
    dist.print_main(
        start_lines(config, ds_config, model, rows, eval_rows, tokenizer, sampler, total_steps, device, precision)
    )
    ds_engine = engine.new_engine(model, ds_config, config.weight_decay)
    checkpoint.create_output_dir(config.output_dir)  # not before: what fails until here must not cost the old results
    dist.seed_all(config.seed + dist.rank())  # dropout differs between ranks
    record = checkpoint.train_record(config, world_size)
    tracker = Tracker(config.output_dir, config.logging_dir, total_steps) if dist.is_main() else SilentTracker()
    run = Run(
        config,
        ds_engine,
        sampler,
        rows,
        eval_rows,
        collate=partial(collate, pad_token_id=tokenizer.pad_token_id, positions=mode.positions),
        device=device,
        tracker=tracker,
        total_steps=total_steps,
        save=lambda epoch, step: checkpoint.save(
            ds_engine.module, tokenizer, train_type, config.output_dir, epoch, step, record, config.save_total_limit
        ),
    )
    train(run)
    tracker.close()
    engine.finish(ds_engine)


if __name__ == "__main__":
    dist.exit_with_message(main)
