"""The benchmarks run and measure what they say; their figures are not judged here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def benchmark(name, *arguments):
    """Run benchmarks/<name>.py; returns what it printed."""
    command = [sys.executable, f"benchmarks/{name}.py", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_train_types_reports_figures_for_a_type(tmp_path):
    arguments = (
        "--quick",
        "--steps",
        2,
        "--max_len",
        64,
        "--only",
        "lora",
        "ptuning 1",
        "--output",
        tmp_path / "r.json",
    )
    benchmark("train_types", *arguments)
    results = json.loads((tmp_path / "r.json").read_text())["types"]
    assert set(results) == {"lora", "ptuning 1"} and all(r["tokens_per_s"] > 0 for r in results.values())


@pytest.mark.slow
def test_zero3_loading_leaves_each_rank_its_half(tmp_path):
    benchmark("zero3_loading", "--hidden", 128, "--output", tmp_path / "r.json")
    assert json.loads((tmp_path / "r.json").read_text())["kept_of_weights"] == pytest.approx([0.5, 0.5], abs=0.02)


@pytest.mark.slow
def test_checkpoint_sizes_are_those_of_the_papers_arithmetic():
    lines = {line[:20].strip(): line[20:].split() for line in benchmark("checkpoint_sizes").splitlines()[1:]}
    assert lines["lora"][0] == f"{28 * 8 * (4096 + 4608):,}"  # rank 8 beside 28 query_key_value of 4096 -> 4608
    assert lines["ptuning 2, flat"][0] == f"{16 * 28 * 2 * 2 * 128:,}"  # tokens, layers, key and value, 2 heads of 128
    assert lines["all"][0] == f"{6_243_584_000:,}"


@pytest.mark.slow
def test_data_finds_the_rows_of_the_original_and_reports_figures(data_file, tmp_path):
    text = benchmark("data", "--quick", "--data", data_file, "--out", tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert set(report) == {"machine", "vocabulary", "preparation", "batches", "batches_of_data", "sizes"}
    for name, rate in report["preparation"]["rows_per_s"].items():
        assert f"{name:<38}{rate:>10,.0f}" in text


@pytest.mark.slow
def test_prefix_rate_measures_encoders_and_flat_prefixes():
    rows = [line.split() for line in benchmark("prefix_rate", "--quick").splitlines()[1:]]
    assert [row[0] for row in rows] == ["True", "False"]
    assert all(float(row[2]) > 0 and row[3].endswith("%" if row[0] == "True" else "-") for row in rows)


@pytest.mark.slow
def test_what_is_run_on_a_card_runs_on_tiny_shapes(tmp_path):
    """benchmarks/gpu.py must not be wrong on the day when a card is there."""
    benchmark("gpu", "--device", "cpu", "--quick", "--out", tmp_path / "r.json")
    stages = json.loads((tmp_path / "r.json").read_text())["stages"]
    assert list(stages) == ["ceilings", "equality", "step", "long", "path", "generation", "types"]
    assert all(stage["said"] == "ok" and stage["results"] for stage in stages.values())


@pytest.mark.parametrize(
    "arguments, part",
    [(["--stages", "equalty"], "Did you mean equality?"), (["--device", "cuda"], "this machine shows no card")],
)
def test_the_cards_benchmark_refuses_what_is_not_there(arguments, part):
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "benchmarks/gpu.py", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and part in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_stage_that_fails_or_is_out_of_time_loses_nothing_and_stops_no_other(tmp_path):
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--quick", "--stages", "equality,ceilings"]
    done = subprocess.run([*command, "--budget", "6", "--out", tmp_path / "r.json"], cwd=ROOT, capture_output=True)
    stages = json.loads((tmp_path / "r.json").read_text())["stages"]
    assert done.returncode == 1 and stages["equality"]["said"].startswith("out of time")
    assert stages["ceilings"]["said"].startswith("not begun")


@pytest.mark.slow
def test_real_size_runs_every_command_on_tiny_shapes(tmp_path):
    arguments = ("--folder", tmp_path / "real", "--tiny", "--output", tmp_path / "r.json")
    text = benchmark("real_size", *arguments)
    (report,) = json.loads((tmp_path / "r.json").read_text()).values()
    assert len(report["commands"]) >= 16 and all(name in text for name in report["commands"])
    for figures in report["commands"].values():
        assert "code" not in figures and figures["peak_gib"] > 0 and figures["silent_secs"] <= figures["secs"]
