"""Host memory that two ranks need, together, to load a checkpoint under ZeRO-3: each keeps a half from the start.

    python benchmarks/zero3_loading.py                  # prints the figures, writes results/zero3_loading_cpu.json
    python benchmarks/zero3_loading.py --hidden 512     # a smaller model

The checkpoint has ChatGLM3-6B's proportions at a smaller width (the embedding's share of all weights included), random
bf16 weights and shards of a sixth of the whole. On CPUs the "card's" memory is the host's, so that the figure counts
everything. Memory is the growth of the ranks' proportional set size (Pss: pages that both map are counted once) over
what the imports take, sampled every few milliseconds, at its peak; beside it the sum of the peaks of their resident
set sizes, in which pages of the files count for each rank.
"""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
RESULT = ROOT / "benchmarks/results/zero3_loading_cpu.json"
SAMPLE_SECS = 0.003


def shape(hidden):
    """config.json of ChatGLM3-6B scaled to a width: the same number of layers, the same ratios."""
    scale = hidden / 4096
    return dict(
        hidden_size=hidden,
        ffn_hidden_size=int(13696 * scale),
        padded_vocab_size=int(65024 * scale),
        num_layers=28,
        num_attention_heads=32,
        kv_channels=hidden // 32,
        multi_query_attention=True,
        multi_query_group_num=2,
        add_qkv_bias=True,
        seq_length=2048,
        torch_dtype="bfloat16",
    )


def make_checkpoint(folder, hidden):
    """A folder with random bf16 weights in shards; returns their size in bytes. The tokenizer is not needed here."""
    import torch

    from glm_finetune import MODE
    from glm_finetune.weights import write_json, write_sharded

    write_json(shape(hidden), folder / "config.json")
    with torch.device("meta"):
        model = MODE["glm3"].model(MODE["glm3"].config.from_pretrained(folder))
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    total = sum(size.numel() for size in sizes.values()) * 2
    tensors = ((name, torch.randn(size, dtype=torch.bfloat16) * 0.02) for name, size in sizes.items())
    write_sharded(tensors, folder, max_shard_bytes=total // 6)
    return total


def memory(kind):
    """Bytes of this process: "Pss" or "Rss"."""
    return int(re.search(rf"^{kind}: +(\d+)", Path("/proc/self/smaps_rollup").read_text(), re.MULTILINE)[1]) * 1024


class Peak(threading.Thread):
    """Samples the memory of this process until `stop`."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak, self.running = {"Pss": 0, "Rss": 0}, True

    def run(self):
        while self.running:
            for kind in self.peak:
                self.peak[kind] = max(self.peak[kind], memory(kind))
            time.sleep(SAMPLE_SECS)

    def stop(self):
        self.running = False
        self.join()
        return self.peak


def load(folder, result):
    """What each rank does: load, write the growth of its memory to `result`."""
    import torch

    from glm_finetune import MODE, build, dist
    from glm_finetune.config import TrainConfig
    from glm_finetune.run import engine
    from glm_finetune.run.ds_config import read_ds_file, resolve

    device = torch.device("cpu")
    config = TrainConfig(model_name_or_path=folder, train_path="", output_dir="", learning_rate=1e-4)
    engine.start(device)
    ds_config = resolve(read_ds_file("ds_zero3_no_offload.json"), config, dist.world_size(), "bf16", "cpu")
    place = engine.Partitioned(torch.bfloat16, device, ds_config)
    dist.barrier()
    before, peak = {kind: memory(kind) for kind in ("Pss", "Rss")}, Peak()
    peak.start()
    model = build.load_base(MODE["glm3"], folder, place)
    dist.barrier()
    growth = {kind: value - before[kind] for kind, value in peak.stop().items()}
    after = {kind: memory(kind) - before[kind] for kind in before}
    kept = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    Path(result).write_text(json.dumps({"growth": growth, "after": after, "kept": kept}))
    dist.barrier()
    os._exit(0)  # nothing to close: the model was only loaded


def run_ranks(folder, world_size):
    """Start the ranks and return what each wrote."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    common = dict(WORLD_SIZE=str(world_size), LOCAL_SIZE=str(world_size), MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    common |= dict(OMP_NUM_THREADS="1", MALLOC_ARENA_MAX="1", DS_ACCELERATOR="cpu")
    results = [folder / f"rank{rank}.json" for rank in range(world_size)]
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank_of", str(folder), "--result", str(results[rank])],
            env={**os.environ, **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world_size)
    ]
    if [process.wait() for process in processes] != [0] * world_size:
        sys.exit("error: a rank failed")
    return [json.loads(result.read_text()) for result in results]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=1024, help="width of the model, a multiple of 512")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--output", default=str(RESULT))
    parser.add_argument("--rank_of", help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rank_of:
        load(arguments.rank_of, arguments.result)
    folder = Path(tempfile.mkdtemp(prefix="zero3-loading-"))
    try:
        weight_bytes = make_checkpoint(folder, arguments.hidden)
        ranks = run_ranks(folder, arguments.ranks)
    finally:
        shutil.rmtree(folder)
    sums = {kind: sum(rank["growth"][kind] for rank in ranks) for kind in ("Pss", "Rss")}
    figures = {
        "hidden": arguments.hidden,
        "ranks": arguments.ranks,
        "weights_mib": round(weight_bytes / 2**20, 1),
        "kept_of_weights": [round(rank["kept"] / weight_bytes, 3) for rank in ranks],
        "peak_pss_of_weights": round(sums["Pss"] / weight_bytes, 3),
        "peak_rss_of_weights": round(sums["Rss"] / weight_bytes, 3),
        "peak_pss_of_weights_by_rank": [round(rank["growth"]["Pss"] / weight_bytes, 3) for rank in ranks],
    }
    Path(arguments.output).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
