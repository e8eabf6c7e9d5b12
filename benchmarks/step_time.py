"""One LoRA training step of our ChatGLM3 against the same network in transformers: tokens per second and peak memory.

    python -m benchmarks.step_time                  # the card if there is one, else the CPU; some minutes
    python -m benchmarks.step_time --device cpu     # writes benchmarks/results/step_time_cpu.json
    python -m benchmarks.step_time --quick          # tiny shapes, some seconds: does it run? Writes nothing without --out

Ours is MODE["glm3"] fed by our `collate`, theirs `GlmForCausalLM` with its normal loss. Both have the same shapes and
peft LoRA of rank 8 on every linear layer of a block; before anything is timed their fp32 logits must agree on equal
weights. The first two thirds of a row are no targets; rows are full, which spares theirs a mask.

A step is forward, backward and AdamW over the LoRA parameters. Time is the median of steps taken in turns. On the CPU
both models are in one process and share their random weights; memory is measured in a fresh process for each model, as
the allocator does not give it back: highest minus first resident size (VmHWM and VmRSS, so Linux only; ru_maxrss would
carry the parent's peak over). On a card the models come one at a time and memory is torch's own count.
Not here: DeepSpeed, several cards, data loading.
"""
import argparse
import gc
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import GlmConfig, GlmForCausalLM

from glm_finetune import MODE
from glm_finetune.data.dataset import collate
from glm_finetune.tuning.lora import add_lora

ROOT = Path(__file__).resolve().parents[1]
SIDES = ("ours", "theirs")
MIN_SPEED_RATIO = 2.0  # the aim: ours / theirs in tokens/s
MAX_MEMORY_RATIO = 0.6  # the aim on a CPU: ours / theirs in peak memory
MAX_LOGIT_ERROR = 1e-4  # largest difference of fp32 logits / their standard deviation
LORA_TARGETS = {
    "ours": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "theirs": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
}


@dataclass(frozen=True)
class Case:
    """Shapes of one comparison. steps: taken by one model before it is the other's turn; warmup: untimed ones before."""

    name: str
    device: str = "cpu"
    dtype: torch.dtype = torch.float32
    num_layers: int = 4
    hidden_size: int = 512
    ffn_hidden_size: int = 1408
    num_heads: int = 8
    num_kv_heads: int = 2
    vocab_size: int = 65024
    batch_size: int = 4
    num_tokens: int = 512
    checkpointing: bool = False
    turns: int = 12
    steps: int = 1
    warmup: int = 2

    @property
    def head_size(self):
        return self.hidden_size // self.num_heads


def cases(device, quick):
    """The comparisons made on a device."""
    if quick:
        return [Case("tiny", device, num_layers=2, hidden_size=64, ffn_hidden_size=96, num_heads=4, vocab_size=512,
                     batch_size=2, num_tokens=24, turns=2, warmup=1)]
    if device == "cpu":
        return [Case("small fp32")]
    big = Case("6B bf16", device, torch.bfloat16, num_layers=28, hidden_size=4096, ffn_hidden_size=13696, num_heads=32,
               batch_size=1, num_tokens=1560, turns=2, steps=8, warmup=3)
    return [big, replace(big, name="6B bf16, checkpointing", checkpointing=True)]


def our_model(case):
    mode = MODE["glm3"]
    return mode.model(mode.config(
        num_layers=case.num_layers, padded_vocab_size=case.vocab_size, hidden_size=case.hidden_size,
        ffn_hidden_size=case.ffn_hidden_size, kv_channels=case.head_size, num_attention_heads=case.num_heads,
        multi_query_attention=True, multi_query_group_num=case.num_kv_heads, add_qkv_bias=True, layernorm_epsilon=1e-5))


def their_model(case):
    return GlmForCausalLM(GlmConfig(
        num_hidden_layers=case.num_layers, vocab_size=case.vocab_size, hidden_size=case.hidden_size,
        intermediate_size=case.ffn_hidden_size, head_dim=case.head_size, num_attention_heads=case.num_heads,
        num_key_value_heads=case.num_kv_heads, attention_bias=True, rms_norm_eps=1e-5, pad_token_id=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}))


@torch.no_grad()
def new_model(side, case):
    """A model with random weights, made in its dtype on its device. Norms and biases are random too: a swap would show."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(case.dtype)
    try:
        with torch.device(case.device):
            model = {"ours": our_model, "theirs": their_model}[side](case)
    finally:
        torch.set_default_dtype(before)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.02)
    return model


@torch.no_grad()
def copy_weights(ours, theirs, case):
    """Give theirs the weights of ours. Raises ValueError if a name of either side is left over."""
    names = {"transformer.embedding.word_embeddings": "model.embed_tokens", "transformer.output_layer": "lm_head",
             "transformer.encoder.final_layernorm": "model.norm"}
    parts = {"input_layernorm": "input_layernorm", "post_attention_layernorm": "post_attention_layernorm",
             "self_attention.dense": "self_attn.o_proj", "mlp.dense_h_to_4h": "mlp.gate_up_proj",
             "mlp.dense_4h_to_h": "mlp.down_proj"}
    state, sizes = {}, [heads * case.head_size for heads in (case.num_heads, case.num_kv_heads, case.num_kv_heads)]
    for i in range(case.num_layers):
        old, new = f"transformer.encoder.layers.{i}", f"model.layers.{i}"
        names |= {f"{old}.{a}": f"{new}.{b}" for a, b in parts.items()}
        qkv = ours.get_submodule(f"{old}.self_attention.query_key_value")
        for part, weight, bias in zip("qkv", qkv.weight.split(sizes), qkv.bias.split(sizes)):
            state[f"{new}.self_attn.{part}_proj.weight"], state[f"{new}.self_attn.{part}_proj.bias"] = weight, bias
    for name, parameter in ours.named_parameters():
        if "query_key_value" not in name:
            state[names[name.removesuffix(".weight")] + ".weight"] = parameter
    theirs.load_state_dict(state)


def new_batch(side, case):
    """The last third of each row is the target. Returns what `side` takes (ours: the contract of data/dataset.py)."""
    ids = torch.randint(1, case.vocab_size, (case.batch_size, case.num_tokens), generator=torch.Generator().manual_seed(1))
    num_source = case.num_tokens * 2 // 3
    rows = [{"input_ids": row, "labels": [-100] * num_source + row[num_source:], "num_prefix": 0} for row in ids.tolist()]
    batch = collate(rows, 0, MODE["glm3"].positions)
    if side == "theirs":
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": batch["labels"]}
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def equal_pair(case):
    """Both models with equal weights, and the largest difference of their logits / the logits' standard deviation.

    Raises ValueError when they differ: nothing they are timed for would mean anything.
    """
    models = {side: new_model(side, case) for side in SIDES}
    copy_weights(*models.values(), case)
    ids = new_batch("theirs", case)["input_ids"][:1, :256]
    with torch.no_grad():
        ours, theirs = (models[side].eval()(input_ids=ids, use_cache=False).logits for side in SIDES)
    error = ((ours - theirs).abs().max() / theirs.std()).item()
    if not error < MAX_LOGIT_ERROR:
        raise ValueError(f"the two models are not the same function: logits differ by {error:.1e} standard deviations.")
    return models, error


class Trainee:
    """A model with LoRA, its optimizer and its batch."""

    def __init__(self, side, case, model):
        if case.checkpointing:
            model.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
        # peft would hold adapters in fp32 beside a bf16 base; DeepSpeed trains them in the base's dtype, so both do here.
        self.model = add_lora(model, 8, 16, 0.0, LORA_TARGETS[side], "random").to(case.dtype).train()
        self.parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4)
        self.batch = new_batch(side, case)
        self.losses = [self.step() for _ in range(case.warmup)]

    def step(self):
        """One optimizer step. Returns its loss (CPU-GPU sync)."""
        loss = self.model(**self.batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()


def take_turn(case, trainee):
    """Time `case.steps` steps. Returns seconds of each."""
    secs = []
    for _ in range(case.steps):
        synchronize(case)
        start = time.perf_counter()
        trainee.losses.append(trainee.step())
        synchronize(case)
        secs.append(time.perf_counter() - start)
    return secs


def synchronize(case):
    if case.device == "cuda":
        torch.cuda.synchronize()


def on_cpu(case, quick):
    """Both models in one process, step by step in turn; memory from children started before anything is built here."""
    peaks = {side: peak_of_child(side, quick) for side in SIDES}
    models, error = equal_pair(case)
    trainees = {side: Trainee(side, case, models[side]) for side in SIDES}
    secs = {side: [] for side in SIDES}
    for turn in range(case.turns):
        for side in SIDES if turn % 2 else reversed(SIDES):
            secs[side] += take_turn(case, trainees[side])
    return {side: facts(case, trainees[side], secs[side], peaks[side]) for side in SIDES}, error


def on_cuda(case):
    """One model at a time on the card, in turns; the logits are compared on two layers in fp32."""
    error = equal_pair(replace(case, num_layers=2, dtype=torch.float32))[1]
    secs, found = {side: [] for side in SIDES}, {}
    for side in SIDES * case.turns:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        trainee = Trainee(side, case, new_model(side, case))
        secs[side] += take_turn(case, trainee)
        found[side] = facts(case, trainee, secs[side], torch.cuda.max_memory_allocated() - before)
        del trainee
    return found, error


def facts(case, trainee, secs, peak_bytes):
    return {"tokens_per_s": round(case.batch_size * case.num_tokens / median(secs), 1),
            "median_step_secs": round(median(secs), 5), "step_secs": [round(s, 5) for s in secs],
            "peak_gib": round(peak_bytes / 2**30, 3), "lora_parameters": sum(p.numel() for p in trainee.parameters),
            "first_loss": trainee.losses[0], "last_loss": trainee.losses[-1]}


def peak_of_child(side, quick):
    """Peak memory in bytes of a fresh process that builds one model and takes some steps."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--device", "cpu", "--memory_of", side]
    return int(subprocess.run(command + ["--quick"] * quick, cwd=ROOT, check=True, stdout=subprocess.PIPE).stdout)


def own_peak(side, case):
    """What `peak_of_child` runs: VmHWM after some steps minus VmRSS with everything imported and nothing built."""
    before = resident("VmRSS")
    take_turn(replace(case, steps=3), Trainee(side, case, new_model(side, case)))
    return resident("VmHWM") - before


def resident(field):
    """A line of this process's /proc status, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[field].split()[0]) * 1024


def compare(case, quick):
    """One case -> what is written and printed about it."""
    sides, error = on_cpu(case, quick) if case.device == "cpu" else on_cuda(case)
    ours, theirs = sides["ours"], sides["theirs"]
    return {"case": {**asdict(case), "dtype": str(case.dtype).removeprefix("torch.")}, "logits_error": error, **sides,
            "speed_ratio": round(ours["tokens_per_s"] / theirs["tokens_per_s"], 3),
            "memory_ratio": round(ours["peak_gib"] / max(theirs["peak_gib"], 1e-3), 3)}


def table(result):
    case = result["case"]
    lines = [f"{case['name']} on {case['device']}: {case['num_layers']} layers of {case['hidden_size']}, batch "
             f"{case['batch_size']} x {case['num_tokens']}, logits differ by {result['logits_error']:.0e} deviations",
             f"  {'':8}{'s/step':>10}{'tokens/s':>12}{'peak GiB':>10}{'LoRA':>12}{'first loss':>12}"]
    for side in SIDES:
        row = result[side]
        lines.append(f"  {side:8}{row['median_step_secs']:10.4f}{row['tokens_per_s']:12,.0f}{row['peak_gib']:10.3f}"
                     f"{row['lora_parameters']:12,}{row['first_loss']:12.5f}")
    aim = f" (aim: <= {MAX_MEMORY_RATIO})" if case["device"] == "cpu" else ""
    lines.append(f"  tokens/s x {result['speed_ratio']:.2f} (aim: >= {MIN_SPEED_RATIO:.0f}), "
                 f"memory x {result['memory_ratio']:.2f}{aim}")
    return "\n".join(lines)


def machine(device):
    """What the numbers depend on, without names of hosts or folders."""
    cpu = [line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers", "peft")},
            "cpu": cpu[0] if cpu else platform.machine(), "threads": torch.get_num_threads(),
            "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
            "load_at_start": os.getloadavg()[0],
            "card": torch.cuda.get_device_name() if device == "cuda" else None}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/, with --quick none")
    parser.add_argument("--memory_of", choices=SIDES, help=argparse.SUPPRESS)  # a child of `peak_of_child`
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if args.memory_of:
        return print(own_peak(args.memory_of, cases(args.device, args.quick)[0]))
    report = {"machine": machine(args.device), "results": []}
    for case in cases(args.device, args.quick):
        report["results"].append(compare(case, args.quick))
        print(table(report["results"][-1]), flush=True)
    out = args.out or (None if args.quick else ROOT / "benchmarks" / "results" / f"step_time_{args.device}.json")
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
