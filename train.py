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

from glm_finetune import build, checkpoint, dist, engine, state
from glm_finetune.config import TrainConfig, parse
from glm_finetune.data.dataset import collate, dataset_settings, without_targets
from glm_finetune.data.sampler import Progress, StepSampler
from glm_finetune.ds_config import precision_of, read_ds_file, resolve
from glm_finetune.loss import IGNORE
from glm_finetune.optim import lr_at, num_warmup_steps
from glm_finetune.summary import start_lines
from glm_finetune.tracker import Meter, new_tracker, peak_gib


@dataclasses.dataclass
class Run:
    """What the loop needs. progress: where it stands; collate(rows) -> batch; save(epoch, progress) -> path."""

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
    progress: Progress


def train(run):
    """The training loop: optimizer steps from where the run stands to its end."""
    config, progress, meter = run.config, run.progress, Meter(run.device)
    warmup = num_warmup_steps(config.warmup_ratio, run.total_steps)
    run.engine.train()
    while progress.step < run.total_steps:
        lr = lr_at(
            progress.step + 1, config.learning_rate, run.total_steps, warmup, config.lr_scheduler, config.min_lr_ratio
        )
        for group in run.engine.optimizer.param_groups:
            group["lr"] = lr

        batches = step_batches(run)
        num_targets = torch.full((), float(sum(len(b["target_index"]) for b in batches)), device=run.device)
        num_targets = dist.sum_over_ranks(num_targets).clamp_min(1)  # of the step: all micro-batches and ranks
        for batch in batches:
            loss = run.engine(**to_device(batch, run.device), num_targets=num_targets, use_cache=False).loss
            # DeepSpeed divides by the micro-batches and averages over the ranks; both are undone.
            run.engine.backward(loss * (len(batches) * dist.world_size()))
            run.engine.step()
            meter.add(loss.detach() * num_targets, batch)

        epoch = progress.epoch + 1
        ends_epoch = run.sampler.advance(progress) or progress.step == run.total_steps
        run.tracker.step()
        saves = ends_epoch or (config.save_model_step and progress.step % config.save_model_step == 0)
        if saves or progress.step % config.show_loss_step == 0:
            log(run, lr, meter)  # looks at the loss: nothing is saved of a run that diverged
        if saves:
            if run.eval_rows is not None:
                run.tracker.log(progress.step, eval_loss=evaluate(run))
            run.tracker.say(f"saved {run.save(epoch, progress)}")
            meter.start()


def step_batches(run):
    """This rank's micro-batches of a step; an empty one becomes a row without targets, so that no rank waits."""
    slots = run.sampler.micro_batches(run.progress, dist.rank())
    return [run.collate([run.rows[i] for i in slot] or [without_targets(run.rows[0])]) for slot in slots]


def to_device(batch, device):
    return {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}


def log(run, lr, meter):
    """One line of numbers. All ranks must call. Raises FloatingPointError for a loss that is not a number."""
    step, epoch = run.progress.step, run.progress.epoch + run.progress.rows / len(run.rows)
    loss, tokens_per_s = meter.read()
    grad_norm = float(run.engine.get_global_grad_norm() or 0.0)  # inf where fp16 overflowed and the step was skipped
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
    inputs = () if config.resume else (config.model_name_or_path, config.train_path, config.eval_path)
    checkpoint.check_output_dir(config.output_dir, config.overwrite_output_dir or config.resume, inputs)
    engine.launch_environment()
    world_size, device = int(os.environ["WORLD_SIZE"]), dist.choose_device(config.device)
    ds_json = read_ds_file(config.ds_file)
    precision = dist.choose_precision(config.precision or precision_of(ds_json), device)
    ds_config = resolve(ds_json, config, world_size, precision, device.type)
    tokenizer, base_config = build.check_base(mode, config.model_name_or_path, config.max_len)
    options = dataset_settings(config)
    rows = mode.dataset(config.train_path, tokenizer, **options)
    eval_rows = mode.dataset(config.eval_path, tokenizer, **options) if config.eval_path else None
    sampler = StepSampler(
        len(rows),
        config.per_device_train_batch_size,
        config.gradient_accumulation_steps,
        world_size,
        config.seed,
        lengths=rows.lengths() if config.group_by_length else None,
        window=options["stream_window"],
    )
    pack_to = config.max_len if config.packing else None
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, positions=mode.positions, max_len=pack_to)

    engine.start(device)
    engine.check(ds_config)
    record = checkpoint.train_record(config, train_type, tokenizer, world_size)
    resume_from = checkpoint.choose_resume(config, record)
    dist.seed_all(config.seed)
    model = build.load_base(mode, config.model_name_or_path, precision, device, config.gradient_checkpointing)
    model = train_type.apply(model, config, mode)
    ds_engine = engine.new_engine(model, ds_config, config.weight_decay)
    progress = Progress()
    if resume_from:
        nothing = to_device(collate_rows([without_targets(rows[0])]), device)
        progress = state.restore(ds_engine, resume_from / state.FOLDER, nothing, config.seed, device)
    else:
        checkpoint.create_output_dir(config.output_dir)  # not before: what fails must not cost the old results
        dist.seed_all(config.seed + dist.rank())  # dropout differs between ranks
    total_steps = config.max_steps or sampler.total_steps(progress, config.num_train_epochs)
    settings = (config, ds_config, model, rows, eval_rows, tokenizer, sampler, total_steps, device, precision)
    dist.print_main(start_lines(*settings), *([f"\nresumed from {resume_from}: {progress}"] if resume_from else []))
    tracker = new_tracker(config, total_steps, progress.step)

    def save(epoch, progress):
        return checkpoint.save(
            ds_engine, tokenizer, train_type, config.output_dir, epoch, progress, record, config.save_total_limit
        )

    train(Run(config, ds_engine, sampler, rows, eval_rows, collate_rows, device, tracker, save, total_steps, progress))
    tracker.close()
    engine.finish(ds_engine)


if __name__ == "__main__":
    dist.exit_with_message(main)
