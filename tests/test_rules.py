"""The rules of the project, held by a test so that breaking one is a decision."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("glm_finetune/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
)
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# Who may import whom: a module may import those of lower levels, and those of its own level.
LEVELS = (
    ("errors", "config", "flags", "dist", "exits", "weights"),
    ("models",),
    ("modes", "tuning"),
    ("data",),
    ("objectives",),
    ("build",),
    ("run", "answer", "evaluate"),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (200 if path.name == "train.py" else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 50 if (path.name, node.name) == ("train.py", "train") else 60
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_module_says_what_it_is(path):
    assert ast.get_docstring(tree(path))


def imported(path):
    """Names of modules that a file imports, at the top or inside functions."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{name.name}" for name in node.names)


def test_modules_import_only_what_lies_below_them():
    for path in ROOT.glob("glm_finetune/**/*.py"):
        parts = path.relative_to(ROOT / "glm_finetune").with_suffix("").parts
        if parts[0] == "__init__":
            continue
        for name in imported(path):
            other = name.split(".")[1] if name.startswith("glm_finetune.") else None
            if other in LEVEL_OF:
                assert LEVEL_OF[other] <= LEVEL_OF[parts[0]], f"{path.name} imports {name}"


def test_models_know_no_flags_no_tokenizer_and_no_deepspeed():
    for path in ROOT.glob("glm_finetune/models/*.py"):
        assert not [
            name
            for name in imported(path)
            if re.search(r"config$|tokenizer|sentencepiece|deepspeed|modes", name)
            and name.startswith(("glm_finetune.config", "glm_finetune.modes", "sentencepiece", "deepspeed"))
        ]


def test_deepspeed_is_imported_by_what_launches_or_saves_only():
    users = {p.name for p in SOURCES if any(name.split(".")[0] == "deepspeed" for name in imported(p))}
    assert users == {"engine.py", "state.py"}
    code = "import sys, predict, merge_lora; sys.exit('deepspeed' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_modes_and_train_types_are_asked_for_by_name_in_their_folders_only():
    for path in SOURCES:
        text = path.read_text(encoding="utf-8")
        if path.parent.name != "modes":
            assert not re.search(r"\bmode(\.name)?\s*(==|!=|in \()", text), path
        if path.parent.name != "tuning":
            assert not re.search(r"\btrain_type(\.name)?\s*(==|!=|in \()", text), path


@pytest.mark.parametrize("path", sorted(ROOT.glob("ds_configs/*.json")), ids=lambda p: p.name)
def test_shipped_deepspeed_files_resolve_and_hold_memory_strategy_only(path):
    from glm_finetune.config import TrainConfig
    from glm_finetune.run.ds_config import read_ds_file, resolve

    config = TrainConfig(model_name_or_path="x", train_path="x", output_dir="x")
    ds_json = read_ds_file(path.name)
    assert set(ds_json) <= {"zero_optimization", "aio"}
    resolved = resolve(ds_json, config, 2, "bf16", "cuda")
    assert resolved["train_batch_size"] == 32 and resolved["bf16"]["enabled"]
    zero, offloads = resolved["zero_optimization"], bool(re.search(r"\d_(offload|nvme)$", path.stem))
    assert zero["stage"] == max(1, int(re.search(r"zero(\d)", path.stem)[1]))
    assert ("offload_optimizer" in zero) == offloads
    assert ("offload_param" in zero) == (offloads and "zero3" in path.name)


def test_importing_the_package_does_nothing_but_define():
    code = "import torch, glm_finetune, train; assert not torch.distributed.is_initialized()"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_nothing_of_a_machine_is_named_in_the_tree():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    pattern = re.compile(r"(?<![\w.])/(?:work|root|home|tmp)/")
    for name in files:
        path = ROOT / name
        if path.suffix in (".py", ".md", ".sh", ".json", ".txt", ".toml") and path.is_file() and path != Path(__file__):
            assert not pattern.search(path.read_text(encoding="utf-8")), name


def test_requirements_are_pinned_and_say_who_imports_them():
    for name in ("requirements.txt", "requirements-dev.txt"):
        for line in (ROOT / name).read_text(encoding="utf-8").splitlines():
            assert line.startswith("#") or re.fullmatch(r"[\w-]+==[\w.]+ +# .+", line), line


def test_the_exceptions_to_the_golden_data_are_in_both_readmes():
    exceptions = json.loads((ROOT / "tests/oracle_exceptions.json").read_text(encoding="utf-8"))
    for name in ("README.md", "README_zh.md"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert all(case in text for case in exceptions), name
