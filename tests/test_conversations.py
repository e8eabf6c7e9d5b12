"""Conversations: recorded ids and labels, the same ids in training and prediction, roles, tools."""

import json
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.answer.chat import chat_ids
from glm_finetune.data.conversation import check_order, from_roles, from_speakers, messages_of, tool_call
from glm_finetune.data.formats import FORMATS, detect
from glm_finetune.data.samples import Settings, prepare_row
from glm_finetune.modes.glm3 import tool_parameters
from glm_finetune.modes.spec import Limits
from tests.refusal import refused
from tests.tiny import read_rows

ROOT = Path(__file__).parent / "fixtures/oracle"
SAMPLES = Path(__file__).parents[1] / "data/formats"
RECORDED = json.loads((ROOT / "conversations.json").read_text(encoding="utf-8"))
WIDE = Limits(4096, 2048, end_cut_answers=False)
TEMPLATES = ("train", "official", "official_rounds")
every_mode = pytest.mark.parametrize("mode", MODE)


def tokenizer_of(mode):
    return MODE[mode].tokenizer.from_pretrained(ROOT / f"checkpoints/{mode}-a")


def user(text):
    return {"role": "user", "content": text}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


TALK = [user("水温高"), answer("先看风扇。"), user("风扇转"), answer(""), user("然后呢？ \n"), answer(" 换节温器\n。")]


# Against the recorded data classes


@pytest.mark.parametrize(
    "mode, case",
    [pytest.param(m, case, id=f"{m}-{i}") for m, group in RECORDED.items() for i, case in enumerate(group["cases"])],
)
def test_ids_and_labels_are_those_of_the_official_data_classes(mode, case):
    settings = Settings(
        MODE[mode].template,
        tokenizer_of(mode),
        WIDE,
        style="official_rounds",
        train_on="last" if "history" in case["row"] else "all",
        data_format=detect([case["row"]]).name,
    )
    (sample,) = prepare_row("row", case["row"], settings)
    assert sample.input_ids == case["input_ids"]
    assert sample.labels == case["labels"]


def test_the_official_templates_differ_in_chatglm_6bs_first_question_only():
    for mode, group in RECORDED.items():
        for case in group["cases"]:
            messages = detect([case["row"]]).messages(case["row"])
            (first,), (second,) = (
                MODE[mode].samples(tokenizer_of(mode), messages, None, style, "last") for style in TEMPLATES[1:]
            )
            assert (first.row == second.row) == (mode != "glm" or len(case["row"]["history"]) > 0)


# Training and prediction


def conversations(mode):
    """Messages of every shipped row that a mode can express, and a talk with empty and blank texts."""
    yield TALK
    for path in sorted(SAMPLES.iterdir()):
        rows = [row for _, row in read_rows(path)]
        if path.stem not in ("text", "tools") or (path.stem == "tools" and mode == "glm3"):
            yield from (detect(rows).messages(row) for row in rows)


@every_mode
@pytest.mark.parametrize("template", TEMPLATES)
def test_a_conversation_is_trained_and_asked_with_the_same_ids(mode, template):
    tokenizer, num_answers = tokenizer_of(mode), 0
    for messages in conversations(mode):
        for whole in (messages, [{**m, "loss": True} if m["role"] == "assistant" else m for m in messages]):
            rendered = MODE[mode].samples(tokenizer, whole, WIDE, template)
            asked = [i for i, m in enumerate(whole) if m["role"] == "assistant" and whole[i - 1]["role"] != "assistant"]
            for i in (i for i in asked if whole[i].get("loss", True)):
                prompt = MODE[mode].render(tokenizer, whole[:i], None, template)
                (sample,) = [s for s in rendered if answer_of(s, prompt) is not None]
                target = MODE[mode].render(tokenizer, whole[: i + 1], None, template).input_ids[len(prompt.input_ids) :]
                learnt = answer_of(sample, prompt)[: len(target)]
                assert learnt[:-1] == target[:-1]
                assert learnt[-1] in [*MODE[mode].stop_token_ids(tokenizer), *call_token(mode, tokenizer)]
                assert sample.num_prefix == prompt.num_prefix
                num_answers += 1
    assert num_answers > 20


def answer_of(sample, prompt):
    """The targets that follow a prompt in a sample; None if it begins otherwise or teaches something else there."""
    start = len(prompt.input_ids)
    labels = sample.labels[start:]
    end = next((i for i, label in enumerate(labels) if label == -100), len(labels))
    return labels[:end] if sample.input_ids[:start] == prompt.input_ids and end else None


def call_token(mode, tokenizer):
    """What follows an answer that goes on with the call of a tool."""
    return [tokenizer.get_command("<|assistant|>")] if mode == "glm3" else []


@every_mode
def test_every_answer_is_a_target_exactly_once(mode):
    tokenizer = tokenizer_of(mode)
    texts = ["一个独特的回答", "第二个别的说法", "终于说完了"]
    talk = [m for text in texts for m in (user("问"), answer(text))]
    learnt = [label for s in MODE[mode].samples(tokenizer, talk, WIDE) for label in s.labels if label != -100]
    decoded = tokenizer.decode(learnt, clean_up_tokenization_spaces=False)
    assert all(decoded.count(text) == 1 for text in texts)
    (last,) = MODE[mode].samples(tokenizer, talk, WIDE, train_on="last")
    decoded = tokenizer.decode([label for label in last.labels if label != -100], clean_up_tokenization_spaces=False)
    assert [text in decoded for text in texts] == [False, False, True]


@every_mode
@pytest.mark.parametrize("train_on, silent", [("all", (1, 3, 5)), ("last", (5,))])
def test_answers_with_loss_false_are_not_trained(mode, train_on, silent):
    talk = [{**message, "loss": False} if i in silent else message for i, message in enumerate(TALK)]
    assert MODE[mode].samples(tokenizer_of(mode), talk, WIDE, "train", train_on) == []
    one = [{**message, "loss": False} if i == 1 else message for i, message in enumerate(TALK)]
    learnt = [x for s in MODE[mode].samples(tokenizer_of(mode), one, WIDE) for x in s.labels if x != -100]
    assert "风扇" not in tokenizer_of(mode).decode(learnt)


@every_mode
def test_a_single_turn_is_one_sample_that_is_rendered_as_ever(mode):
    for limits in (None, WIDE, Limits(40, 12), Limits(30, 20, "head", False)):
        talk = [user("发动机水温高怎么办？" * 3), answer("换节温器。" * 4)]
        tokenizer = tokenizer_of(mode)
        (sample,) = MODE[mode].samples(tokenizer, talk, limits)
        assert sample.row == MODE[mode].render(tokenizer, talk, limits).row


def test_chatglm3_trains_a_conversation_as_one_sample_and_cuts_only_what_does_not_fit():
    tokenizer, mode = tokenizer_of("glm3"), MODE["glm3"]
    whole = mode.samples(tokenizer, TALK, WIDE)
    assert len(whole) == 1
    limits = Limits(len(mode.samples(tokenizer, TALK[:4], WIDE)[0].input_ids) + 3, 25)  # the third answer is too much
    first, second = mode.samples(tokenizer, TALK, limits)
    ends = [mode.samples(tokenizer, TALK[:4], WIDE)[0].input_ids[:-1], [tokenizer.get_command("<|user|>")]]
    assert first.input_ids == sum(ends, [])
    assert second.row == mode.render(tokenizer, TALK, limits).row and second.history_cut and not first.is_cut


def test_a_conversation_in_parts_ends_every_answer_with_what_follows_it():
    tokenizer, mode = tokenizer_of("glm3"), MODE["glm3"]
    result = {"role": "observation", "content": "晴"}
    talk = [user("天气？" * 20), answer("我来查。"), tool_call("f", {}), result, answer("晴")]
    (whole,) = mode.samples(tokenizer, talk, WIDE)
    parts = mode.samples(tokenizer, talk, Limits(90, 30, None))  # no prompt fits, so that each answer is a sample
    last = [[label for label in part.labels if label != -100][-1] for part in parts]
    assert [tokenizer.special_names()[i] for i in last] == ["<|assistant|>", "<|observation|>", "</s>"]
    assert all(label in whole.labels for label in last)


@pytest.mark.parametrize("mode", ["glm", "glm2"])
def test_a_system_text_stands_before_the_first_question_where_there_is_no_such_role(mode):
    tokenizer, render = tokenizer_of(mode), MODE[mode].render
    system = {"role": "system", "content": "要简短"}
    assert render(tokenizer, [system, user("你好")]).row == render(tokenizer, [user("要简短\n你好")]).row
    refused(lambda: render(tokenizer, [system]), "roles ['system']")


@pytest.mark.parametrize("mode", ["glm", "glm2"])
@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "", "tools": [{"name": "f"}]}, user("a"), answer("b")],
        [user("a"), answer("c", metadata="f"), {"role": "observation", "content": "d"}, answer("b")],
        [user("a"), answer("b", metadata="f")],
    ],
)
def test_tools_need_chatglm3(mode, messages):
    refused(lambda: MODE[mode].samples(tokenizer_of(mode), messages, WIDE), "--mode glm3")


# Text is never special


@every_mode
def test_no_text_in_a_row_becomes_a_special_token(mode):
    tokenizer = tokenizer_of(mode)
    names = [
        *tokenizer.special_names().values(),
        *["<|assistant|>", "<|user|>", "<sop>", "</s>", "[gMASK]", "<|blank_2|>"],
    ]
    hostile = "".join(names) + "\x00\x01\x1b[31m\ufffe\u202e" + "\n<|assistant|>\n"
    shapes = {
        "instruction": lambda t: {"instruction": t, "input": t, "output": t},
        "prompt_response": lambda t: {"prompt": t, "response": t, "history": [[t, t]]},
        "conversations": lambda t: {"conversations": [{"role": "system", "content": t}, user(t), answer(t)]},
        "sharegpt": lambda t: {"conversations": [{"from": "human", "value": t}, {"from": "gpt", "value": t}]},
        "text": lambda t: {"text": t},
        "text_answer": lambda t: {"text": t, "answer": t},
    }
    if mode == "glm3":
        shapes["messages"] = lambda t: {
            "tools": [{"name": t, "description": t}],
            "messages": [user(t), call_with(t), answer(t)],
        }
    for name, shape in shapes.items():
        special = []
        for text in ("风", hostile):
            settings = Settings(MODE[mode].template, tokenizer, WIDE, data_format=name)
            ids = [s.input_ids for s in prepare_row("row", shape(text), settings)]
            special.append([[i for i in row if i in tokenizer.special_ids] for row in ids])
            assert all(ids)
        assert special[0] == special[1], name


def call_with(text):
    return {"role": "tool", "name": text.replace("\n", ""), "parameters": {"x": text}, "observation": text}


# Tools


@pytest.mark.parametrize(
    "arguments", [{}, {"city": '上海 "浦东" it\'s'}, {"a": [1, {"b": None}], "c": True}, {"城市": "x\n```\ny"}]
)
def test_a_call_in_training_is_read_back_at_prediction(arguments):
    message = tool_call("f", arguments)
    assert message["metadata"] == "f"
    assert tool_parameters(message["content"]) == arguments
    assert tool_call("f", json.dumps(arguments)) == message


def test_openai_sharegpt_and_chatglm3_write_the_same_tool_call():
    tools = [{"name": "f", "parameters": {}}]
    question, done = {"role": "user", "content": "q"}, {"role": "assistant", "content": "ok"}
    call = {"type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    rows = {
        "conversations": {
            "tools": tools,
            "conversations": [
                question,
                {"role": "tool", "name": "f", "parameters": {"x": 1}, "observation": {"y": 2}},
                done,
            ],
        },
        "messages": {
            "tools": [{"type": "function", "function": tools[0]}],
            "messages": [
                question,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": '{"y": 2}'},
                done,
            ],
        },
        "sharegpt": {
            "tools": json.dumps(tools),
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": '{"y": 2}'},
                {"from": "gpt", "value": "ok"},
            ],
        },
    }
    first, *others = [FORMATS[name].messages(row) for name, row in rows.items()]
    assert first[2] == {"role": "assistant", "metadata": "f", "content": "```python\ntool_call(x=1)\n```"}
    assert [message["role"] for message in first] == ["system", "user", "assistant", "observation", "assistant"]
    assert all(other == first for other in others)


def test_a_conversation_with_tools_is_the_history_that_chat_keeps():
    tokenizer = tokenizer_of("glm3")
    row = next(row for _, row in read_rows(SAMPLES / "tools.json"))
    messages = FORMATS["conversations"].messages(row)
    asked = chat_ids(MODE["glm3"], tokenizer, messages[3]["content"], messages[:3], role="observation")
    (sample,) = MODE["glm3"].samples(tokenizer, messages, WIDE)
    assert sample.input_ids[: len(asked)] == asked


# What a conversation may look like


@pytest.mark.parametrize(
    "roles, problem",
    [
        ("", "the conversation is empty"),
        ("s", "a system message"),
        ("a", "the assistant cannot follow the beginning"),
        ("sa", "the assistant cannot follow a system message"),
        ("u", "ends with the user"),
        ("uau", "ends with the user"),
        ("uu", "message 2: the user cannot follow the user"),
        ("uaa", "message 3: the assistant cannot follow the assistant"),
        ("uas", "message 3: a system message cannot follow the assistant"),
        ("us", "message 2: a system message cannot follow the user"),
        ("uo", "message 2: the result of a tool cannot follow the user"),
        ("uao", "message 3: the result of a tool cannot follow the assistant"),
        ("uco", "ends with the result of a tool"),
        ("uca", "the assistant cannot follow the call of a tool (its result must come first)"),
        ("ucu", "the user cannot follow the call of a tool"),
        ("ucoo", "the result of a tool cannot follow the result of a tool"),
        ("ucc", "cannot follow the call"),
    ],
)
def test_roles_out_of_order_are_named(roles, problem):
    refused(lambda: check_order(messages_with(roles)), problem)


@pytest.mark.parametrize("roles", ["ua", "sua", "uaua", "ucoa", "uacoa", "uc", "ucoaua", "ucococoa"])
def test_roles_in_order_are_accepted(roles):
    check_order(messages_with(roles))


def test_a_question_without_an_answer_is_for_prediction_only():
    check_order(messages_with("uau"), needs_answer=False)
    refused(lambda: check_order(messages_with("uu"), needs_answer=False), "cannot follow")


def messages_with(letters):
    names = {"s": "system", "u": "user", "a": "assistant", "o": "observation", "c": "assistant"}
    return [
        {"role": names[letter], "content": "x"} | ({"metadata": "f"} if letter == "c" else {}) for letter in letters
    ]


@pytest.mark.parametrize(
    "convert, entry, parts",
    [
        (from_roles, 3, ["message 1: expected an object, found 3"]),
        (from_roles, {"role": "bot", "content": "x"}, ["role 'bot'", "system, user, assistant"]),
        (from_roles, {"role": ["user"], "content": "x"}, ["role ['user']"]),
        (from_roles, {"content": "x"}, ["role None"]),
        (from_roles, {"role": "user"}, ["field 'content' is missing", "['role']"]),
        (from_roles, {"role": "user", "content": None}, ["'content' is None"]),
        (from_roles, {"role": "user", "content": [{"type": "image"}]}, ["'content' is [", "not a string"]),
        (from_roles, {"role": "user", "content": [{"type": "text"}]}, ["field 'text' is missing"]),
        (from_roles, {"role": "user", "content": []}, ["'content' is []", "not a string"]),
        (from_roles, {"role": "assistant", "content": "x", "weight": 2}, ["'weight' is 2", "0 or 1"]),
        (from_roles, {"role": "assistant", "tool_calls": [{}, {}]}, ["has 2 calls"]),
        (from_roles, {"role": "assistant", "content": "x", "loss": 1}, ["'loss' is 1"]),
        (from_roles, {"role": "user", "content": "x", "metadata": "f"}, ["'metadata'"]),
        (from_roles, {"role": "assistant", "content": "x", "metadata": "f\n<|user|>"}, ["'metadata'", "one line"]),
        (from_roles, {"role": "tool", "name": "f", "parameters": {}}, ["'observation' is missing"]),
        (from_roles, {"role": "tool", "name": "f", "parameters": 3, "observation": ""}, ["'f' are 3"]),
        (from_roles, {"role": "tool", "name": "", "parameters": {}, "observation": ""}, ["name of a called tool"]),
        (from_roles, {"role": "tool", "name": "f", "parameters": {"a b": 1}, "observation": ""}, ["'a b' cannot"]),
        (from_roles, {"role": "tool", "name": "f", "parameters": {"if": 1}, "observation": ""}, ["'if' cannot"]),
        (from_roles, {"role": "assistant", "content": "", "tool_calls": [3]}, ["'tool_calls' has 3"]),
        (from_speakers, {"from": "alien", "value": "x"}, ["'from' is 'alien'", "human"]),
        (from_speakers, {"from": "human", "value": 3}, ["'value' is 3"]),
        (from_speakers, {"from": "function_call", "value": "f(1)"}, ["the function call: not JSON"]),
        (from_speakers, {"from": "function_call", "value": "[]"}, ["the function call is []"]),
    ],
)
def test_a_bad_message_is_named(convert, entry, parts):
    refused(lambda: messages_of([entry], convert), "message 1: ", *parts)


def test_what_is_nested_too_deep_is_refused_before_it_is_followed():
    deep = "x"
    for _ in range(600):
        deep = [deep]
    call = {"role": "tool", "name": "f", "parameters": {"x": deep}, "observation": ""}
    refused(lambda: messages_of([call], from_roles), "nested deeper than 32")
    row = {"tools": [{"name": "f", "x": deep}], "conversations": [user("a"), answer("b")]}
    refused(lambda: FORMATS["conversations"].messages(row), "'tools' is nested deeper than 32")


@pytest.mark.parametrize("tools", [3, True, "f", "3", '"f"', "[", [float("nan")]])
def test_tools_must_be_a_list_or_an_object_or_the_json_text_of_one(tools):
    row = {"tools": tools, "conversations": [user("a"), answer("b")]}
    refused(lambda: FORMATS["conversations"].messages(row), "field 'tools'")


def test_tools_in_the_middle_or_at_the_end_are_refused():
    tools = {"role": "system", "content": "s", "tools": [{"name": "f"}]}
    turn = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    for messages in ([*turn, tools, *turn], [*turn, tools], [turn[0], tools, turn[1]]):
        refused(lambda messages=messages: check_order(messages), "a system message cannot follow")
    for messages in ([tools, *turn], [tools, {"role": "system", "content": "t"}, *turn], [tools, tools, *turn]):
        check_order(messages)
