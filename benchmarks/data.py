"""The way of the data in numbers: preparation, start, memory, and what padding, grouping and packing cost.

    python benchmarks/data.py --tokenizer ChatGLM2-6B/tokenizer.model   # writes benchmarks/results/data_cpu.json
    python benchmarks/data.py --quick                                   # some seconds, writes nothing without --out

Rows are made up in the form of AdvertiseGen: `类型#上衣*材质#牛仔布*...` of 4 to 16 attributes, and a text of about 100
(40 to 200) Chinese characters.

--tokenizer: any SentencePiece model of real size; default: the small one of tiny_base/. --data: a file of your own,
whose batches are measured too.

original: original_loop.py, with a tokenizer that is a subclass of transformers' slow one and has the methods of the
original's (pieces by EncodeAsPieces, ids by a look-up each). The installed transformers takes about a tenth longer for
it than 4.33.0, the original's. bare: the same loop on SentencePiece without transformers, which nobody ran; a floor for
any such loop. ours: `cache.prepared`, files written, in this process or with one for each core. SentencePiece has as
many threads as there are cores in the first, one in the others; the loops have one. In turns, medians. Memory is the
proportional set size of all processes together.

Batches: a ChatGLM3 of hidden size 256 and 4 layers, all weights learn, 8 samples a step, the three ways in turns, in
one thread (more wait for each other beside other work). The vocabulary is 1,024, so that the output layer has about the
share of the time that it has in the 6B model. bound: 1 / (1 - padding share), what leaving all padding out saves in
work that follows the number of tokens; attention, which follows their square, can save a little more.
"""

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from glm_finetune import MODE  # noqa: E402 (the repository is not installed)
from glm_finetune.data import cache  # noqa: E402
from glm_finetune.data.dataset import InstructionDataset, collate  # noqa: E402
from glm_finetune.data.files import list_data_files  # noqa: E402
from glm_finetune.data.sampler import Progress, StepSampler  # noqa: E402
from glm_finetune.data.samples import Settings  # noqa: E402
from glm_finetune.modes.spec import Limits  # noqa: E402

MODE_NAME, BATCH, VOCABULARY = "glm2", 8, 1024
LIMITS, LIMITS_OF_DATA = Limits(512, 256), Limits(1024, 768)
KEYS = ("类型", "版型", "材质", "颜色", "风格", "图案", "衣样式", "裙长", "领型", "袖长", "裤型", "工艺")
WORDS = re.findall(
    r"\S+",
    """上衣 牛仔布 白色 简约 刺绣 外套 连衣裙 纯色 破洞 宽松 这款 衬衫 采用 柔软 的 面料 穿着 舒适 透气 ， 版型 修身
    显瘦 时尚 大方 设计 感 十足 。 让 你 轻松 穿出 女神 范 百搭 实用 个性 优雅 气质 腰部 收紧 拉长 身材 比例 领口 袖口
    蕾丝 装饰 精致 细节 搭配 阔腿裤 印花 图案 点缀 俏皮 可爱 复古 格纹 质感 出众 不 挑 身形 轻盈 飘逸 夏季 首选""",
)


def new_rows(count):
    """`count` different rows, the same each time."""
    rng = random.Random(0)
    for _ in range(count):
        pairs = (f"{rng.choice(KEYS)}#{rng.choice(WORDS)}" for _ in range(rng.randint(4, 16)))
        length, text = min(max(rng.gauss(105, 35), 40), 200), ""
        while len(text) < length:
            text += rng.choice(WORDS)
        yield {"instruction": "", "input": "*".join(pairs), "output": text}


def write_rows(path, count, different=20_000):
    """A file of `count` rows, repeated after `different` ones."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in new_rows(min(count, different))]
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, count, len(lines)):
            file.writelines(lines[: count - start])
    return path


def secs(function, *args):
    start = time.perf_counter()
    function(*args)
    return time.perf_counter() - start


def settings_of(tokenizer_folder, limits=LIMITS):
    """Those of ChatGLM-Finetuning, with whose rows ours are compared."""
    tokenizer = MODE[MODE_NAME].tokenizer.from_pretrained(tokenizer_folder)
    return Settings(MODE[MODE_NAME].template, tokenizer, limits)


def prepare(path, settings, num_workers, num_threads=None):
    with tempfile.TemporaryDirectory() as folder:
        cache.prepared(list_data_files(path), settings, folder, num_workers=num_workers, num_threads=num_threads)


def rows_per_s(folder, settings, counts, repeats):
    """Rows a second of each way. counts: rows for the loops, and for ours, whose start does not grow with them."""
    from benchmarks.original_loop import BareTokenizer, OriginalTokenizer, original_loop  # not in the workers

    limits = LIMITS.max_len, LIMITS.max_src_len
    few, many = (write_rows(folder / f"{count}.jsonl", count) for count in counts)
    original, bare = OriginalTokenizer(settings.tokenizer), BareTokenizer(settings.tokenizer)
    ours = InstructionDataset(few, settings)
    check = [original_loop(few, tokenizer, *limits)[:1000] for tokenizer in (original, bare)]
    mine = [{name: row[name] for name in ("input_ids", "labels")} for row in ours[:1000]]
    assert check == [mine, mine], "these are different rows"
    cores = len(os.sched_getaffinity(0))
    prepare(few, settings, cores)  # starts the fork server, once for a run
    ways = {
        "original": lambda: secs(original_loop, few, original, *limits),
        "bare": lambda: secs(original_loop, few, bare, *limits),
        "sentencepiece alone": lambda: secs(encode_all, few, settings.tokenizer.sp),
        "ours, 1 process": lambda: secs(prepare, many, settings, 0),
        "ours, 1 process, 1 thread": lambda: secs(prepare, many, settings, 0, 1),
        f"ours, {cores} processes": lambda: secs(prepare, many, settings, cores),
    }
    taken = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            taken[name].append(counts["ours" in name] / run())
    found = {name: median(values) for name, values in taken.items()}
    return {"rows_per_s": found, "of_original": {name: value / found["original"] for name, value in found.items()}}


def encode_all(path, sp):
    """What no Python around it can be faster than: each text to ids."""
    for line in open(path, encoding="utf-8"):  # noqa: SIM115 (read to its end)
        row = json.loads(line)
        sp.encode(row["input"]), sp.encode(row["output"])


def child(*arguments):
    """This script in a fresh process: (what it says, its peak memory in bytes)."""
    command = [sys.executable, __file__, "--child", *map(str, arguments)]
    process, peak = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT), 0
    while process.poll() is None:
        peak = max(peak, tree_memory(process.pid))
        time.sleep(0.05)
    assert process.returncode == 0, f"{command} failed"
    return json.loads(process.stdout.read().splitlines()[-1]), peak


def tree_memory(root):
    """Proportional set size of a process and all its descendants, in bytes."""
    parents, total = {}, 0
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(path.parent.name)] = int(path.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue
    family = {root}
    for _ in range(4):
        family |= {pid for pid, parent in parents.items() if parent in family}
    for pid in family:
        try:
            total += 1024 * int(re.search(r"\nPss: +(\d+)", Path(f"/proc/{pid}/smaps_rollup").read_text())[1])
        except OSError:
            continue
    return total


def run_child(task, path, cache_dir, tokenizer_folder):
    """In the child: prepare a file with all cores, or start on a prepared one and build the first batch."""
    settings, cores = settings_of(tokenizer_folder), len(os.sched_getaffinity(0))
    if task == "prepare":
        return secs(lambda: cache.prepared(list_data_files(path), settings, cache_dir, num_workers=cores))
    start = time.perf_counter()
    data = InstructionDataset(path, settings, cache_dir=cache_dir, progress=True)
    opened = time.perf_counter() - start
    sampler = StepSampler(len(data), BATCH, 1, 1, 1234, lengths=data.lengths() if task == "grouped" else None)
    collate([data[i] for i in sampler.micro_batches(Progress(), 0)[0]], 0, MODE[MODE_NAME].positions)
    return {"opened_secs": opened, "first_batch_secs": time.perf_counter() - start}


def start_and_memory(folder, tokenizer_folder, counts):
    """Peak memory of preparing files of two sizes, and the seconds of data until the first batch of a second start."""
    found = {}
    for count in counts:
        path, cache_dir = write_rows(folder / "rows.jsonl", count), folder / f"cache-{count}"
        time.sleep(3)  # until its time of change says that it is complete
        taken, peak = child("prepare", path, cache_dir, tokenizer_folder)
        found[f"{count} rows"] = {"prepare_secs": taken, "peak_gib": peak / 2**30}
        for task in ("shuffled", "grouped"):
            found[f"{count} rows"][f"second start, {task}"] = child(task, path, cache_dir, tokenizer_folder)[0]
        shutil.rmtree(cache_dir)
    small, large = found.values()
    return {**found, "memory_ratio": large["peak_gib"] / small["peak_gib"]}


def batches_of(data, way, steps, max_len):
    """The batches of the first steps of an epoch; ids are brought into the small vocabulary."""
    lengths = data.lengths() if way == "grouped" else None
    sampler = StepSampler(len(data), BATCH, 1, 1, 1234, lengths=lengths)
    for number in range(steps):
        rows = [data[i] for i in sampler.micro_batches(Progress(rows=number * BATCH), 0)[0]]
        batch = collate(rows, 0, MODE["glm3"].positions, max_len if way == "packed" else None)
        real = sum(len(row["input_ids"]) for row in rows)
        for name in ("input_ids", "labels"):
            batch[name] = torch.where(batch[name] > 0, batch[name] % VOCABULARY, batch[name])
        yield batch, real


def batching(path, settings, steps):
    """Padding and target tokens a second of each way."""
    from benchmarks.step_time import config_of, step  # not in the workers, which import this file

    data = InstructionDataset(path, settings)
    config = MODE["glm3"].config(**config_of(4, 256, 688, 8, VOCABULARY))
    model = MODE["glm3"].model(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    steps = min(steps, len(data) // BATCH)
    if not steps:
        raise SystemExit(f"{path}: fewer than {BATCH} samples, too few to measure.")
    max_len, ways = settings.limits.max_len, ("padded", "grouped", "packed")
    ways = {way: list(batches_of(data, way, steps, max_len)) for way in ways}
    taken = dict.fromkeys(ways, 0.0)
    for batches in ways.values():
        step(model, optimizer, batches[0][0])
    for number in range(steps):
        for way, batches in ways.items():
            taken[way] += step(model, optimizer, batches[number][0])[0]
    found = {}
    for way, batches in ways.items():
        places = sum(batch["input_ids"].numel() for batch, _ in batches)
        found[way] = {
            "padding_share": 1 - sum(real for _, real in batches) / places,
            "tokens_per_s": sum(real for _, real in batches) / taken[way],
            "target_tokens_per_s": sum(len(batch["target_index"]) for batch, _ in batches) / taken[way],
        }
    base = found["padded"]["target_tokens_per_s"]
    ratios = {way: found[way]["target_tokens_per_s"] / base for way in ways}
    return {**found, "of_padded": ratios, "bound": 1 / (1 - found["padded"]["padding_share"])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tokenizer", type=Path, default=ROOT / "tiny_base/tokenizer.model", help="SentencePiece model"
    )
    parser.add_argument("--data", help="a file whose batches are measured too, at 1,024 tokens")
    parser.add_argument("--quick", action="store_true", help="few rows, to see that it runs")
    parser.add_argument("--out", type=Path, help="JSON file; default: benchmarks/results/, with --quick none")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return print(json.dumps(run_child(*args.child)))
    from benchmarks.step_time import machine

    torch.set_num_threads(1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shutil.copy(args.tokenizer, folder / "tokenizer.model")
        settings = settings_of(folder)
        report = {"machine": machine("cpu"), "vocabulary": len(settings.tokenizer)}
        report["preparation"] = rows_per_s(
            folder, settings, (2_000, 4_000) if args.quick else (20_000, 100_000), 1 if args.quick else 5
        )
        steps = 2 if args.quick else 32
        report["batches"] = batching(write_rows(folder / "batches.jsonl", 20 * 64 * BATCH), settings, steps)
        if args.data:
            report["batches_of_data"] = batching(args.data, settings_of(folder, LIMITS_OF_DATA), steps)
        report["sizes"] = start_and_memory(folder, folder, (500, 2_000) if args.quick else (10_000, 1_000_000))
    print(*table(report), sep="\n")
    out = args.out or ROOT / "benchmarks/results/data_cpu.json"
    if args.out or not args.quick:
        out.parent.mkdir(exist_ok=True)
        out.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def table(report):
    """The figures as lines."""
    yield f"{'preparation':<40}{'rows/s':>10}{'of original':>14}"
    for name, rate in report["preparation"]["rows_per_s"].items():
        yield f"  {name:<38}{rate:>10,.0f}{report['preparation']['of_original'][name]:>13.2f}x"
    for part in ("batches", "batches_of_data"):
        if found := report.get(part):
            yield f"{part.replace('_', ' '):<24}{'padding':>10}{'target tokens/s':>18}{'of padded':>12}"
            for way, ratio in found["of_padded"].items():
                share, rate = found[way]["padding_share"], found[way]["target_tokens_per_s"]
                yield f"  {way:<22}{share:>10.1%}{rate:>18,.0f}{ratio:>11.2f}x"
            yield f"  bound by padding{'':<36}{found['bound']:>11.2f}x"
    yield f"{'size':<24}{'prepared in':>12}{'peak memory':>14}{'second start':>14}{'grouped':>10}"
    for name, found in report["sizes"].items():
        if name != "memory_ratio":
            starts = [found[f"second start, {task}"]["first_batch_secs"] for task in ("shuffled", "grouped")]
            secs_and_memory = f"{found['prepare_secs']:>10.1f} s{found['peak_gib']:>10.2f} GiB"
            yield f"  {name:<22}{secs_and_memory}{starts[0]:>12.2f} s{starts[1]:>8.2f} s"
    yield f"  peak memory of the large one{'':<24}{report['sizes']['memory_ratio']:>11.2f}x"


if __name__ == "__main__":
    main()
