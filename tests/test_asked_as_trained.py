"""What was trained is asked with the ids of its training, and comes back byte for byte: whatever the format, template,
mode and way of asking.

A model that has learnt everything stands in: to a prompt that it was trained with, it gives what followed there.
"""

import json
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

import predict
from glm_finetune import MODE
from glm_finetune.answer import chat
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.config import TrainConfig
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.flags import TEMPLATES, unescaped
from glm_finetune.data.samples import Settings, prepare_row, read_questions, settings_of
from glm_finetune.errors import UserError
from glm_finetune.flags import parse
from glm_finetune.modes.spec import Limits
from glm_finetune.record import Prompt
from tests.refusal import refused
from tests.test_bad_input import NEEDED

SHORT = Limits(60, 20)
CHECKPOINTS = Path(__file__).parent / "fixtures/oracle/checkpoints"
FILES = sorted(path for path in (Path(__file__).parents[1] / "data/formats").iterdir() if path.stem != "text")
every_mode = pytest.mark.parametrize("mode", MODE)
every_template = pytest.mark.parametrize("template", TEMPLATES)
PIECES = ["    def f(x):", "\t", "\n", "  ", " ", "，", "（", "？", "①", "风扇", "ok", "_", "</s>", "<|user|>"]
PIECES += ["😀", "e\u0301", "\\n"]


@pytest.fixture
def tokenizer(mode):
    return MODE[mode].tokenizer.from_pretrained(CHECKPOINTS / f"{mode}-a")


def learnt(mode, tokenizer, path, template, **options):
    """All samples of a file, as ids."""
    settings = Settings(MODE[mode].template, tokenizer, None, style=template, **options)
    return [row["input_ids"] for row in InstructionDataset(path, settings)]


@pytest.fixture
def know(monkeypatch):
    """Function: samples -> everybody who generates gets what follows the prompt in one of them."""

    def install(samples):
        def generate(model, tokenizer, mode, prompts, lengths, on_token=None, **sampling):
            stop, answers = mode.stop_token_ids(tokenizer), []
            for prompt in prompts:
                rest = next(ids[len(prompt) :] for ids in samples if ids[: len(prompt)] == prompt)
                answers.append(rest[: next(i for i, token in enumerate(rest) if token in stop)])
            for token in answers[0] if on_token else ():
                on_token(token)
            return answers

        monkeypatch.setattr(predict, "generate", generate)
        monkeypatch.setattr(chat, "generate", generate)

    return install


def folder_of(mode, template, **prompt):
    return SimpleNamespace(mode=MODE[mode], prompt=Prompt(template, **prompt), is_bare=False)


def config_of(*arguments):
    return parse(PredictConfig, ["--model_path", "x", *map(str, arguments)])


def held(tokenizer, text):
    """A text as the tokenizer can hold it: in ChatGLM2 and 3 every text is."""
    return tokenizer.decode(tokenizer.encode_text(text), clean_up_tokenization_spaces=False)


@every_mode
@every_template
@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_row_of_every_format_is_answered_as_it_was_trained(mode, template, path, tokenizer, know):
    try:
        know(learnt(mode, tokenizer, path, template, prompt_text="提取："[: 3 * (path.stem == "text_answer")]))
    except UserError as error:  # tools, or several rounds, that this mode or template has no form for
        assert "no form for" in str(error) or "--template raw" in str(error)
        return
    config = config_of("--test_path", path)
    rows = [row for row in read_questions(config, Prompt(template, "提取：")) if row[3] is not None]
    asked = [(where, messages) for where, _, messages, _ in rows]
    answers, num_cut = predict.answer_batch(None, tokenizer, folder_of(mode, template), config, asked)
    assert answers == [held(tokenizer, answer) for *_, answer in rows] and rows and not num_cut


@every_mode
@pytest.mark.parametrize("separator", [None, "\\n", "："])
def test_the_separator_of_the_training_is_asked_with_whatever_the_way(
    mode, separator, tokenizer, know, tmp_path, capsys
):
    rows = [
        {"instruction": f"{i}翻译", "input": text, "output": f"{i}好"} for i, text in enumerate(("We use", "", "电"))
    ]
    rows.append({"instruction": "", "input": "只有输入", "output": "对"})
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    between = unescaped(separator or "")
    know(learnt(mode, tokenizer, tmp_path / "a.jsonl", "train", separator=between))
    folder, config = folder_of(mode, "train", input_separator=separator), config_of("--test_path", tmp_path / "a.jsonl")
    asked = [(where, messages) for where, _, messages, _ in read_questions(config, folder.prompt)]
    answers, _ = predict.answer_batch(None, tokenizer, folder, config, asked)
    assert answers == [row["output"] for row in rows]
    for (_, [message]), row in zip(asked, rows):
        assert folder.prompt.question(row["instruction"], row["input"]) == message["content"]
    assert asked[0][1][0]["content"] == f"0翻译{between}We use" and asked[1][1][0]["content"] == "1翻译"


def test_flags_of_the_data_arrive_in_the_samples():
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(CHECKPOINTS / "glm3-a")
    flags = ["--roles", "client=user", "--repair_turns", "--input_separator", r"\n", "--template", "raw"]
    config = parse(TrainConfig, [*NEEDED, *flags, "--data_format", "instruction"])
    settings = settings_of(config, MODE["glm3"], tokenizer)
    assert (settings.roles, settings.repair, settings.style) == ({"client": "user"}, True, "raw")
    (sample,) = prepare_row("a", {"instruction": "译", "input": "水", "output": "w"}, settings)
    assert tokenizer.decode(sample.input_ids).startswith("[gMASK]sop 译\n水")


def test_a_separator_for_one_text_is_refused(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}), encoding="utf-8")
    config = config_of("--test_path", tmp_path / "a.jsonl", "--input_separator", ":")
    refused(lambda: list(read_questions(config)), "--input_separator", "a.jsonl is question_answer", "Leave it out")


def texts(rng, number):
    for _ in range(number):
        yield "".join(rng.choices(PIECES, k=rng.randint(1, 9)))


@every_mode
@every_template
def test_answers_come_back_byte_for_byte_whatever_the_way_of_asking(mode, template, tokenizer, know, tmp_path, capsys):
    rng = random.Random(f"{mode} {template}")
    pairs = [(f"{i}号{text}", answer) for i, (text, answer) in enumerate(zip(texts(rng, 60), texts(rng, 60)))]
    rows = [{"instruction": question, "input": "", "output": answer} for question, answer in pairs]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    know(learnt(mode, tokenizer, tmp_path / "a.jsonl", template))
    folder, config = folder_of(mode, template), config_of("--test_path", tmp_path / "a.jsonl")
    asked = [(where, messages) for where, _, messages, _ in read_questions(config)]
    answers, _ = predict.answer_batch(None, tokenizer, folder, config, asked)
    assert answers == [held(tokenizer, answer) for _, answer in pairs]
    for (_, messages), answer in zip(asked, answers):
        predict.answer_batch(None, tokenizer, folder, config, [("the question", messages)], predict.show)
        assert capsys.readouterr().out == answer
        if template != "raw":
            (_, said) = chat.answer_turn(None, tokenizer, folder, config, messages[0]["content"], [])
            assert capsys.readouterr().out == f"\nChatGLM：{answer}\n"
            assert said == {"role": "assistant", "content": answer}
    assert any(answer[0] in " \t\n" or answer[-1] in " \t\n" for answer in answers) or mode == "glm"


@every_mode
@every_template
def test_a_conversation_goes_on_with_the_ids_of_its_training(mode, template, tokenizer, know, tmp_path, capsys):
    rng = random.Random(f"{mode} {template}")
    talk = [{"role": role, "content": held(tokenizer, next(texts(rng, 1)))} for role in ("user", "assistant") * 4]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": talk}), encoding="utf-8")
    folder, history = folder_of(mode, template), []
    if template == "raw":
        with pytest.raises(UserError, match="--template raw"):
            learnt(mode, tokenizer, tmp_path / "a.jsonl", template)
        return
    know(learnt(mode, tokenizer, tmp_path / "a.jsonl", template))
    for message in talk[::2]:
        history = chat.answer_turn(None, tokenizer, folder, config_of("--chat"), message["content"], history)
    assert history == talk


def test_a_call_of_a_tool_stays_a_call_in_what_is_asked_next(know, capsys, tmp_path):
    tokenizer = MODE["glm3"].tokenizer.from_pretrained(CHECKPOINTS / "glm3-a")
    call = {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='北京')\n```"}
    talk = [{"role": "user", "content": "天气？"}, call, {"role": "observation", "content": "晴"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": [*talk, {"role": "assistant", "content": " 晴\n"}]}))
    know(learnt("glm3", tokenizer, tmp_path / "a.jsonl", "train"))
    config, folder = config_of("--chat"), folder_of("glm3", "train")
    history = chat.answer_turn(None, tokenizer, folder, config, "天气？", [])
    assert history == talk[:2] and f"{call['metadata']}\n{call['content']}" in capsys.readouterr().out
    asked = [("x", talk[:1]), ("x", talk)]
    answers, _ = predict.answer_batch(None, tokenizer, folder, config, asked)
    assert answers == [f"{call['metadata']}\n{call['content']}", " 晴\n"]


@every_mode
def test_what_was_trained_on_texts_goes_on_with_one(mode, tokenizer, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "水温高，先看风扇。再看水泵。"}), encoding="utf-8")
    settings = Settings(MODE[mode].template, tokenizer, None)
    data = InstructionDataset(tmp_path / "a.jsonl", settings)
    assert data.report.formats == ["text"]
    (tmp_path / "q.jsonl").write_text(json.dumps({"text": "水温高，先看"}), encoding="utf-8")
    for config in (config_of("--test_path", tmp_path / "q.jsonl"), config_of("--instruction", "水温高，先看")):
        messages = [{"role": "user", "content": config.instruction}]
        if config.test_path:
            [(_, _, messages, _)] = read_questions(config)
        prompt = MODE[mode].render(tokenizer, messages, None, "text")
        begin = tokenizer.begin_ids
        assert prompt.input_ids == begin + tokenizer.encode_text("水温高，先看")
        assert data[0]["input_ids"][: len(begin)] == begin and prompt.num_prefix == data[0]["num_prefix"]
    long = MODE[mode].render(tokenizer, [{"role": "user", "content": "水" * 50 + "高"}], SHORT, "text")
    assert long.question_cut and len(long.input_ids) == len(begin) + 20 and "高" in tokenizer.decode(long.input_ids)


def test_what_is_no_utf_8_is_answered_and_not_asked(monkeypatch, capsys):
    lines = iter(["\udcff\udcfe", "stop"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    chat.converse(None, None, folder_of("glm", "train"), config_of("--chat"))
    assert "no UTF-8" in capsys.readouterr().out
    refused(lambda: config_of("--instruction", "\udcff"), "no UTF-8")


@pytest.mark.parametrize("template", ["raw", "text"])
def test_a_conversation_with_a_template_of_one_question_is_refused(template):
    refused(lambda: chat.check_rounds(template), "--chat has several rounds", template)
