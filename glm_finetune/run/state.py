"""The state of a run: fp32 masters and moments by parameter name, random numbers of every rank, where the data stands.

Plain safetensors and JSON, the same for every ZeRO stage and number of ranks; DeepSpeed's own checkpoints are pickles
bound to both. Weights that do not learn are never written.

    parts = of(engine, progress)               # all ranks must call; rank 0 writes them with `write`
    restore(engine, folder, batch, seed, device)   # all ranks must call
"""

from dataclasses import asdict
from pathlib import Path

import torch

from glm_finetune import dist, weights
from glm_finetune.bars import bar, counted
from glm_finetune.data.sampler import Progress
from glm_finetune.errors import UserError
from glm_finetune.run.engine import whole

MOMENTS = ("exp_avg", "exp_avg_sq")
FOLDER = "state"  # inside a checkpoint


def of(engine, progress):
    """(tensors, {"cpu.R", "cuda.R": (n,) uint8} of rank R, numbers). All ranks must call, and exhaust the tensors."""
    own = {f"cpu.{dist.rank()}": torch.get_rng_state()}
    if engine.device.type == "cuda":
        own[f"cuda.{dist.rank()}"] = torch.cuda.get_rng_state(engine.device)
    randoms = {name: state for states in dist.gather_objects(own) for name, state in states.items()}
    numbers = {**asdict(progress), "updates": num_updates(engine), "world_size": dist.world_size()}
    return tensors_of(engine), randoms, numbers | (_loss_scaler(engine) if engine.fp16_enabled() else {})


def _loss_scaler(engine):
    scaler = vars(engine.optimizer.loss_scaler).items()
    return {"loss_scaler": {name: value for name, value in scaler if isinstance(value, (int, float))}}


def learning(model):
    """(name, parameter) of what learns, in a fixed order."""
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def num_bytes(model):
    """Bytes of (what learns, all weights, masters and moments)."""
    learn = [parameter for _, parameter in learning(model)]
    sizes = (sum(map(weights.full_bytes, parameters)) for parameters in (learn, model.parameters()))
    return *sizes, 4 * (1 + len(MOMENTS)) * sum(map(weights.full_size, learn))


def tensors_of(engine):
    """Yield (key, fp32 tensor on the CPU): master and moments of what learns. All ranks must call and exhaust it."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if has_moments := num_updates(engine) > 0:
        _link_moments(engine)
    for name, parameter in learning(engine.module):
        master = safe_get_full_fp32_param(parameter).cpu()
        yield f"master.{name}", master
        for key in MOMENTS:
            moment = safe_get_full_optimizer_state(parameter, key).cpu() if has_moments else torch.zeros_like(master)
            yield f"{key}.{name}", moment


def num_updates(engine):
    """Updates that Adam has made; before the first it has no moments."""
    steps = (int(state["step"]) for state in engine.basic_optimizer.state.values() if "step" in state)
    return max(steps, default=0)


def _link_moments(engine):
    """Let DeepSpeed find all moments at stages 1 and 2: it looks after the first group's first step, when the other
    groups have none yet."""
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    if engine.zero_optimization_stage() < 3:
        groups = zip(engine.optimizer.bit16_groups, engine.optimizer.single_partition_of_fp32_groups)
        for parameters, flat in groups:
            lazy_init_hp_params_optimizer_state(parameters, flat, engine.basic_optimizer.state)


def write(folder, tensors, randoms, numbers):
    """Write what `of` gave to `folder`, on rank 0."""
    folder.mkdir()
    weights.write_sharded(tensors, folder)
    weights.write_tensors(randoms, folder / "random.safetensors")
    weights.write_json(numbers, folder / "progress.json")


def restore(engine, folder, batch, seed, device):
    """Put the state in a checkpoint back. All ranks must call.

    batch: one without targets, on `device`; a step on it with learning rate 0 makes every stage create its moments.
    Raises UserError if the parameters that learn are not those of the state.
    """
    folder = Path(folder) / FOLDER
    record, tensors = weights.read_json(folder / "progress.json"), weights.open_tensors(folder)
    names = {name for name, _ in learning(engine.module)}
    if different := names ^ {key.partition(".")[2] for key in tensors}:
        raise UserError(f"--resume: what learns is not what learnt there: {', '.join(sorted(different)[:4])}, ...")
    for group in engine.optimizer.param_groups:
        group["lr"] = 0.0
    with bar("restore: a step that changes nothing"):
        for _ in range(engine.gradient_accumulation_steps()):
            engine.backward(engine(**batch, use_cache=False).token_losses.sum())
            engine.step()
    _link_moments(engine)
    learn, total = learning(engine.module), num_bytes(engine.module)[0]
    for name, parameter in counted(learn, "restore", total, lambda pair: weights.full_bytes(pair[1])):
        keys = [f"{key}.{name}" for key in ("master", *MOMENTS)]  # of one parameter at a time: each rank reads them
        set_weight(parameter, *(tensors[key]().to(device) for key in keys))
    for state in engine.basic_optimizer.state.values():
        if "step" in state:
            state["step"].fill_(record["updates"])
    if engine.fp16_enabled():
        vars(engine.optimizer.loss_scaler).update(record.get("loss_scaler", {}))
    _restore_random(folder / "random.safetensors", record, seed, device)


def progress_in(folder):
    """Where the run of a checkpoint stood, and its best one so far, see `Saver.best`."""
    record = weights.read_json(Path(folder) / FOLDER / "progress.json")
    return Progress(record["step"], record["epoch"], record["rows"]), record.get("best")


def set_weight(parameter, master, *moments):
    """Give a parameter its master (fp32, whole, on its device) and moments, and the weight computed with, which is the
    master rounded. All ranks must call.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    with torch.no_grad(), whole(parameter, modifier_rank=0):
        parameter.copy_(master)
    safe_set_full_fp32_param(parameter, master)
    for key, moment in zip(MOMENTS, moments):
        safe_set_full_optimizer_state(parameter, moment, key)


def _restore_random(path, record, seed, device):
    """This rank's random numbers go on where they were; with other ranks or another kind of device they begin anew."""
    states = dict(weights.iter_file(path))
    if record["world_size"] != dist.world_size() or f"{device.type}.{dist.rank()}" not in states:
        return dist.seed_all(seed + dist.rank() + 1000 * record["step"])
    torch.set_rng_state(states[f"cpu.{dist.rank()}"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[f"cuda.{dist.rank()}"], device)
