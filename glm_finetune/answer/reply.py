"""The text of an answer, whole or while it is made, by one rule for a question, a file and a conversation.

    reply = Reply.of(folder, tokenizer)
    pieces = [reply.push(i) for i in ids] + [reply.finish()]        # "".join(pieces) == reply.text

What was trained here comes back byte for byte (ChatGLM-6B: as its tokenizer can hold it); in ChatGLM3 without the line
break in front, where the name of a called tool would stand. A bare base is cleaned as its official chat does.
"""

from glm_finetune.answer.decoder import Decoder
from glm_finetune.modes.tokenizer import CLEAN_UP

UNSETTLED = 16  # characters at the end of a text that cleaning may still change: its patterns are shorter


class Reply:
    """One answer. text: what of it is final. name: of the tool that it calls, "" if it calls none."""

    def __init__(self, tokenizer, line_end=None, clean=None):
        """line_end: id after the name of a tool, where an answer begins with that. clean: text -> text, or None."""
        self.decoder, self.clean = Decoder(tokenizer, line_end), clean
        self.raw = self.text = ""

    @classmethod
    def of(cls, folder, tokenizer):
        """A new answer of a `build.ModelFolder`."""
        has_line = folder.mode.names_tools and folder.prompt.template not in ("raw", "text")
        line_end = tokenizer.newline_ids[-1] if has_line else None
        return cls(tokenizer, line_end, clean_up_of(folder, tokenizer))

    def push(self, token_id):
        """The text that an id makes final, often ""."""
        self.raw += self.decoder.push(token_id)
        return self._settled(self.clean(self.raw)[:-UNSETTLED] if self.clean else self.raw)

    def finish(self):
        """What is left."""
        self.raw += self.decoder.finish()
        return self._settled(self.clean(self.raw) if self.clean else self.raw)

    def _settled(self, text):
        piece = text[len(self.text) :]
        self.text += piece
        return piece

    def message(self):
        """The answer as a message, for what is asked next."""
        if self.decoder.name:
            content = self.text.partition("\n")[2]
            return {"role": "assistant", "metadata": self.decoder.name, "content": content}
        return {"role": "assistant", "content": self.text}


def clean_up_of(folder, tokenizer):
    """Function: text -> text, the official clean-up of a bare base; None for what was trained here."""
    return (lambda text: folder.mode.clean(spaced(text) if tokenizer.clean_up else text)) if folder.is_bare else None


def spaced(text):
    """transformers' clean_up_tokenization_spaces: "a , b" -> "a, b"."""
    for part in CLEAN_UP:
        text = text.replace(part, part.strip())
    return text


def text_of(ids, folder, tokenizer):
    """The text of a whole answer."""
    reply = Reply.of(folder, tokenizer)
    for token_id in ids:
        reply.push(token_id)
    reply.finish()
    return reply.text


def as_answered(text, folder, tokenizer):
    """A reference as this model would write it if it answered perfectly."""
    text = tokenizer.decode(tokenizer.encode_text(text), clean_up_tokenization_spaces=False)
    clean = clean_up_of(folder, tokenizer)
    return clean(text) if clean else text
