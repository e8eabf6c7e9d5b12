"""What public ChatGLM data sets hold besides the first formats: which row is what, and what is refused."""

import csv
import json

import pytest

from glm_finetune.answer.flags import PredictConfig
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.files import list_data_files
from glm_finetune.data.formats import FORMATS, detect
from glm_finetune.data.roles import TARGETS, parse_roles
from glm_finetune.data.samples import Settings, messages_in, of_file, read_questions
from glm_finetune.flags import parse
from tests.refusal import refused
from tests.test_formats import jsonl, rows_in, settings, write

__all__ = ["settings"]  # a fixture
TALK = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
PLAIN = Settings(None, None, None)


def detected(path, needs_answer=True, **options):
    """The settings that a file is read with."""
    (data_file,) = list_data_files(path)
    return of_file(data_file, Settings(None, None, None, **options), needs_answer)


def messages(path, **options):
    known = detected(path, **options)
    return [messages_in(row, known) for row in rows_in(path)]


def asked(path, *flags):
    """[(messages, answer)] of predict.py."""
    config = parse(PredictConfig, ["--test_path", str(path), *flags])
    return [(talk, answer) for _, _, talk, answer in read_questions(config)]


def of(row, **options):
    """The messages of a row whose format is told from its fields."""
    return detect([row]).messages(row, **options)


# 1: text with further columns


FURTHER = [{"text": "水泵漏水", "label": "故障", "tag": 3}, {"text": "正常", "label": "无"}]


def in_file(tmp_path, kind, rows):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        return write(path, jsonl(rows))
    if kind == "parquet":
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_text_with_further_columns_loses_no_target_in_silence(kind, tmp_path, settings):
    path = in_file(tmp_path, kind, FURTHER)
    refused(
        lambda: InstructionDataset(path, settings()),
        f"a.{kind}, ",
        "['label', 'tag']",
        "--columns answer=label",
        "text_answer",
        "--data_format text",
    )
    assert of_file(list_data_files(path)[0], PLAIN, needs_answer=False).data_format == "text_answer"
    assert [talk[0]["content"] for talk, _ in asked(path)] == ["水泵漏水", "正常"]
    told = messages(path, columns={"answer": "label"})
    assert told[0] == [{"role": "user", "content": "水泵漏水"}, {"role": "assistant", "content": "故障"}]
    assert messages(path, data_format="text")[0] == [{"role": "text", "content": "水泵漏水"}]


def test_a_further_column_that_comes_late_is_named_with_its_line(tmp_path, settings):
    rows = [{"text": "t"}] * 30 + [{"text": "t", "events": ["x"]}]
    path = write(tmp_path / "a.jsonl", jsonl(rows))
    refused(lambda: InstructionDataset(path, settings()), "a.jsonl, line 31: ", "['events']", "--columns answer=events")
    assert len(InstructionDataset(path, settings(data_format="text"))) == 31
    assert len(InstructionDataset(path, settings(on_bad_row="skip"))) == 30


def test_a_column_of_nulls_and_a_known_format_beside_text_lose_nothing(tmp_path):
    assert detect([{"text": "t", "meta": None}]).name == "text"
    assert detect([{"text": "t", "instruction": "i", "input": "", "output": "o"}]).name == "instruction"
    assert detect([{"text": "t", "query": "q", "response": "r"}]).name == "query_response"


# 2, 3: history of messages, rows that are lists


@pytest.mark.parametrize("fields", [("instruction", "output"), ("prompt", "response"), ("query", "response")])
@pytest.mark.parametrize(
    "history",
    [
        [{"role": "user", "content": "旧问"}, {"role": "assistant", "metadata": "", "content": "旧答"}],
        [{"from": "human", "value": "旧问"}, {"from": "gpt", "value": "旧答"}],
        [{"human": "旧问", "assistant": "旧答"}],
        [["旧问", "旧答"]],
    ],
    ids=["role", "from", "human", "pairs"],
)
def test_a_history_may_be_messages(fields, history):
    row = {fields[0]: "问", fields[1]: "答", "history": history, "system": None}
    for given in (row, row | {"history": json.dumps(history)}):
        assert [(m["role"], m["content"]) for m in of(given)] == [
            *[("user", "旧问"), ("assistant", "旧答")],
            *[("user", "问"), ("assistant", "答")],
        ]


def test_a_history_of_chatglm3_keeps_its_tools_and_calls():
    history = [
        {"role": "system", "content": "s", "tools": [{"name": "f"}]},
        {"role": "user", "content": "q"},
        {"role": "assistant", "metadata": "f", "content": "```python\ntool_call()\n```"},
        {"role": "observation", "content": "晴"},
        {"role": "assistant", "metadata": "", "content": "a"},
    ]
    found = of({"prompt": "p", "response": "r", "history": history})
    assert found[0]["tools"] == [{"name": "f"}] and found[2]["metadata"] == "f" and len(found) == 7
    bad = {"prompt": "p", "response": "r", "history": [*history[1:2], {"role": "alien", "content": ""}]}
    refused(lambda: of(bad), "field 'history', message 2: role 'alien'")
    refused(lambda: of(bad | {"history": history[:2]}), "the user cannot follow the user")


@pytest.mark.parametrize(
    "talk, name",
    [
        (TALK, "messages"),
        ([{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "sharegpt"),
        ([{"human": "q", "assistant": "a"}], "conversation"),
        ([{"q": "q", "a": ["a"]}], "paragraph"),
    ],
)
@pytest.mark.parametrize("form", ["array", "lines"])
def test_rows_may_be_lists_of_messages(talk, name, form, tmp_path):
    content = json.dumps([talk, talk]) if form == "array" else f"{json.dumps(talk)}\n{json.dumps(talk)}\n"
    path = write(tmp_path / "a.json", content.encode())
    assert detected(path).data_format == name
    assert messages(path) == [TALK, TALK]
    assert asked(path) == [(TALK[:1], "a")] * 2


# 4: roles


@pytest.mark.parametrize("names", [("User", "ASSISTANT"), ("Human", "GPT"), ("HUMAN", "gpt")])
def test_roles_are_read_in_any_case(names):
    for role, text, field in (("role", "content", "messages"), ("from", "value", "conversations")):
        row = {field: [{role: name, text: said} for name, said in zip(names, "qa")]}
        assert of(row) == TALK


def test_other_names_are_read_with_a_flag(tmp_path):
    names = ("Client", "counselor", "NOTE")
    for role, text in (("role", "content"), ("from", "value")):
        rows = [{"conversations": [{role: n, text: said} for n, said in zip((names[2], *names[:2]), "sqa")]}]
        path = write(tmp_path / "a.jsonl", jsonl(rows))
        refused(lambda path=path: messages(path), "'NOTE'", "--roles NAME=ROLE")
        roles = "client=user,counselor=assistant,note=system"
        assert messages(path, roles=parse_roles(roles)) == [[{"role": "system", "content": "s"}, *TALK]]
        assert asked(path, "--roles", roles) == [([{"role": "system", "content": "s"}, TALK[0]], "a")]
    row = {
        "prompt": "p",
        "response": "r",
        "history": [{"role": "客户", "content": "q"}, {"role": "客服", "content": "a"}],
    }
    assert of(row, roles=parse_roles("客户=user,客服=assistant"))[:2] == TALK


@pytest.mark.parametrize(
    "text, parts",
    [
        ("client", ["'client' must be NAME=ROLE"]),
        ("=user", ["'=user' must be NAME=ROLE"]),
        ("client=usr", ["'usr' must be one of", *TARGETS, "Did you mean user?"]),
        ("client=", ["'' must be one of"]),
        ("a=user,A=assistant", ["'A' is given twice"]),
    ],
)
def test_bad_roles_are_named(text, parts):
    refused(lambda: parse_roles(text), f"--roles {text}: ", *parts)


# 5, 6: lists of lines, empty fields


def test_a_paragraph_and_a_value_may_be_lists_of_lines():
    lines = ["第一行", "", "第二行"]
    answer = {"role": "assistant", "content": "第一行\n\n第二行"}
    assert of({"paragraph": [{"q": "q", "a": lines}]}) == [TALK[0], answer]
    assert of({"paragraph": [{"q": ["q"], "a": "第一行\n\n第二行"}]}) == [TALK[0], answer]
    assert of({"conversations": [{"from": "user", "value": "q"}, {"from": "assistant", "value": lines}]})[1] == answer
    first = {"role": "system", "q": "s"}
    assert of({"paragraph": [first, {"q": "q", "a": "a"}]}) == [{"role": "system", "content": "s"}, *TALK]
    refused(lambda: of({"paragraph": [{"q": "q", "a": [3]}]}), "'paragraph', message 1: field 'a' is [3]")
    refused(lambda: of({"paragraph": [{"q": "q"}]}), "ends with the user")


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "q", "output": "a"},
        {"instruction": "q", "input": None, "output": "a", "history": None, "system": None},
        {"instruction": "q", "input": "", "output": "a", "history": "", "system": ""},
        {"query": "q", "response": "a", "history": None, "system": None},
        {"prompt": "q", "response": "a", "history": None, "system": None},
        {"input": "q", "output": "a", "system": None},
        {"ask": "q", "answer": "a", "title": None},
        {"messages": TALK, "tools": None, "system": None},
        {"conversations": TALK, "tools": {}, "system": ""},
        {"messages": [{**TALK[0], "tools": None, "tool_calls": None}, {**TALK[1], "loss": None, "metadata": None}]},
        {"conversation": [{"human": "q", "assistant": "a"}], "tools": None, "system": None},
    ],
    ids=lambda row: ",".join(row),
)
def test_what_is_null_or_missing_is_empty(row):
    assert of(row) == TALK


def test_nulls_that_a_table_fills_in_make_no_call():
    filled = {"name": None, "parameters": None, "observation": None}
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    row = {"messages": [TALK[0], call, {"role": "tool", "content": "晴", **filled}, TALK[1]]}
    assert of(row)[2] == {"role": "observation", "content": "晴"}


@pytest.mark.parametrize("row", [{"question": "q", "answer": None}, {"instruction": "q", "output": None}])
def test_an_answer_that_is_null_is_none_in_prediction_and_an_error_in_training(row, tmp_path):
    path = write(tmp_path / "a.jsonl", jsonl([row]))
    assert asked(path) == [(TALK[:1], None)]
    refused(lambda: messages(path), "is None, not a string")


# 7: tools


@pytest.mark.parametrize(
    "tools",
    [
        [{"tool": "f", "参数": {"a": [1, None]}}],
        {"f": {"description": "x"}, "g": {}},
        ["f(x)", "g()"],
        [{"function": "what it does"}],
    ],
)
def test_tools_of_any_form_are_shown_as_they_are(tools):
    for given in (tools, json.dumps(tools)):
        for field in ("conversations", "messages"):
            assert of({field: TALK, "tools": given})[0]["tools"] == tools
    system = {"role": "system", "content": "s", "tools": tools}
    assert of({"messages": [system, *TALK]})[0]["tools"] == tools


def test_openai_tools_are_unwrapped_and_text_that_is_no_json_is_named():
    tool = {"name": "f", "parameters": {}}
    assert of({"messages": TALK, "tools": [{"type": "function", "function": tool}]})[0]["tools"] == [tool]
    refused(lambda: of({"messages": TALK, "tools": "f(x): looks up x"}), "field 'tools': not JSON")


def test_free_tools_are_written_as_the_official_code_does(settings):
    tools = {"查询": {"城市": "str"}}
    known = settings(data_format="messages")
    (sample,) = known.template.samples(known.tokenizer, of({"messages": TALK, "tools": tools}))
    text = known.tokenizer.decode(sample.input_ids, clean_up_tokenization_spaces=False)
    assert json.dumps(tools, indent=4, ensure_ascii=False) in text


# 8: more formats


@pytest.mark.parametrize(
    "name, row, question",
    [
        ("query_response", {"query": "q", "response": "a"}, "q"),
        ("input_output", {"input": "q", "output": "a"}, "q"),
        ("input_target", {"kind": "NLI", "input": "q", "target": "a"}, "q"),
        ("prompt_completion", {"prompt": "q", "completion": "a"}, "q"),
        ("ask_answer", {"department": "d", "title": "t", "ask": "q", "answer": "a"}, "t\nq"),
        ("ask_answer", {"title": "q", "ask": "q", "answer": "a"}, "q"),
        ("ask_answer", {"title": "q", "ask": "", "answer": "a"}, "q"),
        ("conversation", {"conversation": [{"human": "q", "assistant": "a"}]}, "q"),
        ("conversation", {"conversation": TALK}, "q"),
        ("paragraph", {"id": 1, "paragraph": [{"q": "q", "a": ["a"]}]}, "q"),
        ("instruction", {"instruction": "q", "input": "", "output": "a", "target": "x"}, "q"),
        ("prompt_response", {"prompt": "q", "query": "x", "response": "a", "completion": "x"}, "q"),
        ("context_target", {"context": "q", "input": "x", "target": "a"}, "q"),
        ("question_answer", {"question": "q", "ask": "x", "answer": "a", "instruction": "x", "output": "x"}, "q"),
    ],
)
def test_newer_formats_are_told_and_take_no_row_from_older_ones(name, row, question):
    assert detect([row]).name == name
    assert of(row) == [{"role": "user", "content": question}, TALK[1]]


def test_two_newer_formats_at_once_must_be_named():
    row = {"input": "q", "output": "a", "target": "b"}
    refused(lambda: detect([row]), "input_output or input_target", "--data_format")


@pytest.mark.parametrize("field", ["query", "input", "prompt", "ask", "instruction"])
def test_a_question_alone_is_asked(field, tmp_path):
    assert asked(write(tmp_path / "a.jsonl", jsonl([{field: "q"}]))) == [(TALK[:1], None)]


def test_rounds_with_a_system_text_and_the_last_question_open(tmp_path):
    rounds = [{"human": "q", "assistant": "a"}, {"human": "q2", "assistant": None}]
    path = write(tmp_path / "a.jsonl", jsonl([{"system": "s", "conversation": rounds}]))
    expected = [{"role": "system", "content": "s"}, *TALK, {"role": "user", "content": "q2"}]
    assert asked(path) == [(expected, None)]
    refused(lambda: messages(path), "ends with the user")


# 14: several right answers


@pytest.mark.parametrize("fields", [("question", "answer"), ("instruction", "output"), ("text", "answer")])
def test_several_right_answers_are_for_prediction(fields, tmp_path):
    row = {fields[0]: "q", fields[1]: ["a", "b"]}
    path = write(tmp_path / "a.jsonl", jsonl([row]))
    assert asked(path) == [(TALK[:1], ["a", "b"])]
    assert [row for _, row, _, _ in read_questions(parse(PredictConfig, ["--test_path", str(path)]))] == [row]
    refused(lambda: messages(path), f"field '{fields[1]}' is a list of answers, ['a', 'b']", "a row of each")
    empty = write(tmp_path / "b.jsonl", jsonl([{fields[0]: "q", fields[1]: [3]}]))
    refused(lambda: asked(empty), "line 1", f"'{fields[1]}' is [3]")


def test_every_format_says_which_fields_it_reads():
    assert all({*form.needed} <= {*form.known} for form in FORMATS.values())


@pytest.mark.parametrize(
    "row",
    [
        {"instruction": "翻译成英文", "input": "你好", "target": "hi"},
        {"question": "翻译成英文", "input": "你好", "output": "hi"},
        {"instruction": "p", "query": "q", "response": "r"},
    ],
)
def test_a_column_that_asks_in_another_format_is_not_lost_beside_a_newer_one(row, tmp_path):
    refused(lambda: detect([row]), "would be left out", "--columns instruction=", "--data_format")
    path = write(tmp_path / "a.json", json.dumps([row]).encode())
    name = "input_target" if "target" in row else "query_response" if "query" in row else "input_output"
    assert len(messages(path, data_format=name)[0]) == 2


def test_fields_in_capitals_are_answered_with_their_columns():
    refused(lambda: detect([{"Instruction": "a", "Output": "b"}]), "--columns instruction=Instruction,output=Output")


@pytest.mark.parametrize("first", ["[第一章]", "{{infobox}}", "（一）"])
def test_a_text_may_begin_with_brackets(first, tmp_path):
    path = write(tmp_path / "a.txt", f"{first}\n发动机水温高。\n".encode())
    assert [talk[0]["content"] for talk in messages(path)] == [f"{first}\n发动机水温高。"]


def test_a_separator_goes_where_a_format_takes_it_and_is_refused_where_none_does(tmp_path, settings):
    pair = {"instruction": "译", "input": "水", "output": "w"}
    write(tmp_path / "a.json", json.dumps([pair]).encode())
    write(tmp_path / "b.json", json.dumps([{"messages": TALK}]).encode())
    both, options = f"{tmp_path}/a.json,{tmp_path}/b.json", {"separator": r"\n"}
    assert len(InstructionDataset(both, settings(**options))) == 2
    refused(
        lambda: InstructionDataset(tmp_path / "b.json", settings(**options)), "--input_separator", "b.json is messages"
    )
