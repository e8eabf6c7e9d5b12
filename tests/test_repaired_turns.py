"""--repair_turns: what is joined, what is left out, what is counted."""

import json
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.answer.flags import PredictConfig
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.formats import detect
from glm_finetune.data.samples import Settings, read_questions
from glm_finetune.errors import UserError
from glm_finetune.flags import parse

CHECKPOINTS = Path(__file__).parent / "fixtures/oracle/checkpoints"


def said(*parts):
    return [{"role": {"u": "user", "a": "assistant", "s": "system"}[part[0]], "content": part[1:]} for part in parts]


@pytest.mark.parametrize(
    "before, after",
    [
        (said("ahello", "uq", "ap"), said("uq", "ap")),
        (said("ss", "ahello", "amore", "uq", "ap"), said("ss", "uq", "ap")),
        (said("uq", "ur", "ap", "ao"), said("uq\nr", "ap\no")),
        (said("uq", "ap", "uq", "ur", "ut", "ap"), said("uq", "ap", "uq\nr\nt", "ap")),
    ],
)
@pytest.mark.parametrize("form", ["messages", "sharegpt", "history"])
def test_turns_are_repaired_where_that_is_asked_for_and_errors_else(before, after, form):
    row = {"messages": before}
    if form == "sharegpt":
        names = {"user": "human", "assistant": "gpt", "system": "system"}
        row = {"conversations": [{"from": names[m["role"]], "value": m["content"]} for m in before]}
    if form == "history":
        *history, question, answer = before
        row = {"prompt": question["content"], "response": answer["content"], "history": history}
        if question["role"] != "user":
            return
    file_format = detect([row])
    with pytest.raises(UserError, match="cannot follow"):
        file_format.messages(row)
    messages = file_format.messages(row, repair=True)
    assert messages[-1].pop("repaired") and messages == after
    right = {"messages": after}
    assert detect([right]).messages(right, repair=True) == after


def test_repaired_rows_are_counted_and_an_answer_is_trained_only_if_all_of_it_is(tmp_path):
    rows = [said("uq", "ap"), said("ahello", "uq", "ap"), [*said("uq", "ur", "ap"), {**said("ao")[0], "loss": False}]]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    tokenizer = MODE["glm2"].tokenizer.from_pretrained(CHECKPOINTS / "glm2-a")
    report = InstructionDataset(path, Settings(MODE["glm2"].template, tokenizer, None, repair=True)).report
    assert (report.rows, report.kept, report.repaired, report.no_target) == (3, 2, 1, 1)


def test_turns_are_repaired_in_prediction_too(tmp_path):
    path = tmp_path / "a.jsonl"
    talk = [{"role": role, "content": text} for role, text in (("Bot", "hello"), ("client", "q"), ("client", "r"))]
    path.write_text(json.dumps({"messages": talk}))
    flags = ["--test_path", str(path), "--repair_turns", "--roles", "client=user,bot=assistant"]
    [(_, _, messages, _)] = read_questions(parse(PredictConfig, flags))
    assert [message["content"] for message in messages] == ["q\nr"]
