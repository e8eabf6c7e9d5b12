"""Every train type for some steps on a random ChatGLM3: peak memory, tokens a second, sizes of the checkpoint.

    python benchmarks/train_types.py                    # 6B shapes in bf16 on a card -> results/train_types_cuda.json
    python benchmarks/train_types.py --quick            # tiny shapes on the CPU, to see that it works
    python benchmarks/train_types.py --only lora qlora

The base is made once in a temporary folder (12.5 GB for 6B shapes; --folder keeps it elsewhere). Each train type is one
`train.py` of its own with batch 1, 1,024 tokens and gradient checkpointing; tokens/s leave out the first half.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.zero3_loading import shape  # noqa: E402 (the repository is not installed)

TYPES = {
    "freeze": ["--train_type", "freeze", "--freeze_last", "4"],
    "ptuning 2, encoder": ["--train_type", "ptuning"],
    "ptuning 2, flat": ["--train_type", "ptuning", "--prefix_projection", "False"],
    "ptuning 1": ["--train_type", "ptuning", "--ptuning_version", "1"],
    "lora": ["--train_type", "lora"],
    "lora all-linear": ["--train_type", "lora", "--lora_module_name", "all-linear"],
    "dora": ["--train_type", "lora", "--lora_variant", "dora"],
    "rslora": ["--train_type", "lora", "--lora_variant", "rslora"],
    "pissa": ["--train_type", "lora", "--lora_variant", "pissa"],
    "qlora 4": ["--train_type", "qlora"],
    "qlora 8": ["--train_type", "qlora", "--quantization_bit", "8"],
    "all": ["--train_type", "all"],
}


def make_base(folder, fields, dtype, with_weights=True):
    """A checkpoint with random weights and a tokenizer of its vocabulary (that of tiny_base and unused pieces)."""
    import torch
    from sentencepiece import sentencepiece_model_pb2

    from glm_finetune import MODE
    from glm_finetune.weights import write_json, write_sharded

    folder.mkdir(parents=True)
    pieces = sentencepiece_model_pb2.ModelProto()
    pieces.ParseFromString((ROOT / "tiny_base/tokenizer.model").read_bytes())
    for i in range(len(pieces.pieces), fields["padded_vocab_size"] - 16):
        pieces.pieces.add(piece=f"unused{i}", score=-1e9)
    (folder / "tokenizer.model").write_bytes(pieces.SerializeToString())
    shutil.copyfile(ROOT / "tiny_base/tokenizer_config.json", folder / "tokenizer_config.json")
    write_json({**json.loads((ROOT / "tiny_base/config.json").read_text()), **fields}, folder / "config.json")
    if not with_weights:
        return
    with torch.device("meta"):
        model = MODE["glm3"].model(MODE["glm3"].config.from_pretrained(folder))
    tensors = ((n, torch.randn(p.shape, dtype=dtype) * 0.02) for n, p in model.named_parameters())
    write_sharded(((n, t.abs() * 50 if "norm" in n else t) for n, t in tensors), folder)


def measure(base, out, flags, arguments):
    """One run; returns its figures, or what it said when it failed."""
    command = [sys.executable, str(ROOT / "train.py"), "--mode", "glm3", "--model_name_or_path", str(base)]
    command += ["--train_path", str(arguments.data), "--output_dir", str(out), "--gradient_checkpointing"]
    command += ["--max_steps", str(arguments.steps), "--show_loss_step", str(arguments.steps // 2)]
    command += ["--per_device_train_batch_size", "1", "--learning_rate", "1e-5", *flags]
    command += ["--max_len", str(arguments.max_len), "--max_src_len", str(arguments.max_len // 2)]
    command += ["--device", "cpu", "--precision", "fp32"] if arguments.quick else ["--precision", "bf16"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return {"error": done.stderr.strip().splitlines()[-1][:300]}
    last = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    folder = out / (out / "latest").read_text()
    files = {path: path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    state = sum(size for path, size in files.items() if "state" in path.parts)
    return {
        "tokens_per_s": round(last["tokens_per_s"], 1),
        "peak_gib": round(last["peak_gib"], 2),
        "loss": last["loss"],
        "model_mib": round((sum(files.values()) - state) / 2**20, 2),
        "state_mib": round(state / 2**20, 2),
    }


def write_data(path, num_rows, num_tokens):
    """Rows whose answers fill the length."""
    rows = [{"instruction": "请写一段文字：", "input": str(i), "output": "故障" * num_tokens} for i in range(num_rows)]
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--max_len", type=int, default=1024)
    parser.add_argument("--only", nargs="*", choices=list(TYPES), default=list(TYPES), metavar="TYPE")
    parser.add_argument("--folder", help="where the base and the runs go; default: a temporary folder")
    parser.add_argument("--output", help="JSON file of the results")
    arguments = parser.parse_args()
    import torch

    if not arguments.quick and not torch.cuda.is_available():
        sys.exit("error: no card. --quick runs tiny shapes on the CPU.")
    fields = shape(128 if arguments.quick else 4096)
    if arguments.quick:
        arguments.max_len = min(arguments.max_len, 128)
        fields |= dict(num_layers=4, num_attention_heads=4, kv_channels=32, padded_vocab_size=2048)
    folder = Path(arguments.folder or tempfile.mkdtemp(prefix="train-types-"))
    results = {"device": "CPU" if arguments.quick else torch.cuda.get_device_name(), "hidden": fields["hidden_size"]}
    results |= {"max_len": arguments.max_len, "steps": arguments.steps, "types": {}}
    try:
        if not (folder / "base").is_dir():
            make_base(folder / "base", fields, torch.bfloat16)
        arguments.data = write_data(folder / "data.jsonl", arguments.steps, arguments.max_len)
        for name in arguments.only:
            out = folder / name.replace(" ", "-").replace(",", "")
            results["types"][name] = measure(folder / "base", out, TYPES[name], arguments)
            print(f"{name:20}", results["types"][name], flush=True)
            shutil.rmtree(out, ignore_errors=True)
    finally:
        if not arguments.folder:
            shutil.rmtree(folder)
    default = None if arguments.quick else ROOT / "benchmarks/results/train_types_cuda.json"
    if arguments.output or default:
        Path(arguments.output or default).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
