"""JSON arrays, and objects with rows under `data`: read entry by entry, with the values and refusals of json.loads."""

import gzip
import json
import random
import tracemalloc

import pytest

from glm_finetune.data import arrays, files
from tests.refusal import refused
from tests.test_formats import ROWS, rows_in, write
from tests.tiny import read_rows

VALUES = [0, -0.0, 1.5, 1e300, 12345678901234567890123, -7, True, None, "", '水温\n"\\/😀', [], {}, [[1]]]


def dumped(value, **options):
    return json.dumps(value, ensure_ascii=False, **options).encode()


@pytest.mark.parametrize("piece", [1, 2, 3, 7, 64, 1 << 20])
@pytest.mark.parametrize("options", [{}, {"indent": 1}, {"separators": (",", ":")}], ids=str)
def test_values_are_those_of_json_wherever_a_piece_ends(piece, options, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", piece)
    rows = [{"a": value, "b": f"x{i}"} for i, value in enumerate(VALUES)]
    path = write(tmp_path / "a.json", b"\xef\xbb\xbf \n" + json.dumps(rows, **options).encode() + b" \n")
    found = [value for _, value in arrays.read_array(path)]
    assert found == rows and [type(row["a"]) for row in found] == [type(value) for value in VALUES]
    path = write(tmp_path / "b.json", b'{"v": "1", "data": ' + dumped(rows, **options) + b', "more": [{"data": 1}]}\n')
    assert [value for _, value in arrays.read_object(path)] == rows


@pytest.mark.parametrize("text", ["[NaN, -Infinity, 1e400]", '["\\ud800"]', '[{"a": 1, "a": 2}]', "[]", "[ 1 , 2 ]"])
@pytest.mark.parametrize("piece", [1, 5, 1 << 20])
def test_what_json_takes_is_taken(text, piece, tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", piece)
    path = write(tmp_path / "a.json", text.encode())
    assert repr([value for _, value in arrays.read_array(path)]) == repr(json.loads(text))


def test_whatever_is_cut_or_changed_is_refused_where_json_refuses_it(tmp_path, monkeypatch):
    monkeypatch.setattr(arrays, "PIECE", 11)
    whole, random_ = dumped([{"a": value} for value in VALUES], indent=1), random.Random(0)
    for _ in range(400):
        at = random_.randrange(1, len(whole))
        text = (
            whole[:at] if random_.random() < 0.5 else whole[:at] + random_.choice([b",", b"]", b"x", b'"']) + whole[at:]
        )
        path = write(tmp_path / "a.json", text)
        try:
            expected, line = json.loads(text), None
        except json.JSONDecodeError as error:
            expected, line = None, error.lineno
        except UnicodeDecodeError:
            expected, line = None, 0
        if expected is not None:
            assert [value for _, value in arrays.read_array(path)] == expected
            continue
        with pytest.raises(ValueError, match="a.json") as caught:
            list(arrays.read_array(path))
        assert line == 0 or f"line {line}: " in str(caught.value), (text, caught.value)


@pytest.mark.parametrize(
    "content", [json.dumps(ROWS), json.dumps(ROWS, indent=2), json.dumps({"data": ROWS}, indent=1)]
)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz"])
def test_rows_of_an_array_or_under_data(name, content, tmp_path):
    data = content.encode()
    path = write(tmp_path / name, gzip.compress(data) if name.endswith("gz") else data)
    assert rows_in(path) == ROWS
    assert [where.rpartition(", ")[2] for where, _ in read_rows(path)] == ["entry 1", "entry 2"]


@pytest.mark.parametrize(
    "content", ['{"data": [%s]}', '{"version": "1", "data": [\n%s]\n}', '{"data": [%s], "version": {"a": []}}']
)
def test_an_object_with_a_list_under_data_is_its_rows(content, tmp_path):
    text = content % ",\n".join(json.dumps(row) for row in ROWS)
    assert rows_in(write(tmp_path / "a.json", text.encode())) == ROWS


def test_lines_that_have_data_among_their_columns_stay_lines(tmp_path):
    rows = [{"data": [{"x": 1}], "question": "q", "answer": "a"}] * 2
    assert rows_in(write(tmp_path / "a.jsonl", b"\n".join(map(dumped, rows)))) == rows
    row = {"question": "q", "answer": "a", "data": ["x"]}
    assert rows_in(write(tmp_path / "b.jsonl", dumped(row))) == [row]


def test_lists_one_a_line_are_lines(tmp_path):
    talk = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    path = write(tmp_path / "a.jsonl", b"\n\n".join([dumped(talk)] * 3))
    assert rows_in(path) == [{"messages": talk}] * 3
    assert files.list_data_files(path)[0].has_blocks


@pytest.mark.parametrize(
    "content, parts",
    [
        ('[{"a": 1},\n{"a": 2}', ["line 2: not JSON (Expecting ',' or ']')", "is it whole?"]),
        ('[{"a": 1},\n{"a": "水', ["line 2: not JSON (Unterminated string", "is it whole?"]),
        ('[{"a": 1},\n{"a" 2}]', ["line 2: not JSON (Expecting ':' delimiter)"]),
        ('[{"a": 1}]\n\n]', ["line 3: not JSON (Extra data)"]),
        ('[{"a": 1}]\n[{"a": 2}]', ["line 2: not JSON (Extra data)"]),
        ('{"data": [{"a": 1},\n{"a": 2}', ["line 2: not JSON", "is it whole?"]),
        ('{"data": [{"a": 1}],\n"b" 1}', ["line 2: not JSON"]),
        ('{"data": [{"a": 1}]}\n}', ["line 2: not JSON"]),
        ('{"data": []}', ["the array is empty"]),
        ("[\n]", ["the array is empty"]),
        ('{"data": 3}', ["an object whose 'data' is no list"]),
        ('{"version": 1,\n"data": {"train": []}}', ["an object whose 'data' is no list"]),
    ],
)
def test_what_is_no_array_of_rows_is_named_with_its_line(content, parts, tmp_path):
    path = write(tmp_path / "a.json", content.encode())
    refused(lambda: rows_in(path), "a.json", *parts)


@pytest.mark.parametrize("compressed", [False, True])
def test_an_array_is_streamed(compressed, tmp_path):
    entry = json.dumps({"question": "x" * 2000, "answer": "y"}).encode()
    content = b'{"data": [' + b",\n".join([entry] * 10_000) + b"]}"
    path = write(
        tmp_path / ("a.json.gz" if compressed else "a.json"), gzip.compress(content) if compressed else content
    )
    tracemalloc.start()
    assert sum(1 for _ in read_rows(path)) == 10_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < len(content) / 3


def test_a_mistake_far_from_the_end_is_named_without_reading_on(tmp_path):
    path = write(tmp_path / "a.json", b'[{"a": 1}, {"a" 2}, ' + b'{"a": "' + b"x" * 60_000_000 + b'"}]')
    tracemalloc.start()
    refused(lambda: rows_in(path), "a.json, line 1: not JSON")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40_000_000


# A file that is one conversation, or one row


TALK = [{"role": "user", "content": "空调不制冷"}, {"role": "assistant", "content": "检查制冷剂。"}]
SPOKEN = [{"from": "human", "value": "空调不制冷"}, {"from": "gpt", "value": "检查制冷剂。"}]


@pytest.mark.parametrize("talk", [TALK, SPOKEN], ids=["role", "from"])
@pytest.mark.parametrize("form", ["array", "lines", "pretty"])
@pytest.mark.parametrize("needs_answer", [True, False])
def test_a_file_that_is_one_conversation_is_named(talk, form, needs_answer, tmp_path):
    from tests.test_public_formats import detected

    content = {"array": dumped(talk), "pretty": dumped(talk, indent=2), "lines": b"\n".join(map(dumped, talk))}[form]
    path = write(tmp_path / "a.json", content)
    refused(lambda: detected(path, needs_answer), "a.json, ", "Is the file one conversation?", '{"messages": [...]}')


@pytest.mark.parametrize(
    "row, what",
    [
        ({"messages": TALK}, "one conversation over"),
        ({"conversations": SPOKEN, "system": "s"}, "one conversation over"),
        ({"instruction": "i", "input": "", "output": "o"}, "one object over 5 lines"),
        ({"train": ROWS}, "a list under 'data' is read too"),
    ],
)
@pytest.mark.parametrize("repeated", [1, 3])
def test_one_object_over_several_lines_is_named(row, what, repeated, tmp_path):
    path = write(tmp_path / "a.json", b"\n".join([dumped(row, indent=1)] * repeated))
    refused(lambda: rows_in(path), "a.json: ", what, repr(next(iter(row))), "put [ and ] around it")
    path = write(tmp_path / "a.json", b"[" + b",\n".join([dumped(row, indent=1)] * repeated) + b"]")
    assert rows_in(path) == [row] * repeated
