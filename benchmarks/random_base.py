"""train.py itself on a base with random weights that is never written: for `gpu_stages.py`.

    python -m benchmarks.random_base FOLDER cuda|cpu NAME 0|1 flags of train.py...       # 1: tiny shapes

The weights are made on the device as they would be read, and no checkpoint is written (`all` would write 100 GB).
Prints `RESULT` and, as JSON, the last line of metrics.jsonl.
"""

import json
import os
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))


def main():
    folder, device, name, is_quick, *flags = sys.argv[1:]
    import torch

    import train
    from benchmarks import train_types
    from benchmarks.zero3_loading import shape
    from glm_finetune import MODE, build, weights
    from glm_finetune.run.checkpoint import Saver

    quick, base = is_quick == "1", Path(folder) / "base"
    fields = shape(128 if quick else 4096) | {"seq_length": 8192}
    if quick:
        fields |= dict(num_layers=2, num_attention_heads=4, kv_channels=32, padded_vocab_size=2048)
    if not base.is_dir():
        train_types.make_base(base, fields, torch.bfloat16, with_weights=False)
        train_types.write_data(Path(folder) / "data.jsonl", 40, 64 if quick else 1024)

    def random_tensors(_):
        with torch.device("meta"):
            model = MODE["glm3"].model(MODE["glm3"].config.from_pretrained(base))
        for name, parameter in model.named_parameters():
            tensor = torch.empty(parameter.shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02)
            yield name, tensor.abs() * 50 if "norm" in name else tensor

    weights.iter_tensors, build.weight_files, Saver.save = random_tensors, lambda folder: [], lambda *_, **__: "nothing"
    steps, length = (4, 64) if quick else (20, 1024)
    command = ["--mode", "glm3", "--model_name_or_path", str(base), "--train_path", f"{folder}/data.jsonl", *flags]
    command += ["--output_dir", f"{folder}/{name}", "--gradient_checkpointing", "--max_steps", str(steps)]
    command += ["--show_loss_step", str(steps // 2), "--per_device_train_batch_size", "1", "--learning_rate", "1e-5"]
    command += ["--max_len", str(length), "--max_src_len", str(length // 2), "--device", device, "--precision", "bf16"]
    sys.argv, start = ["train.py", *command], time.perf_counter()
    os.environ.pop("RANK", None)
    train.main()
    last = json.loads((Path(folder) / name / "metrics.jsonl").read_text().splitlines()[-1])
    shown = {key: last.get(key) for key in ("loss", "tokens_per_s", "peak_gib")}
    print("RESULT", json.dumps({**shown, "secs": round(time.perf_counter() - start, 1)}))


if __name__ == "__main__":
    main()
