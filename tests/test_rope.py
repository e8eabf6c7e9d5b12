"""Long-context variants: which rule rope_ratio follows, the numbers of both, and that everything goes on with them."""

import math

import pytest
import torch

import merge_lora
import predict
from glm_finetune import MODE, build
from glm_finetune.errors import UserError
from glm_finetune.models.glm2 import rotate
from glm_finetune.weights import read_json, write_json
from tests.refusal import run_main
from tests.test_training import run
from tests.tiny import make_checkpoint

CODE = {  # as published beside the weights, shortened to the lines that count
    "base": "def forward_impl(self, seq_len, n_elem, base=10000):\n    base = base * self.rope_ratio\n",
    "position": "    seq_idx = torch.arange(seq_len, dtype=torch.float, device=device) / self.rope_ratio\n",
}
FAR = torch.arange(30_000, 131_072, 997)


def stretched(mode, folder, ratio=16, code=None, **changes):
    """A tiny checkpoint with a rope_ratio in its config.json. code: a rule whose published code lies beside it."""
    base = make_checkpoint(mode, folder, seq_length=32768)
    write_json({**read_json(base / "config.json"), "rope_ratio": ratio, **changes}, base / "config.json")
    if code:
        (base / "modeling_chatglm.py").write_text(CODE[code])
    return base


def formula(rule, ratio, position, index, size):
    """Angle of a rotated pair in float64: Su et al. 2021 (arXiv 2104.09864), eq. 15, stretched by one of the rules."""
    base = 10000 * ratio if rule == "base" else 10000
    return (position / ratio if rule == "position" else position) * base ** (-2 * index / size)


@pytest.mark.parametrize("rule, ratio", [("base", 50), ("base", 500), ("position", 16), ("position", 2.5)])
def test_angles_are_those_of_the_formula_far_beyond_thirty_thousand(rule, ratio, tmp_path):
    model = MODE["glm2"].model.from_pretrained(stretched("glm2", tmp_path / "base", ratio), rope_rule=rule)
    cos, sin = model.angles(FAR[None])
    size = model.config.kv_channels // 2
    for found, function in ((cos, math.cos), (sin, math.sin)):
        angles = [[formula(rule, ratio, int(p), i, size) for i in range(size // 2)] for p in FAR]
        expected = torch.tensor([[function(angle) for angle in row] for row in angles])
        # fp32 knows an angle of 131,072 to 2 ** -7; the originals compute it so as well
        torch.testing.assert_close(found[0], expected, rtol=0, atol=2**-7)


def scores(model, query, key, start):
    """Products of queries and keys at positions from `start` on: what attention sees of positions."""
    positions = torch.arange(start, start + query.shape[1])[None]
    cos, sin = (table.to(query.dtype)[:, :, None] for table in model.angles(positions))
    query, key = (rotate(x, cos, sin)[0, :, 0].float() for x in (query, key))
    return query @ key.t()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-3), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("rule", CODE)
def test_far_positions_are_as_good_as_near_ones(rule, dtype, tolerance, tmp_path):
    # only differences of positions count, so text at 40,000 is seen as text at 0; in the original's bf16 it is not
    model = MODE["glm3"].model.from_pretrained(stretched("glm3", tmp_path / "base", code=rule))
    torch.manual_seed(0)
    query, key = (torch.randn(1, 50, 1, model.config.kv_channels).to(dtype) for _ in range(2))
    near, far = (scores(model, query, key, start) for start in (0, 40_000))
    assert (far - near).norm() < tolerance * near.norm()
    model.config.rope_rule = None
    assert (scores(model, query, key, 0) - near).norm() > 0.05 * near.norm()  # the ratio counts


WHICH = {  # mode, code beside the weights, flag, rule or words of the refusal
    "glm3, nothing": ("glm3", None, None, "base"),
    "glm3, its code": ("glm3", "position", None, "position"),
    "glm3, flag": ("glm3", None, "position", "position"),
    "glm2, nothing": ("glm2", None, None, ["rope_ratio is 16", "modeling_chatglm.py", "--rope_rule position"]),
    "glm2, its code": ("glm2", "position", None, "position"),
    "glm2, both": ("glm2", "base", "base", "base"),
    "glm2, they differ": ("glm2", "position", "base", ["modeling_chatglm.py says position, where base was asked for"]),
}


@pytest.mark.parametrize("case", WHICH)
def test_the_rule_is_that_of_the_code_or_the_flag(case, tmp_path):
    mode, code, asked, expected = WHICH[case]
    base = stretched(mode, tmp_path / "base", code=code)
    if isinstance(expected, str):
        assert build.check_base(MODE[mode], base, asked)[1].rope_rule == expected
    else:
        with pytest.raises(UserError) as refusal:
            build.check_base(MODE[mode], base, asked)
        assert all(part in str(refusal.value) for part in expected)


@pytest.mark.parametrize(
    "ratio, words", [(0, "rope_ratio is 0"), (-2, "rope_ratio is -2"), ("16", "rope_ratio is '16'")]
)
def test_a_ratio_that_is_none_is_refused(ratio, words, tmp_path):
    with pytest.raises(UserError, match=words):
        build.check_base(MODE["glm3"], stretched("glm3", tmp_path / "base", ratio))


def test_a_rule_without_a_ratio_is_refused(checkpoints):
    with pytest.raises(UserError, match="has no rope_ratio"):
        build.check_base(MODE["glm3"], checkpoints["glm3"], "base")


def test_a_model_that_is_loaded_without_a_rule_is_refused(tmp_path):
    with pytest.raises(UserError, match="--rope_rule"):
        MODE["glm3"].model.from_pretrained(stretched("glm3", tmp_path / "base"))


@pytest.mark.slow
@pytest.mark.parametrize("mode, rule", [("glm2", "position"), ("glm3", None)])
def test_a_variant_is_trained_merged_and_asked(mode, rule, data_file, tmp_path, monkeypatch, capsys):
    base = {mode: stretched(mode, tmp_path / "base")}
    flags = dict(rope_rule=rule) if rule else {}
    folder = run(mode, "lora", base, data_file, tmp_path / "out", max_steps=2, **flags)[2]
    code, error = run_main(merge_lora, monkeypatch, capsys, "--model_dir", folder)
    assert code == 0, error
    merged = folder.with_name(folder.name + "-merged")
    assert read_json(merged / "config.json")["rope_rule"] == (rule or "base")
    models = [
        build.load_model_folder(build.find_model_folder(f), "fp32", torch.device("cpu"))[1] for f in (folder, merged)
    ]
    adapted, sums = (model(torch.arange(100, 150)[None]).logits for model in models)
    torch.testing.assert_close(sums, adapted, rtol=1e-4, atol=1e-5)
    code, error = run_main(
        predict, monkeypatch, capsys, "--model_path", merged, "--instruction", "你好", "--max_length", 64
    )
    assert code == 0, error


@pytest.mark.slow
def test_another_rule_than_that_of_the_training_is_refused(data_file, tmp_path, monkeypatch, capsys):
    base = {"glm3": stretched("glm3", tmp_path / "base")}
    folder = run("glm3", "lora", base, data_file, tmp_path / "out", max_steps=1)[2]
    run("glm3", "lora", base, data_file, tmp_path / "out", max_steps=2, resume="auto", rope_rule="base")
    (base["glm3"] / "modeling_chatglm.py").write_text(CODE["position"])
    asked = ["--model_path", folder, "--instruction", "你好", "--max_length", 64]
    code, error = run_main(predict, monkeypatch, capsys, *asked)
    assert code == 2 and "says position, where base was asked for, or trained with" in error
    with pytest.raises(RuntimeError, match="rope_rule: base there, position here"):
        run("glm3", "lora", base, data_file, tmp_path / "out", max_steps=3, resume="auto")


def test_answers_of_another_rule_are_not_mixed_in(data_file, tmp_path, monkeypatch, capsys):
    base = stretched("glm3", tmp_path / "base")
    asked = ["--model_path", base, "--test_path", data_file, "--output_path", tmp_path / "a.jsonl"]
    asked += ["--max_new_tokens", 4, "--max_length", 64, "--rope_rule"]
    assert run_main(predict, monkeypatch, capsys, *asked, "base")[0] == 0
    code, error = run_main(predict, monkeypatch, capsys, *asked, "position")
    assert code == 2 and "other settings (rope_rule)" in error


@pytest.mark.parametrize("rule", ["foo", ["base"]])
def test_a_recorded_rule_that_is_none_is_refused(rule, tmp_path):
    with pytest.raises(UserError, match="rope_rule is .*, expected base or position"):
        build.check_base(MODE["glm3"], stretched("glm3", tmp_path / "base", rope_rule=rule))
    plain = stretched("glm3", tmp_path / "plain", ratio=1, rope_rule="base")  # says nothing without a ratio
    assert MODE["glm3"].model.from_pretrained(plain).config.rope_rule is None


@pytest.mark.slow
@pytest.mark.parametrize("train_type, more", [("lora", {}), ("ptuning", dict(ptuning_version=1))])
def test_longer_samples_than_the_base_was_made_for_must_be_allowed(train_type, more, data_file, tmp_path):
    base = {"glm3": make_checkpoint("glm3", tmp_path / "base", seq_length=100)}
    with pytest.raises(RuntimeError, match="--max_len 128: .* was made for 100 tokens.*--allow_longer"):
        run("glm3", train_type, base, data_file, tmp_path / "no", **more)
    records, *_ = run("glm3", train_type, base, data_file, tmp_path / "out", max_steps=1, allow_longer=True, **more)
    assert math.isfinite(records[0]["loss"])
