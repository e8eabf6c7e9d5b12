"""The text of an answer: a bare base's as its official chat cleans it, a reference as the model would write it."""

import random
from types import SimpleNamespace

import pytest

import predict
from glm_finetune import MODE
from glm_finetune.answer.chat import chat
from glm_finetune.answer.reply import Reply, as_answered, text_of
from glm_finetune.record import Prompt
from tests.test_asked_as_trained import CHECKPOINTS, PIECES, held

every_mode = pytest.mark.parametrize("mode", MODE)
OFFICIAL = [*PIECES, "好", ",", "!", "?", ":", " .", " n't", " ' ", "[[训练时间]]", "[[训", "。", "a"]


@pytest.fixture
def tokenizer(mode):
    return MODE[mode].tokenizer.from_pretrained(CHECKPOINTS / f"{mode}-a")


def folder_of(mode, is_bare):
    return SimpleNamespace(mode=MODE[mode], prompt=Prompt("official"), is_bare=is_bare)


@every_mode
def test_a_bare_base_answers_as_its_official_chat_piece_by_piece(mode, tokenizer, monkeypatch):
    rng, folder = random.Random(mode), folder_of(mode, is_bare=True)
    for _ in range(300):
        text = "".join(rng.choices(OFFICIAL, k=rng.randint(0, 30))).replace("<|user|>", "")
        ids = [*(tokenizer.newline_ids if mode == "glm3" else ()), *tokenizer.encode_text(text)]
        monkeypatch.setattr("glm_finetune.answer.chat.generate", lambda *args, ids=ids, **options: [ids])
        said, _ = chat(None, tokenizer, MODE[mode], "问", [], 9)
        reply = Reply.of(folder, tokenizer)
        assert "".join([reply.push(i) for i in ids] + [reply.finish()]) == reply.text == said
        assert text_of(ids, folder, tokenizer) == said


def test_full_width_punctuation_comes_back_from_a_bare_chatglm_6b_and_a_perfect_answer_scores_1():
    tokenizer = MODE["glm"].tokenizer.from_pretrained(CHECKPOINTS / "glm-a")
    gold = "灯不亮，闪烁？①号（左）"
    ids = tokenizer.encode_text(gold)
    trained, bare = folder_of("glm", False), folder_of("glm", True)
    assert text_of(ids, trained, tokenizer) == "灯不亮,闪烁?1号(左)" != gold
    assert text_of(ids, bare, tokenizer).startswith("灯不亮，闪烁？")
    for folder in (trained, bare):
        assert text_of(ids, folder, tokenizer) == as_answered(gold, folder, tokenizer)


@every_mode
def test_references_are_scored_as_the_tokenizer_holds_them_the_best_of_several(mode, tokenizer, capsys):
    golds = ["灯（左）_部件故障_不亮？\n泵_部件故障_漏水", "灯_部件故障_闪烁"]
    folder = folder_of(mode, is_bare=False)
    known = [as_answered(gold, folder, tokenizer) for gold in golds]
    predict.print_scores([(held(tokenizer, golds[0]), known), (held(tokenizer, golds[1]), known[1:]), ("无", [])])
    assert "triples of 2 samples: F1 1.0000" in capsys.readouterr().out


@pytest.mark.parametrize("answer, known", [(None, []), ("a", ["a"]), (["a", "b"], ["a", "b"])])
def test_a_row_has_no_reference_one_or_several(answer, known):
    assert predict.references(answer) == known
