"""The originals' tokenizers as small classes over SentencePiece. No transformers class is involved.

Two ways into ids, and the difference matters:
  encode_text(text)  what data and users write: never yields a special id, whatever the text looks like.
  encode(text)       the original's encode(), token for token, its special tokens added; for ChatGLM-6B a literal
                     "<sop>" in the text becomes the control token there, as it did in the original.

    tokenizer = MODE["glm3"].tokenizer.from_pretrained("ChatGLM3-6B/")
    tokenizer.decode(tokenizer.encode_text("你好"))
"""

import re
import shutil
from functools import cache, partial
from pathlib import Path

import numpy as np
import sentencepiece
import torch

from glm_finetune.errors import UserError
from glm_finetune.modes.added import ADDED_FILE, LISTS, refuse_added
from glm_finetune.weights import read_json

# transformers' clean_up_tokenization, the default of the original ChatGLM-6B and ChatGLM2-6B tokenizers
CLEAN_UP = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")
TIKTOKEN = re.compile(rb"[A-Za-z0-9+/]+=* \d+\r?\n")


class Tokenizer:
    """Common part. Subclasses give the file name, the special tokens and where they go: special_names() -> {id: name},
    for showing them, and pieces(ids, skip_special_tokens=False) -> the pieces of those ids that have a text.

    Attributes of the originals: vocab_size, pad_token_id, eos_token_id, padding_side, model_input_names.
    """

    model_file = None
    model_input_names = ["input_ids", "attention_mask", "position_ids"]
    clean_up_default = True
    num_image_tokens = 0  # ids before SentencePiece's own
    open_mark = None  # pattern of a text whose end may be the beginning of what `white_space` replaces

    def __init__(self, folder, fields):
        self.folder = Path(folder)
        try:
            self.sp = sentencepiece.SentencePieceProcessor(model_file=str(self.folder / self.model_file))
        except (OSError, RuntimeError) as error:
            raise self._unreadable(error) from None
        self.padding_side = fields.get("padding_side", "left")
        self.clean_up = fields.get("clean_up_tokenization_spaces", self.clean_up_default)
        self.remove_space, self.do_lower_case = fields.get("remove_space", False), fields.get("do_lower_case", False)
        self.normalizes = self.remove_space or self.do_lower_case or self.open_mark is not None

    def _unreadable(self, error):
        path = self.folder / self.model_file
        found = sorted(p.name for p in self.folder.iterdir()) if self.folder.is_dir() else "no such folder"
        reason = str(error).splitlines()[0]
        if path.is_file() and path.read_bytes()[:40].startswith(b"version https://git-lfs"):
            return UserError(f"{path}: a git-lfs pointer, not the file itself: git lfs pull, or copy the file again.")
        if path.is_file() and TIKTOKEN.match(path.read_bytes()[:400]):
            return UserError(f"{path}: a vocabulary of tiktoken, as GLM-4 has it, not a ChatGLM's: not supported.")
        return UserError(f"{path}: not a readable SentencePiece model ({reason}). Found in the folder: {found}.")

    @classmethod
    def from_pretrained(cls, folder):
        """Read the tokenizer files of a folder. Raises UserError naming the file that is missing or wrong."""
        config = Path(folder) / "tokenizer_config.json"
        tokenizer = cls(folder, fields := read_json(config) if config.is_file() else {})
        if fields.keys() & LISTS or (Path(folder) / ADDED_FILE).is_file():
            refuse_added(tokenizer, folder)
        return tokenizer

    def knows(self, token):
        """Whether a token is in the vocabulary, special ones by the original's name."""
        return token in ("<unk>", "<pad>") or self.convert_tokens_to_ids(token) != self.convert_tokens_to_ids("<unk>")

    def save_pretrained(self, folder):
        """Copy the tokenizer files, byte for byte. Raises OSError if the model file is gone."""
        for name in (self.model_file, "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
            if name == self.model_file or (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, Path(folder) / name)

    def __len__(self):
        return self.vocab_size

    def encode_text(self, text):
        """Ids of plain text; a special id is never among them. text: str -> list of int."""
        ids = self.sp.encode(self.normalize(text))
        if self.num_image_tokens:
            ids = [i + self.num_image_tokens for i in ids]
        if self.special_ids.isdisjoint(ids):
            return ids
        return [part for i in ids for part in (self._spell(i) if i in self.special_ids else (i,))]

    def encode_parts(self, parts, num_threads=1):
        """Texts and ids -> their ids. parts: a str is encoded as by `encode_text`, a tuple has ids already.

        Returns a list of (T,) int32 arrays. All texts are encoded in one call, which is some times faster.
        """
        texts = [part for part in parts if isinstance(part, str)]
        plain = list(map(self.normalize, texts)) if self.normalizes else texts
        if len(plain) == 1:  # without threads: starting them takes as long as a text
            found = [self.sp.encode(plain[0], return_type="numpy")]
        else:
            found = self.sp.encode(plain, return_type="numpy", num_threads=num_threads)
        if self.num_image_tokens:
            found = [ids + np.int32(self.num_image_tokens) for ids in found]
        special = np.array([*self.special_ids], np.int32)
        is_special = partial(np.isin, test_elements=special, kind="sort")  # a table would have the whole vocabulary
        if found and is_special(np.concatenate(found)).any():
            for i, ids in enumerate(found):
                if is_special(ids).any():
                    found[i] = np.array(self.encode_text(texts[i]), np.int32)
        found, array = iter(found), cache(partial(np.array, dtype=np.int32))
        return [next(found) if isinstance(part, str) else array(part) for part in parts]

    def decode_parts(self, parts):
        """Texts of lists of ids without special ones, in one call, not cleaned up. parts: of `encode_parts`."""
        texts = self.sp.decode([(ids - self.num_image_tokens).tolist() for ids in parts]) if parts else []
        return list(map(self.white_space, texts))

    def _spell(self, special_id):
        """A special piece that the vocabulary would match in text, written with its characters instead."""
        characters = [self.convert_tokens_to_ids(c) for c in self.convert_id_to_token(special_id)]
        return [i for i in characters if i not in self.special_ids]

    def encode(self, text, pair=None, add_special_tokens=True, max_length=None, truncation=False):
        """The original's encode(): ids of `text` (and `pair`) with its special tokens; truncation cuts the text."""
        ids, pair_ids = (None if part is None else self.plain_ids(part) for part in (text, pair))
        if truncation and max_length is not None:
            num_special = len(self.add_special_tokens([], pair_ids)) if add_special_tokens else 0
            ids = ids[: max(0, max_length - num_special)]
        return self.add_special_tokens(ids, pair_ids) if add_special_tokens else ids + (pair_ids or [])

    def plain_ids(self, text):
        """The original's ids of a text alone."""
        return [self.convert_tokens_to_ids(token) for token in self.tokenize(text)]

    def normalize(self, text):
        """What SentencePiece is given: options of tokenizer_config.json that no released checkpoint sets."""
        text = " ".join(text.strip().split()) if self.remove_space else text
        return text.lower() if self.do_lower_case else text

    def decode(self, ids, skip_special_tokens=False, clean_up_tokenization_spaces=None):
        """Ids -> text. clean_up_tokenization_spaces: "a , b" -> "a, b"; default: as the mode's original."""
        ids = [ids] if isinstance(ids, int) else [int(i) for i in ids]
        text = self.white_space(self.sp.decode_pieces(self.pieces(ids, skip_special_tokens)))
        if self.clean_up if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces:
            for spaced in CLEAN_UP:
                text = text.replace(spaced, spaced.strip())
        return text

    def white_space(self, text):
        """Decoded pieces -> text: the other direction of `normalize`."""
        return text

    def __call__(
        self,
        texts,
        padding=False,
        max_length=None,
        truncation=False,
        pad_to_multiple_of=None,
        return_tensors=None,
        padding_side=None,
    ):
        """The original's tokenizer(texts): ids with special tokens; mask and positions where the original gives them.

        texts: str or list of str. padding: False, True ("longest") or "max_length". return_tensors: None or "pt".
        """
        single = isinstance(texts, str)
        rows = [self.encode(t, max_length=max_length, truncation=truncation) for t in ([texts] if single else texts)]
        width = None if not padding else max_length if padding == "max_length" else max(map(len, rows))
        if width and pad_to_multiple_of:
            width += -width % pad_to_multiple_of
        batch = self.pad(rows, width, padding_side or self.padding_side)
        if return_tensors == "pt":
            return {name: torch.stack([torch.as_tensor(v) for v in values]) for name, values in batch.items()}
        values = {name: [torch.as_tensor(v).tolist() for v in rows] for name, rows in batch.items()}
        return {name: rows[0] for name, rows in values.items()} if single else values


class ChatGLMTokenizer(Tokenizer):
    """ChatGLM-6B: `ice_text.model`; white space is coded in pieces of its own; [gMASK] <sop> follow the text.

    The old vocabulary has its first 20,000 ids reserved for image tokens (`num_image_tokens`).
    """

    model_file = "ice_text.model"
    open_mark = re.compile(r"<(n|\|[a-z]{0,5}_?[0-9]{0,2}\|?)?\Z")
    max_blank_length = 80
    control_tokens = "[MASK] [gMASK] [sMASK] <unused_0> <sop> <eop> <ENC> <dBLOCK> <pad> <s> </s>"
    text_specials = ("<sop>", "<eop>", "<unk>", "<pad>", "[MASK]")  # what the original's encode() finds in text

    def __init__(self, folder, fields):
        super().__init__(folder, fields)
        self.num_image_tokens = fields.get("num_image_tokens", 20000)
        self.vocab_size = self.sp.vocab_size() + self.num_image_tokens
        self.mask_token_id, self.gmask_token_id = self._special("[MASK]"), self._special("[gMASK]")
        self.bos_token_id, self.eos_token_id = self._special("<sop>"), self._special("<eop>")
        self.begin_ids = [self.gmask_token_id, self.bos_token_id]  # of a text that answers no question
        self.pad_token_id = self._special("<pad>")
        ids = (self.convert_tokens_to_ids(token) for token in self.control_tokens.split())
        self.special_ids = frozenset(i for i in ids if i != self.num_image_tokens + self.sp.unk_id())
        self.skipped_ids = frozenset(self.convert_tokens_to_ids(token) for token in self.text_specials)

    def _special(self, token):
        if self.sp.piece_to_id(token) == self.sp.unk_id():
            path = self.folder / self.model_file
            raise UserError(f"{path}: has no piece {token}; this is not ChatGLM-6B's vocabulary.")
        return self.convert_tokens_to_ids(token)

    def special_names(self):
        return {i: self.convert_id_to_token(i) for i in self.special_ids}

    def convert_tokens_to_ids(self, token):
        return self.sp.piece_to_id(token) + self.num_image_tokens

    def convert_id_to_token(self, token_id):
        if token_id < self.num_image_tokens:
            return f"<image_{token_id}>"
        index = token_id - self.num_image_tokens
        return self.sp.id_to_piece(index) if index < self.sp.vocab_size() else ""

    def normalize(self, text):
        """White space in pieces of its own."""
        text = super().normalize(text).replace("\n", "<n>").replace("\t", "<|tab|>")
        if "  " in text:
            text = re.sub(f" {{2,{self.max_blank_length}}}", lambda run: f"<|blank_{len(run[0])}|>", text)
        return text

    def tokenize(self, text):
        """The original's pieces: the text is split at literal special tokens, white space around them is dropped."""
        parts = re.split("(" + "|".join(map(re.escape, self.text_specials)) + ")", text)
        pieces = []
        for i, part in enumerate(parts):
            if i % 2:
                pieces.append(part)
                continue
            part = part.lstrip() if i > 0 else part
            part = part.rstrip() if i < len(parts) - 1 else part
            pieces += self.sp.encode(self.normalize(part), out_type=str)
        return pieces

    def add_special_tokens(self, ids, pair_ids=None):
        ids = ids + self.begin_ids
        return ids if pair_ids is None else ids + pair_ids + [self.eos_token_id]

    def pieces(self, ids, skip_special_tokens=False):
        dropped = self.skipped_ids if skip_special_tokens else {self.pad_token_id}
        tokens = (self.convert_id_to_token(i) for i in ids if i not in dropped)
        return [token for token in tokens if token]

    def white_space(self, text):
        text = text.replace("<n>", "\n").replace("<|tab|>", "\t")
        return re.sub(r"<\|blank_([2-9]|[1-7][0-9]|80)\|>", lambda match: " " * int(match[1]), text)

    def pad(self, rows, width=None, side="left"):
        """Rows of ids -> {"input_ids"}; with a `width`, padded, with the original's mask and positions.

        attention_mask: each (1, width, width) bool, True = masked; position_ids: each (2, width) int64.
        """
        if width is None:
            return {"input_ids": rows}
        batch = {"input_ids": [], "attention_mask": [], "position_ids": []}
        for ids in rows:
            left = width - len(ids) if side == "left" else 0
            context = ids.index(self.bos_token_id) if self.bos_token_id in ids else len(ids)
            here, answer = slice(left, left + len(ids)), slice(left + context, left + len(ids))
            masked = torch.ones(1, width, width, dtype=torch.bool)
            masked[0, here, here].triu_(1)
            masked[0, here, left : left + context] = False
            positions = torch.zeros(2, width, dtype=torch.long)
            positions[0, here] = torch.arange(len(ids))
            mask_token = self.mask_token_id if self.mask_token_id in ids else self.gmask_token_id
            if mask_token in ids:
                positions[0, answer] = ids.index(mask_token)
            positions[1, answer] = torch.arange(1, len(ids) - context + 1)
            padding = [self.pad_token_id] * (width - len(ids))
            batch["input_ids"].append(padding + ids if side == "left" else ids + padding)
            batch["attention_mask"].append(masked)
            batch["position_ids"].append(positions)
        return batch


class ChatGLM2Tokenizer(Tokenizer):
    """ChatGLM2-6B and CodeGeeX2: `tokenizer.model`, special tokens behind its vocabulary; [gMASK] sop begin a text."""

    model_file = "tokenizer.model"
    special_tokens = ("[MASK]", "[gMASK]", "[sMASK]", "sop", "eop")

    def __init__(self, folder, fields):
        super().__init__(folder, fields)
        first = self.sp.vocab_size()
        self.commands = {token: first + i for i, token in enumerate(self.special_tokens)}
        self.names = {i: token for token, i in self.commands.items()}
        self.vocab_size = first + len(self.special_tokens)
        self.bos_token_id, self.eos_token_id, self.pad_token_id = self.sp.bos_id(), self.sp.eos_id(), self.sp.unk_id()
        self.commands |= {"<bos>": self.bos_token_id, "<eos>": self.eos_token_id, "<pad>": self.pad_token_id}
        self.special_ids = frozenset(self.commands.values()) - {self.sp.unk_id()}
        self.gmask_token_id = self.commands["[gMASK]"]
        self.begin_ids = [self.gmask_token_id, self.commands["sop"]]  # of every text

    def special_names(self):
        return {self.eos_token_id: "</s>", self.bos_token_id: "<s>", **self.names}

    def get_command(self, token):
        """Id of a special token by the original's name: "[gMASK]", "sop", "<|user|>", "<eos>", ..."""
        return self.commands[token]

    def convert_tokens_to_ids(self, token):
        return self.commands[token] if token in self.commands else self.sp.piece_to_id(token)

    def convert_id_to_token(self, token_id):
        """The piece; special tokens have none here, as in the original."""
        has_none = token_id in (self.bos_token_id, self.eos_token_id, self.pad_token_id)
        return "" if has_none or not 0 <= token_id < self.sp.vocab_size() else self.sp.id_to_piece(token_id)

    def plain_ids(self, text):
        """Text is never special in these modes, so "sop" in it is an ordinary word."""
        return self.sp.encode(self.normalize(text))

    def tokenize(self, text):
        return self.sp.encode(self.normalize(text), out_type=str)

    def add_special_tokens(self, ids, pair_ids=None):
        ids = self.begin_ids + ids
        return ids if pair_ids is None else ids + pair_ids + [self.eos_token_id]

    def pieces(self, ids, skip_special_tokens=False):
        return [token for token in map(self.convert_id_to_token, ids) if token]

    def pad(self, rows, width=None, side="left"):
        """Rows of ids -> padded ids with attention_mask (1 = token) and position_ids, each row (width,) int64."""
        batch = {"input_ids": [], "attention_mask": [], "position_ids": []}
        for ids in rows:
            padding = [0] * ((width or len(ids)) - len(ids))
            columns = {"input_ids": ids, "attention_mask": [1] * len(ids), "position_ids": list(range(len(ids)))}
            for name, values in columns.items():
                fill = [self.pad_token_id] * len(padding) if name == "input_ids" else padding
                batch[name].append(fill + values if side == "left" else values + fill)
        return batch


class ChatGLM3Tokenizer(ChatGLM2Tokenizer):
    """ChatGLM3-6B: ChatGLM2's with role tokens; decoding prints special tokens by name."""

    special_tokens = (*ChatGLM2Tokenizer.special_tokens, "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>")
    clean_up_default = False

    def __init__(self, folder, fields):
        super().__init__(folder, fields)
        self.newline_ids = tuple(self.encode_text("\n"))  # between the role and the content of every message

    def convert_id_to_token(self, token_id):
        return self.names.get(token_id) or super().convert_id_to_token(token_id)
