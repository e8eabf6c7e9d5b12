"""What this machine can hold, and what it shows: precision on a CPU, refusals before reading, bars, streams."""

import io
import shutil
import time

import pytest
import torch
from tqdm import tqdm

import predict
from glm_finetune import MODE, bars, build, dist, host, weights
from glm_finetune.errors import UserError
from glm_finetune.run import memory, tracker
from glm_finetune.run.engine import Partitioned
from glm_finetune.tuning.quantize import Quantized
from tests.refusal import run_main
from tests.test_training import run

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "wanted, is_large, has_bf16, expected",
    [
        (None, False, True, ("fp32", "a small model on a CPU")),
        (None, True, True, ("bf16", "a large model on a CPU")),
        (None, True, False, ("fp32", "this processor has no bf16")),
        ("fp32", True, True, ("fp32", "asked for")),
    ],
)
def test_a_large_model_on_a_cpu_is_held_in_16_bit(wanted, is_large, has_bf16, expected, monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: has_bf16)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: has_bf16)
    assert dist.choose_precision(wanted, CPU, is_large) == expected


def test_a_container_may_have_less_than_its_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(host, "CGROUP", tmp_path)
    whole = host.free_bytes()  # no container
    (tmp_path / "memory.current").write_text("5000\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 300\nactive_file 700\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert abs(host.free_bytes() - whole) < 2**30
    (tmp_path / "memory.max").write_text("9000\n")
    assert host.free_bytes() == 9000 - 5000 + 1000  # pages of files can be evicted


def test_a_model_that_does_not_fit_is_refused_before_anything_of_it_is_made(checkpoints, monkeypatch):
    monkeypatch.setattr(weights.OnDevice, "construct", lambda *_: pytest.fail("made"))
    monkeypatch.setattr(weights, "LARGE_BYTES", 0)
    monkeypatch.setattr(host, "free_bytes", lambda: 2**10)
    with pytest.raises(UserError) as refusal:
        MODE["glm3"].model.from_pretrained(checkpoints["glm3"])
    for part in (str(checkpoints["glm3"]), "float32", "0.0 GiB are free", "--precision bf16", "--quantization_bit 4"):
        assert part in str(refusal.value)


@pytest.mark.parametrize("local_ranks", ["1", "2"])
def test_what_a_place_takes_of_this_machine(local_ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local_ranks)
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 4)
    num, card = int(local_ranks), torch.device("cuda", 0)
    zero, offloading = ({"zero_optimization": section} for section in ({}, {"offload_param": {"device": "cpu"}}))
    assert weights.OnDevice(torch.bfloat16, CPU).host_bytes(100) == 200 * num  # each rank has its own
    assert weights.OnDevice(torch.bfloat16, card).host_bytes(100) == 0
    assert Quantized(torch.bfloat16, CPU, 4).host_bytes(100) == pytest.approx((20 + 45) * num)
    assert Partitioned(torch.bfloat16, CPU, zero).host_bytes(100) == 200 * num / 4
    assert Partitioned(torch.bfloat16, card, zero).host_bytes(100) == 0
    assert Partitioned(torch.bfloat16, card, offloading).host_bytes(100) == 200 * num / 4


@pytest.mark.parametrize("section, ranks", [({}, (1, 1)), ({"offload_optimizer": {"device": "nvme"}}, None)])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_state_of_what_learns_must_fit_into_this_machine(stage, section, ranks, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    model, zero = torch.nn.Linear(10, 10, bias=False).bfloat16(), {"stage": stage, **section}
    needed = (1200 / 2 + (400 if stage == 1 else 400 / 2)) * 2 if ranks else 0  # stage 1 keeps all gradients
    monkeypatch.setattr(host, "free_bytes", lambda: needed)
    memory.check_fits(model, zero, 2, CPU)
    monkeypatch.setattr(host, "free_bytes", lambda: needed - 1)
    if ranks:
        with pytest.raises(UserError, match="100 parameters learn"):
            memory.check_fits(model, zero, 2, CPU)


def test_weights_are_counted_that_are_read(checkpoints, tmp_path):
    folder = shutil.copytree(checkpoints["glm3"], tmp_path / "both")
    size = (folder / "model.safetensors").stat().st_size
    torch.save(dict(weights.iter_tensors(folder)), folder / "pytorch_model.bin")
    assert weights.weight_bytes(folder) == size and weights.weight_bytes(tmp_path) == 0


def test_a_fingerprint_is_of_the_weights_and_not_of_the_files(checkpoints, tmp_path):
    tensors, known = dict(weights.iter_tensors(checkpoints["glm"])), weights.fingerprint(checkpoints["glm"])
    half = len(tensors) // 2
    without = {name: t for name, t in tensors.items() if name != "lm_head.weight" and not name.endswith("inv_freq")}
    assert len(without) < len(tensors)
    for name, parts in {
        "parts": [dict(list(tensors.items())[i:][:half]) for i in (0, half)],
        "bare": [without],
    }.items():
        (tmp_path / name).mkdir()
        if name == "bare":
            torch.save(parts[0], tmp_path / name / "pytorch_model.bin")
        else:
            weights.write_sharded(tensors.items(), tmp_path / name, max_shard_bytes=10_000)
        assert weights.fingerprint(tmp_path / name) == known
    last = next(name for name in without if "layers.1.mlp.dense_4h_to_h.weight" in name)
    tensors[last] = tensors[last] * 1.01
    (tmp_path / "other").mkdir()
    weights.write_sharded(tensors.items(), tmp_path / "other")
    assert weights.fingerprint(tmp_path / "other") != known


@pytest.mark.parametrize("flags", [[], ["--num_beams", "2"]], ids=["greedy", "beams"])
def test_one_question_is_answered_as_in_a_file(flags, checkpoints, tmp_path, monkeypatch, capsys):
    asked = ["--model_path", checkpoints["glm3"], "--max_new_tokens", 12, *flags]
    answers, own, early = [], MODE["glm3"].model.generate, []

    def generate(*args, **kwargs):
        output = own(*args, **kwargs)
        early.append(len(answers))  # of the pieces, those that did not wait for the end
        return output

    monkeypatch.setattr(MODE["glm3"].model, "generate", generate)
    monkeypatch.setattr(predict, "show", answers.append)
    (tmp_path / "q.jsonl").write_text('{"instruction": "你好", "input": "", "output": "好"}\n', encoding="utf-8")
    output = tmp_path / "a.jsonl"
    one = run_main(predict, monkeypatch, capsys, *asked, "--instruction", "你好")
    many = run_main(predict, monkeypatch, capsys, *asked, "--test_path", tmp_path / "q.jsonl", "--output_path", output)
    assert one[0] == many[0] == 0, (one, many)
    assert (early[0] > 2) == (not flags)  # beams are not known before
    assert weights.read_json(output)["prediction"] == "".join(answers)


@pytest.mark.slow
@pytest.mark.parametrize("train_type", ["lora", "ptuning"])
@pytest.mark.parametrize("bits", [4, 8])
def test_a_base_is_asked_in_fewer_bits(bits, train_type, checkpoints, data_file, tmp_path):
    folder = run("glm3", train_type, checkpoints, data_file, tmp_path / "out", max_steps=2, learning_rate=1e-2)[2]
    source, ids = build.find_model_folder(folder), torch.arange(100, 140)[None]
    exact, coarse = (build.load_model_folder(source, "fp32", CPU, b)[1](ids).logits for b in (None, bits))
    assert 0 < (coarse - exact).norm() < 0.2 * exact.norm()


def test_items_are_passed_on_and_counted(monkeypatch):
    made = []
    monkeypatch.setattr(bars, "tqdm", lambda **options: made.append(tqdm(**options, file=io.StringIO())) or made[-1])
    pairs = [("a", torch.zeros(3)), ("b", torch.zeros(5))]
    assert list(bars.counted(pairs, "read", 32)) == pairs
    assert made[0].n == made[0].total == 32


def test_a_bar_is_drawn_again_while_nothing_moves(monkeypatch):
    monkeypatch.setattr(bars, "BEAT_SECS", 0.05)
    shown = io.StringIO()
    with tqdm(desc="read", total=8, file=shown) as one:
        bars.keep_alive()
        first = shown.getvalue().count("read")
        end = time.monotonic() + 5
        while shown.getvalue().count("read") < first + 3 and time.monotonic() < end:
            time.sleep(0.02)
        assert one.n == 0 and shown.getvalue().count("read") >= first + 3


@pytest.mark.slow
@pytest.mark.parametrize("verbose", [False, True])
def test_the_start_lines_say_what_was_changed(verbose, checkpoints, data_file, tmp_path):
    printed = run("glm3", "lora", checkpoints, data_file, tmp_path / "out", max_steps=1, lora_dim=4, verbose=verbose)[3]
    lines = {line[:11].strip(): line[12:] for line in printed.splitlines()}
    assert "lora_dim 4" in lines["flags"] and ("lora_alpha" in lines["flags"]) == verbose
    assert ("deepspeed" in lines) == verbose
    assert "(asked for)" in lines["device"] or "(a small model on a CPU)" in lines["device"]


def test_the_peak_of_a_run_does_not_count_what_was_read_before_it():
    read = bytearray(2**29)
    before = tracker.peak_gib(CPU)
    del read
    tracker.forget_peak()
    assert tracker.peak_gib(CPU) < before - 0.4


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_weights_that_stay_in_the_file_are_checked_and_the_file_is_not_changed(kind, checkpoints, tmp_path):
    base = shutil.copytree(checkpoints["glm3"], tmp_path / "base")
    file, tensors = base / "model.safetensors", dict(weights.iter_tensors(base))
    if kind == "bin":
        file.unlink()
        file = base / "pytorch_model.bin"
        torch.save(tensors, file)
    before = file.read_bytes()
    model = MODE["glm3"].model.from_pretrained(base)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert file.read_bytes() == before
    tensors["transformer.encoder.layers.1.mlp.dense_4h_to_h.weight"][3, 3] = float("nan")
    weights.write_tensors(tensors, file) if kind == "safetensors" else torch.save(tensors, file)
    with pytest.raises(UserError, match="inf or nan .*layers.1.mlp.dense_4h_to_h.weight"):
        MODE["glm3"].model.from_pretrained(base)
