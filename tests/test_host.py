"""What this machine can hold, and what it shows: precision on a CPU, refusals before reading, bars, streams."""

import io
import time

import pytest
import torch
from tqdm import tqdm

import predict
from glm_finetune import MODE, bars, build, dist, host, weights
from glm_finetune.answer.decoder import Printer
from glm_finetune.errors import UserError
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


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(checkpoints, monkeypatch):
    monkeypatch.setattr(weights, "LARGE_BYTES", 0)
    monkeypatch.setattr(weights, "iter_tensors", lambda folder: pytest.fail("read"))
    monkeypatch.setattr(host, "free_bytes", lambda: 2**10)
    with pytest.raises(UserError) as refusal:
        MODE["glm3"].model.from_pretrained(checkpoints["glm3"])
    for part in (str(checkpoints["glm3"]), "float32", "0.0 GiB are free", "--precision bf16", "--quantization_bit 4"):
        assert part in str(refusal.value)


def test_what_is_printed_while_it_is_made_is_the_answer_without_blanks_around_it(capsys):
    printer = Printer()
    for piece in ("", " \n", " a", "b ", "", " c\n", "\n", " "):
        printer(piece)
    assert capsys.readouterr().out == "ab  c"


@pytest.mark.parametrize("flags", [[], ["--num_beams", "2"]], ids=["greedy", "beams"])
def test_one_question_is_answered_as_in_a_file(flags, checkpoints, tmp_path, monkeypatch, capsys):
    asked = ["--model_path", checkpoints["glm3"], "--max_new_tokens", 12, *flags]
    answers = []
    monkeypatch.setattr(predict, "Printer", lambda: answers.append)
    (tmp_path / "q.jsonl").write_text('{"instruction": "你好", "input": "", "output": "好"}\n', encoding="utf-8")
    output = tmp_path / "a.jsonl"
    one = run_main(predict, monkeypatch, capsys, *asked, "--instruction", "你好")
    many = run_main(predict, monkeypatch, capsys, *asked, "--test_path", tmp_path / "q.jsonl", "--output_path", output)
    assert one[0] == many[0] == 0, (one, many)
    assert len(answers) > 2  # in pieces
    assert weights.read_json(output)["prediction"] == "".join(answers).strip()


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
