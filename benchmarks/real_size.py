"""The scripts at the released size on this machine: wall time, peak memory, longest silence of each command.

    python benchmarks/real_size.py --folder real            # 6B: 60 GB of disk, 24 GB of memory, half an hour
    python benchmarks/real_size.py --folder real --layers 14 --only merge predict
    python benchmarks/real_size.py --folder real --tiny     # seconds: that it works

Makes a random ChatGLM3-6B in fp16, in seven .bin shards as it was published, and keeps it in the folder. Memory is what
cannot be evicted (RssAnon + RssShmem of /proc), summed over all processes of a command, sampled ten times a second at
its peak; silence is the longest time between two pieces of output, from pressing Enter to the end. All runs are on the
CPU. The comparisons with peft and transformers are made in the same run.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.train_types import make_base, write_data  # noqa: E402 (the repository is not installed)
from benchmarks.zero3_loading import shape  # noqa: E402

NUM_SHARDS = 7
SAMPLE_SECS = 0.1
POOL = 2**24  # different random values; drawing 6 billion takes two minutes


def tensors_of(model):
    """Yield (name, fp16 tensor) with random values, for a model of meta tensors."""
    import torch

    pool = (torch.randn(POOL) * 0.02).half()
    for name, parameter in model.named_parameters():
        size = parameter.numel()
        values = pool.repeat(-(-size // POOL))[:size].view(parameter.shape)
        yield name, torch.ones_like(values) if "norm" in name else values


def make_checkpoint(folder, fields):
    """The base as it was published: fp16, .bin shards."""
    import torch

    from glm_finetune import MODE
    from glm_finetune.weights import write_json

    make_base(folder, fields, torch.float16, with_weights=False)
    with torch.device("meta"):
        model = MODE["glm3"].model(MODE["glm3"].config.from_pretrained(folder))
    total, weight_map, shard, number = sum(p.numel() * 2 for p in model.parameters()), {}, {}, 1

    def write():
        file = f"pytorch_model-{number:05d}-of-{NUM_SHARDS:05d}.bin"
        torch.save(shard, folder / file)
        weight_map.update(dict.fromkeys(shard, file))

    for name, tensor in tensors_of(model):
        if sum(t.nbytes for t in shard.values()) > total / NUM_SHARDS and number < NUM_SHARDS:
            write()
            shard, number = {}, number + 1
        shard[name] = tensor.clone()
    write()
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / "pytorch_model.bin.index.json")


def make_theirs(folder, fields):
    """The same network as transformers' GlmForCausalLM, bf16 in safetensors."""
    import torch
    from transformers import GlmForCausalLM

    from benchmarks.step_time import their_config
    from glm_finetune import MODE
    from glm_finetune.weights import write_sharded

    config = their_config(MODE["glm3"].config(**fields))
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = GlmForCausalLM(config)
    write_sharded(((name, tensor.bfloat16()) for name, tensor in tensors_of(model)), folder)


def as_safetensors(base, folder):
    """A copy of the base in bf16 safetensors."""
    import torch

    from glm_finetune.weights import iter_tensors, write_sharded

    folder.mkdir()
    for path in base.glob("*token*"):
        shutil.copyfile(path, folder / path.name)
    shutil.copyfile(base / "config.json", folder / "config.json")
    write_sharded(((name, tensor.to(torch.bfloat16)) for name, tensor in iter_tensors(base)), folder)


def memory(process):
    """Bytes that a process and those it started cannot give back."""
    import psutil

    total = 0
    for one in (process, *process.children(recursive=True)):
        try:
            lines = Path(f"/proc/{one.pid}/status").read_text().splitlines()
        except (OSError, psutil.Error):
            continue
        total += sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))) * 1024
    return total


def watched(command):
    """Run a command of the project; returns its figures."""
    import psutil

    start = last = time.monotonic()
    gaps, tail, peak = [0.0], b"", 0
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    pipe = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    process = psutil.Popen([sys.executable, *map(str, command)], cwd=ROOT, env=environment, **pipe)

    def listen():
        nonlocal last, tail
        while piece := os.read(process.stdout.fileno(), 65536):
            gaps.append(time.monotonic() - last)
            last, tail = time.monotonic(), (tail + piece)[-4000:]

    listener = threading.Thread(target=listen)
    listener.start()
    while process.poll() is None:
        peak = max(peak, memory(process))
        time.sleep(SAMPLE_SECS)
    listener.join()
    figures = {"secs": round(time.monotonic() - start, 1), "peak_gib": round(peak / 2**30, 2)}
    figures["silent_secs"] = round(max(gaps), 1)
    if process.returncode:
        return {**figures, "code": process.returncode, "said": tail.decode(errors="replace").strip()[-400:]}
    return figures


def work(name, folder, *more):
    """One of the things that are no script of ours, in a process of its own."""
    import torch

    model = None
    if name == "raw":  # every tensor once, converted
        from glm_finetune.weights import iter_tensors

        kept = [tensor.to(torch.bfloat16, copy=True) for _, tensor in iter_tensors(folder)]
        return print(len(kept), "tensors")
    elif name == "ours":
        from glm_finetune import MODE

        model = MODE["glm3"].model.from_pretrained(folder, torch.bfloat16)
    elif name == "theirs":
        from transformers import GlmForCausalLM

        model = GlmForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    elif name == "copy":
        shutil.copytree(folder, more[0])
    else:  # peft's way to merge
        from peft import PeftModel

        from glm_finetune import MODE

        model = PeftModel.from_pretrained(MODE["glm3"].model.from_pretrained(folder), more[0])
        model.merge_and_unload().save_pretrained(more[1])
        return
    for parameter in model.parameters() if model else ():  # a file that is only mapped is read when it is looked at
        torch.aminmax(parameter)


class Bench:
    """The measurements, each a method that yields (name, command); folders of their own are removed afterwards."""

    def __init__(self, folder, fields, tiny):
        self.folder, self.fields, self.base, self.adapter = folder, fields, folder / "base", folder / "adapter"
        self.steps, self.length = (2, 64) if tiny else (2, 256)

    def train(self, out, *flags, launcher=()):
        command = [*launcher, "train.py", "--mode", "glm3", "--model_name_or_path", self.base, "--device", "cpu"]
        command += ["--train_path", self.folder / "data.jsonl", "--output_dir", out, "--overwrite_output_dir"]
        command += ["--max_len", self.length, "--max_src_len", self.length // 2, "--per_device_train_batch_size", 1]
        return [*command, "--max_steps", self.steps, "--show_loss_step", 1, *flags]

    def worker(self, *parts):
        return [Path(__file__), "--worker", *parts]

    def trained(self):
        """The folder of the adapter, trained if it is not there."""
        if not (self.adapter / "latest").is_file():
            subprocess.run([sys.executable, *map(str, self.train(self.adapter))], cwd=ROOT, check=True)
        return self.adapter / (self.adapter / "latest").read_text()

    def lora(self, scratch):
        yield "train.py, lora", self.train(self.adapter)

    def types(self, scratch):
        yield "train.py, qlora", self.train(scratch / "qlora", "--train_type", "qlora")
        freeze = ["--train_type", "freeze", "--freeze_last", 1]
        yield "train.py, freeze, --async_save", self.train(scratch / "freeze", *freeze, "--async_save")
        yield "train.py, --resume", self.train(scratch / "freeze", *freeze, "--resume", "auto", "--max_steps", 3)

    def zero3(self, scratch):
        ranks = ["-m", "torch.distributed.run", "--nproc_per_node", 2]
        flags = ["--ds_file", "ds_zero3_no_offload.json"]
        yield "train.py, ZeRO-3, two ranks", self.train(scratch / "zero3", *flags, launcher=ranks)

    def predict(self, scratch):
        asked = ["--instruction", "你好", "--max_new_tokens", 8, "--device", "cpu"]
        yield "predict.py, base", ["predict.py", "--model_path", self.base, *asked]
        yield "predict.py, adapter", ["predict.py", "--model_path", self.trained(), *asked]
        four = [*asked, "--quantization_bit", 4]
        yield "predict.py, adapter, 4 bit", ["predict.py", "--model_path", self.trained(), *four]

    def merge(self, scratch):
        yield "copying the base's files", self.worker("copy", self.base, scratch / "copy")
        shutil.rmtree(scratch / "copy", ignore_errors=True)
        merge = ["merge_lora.py", "--model_dir", self.trained(), "--output_dir", scratch / "merged"]
        yield "merge_lora.py", merge
        shutil.rmtree(scratch / "merged", ignore_errors=True)

    def peft(self, scratch):
        yield "peft: merge_and_unload, save_pretrained", self.worker("peft", self.base, self.trained(), scratch / "p")
        shutil.rmtree(scratch / "p", ignore_errors=True)

    def read(self, scratch):
        yield "every tensor once, as bf16 (.bin)", self.worker("raw", self.base)
        yield "from_pretrained, bf16 (.bin)", self.worker("ours", self.base)
        as_safetensors(self.base, scratch / "safe")
        yield "every tensor once, as bf16 (safetensors)", self.worker("raw", scratch / "safe")
        yield "from_pretrained, bf16 (safetensors)", self.worker("ours", scratch / "safe")
        shutil.rmtree(scratch / "safe")
        make_theirs(scratch / "theirs", self.fields)
        yield "transformers' GlmForCausalLM, bf16 (safetensors)", self.worker("theirs", scratch / "theirs")
        shutil.rmtree(scratch / "theirs")


NAMES = ("lora", "predict", "merge", "peft", "read", "types", "zero3")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the checkpoint and the results of the commands lie")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--only", nargs="*", choices=NAMES, default=NAMES, metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--tiny", action="store_true", help="tiny shapes")
    parser.add_argument("--output", type=Path, help="JSON file, added to; default: benchmarks/results/real_size.json")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        return work(*args.worker)
    if args.folder is None:
        parser.error("--folder must be given")
    fields = shape(64 if args.tiny else 4096) | dict(num_layers=args.layers, seq_length=8192, torch_dtype="float16")
    if args.tiny:
        fields |= dict(num_layers=2, num_attention_heads=4, kv_channels=16, padded_vocab_size=1024)
    bench = Bench(args.folder / f"{fields['hidden_size']}-{fields['num_layers']}", fields, args.tiny)
    if not bench.base.is_dir():
        make_checkpoint(bench.base, fields)
        write_data(bench.folder / "data.jsonl", 40, bench.length)
    weights = sum(path.stat().st_size for path in bench.base.glob("*.bin")) / 2**30
    print(f"{weights:.2f} GiB of weights, {fields['num_layers']} layers; memory in GiB and as a multiple of that")
    print(f"{'command':<52} {'secs':>7} {'GiB':>7} {'ratio':>7} {'silent':>7}", flush=True)
    results = {}
    for name in args.only:
        with tempfile.TemporaryDirectory(dir=bench.folder) as scratch:
            for title, command in getattr(bench, name)(Path(scratch)):
                figures = results[title] = watched(command)
                figures["ratio"] = round(figures["peak_gib"] / weights, 2)
                shown = " ".join(f"{figures[key]:>7}" for key in ("secs", "peak_gib", "ratio", "silent_secs"))
                print(f"{title:<52} {shown}  {figures.get('said', '')}", flush=True)
    write(args, fields, weights, results)
    return int(any("code" in figures for figures in results.values()))


def write(args, fields, weights, results):
    """Add the results to the JSON file of this number of layers."""
    from benchmarks.step_time import machine

    path = args.output or ROOT / "benchmarks/results/real_size.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    key = f"hidden {fields['hidden_size']}, {fields['num_layers']} layers"
    before = known.get(key, {}).get("commands", {})
    known[key] = {"machine": machine("cpu"), "weights_gib": round(weights, 2), "commands": {**before, **results}}
    path.write_text(json.dumps(known, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    sys.exit(main())
