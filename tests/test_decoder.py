"""Streamed text: exactly the decoded text, never half a character, at the same cost for every token."""

import random
from pathlib import Path

import pytest

from glm_finetune import MODE
from glm_finetune.answer.decoder import Decoder

TEXTS = [
    "<n>",
    "<",
    "n",
    ">",
    "<|",
    "|>",
    "<|blank_",
    "<|blank_80|>",
    "12",
    "007",
    "<|tab|>",
    "  ",
    "\n",
    " ,",
    "a b",
    "你",
]
EMOJI = ["😀", "é", "中", "👋🏽", "\x7f", "\x0a"]
ORACLE = Path(__file__).parent / "fixtures/oracle/checkpoints"
every_mode = pytest.mark.parametrize("mode", MODE)


def tokenizers(mode, checkpoints):
    """One of the tests' and the golden data's, whose blank pieces differ."""
    return [MODE[mode].tokenizer.from_pretrained(folder) for folder in (checkpoints[mode], ORACLE / f"{mode}-a")]


def hard_ids(tokenizer, draw):
    """Random ids: any, parts of characters, blanks, and texts that ChatGLM-6B replaces or that clean-up would."""
    first = {
        piece: i + tokenizer.num_image_tokens
        for i, piece in enumerate(map(tokenizer.sp.id_to_piece, range(len(tokenizer.sp))))
    }
    single = [i for piece, i in first.items() if set(piece) == {"▁"}]
    for _ in range(draw.randint(0, 14)):
        yield from draw.choice(
            (
                lambda: [draw.randrange(len(tokenizer) + 3)],
                lambda: [first[f"<0x{draw.randrange(256):02X}>"]],
                lambda: [first[f"<0x{b:02X}>"] for b in draw.choice(EMOJI).encode()[: draw.randint(1, 8)]],
                lambda: [draw.choice(single)],
                lambda: tokenizer.encode_text(draw.choice(TEXTS)),
            )
        )()


@every_mode
def test_pieces_are_the_decoded_text_whatever_the_ids(mode, checkpoints):
    draw = random.Random(0)
    for tokenizer in tokenizers(mode, checkpoints):
        for _ in range(1500):
            ids, decoder = list(hard_ids(tokenizer, draw)), Decoder(tokenizer)
            pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
            assert "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False), ids


@every_mode
@pytest.mark.parametrize("text", ["水泵漏水。", "😀👋🏽", "<|blank_00", "   ", "\x00\x01"])
def test_every_token_is_decoded_a_fixed_number_of_times(mode, text, checkpoints, monkeypatch):
    tokenizer, decoded = MODE[mode].tokenizer.from_pretrained(checkpoints[mode]), []
    ids = [i for _ in range(100) for i in tokenizer.encode_text(text)]

    class Counting:
        def __getattr__(self, name):
            return getattr(sp, name)

        def decode_pieces(self, pieces):
            decoded.extend(pieces)
            return sp.decode_pieces(pieces)

    sp = tokenizer.sp
    expected = tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    tokenizer.sp, decoder = Counting(), Decoder(tokenizer)
    pieces = []
    for i in ids:
        pieces.append(decoder.push(i))
        assert len(decoder.bytes) < 4 and len(decoder.mark) < 12
    assert "".join([*pieces, decoder.finish()]) == expected
    assert len(decoded) <= 4 * len(ids)
