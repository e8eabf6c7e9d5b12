"""Files and formats: what each kind of file holds, which format a row is, and what becomes of it."""

import gzip
import json
import pickle
import re
import sys
import tracemalloc
from fractions import Fraction
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.data import files
from glm_finetune.data.blocks import fingerprint
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.formats import FORMATS, detect, parse_columns, renamed
from glm_finetune.data.samples import Settings, of_file, prepare_row, read_questions, settings_of
from glm_finetune.flags import parse
from glm_finetune.modes.spec import Limits
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import refused
from tests.tiny import read_rows

ROOT = Path(__file__).parents[1]
SAMPLES = sorted((ROOT / "data/formats").iterdir())
WIDE = Limits(4096, 2048, end_cut_answers=False)
ROWS = [{"question": "发动机，“水温”高\n怎么办？", "answer": 'a, "b"\tc'}, {"question": "q", "answer": ""}]
every_mode = pytest.mark.parametrize("mode", MODE)
every_sample = pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)


def jsonl(rows=ROWS):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def write(path, content=None):
    path.write_bytes(jsonl() if content is None else content)
    return path


def rows_in(path):
    return [row for _, row in read_rows(path)]


@pytest.fixture
def settings(checkpoints):
    """Function: mode and options -> Settings with room for everything."""

    def make(mode="glm3", **options):
        tokenizer = MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
        return Settings(MODE[mode].template, tokenizer, **{"limits": WIDE, **options})

    return make


# Formats


@pytest.mark.parametrize(
    "name, row, question, answer",
    [
        ("instruction", {"instruction": "甲：", "input": "乙", "output": "丙"}, "甲：乙", "丙"),
        ("advertisegen", {"content": "类型#上衣", "summary": "好看"}, "类型#上衣", "好看"),
        ("question_answer", {"question": "q", "answer": "a"}, "q", "a"),
        ("context_target", {"context": "c\nAnswer: ", "target": "t"}, "c\nAnswer: ", "t"),
        ("text_answer", {"text": "t", "answer": ""}, "t", ""),
        ("prompt_response", {"prompt": "p", "response": "r"}, "p", "r"),
        ("prompt_response", {"prompt": "p", "response": "r", "history": []}, "p", "r"),
        ("prompt_response", {"prompt": "p", "response": "r", "history": None}, "p", "r"),
        (
            "conversations",
            {"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
            "q",
            "a",
        ),
        (
            "messages",
            {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}], "id": 3},
            "q",
            "a",
        ),
        ("sharegpt", {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, "q", "a"),
    ],
)
def test_a_row_of_every_format_is_recognised_and_becomes_messages(name, row, question, answer):
    form = detect([row])
    assert form.name == name
    expected = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    assert form.messages(row) == expected


def test_history_and_system_become_messages_in_their_order():
    history = FORMATS["prompt_response"].messages({"prompt": "c", "response": "d", "history": [["a", "b"]]})
    assert [message["content"] for message in history] == ["a", "b", "c", "d"]
    assert [message["role"] for message in history] == ["user", "assistant"] * 2
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    row = {"system": "s", "conversations": turns, "tools": [{"name": "f"}]}
    tools, system, *_ = FORMATS["sharegpt"].messages(row)
    assert "tools" in tools and system == {"role": "system", "content": "s"}


def test_one_prompt_stands_before_every_text_of_the_first_versions_format(settings, tmp_path):
    row = {"text": "水泵漏水", "answer": "x"}
    assert FORMATS["text_answer"].messages(row, "抽取：")[0]["content"] == "抽取：水泵漏水"
    path = write(tmp_path / "a.jsonl", jsonl([row]))
    with_prompt = InstructionDataset(path, settings(prompt_text="抽取："))
    pair = write(tmp_path / "b.jsonl", jsonl([{"instruction": "抽取：", "input": "水泵漏水", "output": "x"}]))
    assert list(with_prompt) == list(InstructionDataset(pair, settings()))
    refused(lambda: InstructionDataset(pair, settings(prompt_text="抽取：")), "--prompt_text", "b.jsonl is instruction")


@pytest.mark.parametrize("field", ["history", "conversations", "messages", "tools"])
def test_lists_may_be_json_text_as_in_a_csv_cell(field):
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    row = {"prompt": "p", "response": "r", "history": [["a", "b"]]} if field == "history" else {field: turns}
    row = {"conversations": turns, "tools": [{"name": "f"}]} if field == "tools" else row
    as_text = row | {field: json.dumps(row[field])}
    assert detect([as_text]).messages(as_text) == detect([row]).messages(row)


def test_every_format_has_a_small_file_and_a_paragraph():
    shown = {detect(rows_in(path)).name for path in SAMPLES}
    assert shown == set(FORMATS)
    text = (ROOT / "data/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in text for name in FORMATS)
    assert all(path.name in text for path in SAMPLES)


def test_a_format_that_could_be_two_must_be_named(settings, tmp_path):
    rows = [{"question": "q", "answer": "a", "prompt": "p", "response": "r"}]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    refused(
        lambda: InstructionDataset(path, settings()),
        "a.jsonl, line 1",
        "question_answer or prompt_response",
        "--data_format",
    )
    named = InstructionDataset(path, settings(data_format="prompt_response"))
    columns = {"question": "prompt", "answer": "response"}
    assert list(named) == list(InstructionDataset(path, settings(columns=columns)))


def test_the_first_rows_decide_and_one_odd_one_among_them_does_not(settings, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"prompt": "p"}, *ROWS]))
    refused(lambda: InstructionDataset(path, settings()), "line 1: field 'question' is missing", "question_answer")


def test_columns_rename_and_hide():
    columns = parse_columns("instruction=question,output=reply")
    assert columns == {"instruction": "question", "output": "reply"}
    row = {"question": "q", "reply": "r", "input": "", "answer": "no", "instruction": "hidden"}
    assert renamed(row, columns) == {"instruction": "q", "output": "r", "input": "", "answer": "no"}
    assert parse_columns("") == {}


@pytest.mark.parametrize("text", ["question", "a=b", "question=", "question=a,question=b", "=x", "question==,answer"])
def test_bad_columns_are_named(text):
    refused(lambda: parse_columns(text), f"--columns {text}", "FIELD=COLUMN")


def test_a_missing_column_is_named(settings, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"q": "x", "reply": "y"}]))
    rows = InstructionDataset(path, settings(columns={"question": "q", "answer": "reply"}))
    assert len(rows) == 1
    refused(
        lambda: InstructionDataset(path, settings(columns={"question": "q", "answer": "repli"})),
        "line 1: field 'answer' is missing",
    )


# Kinds of files


def as_csv(delimiter):
    quoted = [[f'"{value.replace(chr(34), chr(34) * 2)}"' for value in row.values()] for row in ROWS]
    return "\n".join(delimiter.join(line) for line in [list(ROWS[0]), *quoted]).encode()


CONTENTS = {
    "a.jsonl": jsonl(),
    "a.json": json.dumps(ROWS, ensure_ascii=False, indent=2).encode(),
    "a.txt": jsonl(),
    "a.csv": as_csv(","),
    "a.tsv": as_csv("\t"),
    "bom.jsonl": b"\xef\xbb\xbf" + jsonl(),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(","),
    "blank.jsonl": jsonl().replace(b"\n", b"\r\n \r\n"),
}


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("name", CONTENTS)
def test_every_kind_of_file_gives_the_same_rows(name, compressed, tmp_path):
    path = tmp_path / (name + ".gz" if compressed else name)
    write(path, gzip.compress(CONTENTS[name]) if compressed else CONTENTS[name])
    assert rows_in(path) == ROWS


@pytest.mark.parametrize("compressed", [False, True])
def test_parquet_gives_the_same_rows(compressed, tmp_path, monkeypatch):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(files, "BATCH_ROWS", 3)
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(ROWS * 5), path)
    if compressed:
        path = write(tmp_path / "b.parquet.gz", gzip.compress(path.read_bytes()))
    found = list(read_rows(path))
    assert [row for _, row in found] == ROWS * 5
    assert found[9][0] == f"{path}, row 10"
    refused(lambda: rows_in(write(tmp_path / "bad.parquet", b"PAR1 no")), "bad.parquet", "not a readable Parquet file")


def test_conversations_in_parquet_have_no_empty_fields(tmp_path, settings):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [row for path in SAMPLES if path.name == "conversations.jsonl" for row in rows_in(path)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")  # fills `loss` with null
    samples = InstructionDataset(write(tmp_path / "a.jsonl", jsonl(rows)), settings())
    assert list(InstructionDataset(tmp_path / "a.parquet", settings())) == list(samples)


def test_data_sets_of_the_datasets_library(tmp_path, settings):
    datasets = pytest.importorskip("datasets")
    path = write(tmp_path / "a.jsonl")
    whole = datasets.Dataset.from_json(str(path), cache_dir=str(tmp_path / "cache"))
    whole.save_to_disk(tmp_path / "one")
    datasets.DatasetDict(train=whole, test=whole.select([1])).save_to_disk(tmp_path / "two")
    assert rows_in(tmp_path / "one") == rows_in(tmp_path / "two") == ROWS
    assert rows_in(f"{tmp_path}/two#test") == ROWS[1:]
    refused(lambda: rows_in(f"{tmp_path}/two#dev"), "two#dev", "dev")


@pytest.mark.parametrize("name, library", [("a.parquet", "pyarrow"), ("hf://owner/name", "datasets")])
def test_a_library_that_is_not_there_is_named_with_the_command(name, library, tmp_path, monkeypatch):
    for module in (library, f"{library}.parquet"):
        monkeypatch.setitem(sys.modules, module, None)
    path = name if name.startswith("hf:") else write(tmp_path / name)
    refused(lambda: rows_in(path), str(path), f"pip install {library}")


def test_a_folder_is_all_its_files_in_order(tmp_path):
    for name in ("b.jsonl", "a.csv", "c.json"):
        write(tmp_path / name, CONTENTS["a" + Path(name).suffix])
    write(tmp_path / "README.md", b"no data")
    write(tmp_path / ".hidden.jsonl", b"no data")
    assert [Path(source.path).name for source in files.list_data_files(tmp_path)] == ["a.csv", "b.jsonl", "c.json"]
    assert rows_in(tmp_path) == ROWS * 3
    (tmp_path / "empty").mkdir()
    refused(lambda: rows_in(tmp_path / "empty"), "empty: no file of .json")


@pytest.mark.parametrize("weight", ["1", "2", "0.5", "1.5", "0.3", "2.75"])
def test_a_weight_is_how_often_a_row_counts_on_the_average(weight):
    counts = [files.occurrences(i, Fraction(weight)) for i in range(400)]
    assert sum(counts) == 400 * Fraction(weight)
    assert max(counts) - min(counts) <= 1


def test_files_with_weights_and_the_rows_their_samples_are_from(tmp_path, settings):
    a = write(tmp_path / "a.jsonl", b"\n" + jsonl())
    b = write(
        tmp_path / "b.json",
        json.dumps([{"instruction": "i", "input": "", "output": str(i)} for i in range(4)]).encode(),
    )
    data = InstructionDataset(f"{a}:2, {b}:0.5", settings())
    assert len(data) == 6 and data.report.kept == 6 and data.report.rows == 6
    assert data.report.tokens == sum(len(row["input_ids"]) for row in data)
    assert data.report.targets == sum(label != -100 for row in data for label in row["labels"])
    assert [data.where(i).rpartition("/")[2] for i in range(6)] == [
        *["a.jsonl, line 2"] * 2,
        *["a.jsonl, line 3"] * 2,
        "b.json, entry 2",
        "b.json, entry 4",
    ]
    assert data[0] == data[1] != data[2]
    refused(lambda: InstructionDataset(f"{a}:0", settings()), ":0: a weight must be above 0")


def test_a_path_is_taken_as_it_is_where_it_exists(tmp_path):
    assert len(rows_in(write(tmp_path / "a,b:2"))) == len(ROWS)


def test_where_names_the_line_also_where_values_have_line_breaks(tmp_path):
    wheres = [where for where, _ in read_rows(write(tmp_path / "a.csv", as_csv(",")))]
    assert wheres == [f"{tmp_path}/a.csv, line 2", f"{tmp_path}/a.csv, line 4"]


@pytest.mark.parametrize("compressed", [False, True])
def test_lines_are_streamed(compressed, tmp_path):
    line = json.dumps({"question": "x" * 2000, "answer": "y"}).encode() + b"\n"
    content = line * 5000
    path = write(
        tmp_path / ("a.jsonl.gz" if compressed else "a.jsonl"), gzip.compress(content) if compressed else content
    )
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 5000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / 10


def test_the_fingerprint_follows_content_weights_and_order(tmp_path):
    a, b = write(tmp_path / "a.jsonl"), write(tmp_path / "b.jsonl", jsonl(ROWS[:1]))
    prints = [fingerprint(text) for text in (str(a), str(b), f"{a},{b}", f"{b},{a}", f"{a}:2,{b}", f"{a}:2")]
    assert len(set(prints)) == len(prints)
    assert fingerprint(a) == fingerprint(write(tmp_path / "c.jsonl"))


# From flags to samples, and to questions


def test_settings_are_those_of_the_flags_and_travel_to_other_processes(checkpoints):
    arguments = ["--model_name_or_path", "x", "--train_path", "x", "--output_dir", "x", "--truncation", "head"]
    arguments += ["--columns", "answer=reply", "--data_format", "question_answer", "--train_on", "last"]
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    settings = settings_of(parse(TrainConfig, arguments), MODE["glm3"], tokenizer)
    assert settings.limits == Limits(1024, 256, "head", end_cut_answers=False)
    assert (settings.columns, settings.train_on, settings.too_long) == ({"answer": "reply"}, "last", "cut")
    row = {"question": "水温高", "reply": "换节温器"}
    rows = [prepare_row("a", row, known)[0].row for known in (pickle.loads(pickle.dumps(settings)), settings)]
    assert rows[0] == rows[1]
    config = parse(TrainConfig, [*arguments, "--data_format", "question_anser"])
    refused(lambda: settings_of(config, MODE["glm3"], tokenizer), "--data_format", "Did you mean question_answer?")


@every_sample
def test_questions_for_prediction_are_the_rows_up_to_the_last_answer(path):
    config = parse(PredictConfig, ["--test_path", str(path)])
    form, found = detect(rows_in(path)), list(read_questions(config))
    for (_, row, messages, answer), original in zip(found, rows_in(path), strict=True):
        assert row == original
        if form.name == "text":
            assert (messages, answer) == ([{"role": "user", "content": row["text"]}], None)
            continue
        whole = form.messages(row)
        assert messages == whole[: len(messages)] and messages[-1]["role"] in ("user", "observation")
        assert answer == whole[-1]["content"] and all(m["role"] == "assistant" for m in whole[len(messages) :])


@pytest.mark.parametrize(
    "row",
    [
        {"question": "q"},
        {"instruction": "q", "input": ""},
        {"prompt": "q", "history": []},
        {"content": "q"},
        {"messages": [{"role": "user", "content": "q"}]},
    ],
)
def test_questions_need_no_answer(row, tmp_path):
    path = str(write(tmp_path / "a.jsonl", jsonl([row])))
    (found,) = read_questions(parse(PredictConfig, ["--test_path", path]))
    assert found == (f"{path}, line 1", row, [{"role": "user", "content": "q"}], None)


@every_mode
def test_plain_text_is_cut_into_pieces_that_lose_nothing(mode, settings):
    text = "发动机的水温高，先检查风扇。" * 20
    whole = settings(mode, limits=None, data_format="text")
    (sample,) = prepare_row("row", {"text": text}, whole)
    pieces = prepare_row("row", {"text": text}, settings(mode, limits=Limits(50, 10), data_format="text"))
    end, begin = whole.tokenizer.eos_token_id, sample.input_ids[:2]
    assert len(pieces) > 3 and all(len(piece.input_ids) <= 50 for piece in pieces)
    assert all(piece.input_ids[:2] == begin and piece.num_prefix == sample.num_prefix for piece in pieces)
    assert [i for piece in pieces for i in piece.input_ids[2:]] == sample.input_ids[2:]
    assert sample.input_ids[-1] == end and sum(i == end for piece in pieces for i in piece.input_ids) == 1
    assert whole.tokenizer.decode(sample.input_ids[2:-1]).replace("，", ",") == text.replace("，", ",")
    hidden = sample.num_prefix or 2  # ChatGLM-6B: [gMASK] is the prefix and <sop> a target; else [gMASK] sop
    assert sample.labels == [-100] * hidden + sample.input_ids[hidden:] and sample.num_prefix == (mode == "glm")
    assert prepare_row("row", {"text": ""}, whole) == []


def test_formats_are_told_file_by_file(settings):
    data = InstructionDataset(",".join(str(path) for path in SAMPLES), settings())
    assert data.report.rows == sum(len(rows_in(path)) for path in SAMPLES)
    names = {of_file(source, settings()).data_format for source in data.data_files}
    assert names == set(FORMATS)


# Training


@pytest.mark.slow
@every_sample
@every_mode
def test_every_sample_file_trains_two_steps_in_every_mode(mode, path, checkpoints, tmp_path):
    arguments = train_arguments(
        mode, "lora", checkpoints[mode], path, tmp_path / "out", max_steps=2, max_len=2000, max_src_len=1800
    )
    if path.stem == "tools" and mode != "glm3":
        with pytest.raises(RuntimeError, match="tools.json, entry 1: tools .* Use --mode glm3"):
            run_ranks(train_main, 1, arguments)
        return
    printed = run_ranks(train_main, 1, arguments)[0]
    losses = [json.loads(line)["loss"] for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == 2 and losses[1] < losses[0]
    assert re.search(rf"{path.name}: rows {len(rows_in(path))},.* question_cut 0, history_cut 0, answer_cut 0", printed)
