"""dataset_info.json beside data: its columns and tags are read, flags win, and samples follow from what it says."""

import json

import pytest

from glm_finetune.data.blocks import fingerprint
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.files import list_data_files
from glm_finetune.data.roles import parse_roles
from glm_finetune.data.samples import Settings, messages_in, of_file
from tests.refusal import refused
from tests.test_formats import jsonl, settings, write

__all__ = ["settings"]  # a fixture
ALPACA = {"task": "q", "details": "x", "reply": "a", "role": "s", "past": [["u", "v"]], "input": "not read"}
COLUMNS = {"prompt": "task", "query": "details", "response": "reply", "system": "role", "history": "past"}
SPOKEN = {"talk": [{"who": "Client", "said": "q"}, {"who": "bot", "said": "a"}], "rule": "s", "apis": '[{"name": "f"}]'}
TAGS = {"role_tag": "who", "content_tag": "said", "user_tag": "Client", "assistant_tag": "bot"}
SHAREGPT = {"formatting": "sharegpt", "columns": {"messages": "talk", "system": "rule", "tools": "apis"}, "tags": TAGS}


def folder_of(tmp_path, row, entry, **others):
    write(tmp_path / "a.jsonl", jsonl([row]))
    info = {"mine": {"file_name": "a.jsonl", **entry}, "other": {"file_name": "b.jsonl", "columns": {"prompt": "z"}}}
    write(tmp_path / "dataset_info.json", json.dumps(info | others).encode())
    return tmp_path


def said(path, **options):
    """[(role, text)] of the only row."""
    (data_file,) = list_data_files(path)
    known = of_file(data_file, Settings(None, None, None, **options))
    ((_, row),) = data_file.rows()
    return [(message["role"], message["content"]) for message in messages_in(row, known)]


def test_alpaca_columns_become_ours_for_the_folder_and_for_a_file_in_it(tmp_path):
    folder = folder_of(tmp_path, ALPACA, {"columns": COLUMNS})
    expected = [("system", "s"), ("user", "u"), ("assistant", "v"), ("user", "qx"), ("assistant", "a")]
    assert said(folder) == said(folder / "a.jsonl") == expected


def test_an_entry_with_a_prompt_alone_is_text_to_continue_training_on(tmp_path):
    row = {"document": "t", "url": "u"}
    assert said(folder_of(tmp_path, row, {"columns": {"prompt": "document"}})) == [("text", "t")]


def test_columns_and_tags_of_sharegpt_become_ours(tmp_path):
    found = said(folder_of(tmp_path, SPOKEN, SHAREGPT))
    assert found[1:] == [("system", "s"), ("user", "q"), ("assistant", "a")] and found[0][0] == "system"
    row = {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": ["a"]}]}
    assert said(folder_of(tmp_path, row, {"formatting": "sharegpt"})) == [("user", "q"), ("assistant", "a")]
    openai = {"role_tag": "role", "content_tag": "content", "user_tag": "user", "assistant_tag": "assistant"}
    row = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    entry = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": openai}
    assert said(folder_of(tmp_path, row, entry)) == [("user", "q"), ("assistant", "a")]


def test_flags_win(tmp_path):
    folder = folder_of(tmp_path, {**ALPACA, "text": "t"}, {"columns": COLUMNS})
    assert said(folder, data_format="text") == [("text", "t")]
    folder = folder_of(tmp_path, ALPACA, {"columns": COLUMNS})
    columns = {"question": "task", "answer": "details"}
    assert said(folder, columns=columns) == [("user", "q"), ("assistant", "x")]
    folder = folder_of(tmp_path, SPOKEN, SHAREGPT)
    swapped = parse_roles("client=system,bot=user")
    (data_file,) = list_data_files(folder)
    assert of_file(data_file, Settings(None, None, None, roles=swapped)).roles["client"] == "system"


@pytest.mark.parametrize(
    "info",
    [
        {"default": {"features": {"file_name": {"dtype": "string"}}, "splits": {}}},
        {"features": {}, "citation": ""},
        {"other": {"hf_hub_url": "a/b"}},
        {"other": {"file_name": "b.jsonl", "columns": 3}},
    ],
)
def test_what_says_nothing_of_a_file_is_nothing(info, tmp_path):
    write(tmp_path / "dataset_info.json", json.dumps(info).encode())
    write(tmp_path / "a.jsonl", jsonl([{"question": "q", "answer": "a"}]))
    assert said(tmp_path) == [("user", "q"), ("assistant", "a")]


@pytest.mark.parametrize(
    "content, parts",
    [
        (b"{", ["not JSON"]),
        ("你".encode("gbk"), ["not JSON"]),
        (b"[1]", ["expected names of data sets"]),
        (b'{"m": {"file_name": "a.jsonl", "columns": ["q"]}}', ["columns is ['q'] for a.jsonl"]),
        (b'{"m": {"file_name": "a.jsonl", "tags": {"role_tag": 3}}}', ["tags is {'role_tag': 3}"]),
        (b'{"m": {"file_name": "a.jsonl", "formatting": "x"}}', ["formatting is 'x'", "alpaca or sharegpt"]),
        (
            b'{"m": {"file_name": "a.jsonl"}, "n": {"file_name": "a.jsonl", "columns": {"prompt": "x"}}}',
            ["2 entries say different things of a.jsonl"],
        ),
    ],
)
def test_a_malformed_one_is_named(content, parts, tmp_path):
    write(tmp_path / "a.jsonl", jsonl([{"question": "q", "answer": "a"}]))
    write(tmp_path / "dataset_info.json", content)
    refused(lambda: list_data_files(tmp_path), "dataset_info.json: ", *parts)


def test_a_column_that_is_not_there_is_named(tmp_path):
    folder = folder_of(tmp_path, {"task": "q"}, {"columns": {"prompt": "task", "response": "reply"}})
    refused(lambda: said(folder), "field 'output' is missing")


def test_what_it_says_decides_the_samples_and_the_fingerprint(tmp_path, settings):
    row = {"a": "水温高", "b": "换节温器"}
    folder, prints, rows = folder_of(tmp_path, row, {}), [], []
    for columns in ({"prompt": "a", "response": "b"}, {"prompt": "b", "response": "a"}):
        folder_of(tmp_path, row, {"columns": columns})
        prints.append(fingerprint(folder))
        rows.append(list(InstructionDataset(folder, settings(), cache_dir=tmp_path / "cache")))
    assert prints[0] != prints[1] and rows[0] != rows[1]
