"""Write the sample data: short Chinese car fault reports with their triples, from templates of our own.

    python scripts/make_sample_data.py --output_dir data

Not real reports: the layout of a row and the four relation names are those of public triple-extraction data, while
every sentence is built from the word lists below. A row joins one to three fact clauses, and clauses without a fact,
in a random order. Always true of both files: a word class has one relation (a fault is 部件故障, a symptom 性能故障, a
tool 检测工具), so the output is a function of the input; triples stand in the order of mention; heads and tails are
literal parts of the input; the same seed gives the same bytes.
The files are split by (part, fault) pair: every test row has at least one pair that no training row has, made of words
that training rows do have. A model that memorised pairs fails on it, one that copies does not.
"""

import argparse
import json
import os
import random
from pathlib import Path

INSTRUCTION = "抽取文本中的故障三元组，每行一个，用“_”连接。文本："
NUM_TRAIN_ROWS = 1200
NUM_TEST_ROWS = 60
MIN_CHARS, MAX_CHARS = 12, 45  # of an input
MAX_TRIPLES = 3
HELD_OUT_EVERY = 6  # about one (part, fault) pair in six appears in no training row

# No word is part of another word: a clause can be read in one way only.
SYSTEM_PARTS = {
    "发动机": ("火花塞", "节气门", "喷油嘴", "点火线圈", "活塞环"),
    "冷却系": ("水泵", "风扇", "节温器", "散热片"),
    "制动系": ("刹车盘", "制动管", "主缸"),
    "转向机": ("助力泵", "球头", "拉杆"),
    "变速箱": ("离合器", "电磁阀", "滤网"),
    "供电系": ("蓄电池", "继电器", "保险丝"),
    "空调": ("压缩机", "冷凝器"),
}
FAULTS = ("损坏", "松动", "卡死", "老化", "变形", "断裂", "脏污", "堵塞", "不工作", "有异响", "接触不良", "磨损严重")
SYMPTOMS = ("无力", "抖动", "效率低", "温度高", "噪声大", "压力不足", "反应慢")
TOOLS = ("万用表", "示波器", "诊断仪", "压力表", "试灯")

SYSTEM_OF = {part: system for system, parts in SYSTEM_PARTS.items() for part in parts}
PARTS = tuple(SYSTEM_OF)

PART_FAULT = "{part}_部件故障_{fault}"
SYSTEM_SYMPTOM = "{system}_性能故障_{symptom}"
SYSTEM_PART = "{system}_组成_{part}"
PART_TOOL = "{part}_检测工具_{tool}"

# (clause, triples in the order of mention)
FACT_CLAUSES = (
    ("{part}{fault}", (PART_FAULT,)),
    ("发现{part}{fault}", (PART_FAULT,)),
    ("{fault}的是{part}", (PART_FAULT,)),
    ("{part}和{part2}都{fault}", (PART_FAULT, "{part2}_部件故障_{fault}")),
    ("{part}{fault}且{fault2}", (PART_FAULT, "{part}_部件故障_{fault2}")),
    ("{system}的{part}{fault}", (SYSTEM_PART, PART_FAULT)),
    ("{system}{symptom}", (SYSTEM_SYMPTOM,)),
    ("冷车时{system}{symptom}", (SYSTEM_SYMPTOM,)),
    ("用{tool}检查{part}", (PART_TOOL,)),
    ("用{tool}测得{part}{fault}", (PART_TOOL, PART_FAULT)),
)
# Parts that are sound or repaired, and circumstances: no triple.
PLAIN_CLAUSES = (
    "{part}正常",
    "更换了{part}",
    "清洗{part}后试车",
    "检查{part}正常",
    "行驶{km}公里",
    "用户报修",
    "雨天行驶",
)


def held_out(part: str, fault: str) -> bool:
    """Whether the pair is kept out of the training rows; each part and each fault has pairs on both sides."""
    return (PARTS.index(part) + FAULTS.index(fault)) % HELD_OUT_EVERY == 0


def make_clause(rng: random.Random, parts: list[str], kind: tuple[str, tuple[str, ...]]) -> tuple[str, list[str]]:
    """Fill in one clause; takes two words off `parts`, so that no two clauses of a row speak of the same part."""
    part, part2 = parts.pop(), parts.pop()
    fault, fault2 = rng.sample(FAULTS, 2)
    words = {
        "part": part,
        "part2": part2,
        "fault": fault,
        "fault2": fault2,
        "system": SYSTEM_OF[part],
        "symptom": rng.choice(SYMPTOMS),
        "tool": rng.choice(TOOLS),
        "km": 1000 * rng.randint(2, 98),
    }
    clause, triples = kind
    return clause.format(**words), [triple.format(**words) for triple in triples]


def make_row(rng: random.Random) -> tuple[str, list[str]]:
    """One input and its triples; the caller drops what `is_valid` refuses."""
    parts = rng.sample(PARTS, len(PARTS))
    kinds = rng.choices(FACT_CLAUSES, k=rng.randint(1, 3))
    kinds += [(clause, ()) for clause in rng.sample(PLAIN_CLAUSES, rng.randint(0, 2))]
    rng.shuffle(kinds)
    clauses = [make_clause(rng, parts, kind) for kind in kinds]
    ends = ["，"] * (len(clauses) - 1) + ["。"]
    ends[rng.randrange(len(ends))] = "。"  # one or two sentences
    text = "".join(clause + end for (clause, _), end in zip(clauses, ends, strict=True))
    return text, [triple for _, triples in clauses for triple in triples]


def is_valid(text: str, triples: list[str]) -> bool:
    in_limits = MIN_CHARS <= len(text) <= MAX_CHARS and len(triples) <= MAX_TRIPLES
    return in_limits and len(set(triples)) == len(triples)


def make_files(seed: int) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Training and test rows; a row with a held-out pair can only be a test row, so the inputs are disjoint."""
    rng = random.Random(seed)
    train, test, seen = [], [], set()
    while len(train) < NUM_TRAIN_ROWS or len(test) < NUM_TEST_ROWS:
        text, triples = make_row(rng)
        if text in seen or not is_valid(text, triples):
            continue
        seen.add(text)
        pairs = [(head, tail) for head, relation, tail in (t.split("_") for t in triples) if relation == "部件故障"]
        rows, limit = (test, NUM_TEST_ROWS) if any(held_out(*pair) for pair in pairs) else (train, NUM_TRAIN_ROWS)
        if len(rows) < limit:
            rows.append({"instruction": INSTRUCTION, "input": text, "output": "\n".join(triples)})
    return train, test


def write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    """JSON lines, UTF-8; complete or absent, never half a file."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output_dir", type=Path, default=Path("data"), help="folder of spo_0.json and spo_1.json")
    parser.add_argument("--seed", type=int, default=1234, help="the shipped files have the default")
    args = parser.parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    train, test = make_files(args.seed)
    write_rows(args.output_dir / "spo_0.json", train)
    write_rows(args.output_dir / "spo_1.json", test)
    print(f"{args.output_dir}: {len(train)} training rows in spo_0.json, {len(test)} test rows in spo_1.json")


if __name__ == "__main__":
    main()
