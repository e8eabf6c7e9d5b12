"""Tokens that somebody added to a checkpoint's tokenizer: those that are no original's are refused.

    refuse_added(MODE["glm3"].tokenizer.from_pretrained(base), "output/epoch-1-step-100")

transformers would find them in a text; the tokenizers here know the originals' and would spell them letter by letter.
"""

from pathlib import Path

from glm_finetune.errors import UserError
from glm_finetune.weights import read_json

ADDED_FILE = "added_tokens.json"
LISTS = ("added_tokens_decoder", "additional_special_tokens", "extra_special_tokens")  # in tokenizer_config.json


def refuse_added(tokenizer, folder):
    """Raise UserError naming tokens listed in a folder that a tokenizer does not know, and the file that has them."""
    path, config = Path(folder) / ADDED_FILE, Path(folder) / "tokenizer_config.json"
    fields = read_json(config) if config.is_file() else {}
    listed = [(path, token) for token in (read_json(path) if path.is_file() else ())]
    listed += [(config, token) for name in LISTS for token in _texts(fields.get(name) or [])]
    if unknown := {token: file for file, token in listed if not tokenizer.knows(token)}:
        raise _unknown(unknown)


def _texts(tokens):
    """The texts of a list or an object of tokens, each a text or an object with its text as "content"."""
    tokens = tokens.values() if isinstance(tokens, dict) else tokens if isinstance(tokens, list) else [tokens]
    for token in tokens:
        yield str(token.get("content") if isinstance(token, dict) else token)


def _unknown(tokens):
    """The UserError of {token: file}."""
    (file, *_), shown = tokens.values(), ", ".join([*tokens][:5])
    more = f" and {len(tokens) - 5} more" if len(tokens) > 5 else ""
    return UserError(
        f"{file}: adds {shown}{more} to the vocabulary, which this --mode does not know: they would be read as "
        "ordinary text, in pieces. Remove them from the file if the data does not need them; new tokens are not "
        "supported yet."
    )
