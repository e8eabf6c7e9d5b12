"""The stages of benchmarks/gpu.py, one in a process: python -m benchmarks.gpu_stages NAME cuda|cpu RESULTS [quick].

Each yields results, dicts with `what`, that are written to RESULTS as JSON lines as they come. `equal` says whether
numbers that should agree do. A share is of the ceilings that the stage `ceilings` measures on this card.
"""

import gc
import importlib.util
import json
import socket
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import median

import psutil
import torch

from benchmarks import gpu_equality
from benchmarks.step_time import Case, config_of, new_model, new_trainee, step
from benchmarks.train_types import TYPES
from glm_finetune import MODE
from glm_finetune.data.dataset import collate, to_device

ROOT = Path(__file__).resolve().parents[1]
FULL = config_of(28, 4096, 13696, 32, 65024)
TINY = config_of(2, 64, 96, 4, 512)
GLM_FULL = dict(num_layers=28, hidden_size=4096, inner_hidden_size=16384, num_attention_heads=32, vocab_size=130528)
GLM_TINY = dict(num_layers=2, hidden_size=64, inner_hidden_size=96, num_attention_heads=4, vocab_size=512)
RUN_TYPES = ("lora all-linear", "qlora 4", "qlora 8", "freeze", "ptuning 2, encoder", "ptuning 1", "dora", "all")


def has(name):
    return importlib.util.find_spec(name) is not None


class Card:
    """The device and how to time on it."""

    def __init__(self, device, quick):
        self.device, self.quick, self.on_card = torch.device(device), quick, device == "cuda"
        is_old = self.on_card and torch.cuda.get_device_capability()[0] < 8  # no bf16, no flash attention
        self.dtype = torch.float16 if is_old else torch.bfloat16

    def wait(self):
        if self.on_card:
            torch.cuda.synchronize()

    def fresh(self):
        """Forget what was there, and its peak."""
        gc.collect()
        if self.on_card:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()

    def peak_gib(self):
        """Of a card; None on a CPU."""
        return torch.cuda.max_memory_allocated() / 2**30 if self.on_card else None

    def secs(self, function, times=10):
        """Median seconds of a call, after two that do not count."""
        taken = []
        for _ in range(times + 2):
            self.wait()
            start = time.perf_counter()
            function()
            self.wait()
            taken.append(time.perf_counter() - start)
        return median(taken[2:])

    def matrix_rate(self):
        """bf16 products, in FLOP/s."""
        size = 256 if self.quick else 8192
        left, right = (torch.randn(size, size, device=self.device, dtype=self.dtype) for _ in range(2))
        return 2 * size**3 / self.secs(lambda: left @ right)


def ceilings(card):
    yield {"what": "bf16 matrix rate", "tflop_per_s": card.matrix_rate() / 1e12}
    source = torch.empty(2**20 if card.quick else 2**30, dtype=torch.uint8, device=card.device)
    target = torch.empty_like(source)
    rate = 2 * source.numel() / card.secs(lambda: target.copy_(source)) / 1e9
    yield {"what": "copy, read and written", "gb_per_s": rate}


def equality(card):
    yield from gpu_equality.checks(card)
    if not has("pytest"):
        yield {"what": "pytest is not installed: the tests that wait for a card were left out"}
        return
    command = [sys.executable, "-m", "pytest", "-q", "-k", "card", "tests/test_packing.py", "tests/test_devices.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    last = (done.stdout.strip().splitlines() or ["no output"])[-1]
    yield {"what": "tests that wait for a card", "said": last, "equal": done.returncode in (0, 5)}


def share_of_rate(card, case, secs, rate):
    """Of the matrix rate, that a LoRA step reaches: two products forward, two backward, two more with checkpointing."""
    config = case.config
    size, ffn = config["hidden_size"], config["ffn_hidden_size"]
    kv = 2 * config["multi_query_group_num"] * config["kv_channels"]
    layers = config["num_layers"] * (size * (size + kv) + size * size + 3 * size * ffn)
    return (6 if case.checkpointing else 4) * layers * case.batch_size * case.num_tokens / secs / rate


def use_liger():
    """Let GlmForCausalLM compute norms and SwiGLU by Liger's kernels; returns what puts its own back."""
    from liger_kernel.transformers.rms_norm import LigerRMSNorm
    from liger_kernel.transformers.swiglu import LigerPhi3SwiGLUMLP
    from transformers.models.glm import modeling_glm

    before = modeling_glm.GlmRMSNorm, modeling_glm.GlmMLP
    modeling_glm.GlmRMSNorm, modeling_glm.GlmMLP = LigerRMSNorm, LigerPhi3SwiGLUMLP

    def undo():
        modeling_glm.GlmRMSNorm, modeling_glm.GlmMLP = before

    return undo


def trained(card, side, case):
    """(seconds of a step, peak GiB, first loss) of a new model; side: ours, theirs, or theirs with Liger's kernels."""
    card.fresh()
    undo = use_liger() if side == "liger" else lambda: None
    try:
        kind = "ours" if side == "ours" else "theirs"
        trainee = new_trainee(kind, case, new_model(kind, case))
        taken = [step(*trainee) for _ in range(case.warmup + case.steps)]
        return median(secs for secs, _ in taken[case.warmup :]), card.peak_gib(), taken[0][1]
    finally:
        undo()


def lora_step(card):
    """A step of ours beside GlmForCausalLM + peft, in turns, and of ChatGLM-6B."""
    rate = card.matrix_rate()
    sides = ["ours", "theirs"] + ["liger"] * (card.on_card and has("liger_kernel"))
    if "liger" not in sides:
        yield {"what": "without Liger's kernels: not installed, or no card"}
    shape = dict(batch_size=1, num_tokens=32 if card.quick else 1560, steps=2 if card.quick else 6, rank=16)
    full = Case("step", card.device.type, TINY if card.quick else FULL, card.dtype, **shape)
    for case in (full, replace(full, checkpointing=True)):
        found = {side: [trained(card, side, case)] for side in sides}
        for side in reversed(sides):
            found[side].append(trained(card, side, case))
        for side, turns in found.items():
            secs = median(turn[0] for turn in turns)
            yield {
                "what": f"LoRA, glm3, {side}{', checkpointing' * case.checkpointing}",
                "tokens_per_s": case.num_tokens / secs,
                "share_of_matrix_rate": share_of_rate(card, case, secs, rate),
                "peak_gib": turns[0][1],
                "times_theirs": median(turn[0] for turn in found["theirs"]) / secs,
                "spread": max(turn[0] for turn in turns) / min(turn[0] for turn in turns),
                "loss": turns[0][2],
            }
    yield from glm_step(card, [32] if card.quick else [1560], checkpointing=True)


def glm_step(card, lengths, checkpointing):
    """LoRA steps of ChatGLM-6B: a mask with a prefix."""
    for length in lengths:
        card.fresh()
        torch.set_default_dtype(card.dtype)
        with card.device:
            fields = GLM_TINY if card.quick else GLM_FULL
            model = MODE["glm"].model(MODE["glm"].config(**fields, position_encoding_2d=True))
        torch.set_default_dtype(torch.float32)
        case = Case("glm", card.device.type, {}, card.dtype, 1, length, checkpointing, rank=16)
        ids, asked = torch.randint(5, 500, (length,)).tolist(), length * 2 // 3
        row = {"input_ids": ids, "labels": [-100] * asked + ids[asked:], "num_prefix": asked}
        batch = to_device(collate([row], 3, MODE["glm"].positions), card.device)
        model, optimizer, _ = new_trainee("ours", case, model, batch)
        taken = [step(model, optimizer, batch)[0] for _ in range(3 if card.quick else 7)]
        figures = {"tokens_per_s": length / median(taken[2:]), "peak_gib": card.peak_gib()}
        yield {"what": f"LoRA, glm, {length} tokens, prefix mask", **figures}
        del model, optimizer, batch  # the next is made before these names are given anew


def long_rows(card):
    """Rows of 8,192 tokens, whole and packed, with cuDNN's attention and without; ChatGLM-6B at 2,048 and 4,096."""
    length = 64 if card.quick else 8192
    shape = dict(batch_size=1, num_tokens=length, checkpointing=True, steps=2 if card.quick else 4, rank=16)
    case = Case("long", card.device.type, TINY if card.quick else FULL, card.dtype, **shape)
    rate = card.matrix_rate()
    model, optimizer, whole = new_trainee("ours", case, new_model("ours", case))
    rows, ids = [], torch.randint(1, 500, (length,)).tolist()
    for i in range(0, length, length // 50 or 1):
        part = ids[i : i + (length // 50 or 1)]
        rows.append({"input_ids": part, "labels": [-100] * (len(part) * 2 // 3) + part[len(part) * 2 // 3 :]})
    rows = [{**row, "num_prefix": 0} for row in rows]
    packed = to_device(collate(rows, 0, MODE["glm3"].positions, max_len=length), card.device)
    for name, batch in (("whole", whole), ("packed", packed)):
        for cudnn in (False, True) if card.on_card else (False,):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            card.fresh()
            taken = [step(model, optimizer, batch)[0] for _ in range(case.warmup + case.steps)]
            secs = median(taken[case.warmup :])
            yield {
                "what": f"LoRA, glm3, {length} tokens, {name}{', cuDNN' * cudnn}",
                "tokens_per_s": batch["input_ids"].numel() / secs,
                "share_of_matrix_rate": share_of_rate(card, case, secs, rate),
                "peak_gib": card.peak_gib(),
            }
    torch.backends.cuda.enable_cudnn_sdp(False)
    del model, optimizer
    yield from glm_step(card, [32, 48] if card.quick else [2048, 4096], checkpointing=True)


def generation(card):
    """Greedy tokens a second, batch 1 and 16, beside GlmForCausalLM."""
    asked, new = (8, 4) if card.quick else (512, 128)
    case = Case("generation", card.device.type, TINY if card.quick else FULL, card.dtype)
    options = dict(max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0, eos_token_id=2)
    for side in ("ours", "theirs"):
        card.fresh()
        model = new_model(side, case).eval()
        for num_rows in (1, 16):
            ids = torch.randint(1, 500, (num_rows, asked), device=card.device)
            secs = card.secs(partial(model.generate, ids, attention_mask=torch.ones_like(ids), **options), times=1)
            yield {"what": f"generation, {side}, batch {num_rows}", "tokens_per_s": num_rows * new / secs}
        del model


def train_types(card):
    """Each train type by train.py itself, on a random base that is never written."""
    with tempfile.TemporaryDirectory() as folder:
        for name in RUN_TYPES[:: 3 if card.quick else 1]:
            if name.startswith("qlora") and not has("bitsandbytes"):
                yield {"what": f"{name}: bitsandbytes is not installed, left out"}
                continue
            if name == "all" and card.on_card and torch.cuda.mem_get_info()[1] < 130 * 2**30:
                yield {"what": "all: 6B with fp32 masters and moments takes about 128 GiB, left out"}
                continue
            command = [sys.executable, "-m", "benchmarks.random_base", folder, card.device.type, name.replace(" ", "-")]
            command += [str(int(card.quick)), *TYPES[name], *["--freeze_last", "1"] * (name == "freeze")]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            said = json.loads(lines[-1][7:]) if lines else {"error": done.stderr.strip()[-300:], "equal": False}
            yield {"what": f"train.py, {name}", **said}


def real_path(card):
    """`deepspeed train.py` over nccl (gloo on a CPU): save, kill, resume bit-equal, merge, predict."""
    for precision in precisions_of(card):
        with tempfile.TemporaryDirectory() as folder:
            yield from killed_and_resumed(card, precision, Path(folder))


def precisions_of(card):
    if not card.on_card:
        return ["bf16"]
    return ["fp16"] if card.dtype == torch.float16 else ["bf16", "fp16"]


def killed_and_resumed(card, precision, folder):
    deepspeed = Path(sys.executable).with_name("deepspeed")
    flags = ["--mode", "glm3", "--train_type", "lora", "--model_name_or_path", "tiny_base/", "--max_steps", "12"]
    flags += ["--train_path", "data/spo_0.json", "--save_model_step", "4", "--show_loss_step", "4"]
    flags += ["--max_len", "128", "--max_src_len", "64", "--precision", precision, "--device", card.device.type]

    def command(out, *more):
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = str(probe.getsockname()[1])
        launcher = [deepspeed, "--num_gpus", "1", "--master_port", port] if deepspeed.is_file() else [sys.executable]
        return [*map(str, launcher), "train.py", *flags, "--output_dir", str(folder / out), *more]

    def newest(out):
        return folder / out / (folder / out / "latest").read_text()

    yield ran(f"train.py, {precision}", command("whole"))
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    process = psutil.Popen(command("killed"), cwd=ROOT, **quiet)  # of the stage's session, and gone with it
    while not list((folder / "killed").glob("epoch-*-step-4")) and process.poll() is None:
        time.sleep(0.01)
    for one in [process, *process.children(recursive=True)] if process.is_running() else ():
        one.kill()
    process.wait()
    was_whole = list((folder / "killed").glob("epoch-*-step-12"))
    resumed = ran(f"killed and resumed, {precision}, bit-equal", command("killed", "--resume", "auto"))
    if was_whole:
        resumed |= {"equal": False, "said": "it was over before it could be killed: nothing was resumed"}
    elif resumed["equal"]:
        ends = [(newest(out) / "adapter_model.safetensors").read_bytes() for out in ("killed", "whole")]
        resumed["equal"] = ends[0] == ends[1]
    yield resumed
    merge = ["merge_lora.py", "--model_dir", str(newest("whole")), "--output_dir", str(folder / "merged")]
    yield ran(f"merged, {precision}", [sys.executable, *merge])
    asked = ["--model_path", str(folder / "merged"), "--instruction", "你好", "--max_new_tokens", "8"]
    yield ran(f"predicted, {precision}", [sys.executable, "predict.py", *asked, "--device", card.device.type])


def ran(what, command):
    """Run a command of the project; `equal` says whether it ended with 0."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = {} if done.returncode == 0 else {"said": (done.stdout + done.stderr).strip()[-300:]}
    return {"what": what, "equal": done.returncode == 0, **said}


STAGES = {
    "ceilings": ceilings,
    "equality": equality,
    "step": lora_step,
    "long": long_rows,
    "path": real_path,
    "generation": generation,
    "types": train_types,
}


def main():
    name, device, results, *quick = sys.argv[1:]
    card = Card(device, bool(quick))
    torch.manual_seed(0)
    if card.on_card:
        torch.backends.cuda.enable_cudnn_sdp(False)
    with open(results, "w", encoding="utf-8") as file:
        for result in until_out_of_memory(STAGES[name](card)):
            file.write(json.dumps(result, ensure_ascii=False) + "\n")
            file.flush()


def until_out_of_memory(results):
    """What a stage finds; a card that is too small for it says so."""
    try:
        yield from results
    except torch.OutOfMemoryError as error:
        total = torch.cuda.get_device_properties(0).total_memory / 2**30
        yield {"what": f"the rest was left out: {total:.0f} GiB are too little ({str(error).splitlines()[0][:120]})"}


if __name__ == "__main__":
    main()
