"""What is known of a model folder is known of what is made from it: prompts above all."""

import json
from pathlib import Path

import pytest

import merge_lora
import predict
from glm_finetune import build, record
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.weights import read_json, write_json
from tests.ranks import run_ranks, train_arguments, train_main
from tests.refusal import json_fields, run_main
from tests.tiny import make_checkpoint

BASE = Path(__file__).parent / "fixtures/oracle/checkpoints/glm-a"
# values other than the defaults of training
PROMPT = {"template": "official", "prompt_text": "抽取三元组：", "input_separator": "，抽取："}
ROWS = [{"text": f"{place}漏水，{sign}。", "answer": f"{place}_部件故障_漏水"} for place in "泵管箱" for sign in "响热"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS), encoding="utf-8")
    return path


@pytest.fixture
def answers(data, tmp_path, monkeypatch, capsys):
    """Function: (model folder, flags) -> the predictions for the rows, whether stderr speaks of their prompt."""

    def ask(folder, *flags, rows=data):
        path = tmp_path / "answers.jsonl"
        needed = ["--test_path", rows, "--output_path", path, "--overwrite", "--max_new_tokens", 8, "--device", "cpu"]
        code, said = run_main(predict, monkeypatch, capsys, "--model_path", folder, *needed, *flags)
        assert code == 0, said
        lines = path.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["prediction"] for line in lines], "--prompt_text" in said

    return ask


def test_these_are_the_flags_that_shape_a_prompt():
    assert PROMPT.keys() == record.Prompt.__dataclass_fields__.keys()
    assert PROMPT.keys() <= PredictConfig.__dataclass_fields__.keys() & TrainConfig.__dataclass_fields__.keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", record.Prompt.__dataclass_fields__)
def test_a_merged_folder_is_asked_like_its_adapter(name, data, tmp_path, answers, monkeypatch, capsys):
    flags = {"save_total_limit": 1, name: PROMPT[name], "max_steps": 2}
    if name == "input_separator":
        rows = [{"instruction": row["text"][:2], "input": row["text"][2:], "output": row["answer"]} for row in ROWS]
        data = tmp_path / "pairs.json"
        write_json(rows, data)
    run_ranks(train_main, 1, train_arguments("glm", "lora", BASE, data, tmp_path / "out", **flags))
    (adapter,) = (tmp_path / "out").glob("epoch-*")
    code, said = run_main(merge_lora, monkeypatch, capsys, "--model_dir", adapter, "--output_dir", tmp_path / "merged")
    assert code == 0, said
    expected, _ = answers(adapter, rows=data)
    assert answers(tmp_path / "merged", rows=data) == (expected, False)
    before = read_json(adapter / record.FILE)
    merged = read_json(tmp_path / "merged" / record.FILE)
    assert merged == {**before, "saves": "weights", "merged_from": str(adapter)}
    default = TrainConfig.__dataclass_fields__[name].default
    write_json({**before, name: default, "flags": {**before["flags"], name: default}}, adapter / record.FILE)
    assert answers(adapter, rows=data)[0] != expected
    assert answers(adapter, f"--{name}", PROMPT[name], rows=data)[0] == expected


def old_merged_folder(folder):
    """As this project wrote them before the prompt was recorded with them."""
    make_checkpoint("glm2", folder)
    old = {"format_version": 1, "mode": "glm2", "template": "train", "merged_from": "out/epoch-1-step-1", "base": "x"}
    write_json(old, folder / "train_config.json")
    return folder


def test_a_merged_folder_from_before_says_once_that_its_prompt_is_not_known(tmp_path, capsys):
    folder = old_merged_folder(tmp_path / "merged")
    assert build.find_model_folder(folder).prompt == record.Prompt("train", None)
    said = capsys.readouterr().err
    assert said.count("give --prompt_text where one was used") == 1 and str(folder) in said
    flags = PredictConfig(instruction="x", prompt_text="抽取三元组：")
    assert build.find_model_folder(folder, flags=flags).prompt == record.Prompt("train", "抽取三元组：")
    assert capsys.readouterr().err == ""


def test_checkpoints_from_before_have_their_prompt_among_the_flags_of_their_run(tmp_path, capsys):
    folder = make_checkpoint("glm2", tmp_path / "trained")
    old = {"mode": "glm2", "template": "official", "saves": "weights", "flags": PROMPT}
    write_json(old, folder / "train_config.json")
    assert build.find_model_folder(folder).prompt == record.Prompt(**PROMPT)
    json_fields("train_config.json", prompt_text="新")(folder)
    assert build.find_model_folder(folder).prompt.prompt_text == "新"
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "fields, name, mode",
    [
        ({"inner_hidden_size": 1, "position_encoding_2d": True}, "any", "glm"),
        ({"inner_hidden_size": 1, "position_encoding_2d": True, "_name_or_path": "THUDM/chatglm2-6b"}, "any", "glm"),
        ({"_name_or_path": "THUDM/chatglm2-6b"}, "chatglm3-old", "glm2"),
        ({"_name_or_path": "x"}, "ChatGLM3-6B-32k", "glm3"),
        ({}, "codegeex2-6b", "glm2"),
        ({}, "chatglm3-from-chatglm2", "glm3"),
        ({"_name_or_path": "chatglm-6b"}, "model", None),
    ],
)
def test_a_base_is_told_by_its_fields_or_its_name(fields, name, mode, tmp_path):
    second = {"padded_vocab_size": 9, "kv_channels": 8, "multi_query_attention": True}
    (tmp_path / name).mkdir()
    write_json(fields if "inner_hidden_size" in fields else {**second, **fields}, tmp_path / name / "config.json")
    if mode is None:
        with pytest.raises(ValueError, match=r"which member of the family is it\? Give --mode \(glm, glm2, glm3\)"):
            build.find_model_folder(tmp_path / name)
    else:
        assert build.find_model_folder(tmp_path / name).mode.name == mode
