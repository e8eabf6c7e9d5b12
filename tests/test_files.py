"""What users have in their files and on their command lines besides what the formats say."""

import csv
import datetime
import json

import pytest

from glm_finetune.answer.flags import PredictConfig
from glm_finetune.data import files
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.samples import read_questions
from glm_finetune.flags import parse
from tests.refusal import refused
from tests.test_formats import SAMPLES, jsonl, rows_in, settings, write
from tests.tiny import read_rows

__all__ = ["settings"]  # a fixture


@pytest.mark.parametrize("text", ["a.jsonl,", ",a.jsonl", "a.jsonl,,a.jsonl", ""])
def test_a_stray_comma_is_named_and_means_no_folder(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "a.jsonl")
    refused(lambda: files.list_data_files(text), repr(text), "comma")


def test_a_list_may_be_longer_than_any_file_name(tmp_path):
    path = write(tmp_path / "a.jsonl")
    assert len(files.list_data_files(",".join([f"{path}:.5"] * 500))) == 500


@pytest.mark.parametrize("weight", ["0", "-1", "-.5"])
def test_a_weight_that_is_none_is_named(weight, tmp_path):
    refused(lambda: files.list_data_files(f"{write(tmp_path / 'a.jsonl')}:{weight}"), "a weight must be above 0")


def test_a_number_too_long_for_python_is_a_bad_row_with_its_place(tmp_path, settings):
    digits = b'{"question": "q", "answer": "a", "id": ' + b"1" * 5000 + b"}\n"
    path = write(tmp_path / "a.jsonl", jsonl() + digits)
    refused(lambda: rows_in(path), "line 3: not JSON")
    assert len(InstructionDataset(path, settings(on_bad_row="skip")).report.bad) == 1
    refused(lambda: rows_in(write(tmp_path / "a.json", b"[" + digits + b"]")), "a.json: not JSON")


def test_parquet_that_breaks_within_is_named(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pyarrow.Table.from_pylist([{"question": f"{i}" * 50, "answer": "a"} for i in range(9000)])
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=3000)
    content = bytearray((tmp_path / "a.parquet").read_bytes())
    content[len(content) // 2 : len(content) // 2 + 200] = bytes(200)
    refused(lambda: rows_in(write(tmp_path / "b.parquet", content)), "b.parquet: not a readable Parquet file")
    broken = pyarrow.array([b"\xff"], pyarrow.binary()).cast(pyarrow.string(), safe=False)
    parquet.write_table(pyarrow.table({"question": broken}), tmp_path / "c.parquet")
    refused(lambda: rows_in(tmp_path / "c.parquet"), "c.parquet: not a readable Parquet file")


def test_lines_of_a_table_are_those_of_the_file(tmp_path):
    text = b'\n"ques\ntion",answer\n\nq,a\n\n"q\n2",a2\nq3,a3\n'
    assert [where.rpartition(" ")[2] for where, _ in read_rows(write(tmp_path / "a.csv", text))] == [
        "5",
        "7",
        "9",
    ]
    refused(lambda: rows_in(write(tmp_path / "b.csv", b"question,answer,answer\nq,a,b\n")), "two columns", "'answer'")
    refused(lambda: rows_in(write(tmp_path / "c.csv", b"question,answer\nq,a\nq,\xff\n")), "c.csv, line ", "GBK")


@pytest.mark.parametrize("name", ["sharegpt.json", "conversations.jsonl", "messages.jsonl"])
def test_conversations_in_a_csv_are_recognised(name, tmp_path, settings):
    rows = rows_in(next(path for path in SAMPLES if path.name == name))
    (field,) = {"conversations", "messages"} & rows[0].keys()
    with open(tmp_path / "a.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerows([[field], *([json.dumps(row[field], ensure_ascii=False)] for row in rows)])
    plain = write(tmp_path / "a.jsonl", jsonl([{field: row[field]} for row in rows]))
    assert list(InstructionDataset(tmp_path / "a.csv", settings())) == list(InstructionDataset(plain, settings()))


def test_instructions_may_have_a_history_and_a_system_text(tmp_path, settings):
    row = {"instruction": "问", "input": "", "output": "答", "system": "短", "history": [["旧问", "旧答"]]}
    roles = ("system", "user", "assistant", "user", "assistant")
    texts = ("短", "旧问", "旧答", "问", "答")
    messages = [{"role": role, "content": text} for role, text in zip(roles, texts)]
    paths = [write(tmp_path / f"{i}.jsonl", jsonl([r])) for i, r in enumerate((row, {"messages": messages}))]
    first, second = (list(InstructionDataset(path, settings())) for path in paths)
    assert first == second


def test_openai_parts_and_weights(tmp_path, settings):
    def talk(content, **more):
        answer = {"role": "assistant", "content": "答", **more}
        return {"messages": [{"role": "user", "content": content}, answer, *turn]}

    turn = [{"role": "user", "content": "再问"}, {"role": "assistant", "content": "再答"}]
    parts = [{"type": "text", "text": "问"}, {"type": "text", "text": "题"}]
    rows = (talk(parts, weight=0), talk("问题", loss=False))
    paths = [write(tmp_path / f"{i}.jsonl", jsonl([row])) for i, row in enumerate(rows)]
    first, second = (list(InstructionDataset(path, settings())) for path in paths)
    assert first == second


def test_weights_have_no_place_in_prediction(tmp_path):
    path = write(tmp_path / "a.jsonl")
    config = parse(PredictConfig, ["--model_path", str(tmp_path), "--test_path", f"{path}:2"])
    refused(lambda: list(read_questions(config)), "a.jsonl:2", "answers need no weight")


def test_an_answer_takes_the_place_of_no_field(tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([{"question": "q"}, {"question": "q", "prediction": "of another model"}]))
    config = parse(PredictConfig, ["--model_path", str(tmp_path), "--test_path", str(path)])
    refused(lambda: list(read_questions(config)), "a.jsonl, line 2", "the field 'prediction'", "Rename")


def test_what_json_cannot_hold_is_text_beside_an_answer(tmp_path):
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([{"question": "q", "day": datetime.date(2026, 1, 2)}]), path)
    ((_, row, _, _),) = read_questions(parse(PredictConfig, ["--model_path", str(tmp_path), "--test_path", str(path)]))
    assert row == {"question": "q", "day": "2026-01-02"}
    half = write(tmp_path / "a.jsonl", b'{"question": "q", "note": "\\ud800"}\n')
    config = parse(PredictConfig, ["--model_path", str(tmp_path), "--test_path", str(half)])
    refused(lambda: list(read_questions(config)), "a.jsonl, line 1", "half of a character")
