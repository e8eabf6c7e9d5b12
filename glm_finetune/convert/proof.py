"""Whether a merged model is base + adapter: by its logits, before and after it is written.

samples = sample(model, tokenizer, folder)       # of base + adapter
check_sum(merged_model, samples)                 # in fp32
check_written(merged_model, temporary)           # every tensor is the sum's, rounded
"""

import torch

from glm_finetune.errors import UserError
from glm_finetune.generator import generate
from glm_finetune.weights import iter_tensors

PROMPTS = ("你好", "发动机水温高，风扇不转，是什么故障？", "Write a function that reverses a list.")
# Largest logit difference that rounding the merged weights explains, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


@torch.inference_mode()
def sample(model, tokenizer, folder):
    """[(ids, logits)]: each prompt with up to 16 greedy tokens, (1, T) int64 and (T, V) fp32, from base + adapter."""
    samples = []
    for prompt in PROMPTS:
        messages = [{"role": "user", "content": prompt}]
        asked = folder.mode.render(tokenizer, messages, style=folder.prompt.template).input_ids
        (answer,) = generate(model, tokenizer, folder.mode, [asked], [16])
        ids = torch.tensor([asked + answer], device=model.device)
        samples.append((ids, model(input_ids=ids, use_cache=False).logits[0]))
    return samples


def check_sum(model, samples):
    """Raise UserError unless the merged model in fp32 gives the logits of base + adapter."""
    difference, scale, _ = compare(model, samples)
    if not difference <= TOLERANCE[torch.float32] * scale:
        raise UserError(f"merging changed the logits by {difference:.2e} of {scale:.1f} in fp32; nothing was written.")


def check_written(model, folder):
    """Raise UserError unless every tensor in `folder` is the merged one, rounded to the file's dtype."""
    merged = {**dict(model.named_parameters(remove_duplicate=False)), **model.stored_buffers()}
    for name, tensor in iter_tensors(folder):
        if not torch.equal(tensor, merged[name].detach().to(tensor.dtype)):
            raise UserError(f"{folder}: {name} was not written as it was merged; the folder was removed.")


@torch.inference_mode()
def compare(model, samples):
    """Largest logit difference, largest logit, share of equal likeliest tokens, of a model against `samples`."""
    difference, scale, equal = 0.0, 0.0, []
    for ids, expected in samples:
        logits = model(input_ids=ids, use_cache=False).logits[0]
        difference = max(difference, (logits - expected).abs().max().item())
        scale = max(scale, expected.abs().max().item())
        equal.append((logits.argmax(-1) == expected.argmax(-1)).float())
    return difference, scale, torch.cat(equal).mean().item()
