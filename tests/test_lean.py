"""What is made again, drawn again or left out changes no number: each lean way against the plain one."""

import pytest
import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import nn

from benchmarks import saved_bytes
from glm_finetune import MODE
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import without_targets
from glm_finetune.flags import parse
from glm_finetune.models.again import Dropout, Lean, RMSNorm, made_again
from glm_finetune.models.network import enable_checkpointing
from glm_finetune.run.parts import choose, with_defaults
from glm_finetune.run.run import Run
from glm_finetune.tuning.fused import FusedLinear
from glm_finetune.tuning.lora import add_lora
from tests.ranks import run_ranks, train_arguments
from tests.test_models import batch_of, dataset, load

every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
NO_DROPOUT = ["--lora_dropout", "0"]  # of the last layer fewer rows are computed, so other ones would be dropped
KINDS = {
    "lora": ["--train_type", "lora", "--lora_module_name", "all-linear", *NO_DROPOUT],
    "dora": [
        "--train_type",
        "lora",
        "--lora_module_name",
        "all-linear",
        "--lora_variant",
        "dora",
        "--lora_dropout",
        "0",
    ],
    "freeze": ["--train_type", "freeze", "--freeze_last", "1"],
    "all": ["--train_type", "all"],
    "ptuning 2": ["--train_type", "ptuning", "--pre_seq_len", "4", "--prefix_dropout", "0"],
    "ptuning 1": ["--train_type", "ptuning", "--ptuning_version", "1", "--pre_seq_len", "4", "--prefix_dropout", "0"],
}


def losses_and_gradients(mode, kind, batch, checkpoints, lean=True, checkpointing=False, compiled=False):
    """(losses of the targets, {name: gradient} of what learns) of a new model, the same each time."""
    torch.manual_seed(1)
    needed = ["--train_path", "a", "--output_dir", "b", "--model_name_or_path", str(checkpoints[mode])]
    config = parse(TrainConfig, [*needed, "--mode", mode, *KINDS[kind]])
    train_type, model = choose(config)[1], load(mode, checkpoints)
    if checkpointing:
        enable_checkpointing(model)
    model = train_type.apply(model, with_defaults(config, train_type), MODE[mode]).train()
    model.choose_ways(lean, compiled)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    losses = model(**batch, use_cache=False).token_losses
    losses.mean().backward()
    return losses.detach(), {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mode", MODE)
def test_losses_and_gradients_are_those_of_the_plain_way(mode, kind, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    given = mode, kind, batch_of(rows[:5], mode, tokenizer), checkpoints
    losses, gradients = losses_and_gradients(*given, lean=False)
    for found, grads in (losses_and_gradients(*given), losses_and_gradients(*given, checkpointing=True)):
        torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
        assert grads.keys() == gradients.keys() and any(gradient.any() for gradient in gradients.values())
        for name, gradient in grads.items():
            torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("mode", MODE)
def test_a_batch_without_targets_has_gradients_of_zero(mode, checkpoints, data_file):
    rows, tokenizer = dataset(mode, checkpoints, data_file)
    given = mode, "lora", batch_of([without_targets(rows[0])], mode, tokenizer), checkpoints
    losses, gradients = losses_and_gradients(*given)
    assert len(losses) == 0 and all(gradient is not None and not gradient.any() for gradient in gradients.values())


def test_what_is_made_again_is_what_was_made_and_not_kept():
    gate, up = (torch.randn(3, 5, requires_grad=True) for _ in range(2))
    calls = []

    def silu(x):
        calls.append(x)
        return F.silu(x)

    with made_again() as again:
        product = again(torch.mul, again(silu, gate * 1), up)
        part = product[:, 1:4].t() @ torch.ones(3, 2)  # a view of it is kept
        result = (product * product).sum() + part.square().sum()
    assert len(calls) == 1
    result.backward()
    assert len(calls) > 1
    expected = [x.detach().requires_grad_() for x in (gate, up)]
    product = F.silu(expected[0]) * expected[1]
    ((product * product).sum() + (product[:, 1:4].t() @ torch.ones(3, 2)).square().sum()).backward()
    assert torch.equal(gate.grad, expected[0].grad) and torch.equal(up.grad, expected[1].grad)


def test_a_kept_tensor_that_is_changed_in_place_is_noticed():
    gate = torch.randn(3, 5, requires_grad=True) * 1
    with made_again() as again:
        product = again(F.silu, gate)
        result = (product * product).sum()
    gate.add_(1)
    with pytest.raises(AssertionError, match="changed in place"):
        result.backward()


def ways_of_a_run(arguments):
    """(whether its parts are lean, whether its layers are compiled) of the model that train.py would train."""
    with Run.open(parse(TrainConfig, arguments)) as run:
        network = run.engine.module.get_base_model()
        lean = {part.lean for part in run.engine.module.modules() if isinstance(part, Lean)}
        return lean, {layer._compiled_call_impl is not None for layer in network.layers}


@pytest.mark.slow
@pytest.mark.parametrize(
    "flags, expected",
    [({}, ({True}, {False})), ({"lean": False}, ({False}, {False})), ({"compile": True}, ({False}, {True}))],
    ids=["default", "plain", "compiled"],
)
def test_the_flags_reach_the_layers(flags, expected, checkpoints, data_file, tmp_path):
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", **flags)
    assert run_ranks(ways_of_a_run, 1, arguments) == [expected]


@every_dtype
def test_dropout_is_torchs_and_its_mask_is_the_same_in_the_backward_pass(dtype):
    x = torch.randn(64, 33, dtype=dtype)
    results = []
    for kind in (nn.Dropout, Dropout):
        torch.manual_seed(3)
        leaf = x.clone().requires_grad_()
        out = kind(0.3).train()(leaf)
        noise = torch.rand(5)  # what is drawn afterwards is not disturbed
        out.backward(torch.ones_like(out))
        results.append((out, leaf.grad, noise, torch.rand(5)))
    for ours, theirs in zip(*results):
        assert torch.equal(ours, theirs)
    assert torch.equal(Dropout(0.3).eval()(x), x)


@every_dtype
def test_the_norm_is_torchs(dtype):
    torch.manual_seed(3)
    norm, plain = RMSNorm(48, eps=1e-5).to(dtype), nn.RMSNorm(48, eps=1e-5).double()
    nn.init.normal_(norm.weight, 1, 0.2)
    plain.load_state_dict(norm.state_dict())
    x, grad = (torch.randn(4, 7, 48, dtype=dtype) for _ in range(2))
    leaves = [x.clone().requires_grad_(), x.double().requires_grad_()]
    for layer, leaf in zip((norm, plain), leaves):
        out = layer(leaf)
        out.backward(grad.to(leaf.dtype))
    torch.testing.assert_close(norm(x), plain(x.double()).to(dtype))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad.to(dtype))
    torch.testing.assert_close(norm.weight.grad, plain.weight.grad.to(dtype))


def lora_layer(variant, checkpoints, dtype):
    """The first LoRA layer of a model, the same weights each time."""
    torch.manual_seed(3)
    model = add_lora(load("glm2", checkpoints), 4, 6, 0.0, ["dense_h_to_4h"], "base", variant)
    layers = [layer for layer in model.modules() if isinstance(layer, lora.Linear)]
    assert layers and all(type(layer) is FusedLinear for layer in layers)
    nn.init.normal_(layers[0].lora_B.default.weight, std=0.1)
    return layers[0].bfloat16().to(dtype)


def result_and_gradients(layer, lean):
    layer.lean = lean
    x = torch.linspace(-2, 2, 160).view(5, 32).bfloat16().to(layer.lora_B.default.weight.dtype).requires_grad_()
    out, learning = layer(x), [parameter for parameter in layer.parameters() if parameter.requires_grad]
    return [out, *torch.autograd.grad(out.square().sum(), [x, *learning])]


@pytest.mark.parametrize("variant", ["lora", "rslora", "dora"])
def test_a_lora_layer_is_pefts_and_rounds_no_more(variant, checkpoints):
    layer = lora_layer(variant, checkpoints, torch.float64)
    exact = result_and_gradients(layer, lean=False)
    torch.testing.assert_close(result_and_gradients(layer, lean=True), exact)
    layer = lora_layer(variant, checkpoints, torch.bfloat16)
    found = [result_and_gradients(layer, lean) for lean in (True, False)]
    errors = [[(x.double() - right).norm() / right.norm() for x, right in zip(way, exact)] for way in found]
    assert errors[0][0] <= errors[1][0]  # of what comes out of it
    assert max(errors[0]) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize("dropout, most", [(0.0, 0.45), (0.1, 0.40)])
def test_a_lora_step_keeps_less_than_half_of_what_another_keeps(dropout, most):
    ours, plain, theirs, _ = (saved_bytes.units(side, dropout) for side in saved_bytes.SIDES)
    assert ours < most * theirs and ours < 0.6 * plain


@pytest.mark.slow
def test_compiled_layers_give_the_losses_of_plain_ones(checkpoints, data_file):
    rows, tokenizer = dataset("glm3", checkpoints, data_file)
    given = "glm3", "lora", batch_of(rows[:5], "glm3", tokenizer), checkpoints
    losses, gradients = losses_and_gradients(*given, lean=False)
    found, compiled = losses_and_gradients(*given, compiled=True)
    torch.testing.assert_close(found, losses, rtol=1e-5, atol=1e-6)
    for name, gradient in compiled.items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6, msg=name)
