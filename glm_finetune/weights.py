"""Checkpoint files: read the weights of a folder tensor by tensor, write them as sharded safetensors. No ZeRO here.

Reads what the originals published (sharded `pytorch_model-*.bin`, with `weights_only=True`) and safetensors, one tensor
at a time, so that a model is filled without a second copy of it. Writing is atomic: a shard has a temporary name until
it is complete.

    for name, tensor in iter_tensors("ChatGLM3-6B/"): ...
"""

import hashlib
import json
import os
import pickle
import re
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glm_finetune import dist, host
from glm_finetune.bars import counted
from glm_finetune.errors import NotWritten, OutOfMemory, UserError

SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
INDEX_FILES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
MAX_SHARD_BYTES = 2 * 10**9  # the originals' shard size
LARGE_BYTES = 2**31  # of a checkpoint; a larger one is not turned into fp32 unless asked for
TOO_LARGE = (
    "Use --precision bf16, --train_type qlora (predict.py: --quantization_bit 4), or a machine with more memory."
)
NOT_PLAIN = (
    "refused, it does not hold plain tensors. It is damaged, a git-lfs pointer (then: git lfs pull), or a pickle with "
    "objects in it, which could run any code."
)


def weight_files(folder):
    """Paths of the weight files of `folder`, in order. Raises UserError naming it, or the shards that it lacks."""
    folder = Path(folder)
    names = [name for name in INDEX_FILES + SINGLE_FILES if (folder / name).is_file()]
    if not names:
        raise _no_weights(folder)
    return _shards(folder, names[0]) if names[0] in INDEX_FILES else [folder / names[0]]


def weight_bytes(folder):
    """Bytes of the weight files of a folder, 0 where they are not whole."""
    with suppress(UserError):
        return sum(path.stat().st_size for path in weight_files(folder))
    return 0


def _no_weights(folder):
    if folder.is_dir():
        found = sorted(path.name for path in folder.iterdir())
        return UserError(f"{folder}: no weights. Expected one of {[*SINGLE_FILES, *INDEX_FILES]}, found {found}.")
    return UserError(f"{folder}: no such folder. Give the folder of a checkpoint (config.json, weights, tokenizer).")


def _shards(folder, index):
    """Paths of the files in an index, sorted. Raises UserError if it has no map to file names, or one is missing."""
    weight_map = read_json(folder / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise UserError(f"{folder / index}: no weight_map from parameter names to file names. Copy the file again.")
    shards = sorted(set(weight_map.values()))
    if missing := [shard for shard in shards if not (folder / shard).is_file()]:
        raise UserError(
            f"{folder}: {index} lists {len(missing)} shard(s) that are not there: {missing}. "
            "Copy them from where the checkpoint came from."
        )
    return [folder / shard for shard in shards]


def read_json(path):
    """The object in a JSON file: a dict. Raises UserError naming a file that is missing, not JSON or not an object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise _no_json(path, error) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found a {type(value).__name__}.")
    return value


def _no_json(path, error):
    is_missing = isinstance(error, FileNotFoundError)
    return UserError(f"{path}: no such file." if is_missing else f"{path}: not valid JSON ({error}).")


def iter_tensors(folder):
    """Yield (name, tensor on the CPU) for all weights in `folder`, one shard open at a time."""
    for path in weight_files(folder):
        yield from iter_file(path)


def iter_file(path):
    """Yield (name, tensor on the CPU) of a file. Raises UserError naming it if it is damaged or holds other things."""
    try:
        yield from _iter_safetensors(path) if path.suffix == ".safetensors" else _iter_bin(path)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, OSError, MemoryError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path, error):
    if isinstance(error, pickle.UnpicklingError):  # whose own words, torch's, advise to switch the protection off
        return UserError(f"{path}: {NOT_PLAIN}")
    reason = (str(error).strip() or type(error).__name__).splitlines()[0].partition(". ")[0]
    if is_out_of_memory(error):
        return OutOfMemory(
            f"{path}: out of host memory while reading it ({reason}; {host.free_bytes() / 2**30:.1f} GiB are free). "
            f"Close other programs, start fewer processes on this machine. {TOO_LARGE}"
        )
    return UserError(
        f"{path}: the file is damaged or not a weight file ({reason}). Copy it again and "
        "compare its size with the source; some hundred bytes are a git-lfs pointer: git lfs pull."
    )


def is_out_of_memory(error):
    """Whether an error says that the host could not allocate memory: torch has no class for it."""
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


def read_tensor(path, name):
    """One tensor of a safetensors file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor(name)


def open_tensors(folder):
    """{name: function that gives its tensor} of all weights in `folder`; what is not asked for is not read."""
    tensors = {}
    for path in weight_files(folder):
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                tensors |= {name: partial(read_tensor, path, name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        else:  # mapped: only what is looked at is read
            tensors |= {name: partial(_itself, tensor) for name, tensor in iter_file(path)}
    return tensors


def _itself(tensor):
    return tensor


def fingerprint(folder):
    """A hash of shapes and some values of all weights in `folder`: 64 digits, whatever the kind and number of files.

    A weight that is there twice (tied ones) counts once, rotary frequencies do not: the original never reads them.
    """
    rows = {}
    for name, tensor in iter_tensors(folder):
        if not name.endswith(".inv_freq"):
            flat = tensor.reshape(-1)  # some of the beginning, middle and end: little of a mapped file is read
            places = (0, len(flat) // 3, len(flat) // 2, max(0, len(flat) - 64))
            sample = tuple(value for start in places for value in flat[start : start + 64].tolist())
            rows[tuple(tensor.shape), sample] = max(name, rows.get((tuple(tensor.shape), sample), name))
    return hashlib.sha256(repr(sorted((name, *key) for key, name in rows.items())).encode()).hexdigest()


def _iter_safetensors(path):
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
    for name in names:
        yield name, read_tensor(path, name)  # opened anew: what was read of the mapped file would stay resident


def _iter_bin(path):
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except RuntimeError as error:
        if "mmap" not in str(error) or is_out_of_memory(error):
            raise
        tensors = torch.load(path, map_location="cpu", weights_only=True)  # a file of torch < 1.6
    if not isinstance(tensors, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise pickle.UnpicklingError("not a dict of tensors")
    yield from tensors.items()


@dataclass(frozen=True)
class OnDevice:
    """Where weights go as they are read: every one whole onto `device`, as `dtype`.

    A place has two methods. construct(build) -> build(), a model without values. assign(model, name, tensor) gives a
    parameter its value and returns whether all of it is finite. Others: `Mapped`, `engine.Partitioned`,
    `quantize.Quantized`.

        file             a.weight (fp16)           b.weight
        OnDevice         cast, whole, on the card  the same            a model of meta tensors, replaced one by one
        Partitioned      a part on each rank       the same            divided when it is made, filled from rank 0
        Quantized        4 bit, on the card        cast if it is no matrix of a layer
    """

    dtype: torch.dtype
    device: torch.device
    verb = "read"  # what is done to them on the way

    def host_bytes(self, num_elements):
        """Memory of this machine that so many weights take, on all its ranks."""
        return num_elements * self.dtype.itemsize * dist.local_size() if self.device.type == "cpu" else 0

    def construct(self, build):
        with torch.device("meta"):
            return build()

    def assign(self, model, name, tensor):
        # A copy in any case: a tensor that is still a view of the mapped file would keep the shard open.
        value = torch.empty(tensor.shape, dtype=self.dtype, device=self.device).copy_(tensor)
        replace_parameter(model, name, value)
        return is_finite(value)


class Mapped(OnDevice):
    """The CPU, where tensors that have the dtype already stay in the file, mapped: read when needed, evicted if need
    be. For prediction: a file that is written over while it is mapped takes the model with it.
    """

    def assign(self, model, name, tensor):
        if tensor.dtype != self.dtype or self.device.type != "cpu":
            return super().assign(model, name, tensor)
        replace_parameter(model, name, tensor)
        return is_finite(tensor)


def replace_parameter(model, name, value):
    """Put a new nn.Parameter in the place of the one called `name`. value: a tensor, or a Parameter taken as it is."""
    owner, _, attribute = name.rpartition(".")
    parameters = model.get_submodule(owner)._parameters
    if not isinstance(value, torch.nn.Parameter):
        value = torch.nn.Parameter(value, requires_grad=parameters[attribute].requires_grad)
    parameters[attribute] = value


def is_finite(tensor):
    """Whether a tensor has no inf and no nan; one pass without a copy in another dtype. CPU-GPU sync."""
    return bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all())


def check_host(build, folder, place):
    """Raise UserError on every rank if what build() makes takes more of rank 0's machine than is free there.

    For large checkpoints, before anything of them is made or read. All ranks must call.
    """
    with torch.device("meta"):
        num_elements = sum(map(full_size, build().parameters()))
    what = f"{folder} as {DTYPE_NAMES[place.dtype]}"
    dist.on_main(host.check_fits, place.host_bytes(num_elements), what, TOO_LARGE)


def fill(model, folder, place, ignore=(), aliases=None):
    """Give every parameter of `model` (of `place.construct`) the tensor of that name in `folder`; place: `OnDevice`.

    ignore, aliases: see `matched`. Under ZeRO-3 all ranks must call.
    Raises UserError listing missing, unexpected and mis-shaped names, and tensors with inf or nan in them.
    """
    shapes = {name: full_shape(parameter) for name, parameter in model.named_parameters()}
    title = f"{place.verb} {folder} as {DTYPE_NAMES[place.dtype]}"
    problems = [], [], [], []
    fitting = matched(shapes, folder, ignore, aliases or {}, problems)
    for name, parameter, tensor in counted(fitting, title, weight_bytes(folder)):
        if parameter and not place.assign(model, parameter, tensor):
            problems[-1].append(name)
    if any(problems):
        raise do_not_fit(folder, place.dtype, problems)


def matched(shapes, folder, ignore, aliases, problems):
    """Yield (name in the file, its parameter or None, tensor) of all weights in `folder` that fit.

    shapes: {parameter: shape}. ignore: patterns of names in the file that belong to no parameter and are of no use.
    aliases: {name in the file: parameter}, for tied weights; where both are in the file the alias wins, as in the
    original. problems: three lists to which missing, unexpected and mis-shaped names are added, and a fourth.
    """
    seen, (missing, unexpected, misshaped, _) = set(), problems
    for name, tensor in iter_tensors(folder):
        target = aliases.get(name, name)
        if any(re.search(pattern, name) for pattern in ignore):
            yield name, None, tensor
        elif target not in shapes:
            unexpected.append(name)
        elif tensor.shape != shapes[target] or not tensor.is_floating_point():
            misshaped.append(_misfit(name, tensor, shapes[target]))
        else:  # ChatGLM-6B's files hold the tied matrix twice; lm_head.weight, its alias, has been read already
            yield name, None if target in seen and name == target in aliases.values() else target, tensor
        seen.add(target)
    missing += [name for name in shapes if name not in seen]


def _misfit(name, tensor, shape):
    if not tensor.is_floating_point():
        return f"{name}: {tensor.dtype} in the file (quantised?), a floating-point type expected"
    return f"{name}: {tuple(tensor.shape)} in the file, {tuple(shape)} expected"


def do_not_fit(folder, dtype, problems):
    """The UserError of the four lists of `matched`."""
    not_finite = f"inf or nan among the values, as {DTYPE_NAMES[dtype]}"
    lines = [
        f"\n  {kind} ({len(names)}): {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for kind, names in zip(("missing", "unexpected", "wrong shape or type", not_finite), problems)
        if names
    ]
    return UserError(f"{folder}: the weights do not fit the model of its config.json." + "".join(lines))


def write_sharded(tensors, folder, max_shard_bytes=MAX_SHARD_BYTES):
    """Write (name, CPU tensor) pairs, made lazily, as model.safetensors or shards with an index; one shard is held."""
    folder, shards, shard, size = Path(folder), [], {}, 0
    for name, tensor in tensors:
        if shard and size + tensor.nbytes > max_shard_bytes:
            shards.append(_write_shard(shard, folder / f"shard-{len(shards)}.tmp"))
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    shards.append(_write_shard(shard, folder / f"shard-{len(shards)}.tmp"))
    if len(shards) > 1:
        _name_shards(shards, folder)
    else:
        os.replace(shards[0][0], folder / "model.safetensors")


def _write_shard(shard, path):
    write_tensors(shard, path)
    return path, list(shard), sum(tensor.nbytes for tensor in shard.values())


def _name_shards(shards, folder):
    """Give the files of several shards, [(path, names, bytes)], their names, and write the index."""
    weight_map = {}
    for i, (path, names, _) in enumerate(shards, 1):
        final = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        os.replace(path, folder / final)
        weight_map.update(dict.fromkeys(names, final))
    index = {"metadata": {"total_size": sum(num_bytes for _, _, num_bytes in shards)}, "weight_map": weight_map}
    write_json(index, folder / "model.safetensors.index.json")


def write_tensors(tensors, path):
    """Write {name: CPU tensor} as one safetensors file that everyone may read (the library would make it private).
    Raises NotWritten when that fails: for a full disk the library has an error of its own.
    """
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise NotWritten(f"{path}: not written ({error}).") from error
    os.chmod(path, 0o644)


def write_json(value, path):
    """Write `value` as JSON, atomically: a reader sees the old file or the new one."""
    write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", path)


def write_text(text, path):
    """Write a text file, atomically."""
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def full_shape(parameter):
    """Shape of a parameter, also when ZeRO-3 keeps only a part of it here."""
    return getattr(parameter, "ds_shape", parameter.shape)


def full_size(parameter):
    """Number of elements of a parameter, also when ZeRO-3 keeps a part of it here or two are packed into a byte."""
    state = getattr(parameter, "quant_state", None)
    return full_shape(parameter).numel() if state is None else state.shape.numel()


def full_bytes(parameter):
    """Bytes of a parameter's weights, also when ZeRO-3 keeps a part of it here (scales of quantised ones excepted)."""
    return full_shape(parameter).numel() * parameter.element_size()
