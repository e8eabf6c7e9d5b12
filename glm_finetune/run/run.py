"""What a training run is made of: mode, train type, data, the place of its weights."""

import os
from functools import partial

from glm_finetune.config import SHUFFLE_BUFFER
from glm_finetune.data.cache import default_cache_dir
from glm_finetune.data.dataset import InstructionDataset, collate
from glm_finetune.data.files import paths_of
from glm_finetune.data.sampler import StepSampler
from glm_finetune.data.samples import settings_of
from glm_finetune.errors import UserError, raise_together, unknown_choice
from glm_finetune.models.network import DTYPES
from glm_finetune.modes import MODE
from glm_finetune.run import checkpoint
from glm_finetune.run.engine import Partitioned
from glm_finetune.tuning import TRAIN_TYPE
from glm_finetune.tuning.quantize import Quantized
from glm_finetune.weights import OnDevice


def choose(config):
    """TrainConfig -> (Mode, TrainType); fills in the defaults that depend on the train type.

    Raises UserError with the nearest name for what is not registered.
    """
    raise_together(
        [
            *unknown_choice("mode", config.mode, tuple(MODE)),
            *unknown_choice("train_type", config.train_type, tuple(TRAIN_TYPE)),
        ]
    )
    train_type = TRAIN_TYPE[config.train_type]
    if config.learning_rate is None:
        config.learning_rate = train_type.learning_rate(config)
    return MODE[config.mode], train_type


def check_paths(config):
    """Raise UserError if --output_dir holds results that are not to be deleted, or something that the run reads."""
    inputs = () if config.resume else (config.model_name_or_path, *paths_of(config.train_path, config.eval_path))
    checkpoint.check_output_dir(config.output_dir, config.overwrite_output_dir or config.resume, inputs)


def load_data(config, mode, tokenizer):
    """(rows, evaluation rows or None, sampler, function: rows -> batch) of a run.

    Raises UserError for fewer samples than ranks, and as InstructionDataset.
    """
    window = (config.shuffle_buffer or SHUFFLE_BUFFER) if config.streaming else None
    options = dict(
        settings=settings_of(config, mode, tokenizer),
        progress=True,
        cache_dir=config.cache_dir or default_cache_dir(),
        overwrite_cache=config.overwrite_cache,
    )
    rows = InstructionDataset(config.train_path, **options, window=window)
    eval_rows = InstructionDataset(config.eval_path, **options) if config.eval_path else None
    world_size = int(os.environ["WORLD_SIZE"])
    if len(rows) < world_size:
        raise UserError(
            f"--train_path {config.train_path}: {len(rows)} samples for {world_size} ranks, some would have nothing to "
            "do. Start fewer ranks or give more data."
        )
    lengths = rows.lengths() if config.group_by_length else None
    per_step = config.per_device_train_batch_size, config.gradient_accumulation_steps
    sampler = StepSampler(len(rows), *per_step, world_size, config.seed, lengths=lengths, window=window)
    max_len = config.max_len if config.packing else None
    return (
        rows,
        eval_rows,
        sampler,
        partial(collate, pad_token_id=tokenizer.pad_token_id, positions=mode.positions, max_len=max_len),
    )


def choose_place(config, train_type, ds_config, precision, device):
    """Where the base's weights go as they are read: divided (ZeRO-3), quantised, or whole onto `device`."""
    dtype = DTYPES[precision]
    if ds_config["zero_optimization"]["stage"] == 3:
        return Partitioned(dtype, device, ds_config)
    if train_type.quantizes:
        return Quantized(dtype, device, config.quantization_bit)
    return OnDevice(dtype, device)
