"""The shipped sample data: what generated it, its limits, and that an answer follows from its text alone."""

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = ROOT / "data"
FILES = ("spo_0.json", "spo_1.json")
COMMAND = "python scripts/make_sample_data.py --output_dir data"
RELATIONS = {"部件故障", "性能故障", "组成", "检测工具"}


def read_rows(name: str) -> list[dict[str, str]]:
    return [json.loads(line) for line in (DATA / name).read_text(encoding="utf-8").splitlines()]


def triples_of(row: dict[str, str]) -> list[tuple[str, ...]]:
    return [tuple(line.split("_")) for line in row["output"].split("\n")]


def chars_of(rows: list[dict[str, str]]) -> set[str]:
    return {char for row in rows for value in row.values() for char in value}


def pairs_of(rows: list[dict[str, str]]) -> set[tuple[str, str]]:
    return {(t[0], t[2]) for row in rows for t in triples_of(row) if t[1] == "部件故障"}


TRAIN, TEST = (read_rows(name) for name in FILES)


def extract(text: str, words: dict[str, set[str]]) -> str:
    """The triples of a text, read off with word classes and two regular expressions: no use of the generator."""
    either = {name: "(" + "|".join(sorted(group)) + ")" for name, group in words.items()}
    part, fault, tool, system, symptom = (either[n] for n in ("part", "fault", "tool", "system", "symptom"))
    body = re.compile(f"(?:发现)?(?:用{tool}测得)?(?:{system}的)?{part}(?:和{part}都)?{fault}(?:且{fault})?")
    found = []
    for clause in re.split("[，。]", text):
        if match := re.fullmatch(f"(?:冷车时)?{system}{symptom}", clause):
            found.append((match[1], "性能故障", match[2]))
        elif match := re.fullmatch(f"用{tool}检查{part}", clause):
            found.append((match[2], "检测工具", match[1]))
        elif match := re.fullmatch(f"{fault}的是{part}", clause):
            found.append((match[2], "部件故障", match[1]))
        elif match := body.fullmatch(clause):
            by_tool, whole, first, second, *tails = match.groups()
            found += [(first, "检测工具", by_tool)] if by_tool else []
            found += [(whole, "组成", first)] if whole else []
            found += [(head, "部件故障", tail) for head in (first, second) if head for tail in tails if tail]
    return "\n".join("_".join(triple) for triple in found)


def test_readme_command_writes_the_shipped_bytes(tmp_path):
    assert f"    {COMMAND}\n" in (DATA / "README.md").read_text(encoding="utf-8")
    arguments = shlex.split(COMMAND)[1:-1]
    subprocess.run([sys.executable, *arguments, str(tmp_path)], cwd=ROOT, check=True, timeout=120)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(FILES)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (DATA / name).read_bytes(), f"{name} differs: run `{COMMAND}`"


def test_row_counts():
    assert len(TRAIN) >= 1000
    assert len(TEST) >= 50


def test_no_input_occurs_twice_in_or_across_files():
    inputs = [row["input"] for row in TRAIN + TEST]
    assert len(set(inputs)) == len(inputs)


def test_every_test_row_has_a_pair_that_training_lacks():
    known = pairs_of(TRAIN)
    assert [row["input"] for row in TEST if pairs_of([row]) <= known] == []


def test_characters_fit_a_small_vocabulary_and_test_adds_none():
    assert len(chars_of(TRAIN + TEST)) <= 200
    assert chars_of(TEST) <= chars_of(TRAIN)


@pytest.mark.parametrize("name", FILES)
def test_every_line_is_three_parts_with_head_and_tail_from_the_input(name):
    for row in read_rows(name):
        assert list(row) == ["instruction", "input", "output"]
        assert row["instruction"] == "抽取文本中的故障三元组，每行一个，用“_”连接。文本："
        assert 12 <= len(row["input"]) <= 45, row
        triples = triples_of(row)
        assert 1 <= len(triples) == len(set(triples)) <= 3, row
        for triple in triples:
            assert len(triple) == 3 and triple[1] in RELATIONS, row
            assert triple[0] in row["input"] and triple[2] in row["input"], row


@pytest.mark.parametrize("name", FILES)
def test_output_follows_from_the_input_alone(name):
    slots = {
        "部件故障": ("part", "fault"),
        "性能故障": ("system", "symptom"),
        "组成": ("system", "part"),
        "检测工具": ("part", "tool"),
    }
    words = {slot: set() for pair in slots.values() for slot in pair}
    for head, relation, tail in (triple for row in TRAIN for triple in triples_of(row)):
        words[slots[relation][0]].add(head)
        words[slots[relation][1]].add(tail)
    flat = [word for group in words.values() for word in group]
    assert [(a, b) for a in flat for b in flat if a is not b and a in b] == []  # one way to read a clause
    for row in read_rows(name):
        assert extract(row["input"], words) == row["output"], row["input"]
