#!/usr/bin/env bash
# deepspeed 0.19.8, torch 2.13.0: with {"bf16": {"enabled": true}} the gradients of the micro-batches of a step are added up
# in bf16, at ZeRO stages 1, 2 and 3, although masters and moments are fp32. Small contributions vanish: one gradient of 1
# and 64 of 1/512 have the sum 1.125; what arrives has the norm 1.0. Only {"data_types": {"grad_accum_dtype": "fp32"}} gives
# 1.125. So in bf16 more accumulation is not the same as a larger micro-batch.
#
# And asking for it changes the optimizer class at stage 1 alone: BF16_Optimizer instead of DeepSpeedZeroOptimizer, whose
# attributes (bit16_groups, single_partition_of_fp32_groups) code for stages 1 and 2 relies on; stage 2 keeps its class.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 deepspeed==0.19.8 numpy==2.4.6
cat >"$folder/sums.py" <<'PY'
import os
import sys

os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_SIZE="1", MASTER_ADDR="127.0.0.1", DS_ACCELERATOR="cpu")
os.environ["MASTER_PORT"] = sys.argv[3]
import deepspeed
import torch

stage, dtype = int(sys.argv[1]), sys.argv[2]
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
deepspeed.init_distributed("gloo", verbose=False)
model = torch.nn.Linear(1, 1, bias=False)
config = {
    "train_micro_batch_size_per_gpu": 1,
    "gradient_accumulation_steps": 65,
    "bf16": {"enabled": True},
    "zero_optimization": {"stage": stage},
    "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "torch_adam": True}},
    "steps_per_print": 2**31,
}
if dtype != "default":
    config["data_types"] = {"grad_accum_dtype": dtype}
engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=config)
for i in range(65):  # the loss is the weight times the input: its gradient is the input. DeepSpeed divides by 65.
    x = torch.tensor([[65.0 if i == 0 else 65.0 / 512]], dtype=torch.bfloat16)
    engine.backward(engine(x).sum())
    engine.step()
print("RESULT", stage, dtype, f"{float(engine.get_global_grad_norm()):.4f}", type(engine.optimizer).__name__)
PY
port=29760
for stage in 1 2 3; do
    for dtype in default fp32; do
        port=$((port + 1))
        "$folder/venv/bin/python" "$folder/sums.py" "$stage" "$dtype" "$port" 2>/dev/null | grep RESULT
    done
done | tee "$folder/found"
diff - "$folder/found" <<'TXT' && echo "as stated"
RESULT 1 default 1.0000 DeepSpeedZeroOptimizer
RESULT 1 fp32 1.1250 BF16_Optimizer
RESULT 2 default 1.0000 DeepSpeedZeroOptimizer
RESULT 2 fp32 1.1250 DeepSpeedZeroOptimizer
RESULT 3 default 1.0000 DeepSpeedZeroOptimizer_Stage3
RESULT 3 fp32 1.1250 DeepSpeedZeroOptimizer_Stage3
TXT
