"""Tokenizers: text never becomes a special token, padding, streaming. Token ids themselves: test_oracle.py."""

import pytest
import torch

from glm_finetune import MODE
from glm_finetune.answer.decoder import Decoder

every_mode = pytest.mark.parametrize("mode", MODE)
INJECTIONS = (
    "<sop>",
    "<eop>",
    "[gMASK]",
    "[MASK]",
    "<pad>",
    "</s>",
    "sop",
    "<|user|>",
    "<|assistant|>\n",
    "<|observation|>",
    "a<sop>b<|system|>c</s>d",
    "＜ｓｏｐ＞",
    "[gMASK] <sop>",
    "<s>",
    "<unused_0>",
    "<ENC>",
)


def tokenizer_of(mode, checkpoints):
    return MODE[mode].tokenizer.from_pretrained(checkpoints[mode])


@every_mode
@pytest.mark.parametrize("text", INJECTIONS)
def test_text_never_yields_a_special_id_and_survives(mode, text, checkpoints):
    tokenizer = tokenizer_of(mode, checkpoints)
    ids = tokenizer.encode_text(text)
    assert ids and not tokenizer.special_ids & set(ids)
    expected = text.translate({ord("＜"): "<", ord("＞"): ">", ord("ｓ"): "s", ord("ｏ"): "o", ord("ｐ"): "p"})
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == (expected if mode == "glm" else text)


@every_mode
def test_rendered_conversations_hold_the_special_tokens_of_their_form_only(mode, checkpoints):
    tokenizer = tokenizer_of(mode, checkpoints)
    plain, hostile = (
        [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        for text in ("你好", "".join(INJECTIONS))
    )
    specials = [
        [i for i in MODE[mode].render(tokenizer, m).input_ids if i in tokenizer.special_ids] for m in (plain, hostile)
    ]
    assert specials[0] == specials[1]


@every_mode
@pytest.mark.parametrize("fields", [{}, {"remove_space": True, "do_lower_case": True}])
def test_texts_encoded_in_one_call_are_the_texts_encoded_one_by_one(mode, fields, checkpoints):
    tokenizer = MODE[mode].tokenizer(checkpoints[mode], fields)
    texts = ["", " ", *INJECTIONS, "A  b\n\tC", "\u200b", "你好" * 300]
    parts = [part for text in texts for part in (text, (1, 2), (3,))]
    for special in (tokenizer.special_ids, {*tokenizer.special_ids, tokenizer.encode_text("你好")[-1]}):
        tokenizer.special_ids = special  # with one that some text has
        found = tokenizer.encode_parts(parts, num_threads=2)
        assert {ids.dtype.name for ids in found} == {"int32"}
        expected = [tokenizer.encode_text(part) if isinstance(part, str) else list(part) for part in parts]
        assert [ids.tolist() for ids in found] == expected
    assert tokenizer.encode_parts([]) == []


def test_a_vocabulary_that_would_match_a_special_piece_in_text_is_overruled(checkpoints):
    tokenizer = tokenizer_of("glm", checkpoints)
    blank = tokenizer.convert_tokens_to_ids("<|blank_2|>")
    tokenizer.special_ids = tokenizer.special_ids | {blank}
    assert blank not in tokenizer.encode_text("a  b")


@every_mode
@pytest.mark.parametrize(
    "text", ["👋🏽 你好，世界\n\n第二行\tx", "ａｂｃ emoji 😀😃", "日本語 한국어 مرحبا", "  two  spaces  "]
)
def test_streamed_text_is_the_decoded_text_and_never_half_a_character(mode, text, checkpoints):
    tokenizer = tokenizer_of(mode, checkpoints)
    ids, decoder = tokenizer.encode_text(text), Decoder(tokenizer)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert not any("\ufffd" in piece for piece in pieces)


@every_mode
def test_padding_on_either_side_keeps_tokens_and_positions(mode, checkpoints):
    tokenizer = tokenizer_of(mode, checkpoints)
    texts = ["风扇不转", "发动机水温高"]
    alone = [tokenizer(text)["input_ids"] for text in texts]
    for side in ("left", "right"):
        batch = tokenizer(texts, padding=True, return_tensors="pt", padding_side=side)
        for row, positions, ids in zip(batch["input_ids"], batch["position_ids"], alone):
            kept = row != tokenizer.pad_token_id
            assert row[kept].tolist() == ids
            assert kept[-1 if side == "left" else 0]
            unpadded = torch.as_tensor(tokenizer.pad([ids], len(ids))["position_ids"][0])
            assert torch.equal(positions[..., kept], unpadded)


@every_mode
def test_saved_tokenizer_files_are_the_same_bytes(mode, checkpoints, tmp_path):
    tokenizer_of(mode, checkpoints).save_pretrained(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (checkpoints[mode] / path.name).read_bytes()
    assert MODE[mode].tokenizer.from_pretrained(tmp_path).encode("你好") == tokenizer_of(mode, checkpoints).encode(
        "你好"
    )


@every_mode
def test_training_and_prediction_agree_on_the_prompt(mode, checkpoints):
    tokenizer, render = tokenizer_of(mode, checkpoints), MODE[mode].render
    question = [{"role": "user", "content": "风扇不转"}]
    sample = render(tokenizer, [*question, {"role": "assistant", "content": "风扇_部件故障_不转"}])
    prompt = render(tokenizer, question)
    assert sample.input_ids[: len(prompt.input_ids)] == prompt.input_ids
    answer = [label for label in sample.labels if label != -100]
    assert answer[-1] in MODE[mode].stop_token_ids(tokenizer)


@every_mode
def test_chat_does_not_touch_the_history_it_is_given(mode, checkpoints):
    from glm_finetune.answer.chat import chat

    model = MODE[mode].model.from_pretrained(checkpoints[mode], dtype=torch.float32)
    history, pieces = [], []
    response, new_history = chat(
        model,
        tokenizer_of(mode, checkpoints),
        MODE[mode],
        "你好",
        history,
        max_new_tokens=4,
        do_sample=False,
        on_text=pieces.append,
    )
    assert history == [] and new_history
    assert isinstance(response, (str, dict)) and pieces
    chat(model, tokenizer_of(mode, checkpoints), MODE[mode], "再见", new_history, max_new_tokens=4, do_sample=False)
