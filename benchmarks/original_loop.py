"""The data class of ChatGLM-Finetuning for ChatGLM2, written again as it works, for benchmarks/data.py to compare with.

One row at a time: json, tokenizer.tokenize of prompt and answer, concatenations, convert_tokens_to_ids, assertions.

    rows = original_loop("data.jsonl", OriginalTokenizer(tokenizer), max_len=512, max_src_len=256)
"""

import json

from transformers import PreTrainedTokenizer


class OriginalTokenizer(PreTrainedTokenizer):
    """The methods of the original ChatGLM2 tokenizer that its data class uses."""

    def __init__(self, tokenizer):
        self.sp_model, self.special_tokens = tokenizer.sp, {"sop": tokenizer.commands["sop"], "</s>": 2}
        self.special_tokens["[gMASK]"] = tokenizer.commands["[gMASK]"]
        self.num_words = len(tokenizer)
        super().__init__()

    @property
    def vocab_size(self):
        return self.num_words

    def get_vocab(self):
        return {}

    def _tokenize(self, text, **kwargs):
        return self.sp_model.EncodeAsPieces(text)

    def _convert_token_to_id(self, token):
        return self.special_tokens[token] if token in self.special_tokens else self.sp_model.PieceToId(token)


class BareTokenizer(OriginalTokenizer):
    """The same two calls without what transformers does around them."""

    def tokenize(self, text):
        return self._tokenize(text)

    def convert_tokens_to_ids(self, tokens):
        return [self._convert_token_to_id(token) for token in tokens]


def original_loop(path, tokenizer, max_len, max_src_len):
    """All rows as lists of ids and labels, as the original data class builds them."""
    rows = []
    with open(path, encoding="utf-8") as file:
        for line in file:
            sample = json.loads(line.strip())
            question = f"[Round 1]\n\n问：{sample['instruction'] + sample['input']}\n\n答："
            source = tokenizer.tokenize(question)
            if len(source) > max_src_len:
                source = source[: max_src_len - 4] + source[-4:]
            max_target = max_len - 3 - len(source)
            target = tokenizer.tokenize(sample["output"])
            if len(target) > max_target:
                target = target[:max_target]
            tokens = ["[gMASK]", "sop"] + source + target + ["</s>"]
            assert len(tokens) <= max_len
            ids = tokenizer.convert_tokens_to_ids(tokens)
            start = len(source) + 2
            labels = [-100] * start + ids[start:]
            assert len(ids) == len(labels)
            assert len(ids) <= max_len
            rows.append({"input_ids": ids, "labels": labels})
    return rows
