"""Learning rates of P-Tuning v2 with and without its encoder: why their defaults differ.

    python benchmarks/prefix_rate.py        # prints a table; on a CPU some minutes

A random ChatGLM3 of the 6B models' width with two layers learns data/spo_0.json for 40 steps. What counts is the width:
a rate that is right for keys and values themselves saturates every tanh of an encoder.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.train_types import make_base  # noqa: E402 (the repository is not installed)
from benchmarks.zero3_loading import shape  # noqa: E402
from glm_finetune.weights import iter_tensors  # noqa: E402

SETTINGS = ((True, 1e-4), (True, 1e-3), (True, 2e-2), (False, 1e-3), (False, 2e-2))  # encoder, learning rate


def saturation(tensors):
    """Share of the encoder's tanh outputs beyond 0.99; None without an encoder."""
    tensors = {name.removeprefix("transformer.prefix_encoder."): tensor for name, tensor in tensors.items()}
    if "trans.0.weight" not in tensors:
        return None
    hidden = tensors["embedding.weight"] @ tensors["trans.0.weight"].T + tensors["trans.0.bias"]
    return (hidden.tanh().abs() > 0.99).float().mean().item()


def train(base, out, encoder, rate):
    """(loss of the last ten steps, saturation) after 40 steps."""
    flags = {
        "mode": "glm3",
        "train_type": "ptuning",
        "model_name_or_path": base,
        "train_path": ROOT / "data/spo_0.json",
        "output_dir": out,
        "max_len": 96,
        "max_src_len": 64,
        "per_device_train_batch_size": 4,
        "max_steps": 40,
        "precision": "fp32",
        "prefix_projection": encoder,
        "prefix_dropout": 0,
        "learning_rate": rate,
    }
    command = [
        sys.executable,
        ROOT / "train.py",
        *(part for name, value in flags.items() for part in (f"--{name}", value)),
    ]
    subprocess.run([*map(str, command)], check=True, capture_output=True)
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return last["loss"], saturation(dict(iter_tensors(out / (out / "latest").read_text())))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two settings of a narrow model, to see that it runs")
    quick = parser.parse_args().quick
    fields = shape(128 if quick else 4096) | dict(num_layers=2, ffn_hidden_size=1024, padded_vocab_size=480)
    print(f"{'encoder':10}{'rate':>8}{'loss of steps 31 to 40':>26}{'tanh beyond 0.99':>20}")
    with tempfile.TemporaryDirectory(prefix="prefix-rate-") as folder:
        base = Path(folder) / "base"
        make_base(base, fields, torch.float32)
        for i, (encoder, rate) in enumerate(SETTINGS[::4] if quick else SETTINGS):
            loss, share = train(base, Path(folder) / str(i), encoder, rate)
            print(f"{encoder!s:10}{rate:8g}{loss:26.3f}{'-' if share is None else f'{share:.0%}':>20}", flush=True)


if __name__ == "__main__":
    main()
