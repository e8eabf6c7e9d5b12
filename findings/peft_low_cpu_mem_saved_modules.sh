#!/usr/bin/env bash
# peft 0.21.2, torch 2.13.0, transformers 5.23.0: PeftModel.from_pretrained(..., low_cpu_mem_usage=True) is more than a way
# to save memory. An adapter with modules_to_save whose file is bf16 (trained in bf16) on a model in fp32: by default the
# saved modules are copied into the model and become fp32; with low_cpu_mem_usage they are put in place of its own and stay
# bf16, while autocast_adapter_dtype (default True) widens the LoRA matrices alone. The first forward pass through a linear
# layer among them ends in "expected m1 and m2 to have the same dtype". Adapters without modules_to_save do not show it.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0 peft==0.21.2 transformers==5.23.0
cat >"$folder/dtypes.py" <<'PY'
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

sizes = dict(vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)


def base():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**sizes))


trained = get_peft_model(base().bfloat16(), LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"]))
trained.bfloat16().save_pretrained(sys.argv[1])
for low in (False, True):
    model = PeftModel.from_pretrained(base(), sys.argv[1], low_cpu_mem_usage=low)
    kinds = {
        "lora_A" if "lora_A" in name else "lm_head": str(parameter.dtype).removeprefix("torch.")
        for name, parameter in model.named_parameters()
        if "lora_A" in name or "modules_to_save" in name
    }
    try:
        said = str(model(torch.tensor([[1, 2, 3]])).logits.dtype).removeprefix("torch.")
    except RuntimeError as error:
        said = str(error).partition(",")[0] if "same dtype" in str(error) else "another error"
    print("RESULT", low, kinds["lora_A"], kinds["lm_head"], said)
PY
"$folder/venv/bin/python" "$folder/dtypes.py" "$folder/adapter" 2>/dev/null | grep RESULT | tee "$folder/found"
diff - "$folder/found" <<'TXT' && echo "as stated"
RESULT False float32 float32 float32
RESULT True float32 bfloat16 expected m1 and m2 to have the same dtype
TXT
