"""Prompts -> new ids, by a loaded model: greedy, sampled or by beams; together, or one prompt token by token.

    [ids] = generate(model, tokenizer, mode, [prompt], [16])                    # greedy, 16 tokens at most
    generate(model, tokenizer, mode, [prompt], [16], on_token=print, do_sample=True, top_p=0.8)

The only place that calls transformers' `generate`. Text -> ids is `Mode.render`'s, ids -> text the tokenizer's.
"""

from itertools import takewhile

import torch
from transformers.generation.streamers import BaseStreamer


@torch.inference_mode()
def generate(model, tokenizer, mode, prompts, max_new_tokens, on_token=None, num_beams=1, **sampling):
    """The new ids of each prompt, up to its first stop token. prompts: lists of ids; they are padded on the left.

    max_new_tokens: one for each prompt. on_token: called with each new id of the only prompt, stop tokens excepted;
    beams are not known before the end. sampling: of transformers' `generate` (`sampling_of`); none: greedy.

        prompts [1 2 3], [7]  ->  rows 1 2 3 | 9 </s> -     ->  [9], [8 8 8]
                                  _ _ 7 | 8 8 8
    """
    stop, width = mode.stop_token_ids(tokenizer), max(map(len, prompts))
    padded = tokenizer.pad(prompts, width if len(prompts) > 1 else None, "left")
    output = model.generate(
        **{name: torch.stack([torch.as_tensor(row) for row in rows]).to(model.device) for name, rows in padded.items()},
        max_new_tokens=max(max_new_tokens),
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
        streamer=_Streamer(stop, on_token) if on_token and num_beams == 1 else None,
        num_beams=num_beams,
        **{"do_sample": False, **sampling},
    )
    rows = (ids[:limit] for ids, limit in zip(output[:, width:].tolist(), max_new_tokens))
    answers = [list(takewhile(lambda token: token not in stop, ids)) for ids in rows]
    if on_token and num_beams > 1:
        for token in answers[0]:
            on_token(token)
    return answers


def sampling_of(config):
    """PredictConfig -> `sampling` and num_beams of `generate`."""
    drawn = {"do_sample": True, "top_p": config.top_p, "temperature": config.temperature} if config.do_sample else {}
    return {"num_beams": config.num_beams, **drawn}


class _Streamer(BaseStreamer):
    """Receives the prompt and then token after token from transformers; passes on those that do not end the answer."""

    def __init__(self, stop, on_token):
        self.stop, self.on_token, self.is_prompt = set(stop), on_token, True

    def put(self, value):
        for token in () if self.is_prompt else value.flatten().tolist():
            if token not in self.stop:
                self.on_token(token)
        self.is_prompt = False

    def end(self):
        pass
