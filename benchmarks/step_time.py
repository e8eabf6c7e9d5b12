"""One LoRA training step of our ChatGLM3 against the same network in transformers: tokens per second and peak memory.

    python benchmarks/step_time.py                  # the card if there is one, else the CPU; some minutes
    python benchmarks/step_time.py --device cpu     # writes benchmarks/results/step_time_cpu.json
    python benchmarks/step_time.py --quick          # tiny shapes, some seconds, writes nothing without --out

Ours is MODE["glm3"] fed by our `collate`, theirs `GlmForCausalLM` with its normal loss, both with peft LoRA of rank 8
on every linear layer of a block. Before anything is timed, fp32 logits must agree on equal weights. Two thirds of a row
are no targets; rows are full, which spares theirs a mask. A step is forward, backward and AdamW on the LoRA parameters.

CPU: both models stand in one process and step in turns; run it alone, since threads that lose a core hold up the
others. Memory is measured in a fresh process for each (the allocator gives nothing back): highest resident size minus
that with everything imported and nothing built, by /proc, so Linux only (ru_maxrss would carry over the parent's peak).
Card: a fresh process for each model in turns, memory as torch counts it. Not here: DeepSpeed, several cards, loading.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch
from transformers import GlmConfig, GlmForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from glm_finetune import MODE  # noqa: E402 (the repository is not installed)
from glm_finetune.data.dataset import collate  # noqa: E402
from glm_finetune.errors import UserError  # noqa: E402
from glm_finetune.models.again import Lean  # noqa: E402
from glm_finetune.models.network import enable_checkpointing  # noqa: E402
from glm_finetune.tuning.lora import add_lora  # noqa: E402

SIDES = ("ours", "theirs")
MAX_LOGIT_ERROR = 1e-4  # largest difference of fp32 logits / their standard deviation
LORA_TARGETS = {
    "ours": ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"),
    "theirs": ("q_proj", "k_proj", "v_proj", "o_proj", "gate_up_proj", "down_proj"),
}
PARTNERS = (
    ("transformer.embedding.word_embeddings", "model.embed_tokens"),
    ("transformer.output_layer", "lm_head"),
    ("transformer.encoder.final_layernorm", "model.norm"),
    ("transformer.encoder.layers", "model.layers"),
    ("self_attention.dense", "self_attn.o_proj"),
    ("self_attention.query_key_value", "self_attn.{}_proj"),
    ("dense_h_to_4h", "gate_up_proj"),
    ("dense_4h_to_h", "down_proj"),
)  # parts of our names, and of theirs


def config_of(num_layers, hidden_size, ffn_hidden_size, num_heads, vocab_size):
    """The shapes in a ChatGLM2Config's words."""
    return dict(
        num_layers=num_layers,
        hidden_size=hidden_size,
        ffn_hidden_size=ffn_hidden_size,
        add_qkv_bias=True,
        num_attention_heads=num_heads,
        kv_channels=hidden_size // num_heads,
        multi_query_attention=True,
        multi_query_group_num=2,
        padded_vocab_size=vocab_size,
        layernorm_epsilon=1e-5,
    )


@dataclass(frozen=True)
class Case:
    """A comparison. config: see `config_of`. steps: timed ones; warmup: steps of a new model before them."""

    name: str
    device: str
    config: dict
    dtype: torch.dtype = torch.float32
    batch_size: int = 4
    num_tokens: int = 512
    checkpointing: bool = False
    steps: int = 15
    warmup: int = 2
    rank: int = 8


def cases(device, quick):
    """The comparisons made on a device: on a card ChatGLM3-6B itself, without and with gradient checkpointing."""
    if quick:
        return [Case("tiny", device, config_of(2, 64, 96, 4, 512), batch_size=2, num_tokens=24, steps=2)]
    if device == "cpu":
        return [Case("small, fp32", device, config_of(4, 512, 1408, 8, 65024))]
    full = Case("6B, bf16", device, config_of(28, 4096, 13696, 32, 65024), torch.bfloat16, 1, 1560, steps=8, warmup=3)
    return [full, replace(full, name="6B, bf16, checkpointing", checkpointing=True)]


def their_config(config):
    """A ChatGLM2Config in the words of transformers."""
    return GlmConfig(
        num_hidden_layers=config.num_layers,
        vocab_size=config.padded_vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.ffn_hidden_size,
        num_attention_heads=config.num_attention_heads,
        pad_token_id=None,
        head_dim=config.kv_channels,
        num_key_value_heads=config.num_kv_heads,
        attention_bias=config.add_qkv_bias,
        rms_norm_eps=config.layernorm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


@torch.no_grad()
def new_model(side, case):
    """A model with random weights, made in its dtype on its device; norms and biases random too, so that swaps show."""
    torch.set_default_dtype(case.dtype)
    config = MODE["glm3"].config(**case.config)
    with torch.device(case.device):
        model = MODE["glm3"].model(config) if side == "ours" else GlmForCausalLM(their_config(config))
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        parameter.normal_(1.0 if "norm" in name else 0.0, 0.02)
    return model


@torch.no_grad()
def copy_weights(ours, theirs):
    """Give theirs the weights of ours; every name of both must find its partner."""
    sizes, state = [getattr(theirs.model.layers[0].self_attn, f"{part}_proj").out_features for part in "qkv"], {}
    for name, parameter in ours.named_parameters():
        for our_part, their_part in PARTNERS:
            name = name.replace(our_part, their_part)
        parts = zip("qkv", parameter.split(sizes)) if "{}" in name else [("", parameter)]
        state |= {name.format(part): tensor for part, tensor in parts}
    theirs.load_state_dict(state)


def new_batch(side, case):
    """What `side` takes (ours: the contract of data/dataset.py). The last third of each row is the target."""
    start, generator = case.num_tokens * 2 // 3, torch.Generator().manual_seed(1)
    ids = torch.randint(1, case.config["padded_vocab_size"], (case.batch_size, case.num_tokens), generator=generator)
    rows = [{"input_ids": row, "labels": [-100] * start + row[start:], "num_prefix": 0} for row in ids.tolist()]
    batch = collate(rows, 0, MODE["glm3"].positions)
    if side == "theirs":
        batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": batch["labels"]}
    return {name: tensor.to(case.device) for name, tensor in batch.items()}


def equal_pair(case):
    """Both models with equal weights, and how far apart their logits are. Raises UserError beyond MAX_LOGIT_ERROR."""
    models = {side: new_model(side, case).eval() for side in SIDES}
    copy_weights(models["ours"], models["theirs"])
    ids = new_batch("theirs", case)["input_ids"][:1, :256]
    with torch.no_grad():
        ours, theirs = (models[side](input_ids=ids, use_cache=False).logits for side in SIDES)
    error = ((ours - theirs).abs().max() / theirs.std()).item()
    if not error < MAX_LOGIT_ERROR:
        raise UserError(f"these are two different functions: logits differ by {error:.1e} standard deviations.")
    return models, error


def adapted(side, model, rank, dropout):
    """LoRA on all linear layers; theirs with peft's own layers, as it comes."""
    model = add_lora(model, rank, 2 * rank, dropout, LORA_TARGETS[side], "random")
    for part in model.modules() if side == "theirs" else ():
        if isinstance(part, Lean):
            part.lean = False
    return model


def new_trainee(side, case, model, batch=None):
    """LoRA on `model`, its optimizer and its batch (default: `new_batch`)."""
    if case.checkpointing:
        enable_checkpointing(model)
    # peft keeps fp32 adapters beside a 16-bit base; DeepSpeed trains them in the base's dtype, so here both sides do.
    model = adapted(side, model, case.rank, 0.0).to(case.dtype).train()
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4)
    return model, optimizer, new_batch(side, case) if batch is None else batch


def step(model, optimizer, batch):
    """One optimizer step -> its seconds and its loss."""
    start = time.perf_counter()
    loss = model(**batch, use_cache=False).loss
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = loss.item()  # CPU-GPU sync: the copy is queued behind the whole step
    return round(time.perf_counter() - start, 5), loss


def measure(side, case):
    """What a fresh process finds out about one model; on the CPU the warm-up is enough for that."""
    before = resident("VmRSS")
    on_card, trainee = case.device == "cuda", new_trainee(side, case, new_model(side, case))
    taken = [step(*trainee) for _ in range(case.warmup + case.steps * on_card)]
    peak = torch.cuda.max_memory_allocated() if on_card else resident("VmHWM") - before
    num_parameters = sum(p.numel() for p in trainee[0].parameters() if p.requires_grad)
    return {"peak_gib": peak / 2**30, "lora_parameters": num_parameters, "taken": taken}


def resident(name):
    """A size in /proc/self/status, in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def in_child(side, index, args):
    """`measure` in a process of its own. index: of the case."""
    command = [sys.executable, "-m", "benchmarks.step_time", "--device", args.device, "--child", f"{index}:{side}"]
    return json.loads(subprocess.check_output(command + ["--quick"] * args.quick, cwd=ROOT))


def in_turns(case, models):
    """Train both models of one process in turns. Returns {side: [(seconds, loss) of each step]}."""
    trainees, taken = {side: new_trainee(side, case, models[side]) for side in SIDES}, {side: [] for side in SIDES}
    for i in range(case.warmup + case.steps):
        for side in SIDES if i % 2 else reversed(SIDES):
            taken[side].append(step(*trainees[side]))
    return taken


def compare(case, index, args):
    """What is written about a case."""
    found = {side: in_child(side, index, args) for side in SIDES}
    first_turn = {side: found[side].pop("taken") for side in SIDES}
    if case.device == "cuda":  # too large for both at a time: two layers are compared
        error = equal_pair(replace(case, config={**case.config, "num_layers": 2}, dtype=torch.float32))[1]
        turns = [first_turn, {side: in_child(side, index, args)["taken"] for side in SIDES}]
    else:
        models, error = equal_pair(case)
        turns = [in_turns(case, models)]
    for side in SIDES:
        secs = [second for turn in turns for second, _ in turn[side][case.warmup :]]
        losses = [loss for _, loss in turns[0][side]]
        found[side] |= {"median_secs": median(secs), "fastest_secs": min(secs), "secs": secs, "losses": losses}
    ratios = [found["ours"][key] / found["theirs"][key] for key in ("median_secs", "fastest_secs", "peak_gib")]
    return {
        "case": {**asdict(case), "dtype": str(case.dtype)},
        "logits_error": error,
        **found,
        "speed_ratio": 1 / ratios[0],
        "fastest_step_ratio": 1 / ratios[1],
        "memory_ratio": ratios[2],
    }


def show(result):
    case = Case(**result["case"])
    print(
        f"{case.name}, {case.device}, batch {case.batch_size} x {case.num_tokens}\n"
        f"        s/step (fastest)   tokens/s  peak GiB  LoRA parameters  first loss"
    )
    for side in SIDES:
        found, tokens_per_s = result[side], case.batch_size * case.num_tokens / result[side]["median_secs"]
        print(
            f"{side:6}{found['median_secs']:8.3f} ({found['fastest_secs']:.3f}){tokens_per_s:12,.0f}"
            f"{found['peak_gib']:10.3f}{found['lora_parameters']:17,}{found['losses'][0]:12.5f}"
        )
    print(
        f"logits differ by {result['logits_error']:.0e} standard deviations. Tokens/s x {result['speed_ratio']:.2f} "
        f"(aim: 2 or more; of the fastest steps x {result['fastest_step_ratio']:.2f}), memory x "
        f"{result['memory_ratio']:.2f} (aim on a CPU: 0.6 or less)"
    )


def machine(device):
    """What the numbers depend on, without names of hosts or folders."""
    cpu = re.search("model name\\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers", "peft")},
        "device": torch.cuda.get_device_name() if device == "cuda" else cpu and cpu[1],
        "threads": torch.get_num_threads(),
        "load_at_start": os.getloadavg()[0],
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/, with --quick none")
    parser.add_argument("--child", help=argparse.SUPPRESS)  # CASE:SIDE, see `in_child`
    args = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    if args.child:
        index, side = args.child.split(":")
        return print(json.dumps(measure(side, cases(args.device, args.quick)[int(index)])))
    report = {"machine": machine(args.device), "results": []}
    for index, case in enumerate(cases(args.device, args.quick)):
        report["results"].append(compare(case, index, args))
        show(report["results"][-1])
    out = args.out or ROOT / f"benchmarks/results/step_time_{args.device}.json"
    if args.out or not args.quick:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
