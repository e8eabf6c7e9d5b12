"""The rules of the project, held by a test so that breaking one is a decision."""

import ast
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from glm_finetune.modes import MODE
from glm_finetune.tuning import TRAIN_TYPE
from tests.ranks import train_arguments

ROOT = Path(__file__).parents[1]
SOURCES = sorted(
    [*ROOT.glob("*.py"), *ROOT.glob("glm_finetune/**/*.py"), *ROOT.glob("scripts/*.py"), *ROOT.glob("benchmarks/*.py")]
)
LIBRARY = [path for path in SOURCES if path.parent == ROOT or path.is_relative_to(ROOT / "glm_finetune")]
TESTS = sorted(ROOT.glob("tests/**/*.py"))

# Who may import whom: a module may import those of lower levels, and those of its own level.
LEVELS = (
    ("errors", "flags", "dist", "bars", "host", "exits", "weights"),
    ("models",),
    ("modes", "tuning"),
    ("data",),
    ("objectives", "record", "build", "generator"),
    ("run", "answer", "evaluate", "convert"),
    ("config",),
)
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}


def tree(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@pytest.mark.parametrize("path", SOURCES + TESTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_are_short(path):
    assert len(path.read_text(encoding="utf-8").splitlines()) <= (150 if path.name == "train.py" else 400)
    for node in ast.walk(tree(path)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            limit = 50 if (path.name, node.name) == ("train.py", "train") else 60
            assert node.end_lineno - node.lineno < limit, node.name


@pytest.mark.parametrize("name", ["README.md", "README_zh.md"])
def test_the_core_that_the_readmes_name_can_be_read_in_one_sitting(name):
    text, pattern = (
        (ROOT / name).read_text(encoding="utf-8"),
        r"([\d,]+)(?: lines: | 行：)(`train\.py`.*?tuning/lora\.py`)",
    )
    stated, listed = re.search(pattern, text, re.DOTALL).groups()
    files = re.findall(r"`([^`]+)`", listed)
    core = [ROOT / file if file == "train.py" else ROOT / "glm_finetune" / file for file in files]
    num_lines = sum(len(path.read_text(encoding="utf-8").splitlines()) for path in core)
    assert len(set(core)) == 16 and num_lines <= 2000
    assert int(stated.replace(",", "")) == num_lines


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


ROOMS = ("answer", "evaluate", "convert")


@pytest.mark.parametrize(
    "script, strangers", [("train", ROOMS), ("predict", ("run", "convert")), ("merge_lora", ("run", *ROOMS[:2]))]
)
def test_scripts_import_only_the_rooms_they_need(script, strangers):
    code = f"import sys, {script}; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not [name for name in run.stdout.split() for other in strangers if name == f"glm_finetune.{other}"]


@pytest.mark.slow
def test_training_works_without_the_rooms_that_it_does_not_need(checkpoints, data_file, tmp_path):
    for name in subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split():
        if name.endswith((".py", ".json")) and not name.startswith(
            ("tests/", *(f"glm_finetune/{room}/" for room in ROOMS))
        ):
            (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tmp_path / "tree" / name)
    arguments = train_arguments("glm3", "lora", checkpoints["glm3"], data_file, tmp_path / "out", max_steps=2)
    run = subprocess.run(
        [sys.executable, "train.py", *arguments], cwd=tmp_path / "tree", capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert (tmp_path / "out/epoch-1-step-2/adapter_model.safetensors").is_file()
    assert not any((tmp_path / "tree/glm_finetune" / room).exists() for room in ROOMS)


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


NAMED = re.compile(r"chatglm-?\d|codegeex|\bglm\d", re.IGNORECASE)  # inside a longer text, a pattern for one


def for_people(node):
    """Whether a node's texts are read by people only: docstrings, flags with help and default, error messages."""
    called = isinstance(node, ast.Call) and getattr(node.func, "id", None) in ("flag", "print")
    is_docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    return called or is_docstring or isinstance(node, ast.Raise)


def within(source, condition):
    """The ids of all nodes below those that meet `condition`."""
    return {id(part) for node in ast.walk(source) if condition(node) for part in ast.walk(node)}


def names_asked_for(source, names, pattern=None):
    """String constants that are one of `names` or match `pattern`, except in what is for people."""
    people = within(source, for_people)
    trained = ast.Tuple | ast.arguments | ast.AnnAssign | ast.Compare  # "all" is also a value of --train_on
    answers = within(source, lambda node: isinstance(node, trained) and "train_on" in ast.unparse(node))
    texts = [part for part in ast.walk(source) if isinstance(part, ast.Constant) and isinstance(part.value, str)]
    return [
        (part.lineno, part.value)
        for part in texts
        if (part.value in names or (pattern and pattern.search(part.value)))
        and id(part) not in people
        and not (part.value == "all" and id(part) in answers)
    ]


def asked_for_outside(path, source):
    """What a file of the library asks for that only modes/ or only tuning/ may know."""
    found = [] if path.parent.name == "tuning" else names_asked_for(source, {*TRAIN_TYPE})
    if path.parent.name == "modes":
        return found
    modules = [node.module or "" for node in ast.walk(source) if isinstance(node, ast.ImportFrom)]
    imports = [name for name in modules if re.fullmatch(rf"glm_finetune\.modes\.({'|'.join(MODE)})", name)]
    return found + imports + names_asked_for(source, {*MODE}, NAMED)


@pytest.mark.parametrize("path", LIBRARY, ids=lambda p: str(p.relative_to(ROOT)))
def test_modes_and_train_types_are_asked_for_by_name_in_their_folders_only(path):
    assert not asked_for_outside(path, tree(path))


@pytest.mark.parametrize(
    "code",
    [
        'if mode == "glm": pass',
        'if "glm3" in (config.mode, other): pass',
        'fields = MODE["glm"].config.required_fields',
        'match = re.search(r"chatglm([23])|(codegeex2)", name)',
        'match mode.name:\n    case "glm2": pass',
        'options = {"lora": 1, "x": 2}[config.train_type]',
        'saves = train_type.name.startswith("qlora")',
        "from glm_finetune.modes.glm3 import clean_response",
        'def add(train_type="all"): pass',
        'for name, allowed in (("train_type", ("all",)),): pass',
    ],
)
def test_asking_for_a_mode_or_a_train_type_by_name_is_found(code):
    assert asked_for_outside(ROOT / "glm_finetune/build.py", ast.parse(code))


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
    at_least = 1 if offloads else 2  # stages 0 and 1 in bf16: see ds_config
    assert zero["stage"] == max(at_least, int(re.search(r"zero(\d)", path.stem)[1]))
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
