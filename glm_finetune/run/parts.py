"""What a run is made of before anything is loaded or started: names, machine, DeepSpeed's dict, data, places."""

from dataclasses import replace
from functools import partial

from glm_finetune import dist, tuning
from glm_finetune.bars import keep_alive
from glm_finetune.data.cache import default_cache_dir
from glm_finetune.data.dataset import InstructionDataset, collate
from glm_finetune.data.files import paths_of
from glm_finetune.data.flags import SHUFFLE_BUFFER
from glm_finetune.data.sampler import StepSampler
from glm_finetune.data.samples import settings_of
from glm_finetune.errors import UserError, raise_together, unknown_choice
from glm_finetune.models.original import DTYPES
from glm_finetune.modes import MODE
from glm_finetune.objectives import OBJECTIVE
from glm_finetune.run import folder, origin
from glm_finetune.run.ds_config import OWNED, not_used, precision_of, read_ds_file, resolve, stage_of
from glm_finetune.run.engine import Partitioned
from glm_finetune.tuning import TRAIN_TYPE
from glm_finetune.tuning.quantize import Quantized
from glm_finetune.weights import LARGE_BYTES, OnDevice, weight_bytes


def choose(config):
    """TrainConfig -> (Mode, TrainType). Raises UserError with the nearest name for what is not registered."""
    names = {"mode": MODE, "train_type": TRAIN_TYPE, "objective": OBJECTIVE}
    raise_together(problem for name in names for problem in unknown_choice(name, getattr(config, name), names[name]))
    return MODE[config.mode], TRAIN_TYPE[config.train_type]


def with_defaults(config, train_type):
    """The config with the learning rate of the train type's recipe, where none is given."""
    rate = train_type.learning_rate(config) if config.learning_rate is None else config.learning_rate
    return replace(config, learning_rate=rate, given=config.given)


def output_folder(config, begins):
    """Arguments of `folder.lock`. begins: whether the run begins anew there; else nothing in it goes."""
    paths = paths_of(config.train_path, config.eval_path)
    inputs = (config.model_name_or_path, config.init_from, *paths) if begins else ()
    return config.output_dir, config.overwrite_output_dir or config.resume == "auto" or not begins, inputs


def settle(config):
    """{name: part} of what follows from flags and machine alone."""
    mode, train_type = choose(config)
    if config.init_from or "mode" not in config.given:
        config = origin.settle(config, mode, train_type)
    config = with_defaults(config, train_type)
    folder.check_output_dir(*output_folder(config, not config.resume))
    dist.launch_environment()
    (_, world_size), device = dist.launched(), dist.choose_device(config.device, config.cudnn_attention)
    ds_json = read_ds_file(config.ds_file)
    raise_together(tuning.problems(config, train_type, stage_of(ds_json)))
    if is_large := weight_bytes(config.model_name_or_path) > LARGE_BYTES:
        keep_alive()
    precision, why = dist.choose_precision(config.precision or precision_of(ds_json), device, is_large)
    ds_config = resolve(ds_json, config, world_size, precision, device.type, train_type.fp32)
    if ds_json.keys() & OWNED and (numbers := not_used(ds_json, ds_config)):
        dist.print_main(f"--ds_file {config.ds_file}: not used, the flags say these: {', '.join(numbers)}")
    chosen = dict(config=config, mode=mode, objective=OBJECTIVE[config.objective], train_type=train_type)
    return dict(chosen, device=device, precision=precision, why=why, ds_config=ds_config)


def load_data(config, mode, objective, tokenizer):
    """{name: part} of the data. Raises UserError for fewer samples than ranks, and as InstructionDataset."""
    window = (config.shuffle_buffer or SHUFFLE_BUFFER) if config.streaming else None
    cache = dict(cache_dir=config.cache_dir or default_cache_dir(), overwrite_cache=config.overwrite_cache)
    options = dict(settings=settings_of(config, mode, tokenizer, objective.drafts), progress=True, **cache)
    rows = InstructionDataset(config.train_path, **options, window=window)
    eval_rows = InstructionDataset(config.eval_path, **options) if config.eval_path else None
    if len(rows) < (world_size := dist.launched()[1]):
        raise _too_few(config.train_path, len(rows), world_size)
    lengths = rows.lengths() if config.group_by_length else None
    per_step = config.per_device_train_batch_size, config.gradient_accumulation_steps, world_size
    sampler = StepSampler(len(rows), *per_step, config.seed, lengths=lengths, window=window)
    max_len = config.max_len if config.packing else None
    collate_rows = partial(collate, pad_token_id=tokenizer.pad_token_id, positions=mode.positions, max_len=max_len)
    return dict(tokenizer=tokenizer, rows=rows, eval_rows=eval_rows, sampler=sampler, collate=collate_rows)


def _too_few(path, num_rows, world_size):
    few = f"{num_rows} samples for {world_size} ranks, some would have nothing to do"
    return UserError(f"--train_path {path}: {few}. Start fewer ranks or give more data.")


def choose_place(config, train_type, ds_config, precision, device):
    """Where the base's weights go as they are read: divided (ZeRO-3), quantised, or whole onto `device`."""
    dtype = DTYPES[precision]
    if ds_config["zero_optimization"]["stage"] == 3:
        return Partitioned(dtype, device, ds_config)
    if train_type.quantizes:
        return Quantized(dtype, device, config.quantization_bit)
    return OnDevice(dtype, device)
