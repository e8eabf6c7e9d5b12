"""Bad data: one error that names file, line and field and says what to do; or a list of what was skipped."""

import gzip
import json
import re

import pytest

from glm_finetune import MODE
from glm_finetune.data import files
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.formats import FORMATS
from glm_finetune.data.samples import Settings, prepare_row
from glm_finetune.modes.spec import Limits
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import heard, refused

TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SPOKEN = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
GOOD = {
    "instruction": {"instruction": "i", "input": "n", "output": "o"},
    "advertisegen": {"content": "c", "summary": "s"},
    "question_answer": {"question": "q", "answer": "a"},
    "context_target": {"context": "c", "target": "t"},
    "text_answer": {"text": "t", "answer": "a"},
    "prompt_response": {"prompt": "p", "response": "r", "history": [["q", "a"]]},
    "conversations": {"conversations": TALK},
    "messages": {"messages": TALK},
    "sharegpt": {"conversations": SPOKEN},
    "text": {"text": "t"},
    "query_response": {"query": "q", "response": "r", "history": [["q", "a"]]},
    "input_output": {"input": "i", "output": "o"},
    "input_target": {"input": "i", "target": "t"},
    "prompt_completion": {"prompt": "p", "completion": "c"},
    "ask_answer": {"ask": "q", "answer": "a", "title": "t"},
    "conversation": {"conversation": [{"human": "q", "assistant": "a"}]},
    "paragraph": {"paragraph": [{"q": "q", "a": ["a", "b"]}]},
}
CAN_BE_EMPTY = ("history", "title")  # missing, or null; and `input` beside an instruction
DEEP = json.loads("[" * 300 + "]" * 300)


def lines(*rows):
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


@pytest.fixture
def dataset(checkpoints, tmp_path):
    """Function: bytes -> data set of ChatGLM3."""

    def make(content, name="data.jsonl", **options):
        (tmp_path / name).write_bytes(content)
        tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
        settings = Settings(MODE["glm3"].template, tokenizer, Limits(400, 200, "tail", False), **options)
        return InstructionDataset(tmp_path / name, settings)

    return make


def test_every_format_is_tried():
    assert GOOD.keys() == FORMATS.keys()


@pytest.mark.parametrize("value", [None, 3, True, {"a": "b"}, DEEP, "missing"], ids=lambda value: f"{value!r:.12}")
@pytest.mark.parametrize("name, field", [(name, field) for name, row in GOOD.items() for field in row])
def test_a_field_that_is_missing_or_of_another_kind_is_named_with_its_line(dataset, name, field, value):
    row = {key: text for key, text in GOOD[name].items() if key != field}
    row = row if value == "missing" else row | {field: value}
    if (field in CAN_BE_EMPTY or (name, field) == ("instruction", "input")) and value in (None, "missing"):
        assert len(dataset(lines(GOOD[name], row))) == 2
        return
    message = refused(lambda: dataset(lines(GOOD[name], row)), "data.jsonl, line 2: ", f"'{field}'")
    assert ("is missing" in message) == (value == "missing") and len(message) < 400
    alone = refused(lambda: dataset(lines(row), data_format=name), "data.jsonl, line 1: ", f"'{field}'")
    assert "\n" not in alone


@pytest.mark.parametrize("name, field", [(name, field) for name, row in GOOD.items() for field in row])
def test_half_characters_are_named(dataset, name, field):
    row = re.sub('"q"(?!:)', r'"\\ud800"', json.dumps(GOOD[name]))
    row = row if "\\ud800" in row else json.dumps(GOOD[name] | {field: "\ud800"})
    refused(lambda: dataset(row.encode()), "line 1: ", "half of a character")


@pytest.mark.parametrize(
    "name, row, parts",
    [
        ("prompt_response", {"history": [["q"]]}, ["'history', round 1", "[question, answer]"]),
        ("prompt_response", {"history": [["q", "a"], ["q", None]]}, ["'history', round 2", "is None"]),
        ("prompt_response", {"history": {"q": "a"}}, ["'history' is {"]),
        ("prompt_response", {"history": "q"}, ["'history': not JSON"]),
        ("conversations", {"conversations": []}, ["the conversation is empty"]),
        ("conversations", {"conversations": TALK[:1]}, ["ends with the user", "add the answer"]),
        ("conversations", {"conversations": TALK[::-1]}, ["the assistant cannot follow the beginning"]),
        ("conversations", {"conversations": [*TALK, {"role": "bot", "content": "x"}]}, ["message 3: role 'bot'"]),
        ("conversations", {"conversations": [*TALK, "x"]}, ["message 3: expected an object"]),
        ("conversations", {"conversations": TALK, "tools": 3}, ["'tools' is 3", "not a list or an object"]),
        ("conversations", {"conversations": TALK, "tools": [DEEP]}, ["'tools' is nested deeper"]),
        ("conversations", {"conversations": TALK, "tools": [{"name": "f", "x": DEEP}]}, ["'tools' is nested deeper"]),
        ("messages", {"messages": []}, ["the conversation is empty"]),
        ("messages", {"messages": [{"role": "user", "content": DEEP}]}, ["message 1: field 'content' is [[["]),
        ("sharegpt", {"conversations": SPOKEN[:1]}, ["ends with the user"]),
        ("sharegpt", {"conversations": [{"from": "human"}]}, ["message 1: field 'value' is missing"]),
    ],
)
def test_a_bad_conversation_is_named_with_its_line(dataset, name, row, parts):
    refused(lambda: dataset(lines(GOOD[name], GOOD[name] | row)), "data.jsonl, line 2: ", *parts)


@pytest.mark.parametrize("name", [name for name in GOOD if name != "question_answer"])
def test_mixed_formats_in_one_file_are_named_with_the_first_odd_line(dataset, name):
    rows = [GOOD["question_answer"]] * 3 + [GOOD[name]]
    refused(lambda: dataset(lines(*rows)), "data.jsonl, line 4: field 'question' is missing", "format question_answer")


def test_fields_of_no_format_are_answered_with_the_nearest_or_all(dataset):
    refused(
        lambda: dataset(lines({"instruction": "i", "input": "o"})), "line 1: field 'output' is missing", "--columns"
    )
    refused(lambda: dataset(lines({"a": 1})), "line 1", "['a']", *FORMATS)
    refused(lambda: dataset(lines({})), "line 1", "no known format")


def test_an_answer_in_a_file_of_plain_text_is_not_lost(dataset):
    refused(lambda: dataset(lines(*[GOOD["text"]] * 3, GOOD["text_answer"])), "line 4: field 'answer' stands beside")


JUNK = (None, 0, -1.5, True, "", "x", "[", "{}", "\ud800", [], [None], [[]], {}, {"": 0}, {"role": "tool"}, DEEP)
CALL = {"function": {"name": "f", "arguments": '{"x": [1]}'}}
RICH = {
    "conversations": {
        "tools": [{"name": "f", "parameters": {}}],
        "system": "s",
        "conversations": [
            {"role": "user", "content": "q"},
            {"role": "tool", "name": "f", "parameters": {"x": [1]}, "observation": {"y": 2}},
            {"role": "assistant", "content": "a", "metadata": "", "loss": False},
        ],
    },
    "messages": {
        "messages": [TALK[0], {"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": ""}, TALK[1]]
    },
    "sharegpt": {"conversations": [SPOKEN[0], {"from": "function_call", "value": '{"name": "f"}'}]},
    "prompt_response": GOOD["prompt_response"],
    "query_response": {"query": "q", "response": "r", "history": TALK},
    "conversation": {"system": "s", "conversation": [{"human": "q", "assistant": "a"}] * 2, "tools": {"f": [1]}},
    "paragraph": {"paragraph": [{"role": "system", "q": "s"}, {"q": ["q", "r"], "a": ["a", ""]}]},
    "ask_answer": {"title": "t", "ask": "q", "answer": "a"},
}


def mutants(value):
    """The value with each of its parts in turn replaced by junk, or left out."""
    yield from JUNK
    parts = list(value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else [])
    for key, part in parts:
        yield type(value)(other for other in parts if other[0] != key) if isinstance(value, dict) else value[:key]
        for mutant in mutants(part):
            yield {**value, key: mutant} if isinstance(value, dict) else [*value[:key], mutant, *value[key + 1 :]]


@pytest.mark.parametrize("name", RICH)
def test_whatever_is_in_a_row_is_a_sample_or_one_clear_error(name, checkpoints):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
    settings = Settings(MODE["glm3"].template, tokenizer, Limits(400, 200, "head", False), data_format=name)
    assert prepare_row("file, line 7", RICH[name], settings)
    outcomes = []
    for mutant in mutants(RICH[name]):
        if isinstance(mutant, dict):
            try:
                outcomes.append(bool(prepare_row("file, line 7", mutant, settings)))
            except ValueError as error:
                assert str(error).startswith("file, line 7: ") and len(str(error)) < 500
                heard.append(str(error))
                outcomes.append(None)
    assert outcomes.count(True) > 2 and outcomes.count(None) > 30


# Files


@pytest.mark.parametrize(
    "content, name, parts",
    [
        ("你好".encode("gbk"), "a.csv", ["not UTF-8", "iconv -f GBK"]),
        (lines(GOOD["text"] | {"text": "你好"}).decode().encode("gbk"), "a.jsonl", [", line 1: not UTF-8"]),
        (lines(GOOD["text"]) + '{"text": "你"}'.encode("gbk"), "a.jsonl", [", line 2: not UTF-8", "iconv"]),
        (b"question,answer\na\n", "a.csv", [", line 2: 1 values less than the header has"]),
        (b'question,answer\n"a\nb",c\nd,e,f\n', "a.csv", [", line 4: 1 more values than the header has", "','"]),
        (b"question,answer\n", "a.csv", ["the file is empty"]),
        (b'question,answer\n"a"b,c\n', "a.csv", [", line 2: not CSV"]),
        (b"", "a.tsv", ["the file is empty"]),
        (b"{\n}", "a.json", [", line 1: not JSON", "several lines"]),
        (b"[" * 100_000, "a.json", ["nested too deep"]),
        (b'{"text":' * 100_000, "a.jsonl", [", line 1: nested too deep"]),
        (b"[1, 2]", "a.json", [", entry 1: expected an object, found 1"]),
        (gzip.compress(lines(GOOD["text"]) * 50, mtime=0)[:-12], "a.jsonl.gz", ["not a whole gzip file"]),
        (lines(GOOD["text"]), "a.jsonl.gz", ["not a whole gzip file"]),
        (b"x", "a.csv.gz", ["not a whole gzip file"]),
    ],
)
def test_a_bad_file_is_named(dataset, content, name, parts):
    message = refused(lambda: dataset(content, name), name, *parts)
    assert len(message) < 400


@pytest.mark.parametrize("newline", [b"\n", b""])
def test_a_line_of_50_mb_is_refused_without_being_read_whole(dataset, newline):
    content = lines(GOOD["text"]) + b'{"text": "' + b"x" * 50_000_000 + b'"}' + newline
    refused(lambda: dataset(content), "data.jsonl, line 2: longer than 16 MiB")
    data = dataset(content + lines(GOOD["text"]) * bool(newline), on_bad_row="skip")
    assert len(data) == 1 + bool(newline) and len(data.report.bad) == 1


def test_a_text_of_50_mb_in_an_array_is_refused_before_it_is_tokenized(dataset):
    content = json.dumps([GOOD["text"], {"text": "x" * 50_000_000}]).encode()
    refused(lambda: dataset(content), "data.jsonl, entry 2: field 'text' has 50,000,000 characters")


def test_control_characters_are_text(dataset):
    text = "".join(map(chr, range(32))) + "\x7f\x80\ufeff\ufffd"
    data = dataset(lines({"text": text}))
    assert data.report.kept == 1
    refused(lambda: dataset(b'{"text": "a\x00b"}'), "line 1: not JSON")  # JSON wants them escaped


def test_missing_files_are_named(tmp_path):
    refused(lambda: files.list_data_files(tmp_path / "a.json"), "a.json: no such file", "hf://owner/name")
    (tmp_path / "b.json").write_text("{}")
    refused(lambda: files.list_data_files(f"{tmp_path}/b.json,{tmp_path}/c.json:2"), "c.json: no such file")


# Skipping


BAD = lines(GOOD["text_answer"]) + b"{oops\n" + lines({"text": "t"}, {"text": 3, "answer": "a"}, 7) + b'"\xff"\n'


def test_bad_rows_are_skipped_and_listed_on_request(dataset):
    content = BAD + lines(GOOD["text_answer"])
    refused(lambda: dataset(content), "data.jsonl, line 2: not JSON")
    data = dataset(content, on_bad_row="skip")
    assert (data.report.rows, data.report.kept, len(data.report.bad)) == (7, 2, 5)
    assert [text.split(": ")[0].rpartition("line ")[2] for text in data.report.bad] == ["2", "3", "4", "5", "6"]
    assert [data.where(i).rpartition(" ")[2] for i in range(2)] == ["1", "7"]
    assert "bad 5" in str(data.report) and "5 bad rows were left out" in "".join(data.report.hints())


def test_a_file_that_begins_with_bad_rows_is_read_on_after_them(dataset):
    content = b"{oops\n" * 60 + lines(GOOD["text_answer"])
    assert len(dataset(content, on_bad_row="skip")) == 1
    refused(lambda: dataset(b"{oops\n" * 60, on_bad_row="skip"), "no row can be read", "line 1: not JSON")


def test_nothing_but_bad_rows_is_an_error_that_lists_some(dataset):
    content = lines(*[{"text": 3}] * 9)
    message = refused(lambda: dataset(content, on_bad_row="skip"), "no row left", "bad 9", "line 1: field 'text' is 3")
    assert message.count("field 'text' is 3") == 5


@pytest.mark.slow
def test_a_run_lists_skipped_rows_in_its_output_folder(checkpoints, tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_bytes(BAD + lines(GOOD["text_answer"]) * 4)
    arguments = train_arguments(
        "glm3", "lora", checkpoints["glm3"], path, tmp_path / "out", max_steps=1, on_bad_row="skip"
    )
    printed = run_ranks(train_main, 1, arguments)[0]
    listed = (tmp_path / "out/bad_rows.txt").read_text(encoding="utf-8").splitlines()
    assert len(listed) == 5 and listed[0].startswith(f"{path}, line 2: not JSON")
    assert "bad 5" in printed and "5 bad rows were left out" in printed
