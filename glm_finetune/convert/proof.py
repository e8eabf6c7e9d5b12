"""Whether a merged model is base + adapter: each sum when it is formed, the logits when it is written.

check_sum(name, probe(lora_layer), probe(merged_layer))              # a layer's results, in fp32
difference, scale, agreement = compare(folder, network, written, tokenizer)

The logits are formed with one layer's weights in memory at a time, for texts of a dozen tokens, in fp32.
"""

from contextlib import contextmanager

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from tqdm import tqdm

from glm_finetune.errors import UserError
from glm_finetune.weights import open_tensors, replace_parameter

TEXTS = (  # question and answer, which is given: one pass is enough
    ("你好", "你好，有什么可以帮助你的吗？"),
    ("发动机水温高，风扇不转，是什么故障？", "先检查风扇的保险丝和温控开关，再检查水泵。"),
    ("Write a function that reverses a list.", "def reverse(items): return items[::-1]"),
)
# Largest logit difference that rounding the merged weights explains, as a share of the largest logit.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.02, torch.bfloat16: 0.1}


def empty_model(mode, config):
    """A model whose parameters have shapes and no memory: one zero, seen everywhere. peft knows what to do with it."""
    with torch.device("meta"):
        model = mode.model(config)
    for name, parameter in list(model.named_parameters()):
        replace_parameter(model, name, torch.zeros(()).expand(parameter.shape))
    model.tie_weights()
    return model.eval().requires_grad_(False)


def is_empty(parameter):
    """Whether it is one of `empty_model`."""
    return parameter.untyped_storage().nbytes() < parameter.nbytes


def probe(layer):
    """What a linear layer or an embedding makes of fixed inputs."""
    base = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
    if isinstance(base, nn.Embedding):
        return layer(torch.arange(min(8, base.num_embeddings)))
    generator = torch.Generator().manual_seed(0)
    return layer(torch.randn(4, base.in_features, generator=generator))


def check_sum(name, before, after):
    """Raise UserError unless a merged layer gives in fp32 what base + adapter gave."""
    difference, scale = (after - before).abs().max().item(), before.abs().max().item()
    if not difference <= TOLERANCE[torch.float32] * max(scale, 1e-30):
        raise UserError(f"{name}: merging changed its results by {difference:.2e} of {scale:.1f}; nothing was written.")


def compare(folder, network, written, tokenizer):
    """Largest logit difference between the folder `written` and base + adapter, largest logit, share of equal likeliest
    tokens. folder: ModelFolder; network: without values, with the adapter in it.
    """
    samples = []
    for question, answer in TEXTS:
        messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        samples.append(torch.tensor([folder.mode.render(tokenizer, messages, style=folder.prompt.template).input_ids]))
    expected = logits_of(network, folder.base, samples, "base + adapter")
    found = logits_of(empty_model(folder.mode, network.config), written, samples, "merged")
    difference = max((a - b).abs().max().item() for a, b in zip(found, expected))
    equal = [(a.argmax(-1) == b.argmax(-1)).float() for a, b in zip(found, expected)]
    return difference, max(b.abs().max().item() for b in expected), torch.cat(equal).mean().item()


def logits_of(network, folder, samples, title):
    """[(T, V) fp32 logits] of samples, (1, T) ids each, by a network without values and the weights in a folder."""
    tensors = open_tensors(folder)
    tensors |= {name: tensors[alias] for alias, name in network.tied_names().items() if alias in tensors}
    tensors |= {alias: tensors[name] for alias, name in network.tied_names().items() if name in tensors}
    layers = next(name for name, module in network.named_modules() if module is network.layers)
    encoders = "transformer.prefix_encoder.", "transformer.prompt_encoder."  # of a base that has a prefix in it
    with filled(network, tensors, f"{network.input_embeddings_name}.", *encoders):
        streams = [network.begin({"input_ids": ids}) for ids in samples]
    hidden = [stream.hidden for stream in streams]
    for i, layer in enumerate(tqdm(network.layers, desc=f"prove: {title}", unit=" layers")):
        with filled(network, tensors, f"{layers}.{i}."):
            flows = zip(hidden, streams)
            hidden = [layer(x, of.mask, of.cos, of.sin, of.prefixes[i]) for x, of in flows]
    rest = [name for name, _ in network.named_parameters() if not name.startswith((f"{layers}.", *_ends(network)))]
    with filled(network, tensors, *rest, f"{network.output_embeddings_name}."):
        return [network.logits(x)[0] for x in hidden]


def _ends(network):
    return f"{network.input_embeddings_name}.", f"{network.output_embeddings_name}."


@contextmanager
def filled(network, tensors, *beginnings):
    """Give parameters whose names begin so their values, in fp32, and take them away again. tensors: `open_tensors`."""
    names = [name for name, p in network.named_parameters(remove_duplicate=False) if is_empty(p)]
    names = [name for name in names if name.startswith(beginnings) and ".original_module." not in name]
    before = {name: network.get_parameter(name) for name in names}
    for name in names:
        replace_parameter(network, name, tensors[name.replace(".base_layer", "")]().float())
    yield
    for name, parameter in before.items():
        replace_parameter(network, name, parameter)
