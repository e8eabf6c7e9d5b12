"""One turn of a conversation with a model, in the mode's own format: whole or streamed.

response, history = chat(model, tokenizer, MODE["glm3"], "你好", history=[])
"""

import torch
from transformers.generation.streamers import BaseStreamer


def as_messages(history):
    """Past turns as messages; pairs (question, answer), as ChatGLM-6B and 2 keep them, become two messages each."""
    messages = []
    for turn in history:
        if isinstance(turn, dict):
            messages.append(turn)
        else:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return messages


def chat_ids(mode, tokenizer, query, history, role="user", template="official"):
    """Prompt ids for the next answer. role: of the query ("observation" for a tool's result in ChatGLM3)."""
    messages = [*as_messages(history), {"role": role, "content": query}]
    return mode.render(tokenizer, messages, None, template).input_ids


def chat(model, tokenizer, mode, query, history=(), role="user", template="official", on_text=None, **sampling):
    """Ask once. history: messages (ChatGLM3) or (question, answer) pairs (ChatGLM-6B, 2); it is not modified.

    on_text: called with each piece of text as it becomes final, for streaming. sampling: arguments of `generate`.
    Returns (response, new history): as the original's chat(), but a last token that is no stop token is kept.
    """
    ids = chat_ids(mode, tokenizer, query, history, role, template)
    batch = {name: torch.as_tensor(rows).to(model.device) for name, rows in tokenizer.pad([ids]).items()}
    stop = mode.stop_token_ids(tokenizer)
    streamer = _TextStreamer(tokenizer, stop, on_text) if on_text else None
    with torch.inference_mode():
        output = model.generate(
            **batch, eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, streamer=streamer, **sampling
        )
    new_ids = answer_ids(output[0, len(ids) :].tolist(), stop)
    return mode.finish_turn(list(history), query, role, tokenizer.decode(new_ids))


def answer_ids(ids, stop):
    """Generated ids up to the first stop token."""
    return ids[: next((i for i, token in enumerate(ids) if token in stop), len(ids))]


class StreamDecoder:
    """Text of a growing list of ids, piece by piece, never half a character.

    A character may be spread over several byte tokens; until its last one arrives decoding ends in U+FFFD, which is
    held back. `push` returns what can be printed; `finish` what is left at the end.
    """

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.printed = tokenizer, [], 0

    def push(self, token_id):
        self.ids.append(token_id)
        return self._new(self._text().rstrip("\ufffd"))

    def finish(self):
        return self._new(self._text())

    def _text(self):
        return self.tokenizer.decode(self.ids, clean_up_tokenization_spaces=False)

    def _new(self, text):
        new, self.printed = text[self.printed :], max(self.printed, len(text))
        return new


class _TextStreamer(BaseStreamer):
    """Receives the prompt and then token after token from `generate`; passes finished text on."""

    def __init__(self, tokenizer, stop, on_text):
        self.decoder, self.stop, self.on_text, self.is_prompt = StreamDecoder(tokenizer), set(stop), on_text, True

    def put(self, value):
        if self.is_prompt:
            self.is_prompt = False
            return
        for token in value.flatten().tolist():
            if token not in self.stop:
                self.on_text(self.decoder.push(token))

    def end(self):
        self.on_text(self.decoder.finish())
