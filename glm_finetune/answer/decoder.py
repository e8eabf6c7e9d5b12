"""Ids -> text while they are made: each token is looked at once, and no piece ends within a character.

    decoder = Decoder(tokenizer)
    pieces = [decoder.push(i) for i in ids] + [decoder.finish()]
    "".join(pieces) == tokenizer.decode(ids, clean_up_tokenization_spaces=False)

Three things are held back until they are whole: the bytes of a character that SentencePiece has no piece for, a blank
that may be the one in front of the text, and ChatGLM-6B's marks for white space.

    <0xF0> <0x9F> <0x98> <0x80> ▁a  ->  "" "" "" "😀" " a"         "<" "n" ">" "x"  ->  "" "" "\\n" "x"
"""

ANCHOR = "x"  # any text: what follows it is not at the beginning, where SentencePiece takes a blank away


class Decoder:
    """`push` returns the text that an id makes final, often "" or that of ids before it; `finish` what is left."""

    def __init__(self, tokenizer, line_end=None):
        """line_end: id that ends a first line, of which nothing is seen where it is empty; what follows it begins
        anew. name: that line, once it is over.
        """
        self.tokenizer, self.line_end, self.name = tokenizer, line_end, ""
        self.line = ""  # what there is of the first line
        self.first = []  # the blank piece that began the text and is not seen; None: the text has begun
        self.bytes = b""  # of the last character, which is not complete
        self.mark = ""  # of ChatGLM-6B, or what may become one

    def push(self, token_id):
        if self.line_end is None:
            return self._push(token_id)
        if token_id != self.line_end:
            text = self._push(token_id)
            self.line += text
            return text
        rest = self.finish()
        self.name, self.line_end, self.first = (self.line + rest).strip(), None, []
        return rest + "\n" if self.name else ""

    def _push(self, token_id):
        (piece, *_) = [*self.tokenizer.pieces([token_id]), None]
        if piece is None:
            return ""
        if self._is_byte(piece):
            self.first = None
            self.bytes += bytes([int(piece[3:5], 16)])
            return self._with_marks(self._characters(is_end=False))
        return self._with_marks(self._characters(is_end=True) + self._surface(piece))

    def finish(self):
        text, self.mark = self.mark + self._characters(is_end=True), ""
        return self.tokenizer.white_space(text)

    def _is_byte(self, piece):
        sp = self.tokenizer.sp
        return sp.is_byte(sp.piece_to_id(piece))

    def _surface(self, piece):
        """The text of a piece where it stands."""
        decode = self.tokenizer.sp.decode_pieces
        if self.first is None:
            return decode([ANCHOR, piece])[len(ANCHOR) :]
        text = decode([*self.first, piece])
        if text:
            self.first = None
        elif decode([ANCHOR, piece]) != ANCHOR:
            self.first = [piece]
        return text

    def _characters(self, is_end):
        """Take the whole characters out of `bytes`; a byte that begins none is U+FFFD, as SentencePiece has it.

        is_end: no byte follows, so what is left is no character.
        """
        text = ""
        while self.bytes and (is_end or len(self.bytes) >= _length(self.bytes[0])):
            size = _length(self.bytes[0])
            try:
                text += self.bytes[:size].decode("utf-8")
            except UnicodeDecodeError:
                text, size = text + "\ufffd", 1
            self.bytes = self.bytes[size:]
        return text

    def _with_marks(self, text):
        """`text` behind what was held back, without the beginning of a mark at its end."""
        text = self.mark + text
        match = self.tokenizer.open_mark and self.tokenizer.open_mark.search(text)
        self.mark = match[0] if match else ""
        return self.tokenizer.white_space(text[: len(text) - len(self.mark)])


def _length(first):
    """Bytes of a UTF-8 character that begins with the byte `first`; 1 if none does."""
    return 2 if 0xC2 <= first <= 0xDF else 3 if 0xE0 <= first <= 0xEF else 4 if 0xF0 <= first <= 0xF4 else 1
