"""Everything that needs a card, checked and measured by one command: at most eight minutes, no weights, no network.

    python benchmarks/gpu.py                            # a card -> a table, benchmarks/results/gpu_<card>.json
    python benchmarks/gpu.py --stages equality,step
    python benchmarks/gpu.py --device cpu --quick       # every stage on tiny shapes: that the script is right

Each stage is a process of its own with a limit of its own (`gpu_stages.py`), the most worth first; what it has found is
written as it is found, so that a stage that fails or is out of time loses nothing and stops no other. The exit code is
1 if a stage failed, was out of time or found two numbers that should be equal and are not. What a machine lacks
(Liger's kernels, bitsandbytes, pytest, memory) is said and left out.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from glm_finetune.errors import UserError, unknown_choice  # noqa: E402 (the repository is not installed)

LIMITS = {  # seconds of each stage on a card, in their order
    "ceilings": 40,
    "equality": 100,
    "step": 170,
    "long": 110,
    "path": 150,
    "generation": 80,
    "types": 200,
}
BUDGET_SECS = 480  # of all together


def arguments_of(argv):
    """The command line. Raises UserError for a stage that is not there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", default=",".join(LIMITS), help=f"some of {', '.join(LIMITS)}, commas between them")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--quick", action="store_true", help="tiny shapes")
    parser.add_argument("--budget", type=int, default=BUDGET_SECS, metavar="SECONDS", help="of all stages together")
    parser.add_argument(
        "--out", type=Path, help="JSON file; default: benchmarks/results/gpu_<card>.json, on a CPU none"
    )
    args = parser.parse_args(argv)
    args.stages = [name.strip() for name in args.stages.split(",")]
    for problem in (text for name in args.stages for text in unknown_choice("stages", name, tuple(LIMITS))):
        raise UserError(problem)
    return args


def run_stage(name, args, limit_secs):
    """Run a stage -> (its results, "ok" or what went wrong, seconds)."""
    started, results = time.monotonic(), Path(tempfile.mkdtemp(prefix="gpu-")) / "results.jsonl"
    command = [sys.executable, "-m", "benchmarks.gpu_stages", name, args.device, str(results), *["quick"] * args.quick]
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, stdout=sys.stderr)
    try:
        code = process.wait(limit_secs)
        said = "ok" if code == 0 else f"failed, exit code {code}"
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with what it has started
        process.wait()
        said = f"out of time after {limit_secs:.0f} s"
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    return [json.loads(line) for line in lines], said, time.monotonic() - started


def show(name, found, said, secs):
    print(f"\n{name}: {said}, {secs:.0f} s")
    for result in found:
        values = (
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in result.items()
        )
        print("  " + "  ".join(text.removeprefix("what ") for text in values), flush=True)


def main():
    args = arguments_of(sys.argv[1:])
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "--device cuda: this machine shows no card. --device cpu --quick runs every stage on tiny shapes."
        )
    card = torch.cuda.get_device_name() if args.device == "cuda" else None
    out = args.out or (card and ROOT / f"benchmarks/results/gpu_{re.sub('[^a-z0-9]+', '_', card.lower())}.json")
    report = {"card": card, "torch": torch.__version__, "quick": args.quick, "stages": {}}
    print(f"{card or 'CPU'}, torch {torch.__version__}{', tiny shapes' if args.quick else ''}", flush=True)
    end, is_right = time.monotonic() + args.budget, True
    for name in args.stages:
        limit = min(LIMITS[name] if args.device == "cuda" else args.budget, end - time.monotonic())
        found, said, secs = run_stage(name, args, limit) if limit > 5 else ([], "not begun: the time is over", 0)
        show(name, found, said, secs)
        is_right = is_right and said == "ok" and all(result.get("equal", True) for result in found)
        report["stages"][name] = {"said": said, "secs": round(secs, 1), "results": found}
        if out:
            out.parent.mkdir(parents=True, exist_ok=True)
            out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"\n{'all is right' if is_right else 'something failed, see above'}{f'; written to {out}' if out else ''}")
    return 0 if is_right else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"error: {error}")
