"""What a LoRA step keeps for its backward pass, of ours and of the same network in transformers, both with peft.

    python benchmarks/saved_bytes.py        # a table, and benchmarks/results/saved_bytes.json; any machine

Counted is the memory of every tensor made in the forward pass that is still alive when it is over and only the loss is
held: nothing but the backward pass wants it. Batch and parameters do not count. In bf16; the slope between 2 and 4
layers, so that embedding and loss drop out. A unit is 2 x hidden bytes a token and layer, a bf16 hidden state. Ours is
also counted without what is made again, theirs with the fp32 adapters that peft gives it and with bf16 ones like ours.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from benchmarks.step_time import Case, adapted, config_of, machine, new_batch, new_model  # noqa: E402

HIDDEN, RANK, FEW, MANY = 512, 16, 2, 4  # FEW, MANY: layers
CASE = Case("saved bytes", "cpu", config_of(FEW, HIDDEN, 1408, 8, 1024), torch.bfloat16, batch_size=2, num_tokens=256)
SIDES = {  # side, lean, dtype of the adapters: DeepSpeed trains ours in the base's
    "ours": ("ours", True, torch.bfloat16),
    "--lean False": ("ours", False, torch.bfloat16),
    "GlmForCausalLM": ("theirs", None, torch.float32),
    "bf16 adapters": ("theirs", None, torch.bfloat16),
}


class Made(TorchDispatchMode):
    """Notes the memory of every tensor that is made inside, without keeping it alive."""

    def __init__(self):
        super().__init__()
        self.storages = {}  # address -> (weak reference, bytes); of a reused address the newest

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.storages[storage.data_ptr()] = StorageWeakRef(storage), storage.nbytes()
        return result

    def alive(self, but):
        """Bytes of what is still there. but: addresses that do not count."""
        there = (size for address, (ref, size) in self.storages.items() if address not in but and not ref.expired())
        return sum(there)


def kept(side, lean, dtype, dropout, num_layers):
    """Bytes that the backward pass of one step makes stay."""
    torch.manual_seed(0)
    case = replace(CASE, config={**CASE.config, "num_layers": num_layers})
    model = new_model(side, case)
    network, model = model, adapted(side, model, RANK, dropout).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype) if parameter.requires_grad else parameter.data
    if side == "ours":
        network.choose_ways(lean)
    batch = new_batch(side, case)
    given = [*model.parameters(), *model.buffers(), *(x for x in batch.values() if isinstance(x, torch.Tensor))]
    addresses = {tensor.untyped_storage().data_ptr() for tensor in given}
    with Made() as made:
        loss = model(**batch, use_cache=False).loss
    num_bytes = made.alive(addresses)
    loss.backward()  # held until here
    return num_bytes


def units(name, dropout):
    """What one of SIDES keeps, in bf16 hidden states a token and layer."""
    few, many = (kept(*SIDES[name], dropout, num_layers) for num_layers in (FEW, MANY))
    return (many - few) / (2 * HIDDEN * CASE.batch_size * CASE.num_tokens * (MANY - FEW))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/saved_bytes.json")
    args = parser.parse_args()
    results = {}
    print(f"{'units a token and layer':<24}" + "".join(f"{name:>20}" for name in SIDES) + f"{'ours / theirs':>16}")
    for dropout in (0.0, 0.1):
        found = {name: units(name, dropout) for name in SIDES}
        results[f"dropout {dropout}"] = found | {"ratio": found["ours"] / found["GlmForCausalLM"]}
        columns = "".join(f"{number:20.2f}" for number in found.values())
        print(f"LoRA dropout {dropout:<11}{columns}{results[f'dropout {dropout}']['ratio']:16.3f}")
    out = args.out or ROOT / "benchmarks/results/saved_bytes.json"
    out.write_text(json.dumps({"machine": machine("cpu"), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
