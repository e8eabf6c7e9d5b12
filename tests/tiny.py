"""Tiny random checkpoints in the original layout, for tests: a folder like ChatGLM-6B/, some hundred kilobytes.

    make_checkpoint("glm3", tmp_path / "base", num_layers=3)

The two SentencePiece models are trained once a process, on the shipped data. Nothing here needs a download.
"""

import functools
import io
import json
from pathlib import Path

import sentencepiece
import torch
from sentencepiece import sentencepiece_model_pb2

from glm_finetune import MODE
from glm_finetune.data.files import Unreadable, list_data_files
from glm_finetune.errors import UserError
from glm_finetune.weights import read_json, write_json

DATA = Path(__file__).parents[1] / "data/spo_0.json"
NAMES = {"glm": "THUDM/chatglm-6b", "glm2": "THUDM/chatglm2-6b", "glm3": "THUDM/chatglm3-6b"}
CONTROL_PIECES = ("[MASK]", "[gMASK]", "[sMASK]", "<unused_0>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")
BLANK_PIECES = ("<|tab|>", *(f"<|blank_{n}|>" for n in range(2, 81)))
GLM_CONFIG = dict(
    hidden_size=32,
    inner_hidden_size=64,
    num_layers=2,
    num_attention_heads=2,
    layernorm_epsilon=1e-5,
    max_sequence_length=256,
    position_encoding_2d=True,
    model_type="chatglm",
    use_cache=True,
    torch_dtype="float32",
    architectures=["ChatGLMModel"],
)
GLM2_CONFIG = read_json(Path(__file__).parents[1] / "tiny_base/config.json") | dict(
    hidden_size=32,
    num_layers=2,
    num_attention_heads=4,
    kv_channels=8,
    multi_query_group_num=2,
    ffn_hidden_size=48,
    torch_dtype="float32",
)


def make_checkpoint(mode_name, folder, **config_changes):
    """Write config.json, random fp32 weights (the same each time) and tokenizer to `folder`; returns it as a Path.

    config_changes: fields of config.json that replace GLM_CONFIG or GLM2_CONFIG.
    """
    mode, folder = MODE[mode_name], Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / mode.tokenizer.model_file).write_bytes(tokenizer_model(mode_name))
    settings = {"name_or_path": NAMES[mode_name], "remove_space": False, "do_lower_case": False}
    write_json(settings | ({"num_image_tokens": 0} if mode_name == "glm" else {}), folder / "tokenizer_config.json")
    sizes = GLM_CONFIG if mode_name == "glm" else GLM2_CONFIG
    fields = {**sizes, "_name_or_path": NAMES[mode_name], **vocabulary_fields(mode_name, folder)}
    write_json(fields | config_changes, folder / "config.json")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mode.model(mode.config.from_pretrained(folder)).save_weights(folder)
    return folder


def vocabulary_fields(mode_name, folder):
    """The fields of config.json that follow from the tokenizer in `folder`; vocabulary padded as in the originals."""
    tokenizer = MODE[mode_name].tokenizer.from_pretrained(folder)
    padded_size = -(-len(tokenizer) // 32) * 32
    if mode_name != "glm":
        return {"padded_vocab_size": padded_size}
    ids = {
        name: getattr(tokenizer, name)
        for name in ("bos_token_id", "eos_token_id", "mask_token_id", "gmask_token_id", "pad_token_id")
    }
    return {"vocab_size": padded_size, **ids}


def tokenizer_model(mode_name):
    """Bytes of the SentencePiece model: ice_text.model for glm, tokenizer.model for the others."""
    return _glm_model() if mode_name == "glm" else _glm2_model()


@functools.cache
def _glm2_model():
    """unk, bos, eos = 0, 1, 2, then bytes, then pieces; text is left as it is."""
    return _train(vocab_size=900, normalization_rule_name="identity", pad_id=-1)


@functools.cache
def _glm_model():
    """The order of ChatGLM-6B: <pad> and <n> after </s>, then pieces, control pieces, blanks, bytes."""
    model = sentencepiece_model_pb2.ModelProto()
    model.ParseFromString(
        _train(
            vocab_size=1000,
            normalization_rule_name="nmt_nfkc",
            pad_id=3,
            control_symbols=[*CONTROL_PIECES],
            user_defined_symbols=["<n>", *BLANK_PIECES],
        )
    )
    group = dict.fromkeys(("<unk>", "<s>", "</s>", "<pad>", "<n>"), 0)
    group |= dict.fromkeys(CONTROL_PIECES, 2) | dict.fromkeys(BLANK_PIECES, 3)
    pieces = sorted(model.pieces, key=lambda p: 4 if p.type == p.BYTE else group.get(p.piece, 1))  # stable
    del model.pieces[:]
    model.pieces.extend(pieces)
    return model.SerializeToString()


def _train(**options):
    """A byte-fallback BPE model of the shipped data's texts."""
    rows = [json.loads(line) for line in DATA.read_text(encoding="utf-8").splitlines()]
    texts = [row["instruction"] + row["input"] + "\n" + row["output"] for row in rows]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        remove_extra_whitespaces=False,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def read_rows(path):
    """Yield (where, row) of the files of --train_path. Raises UserError for one that cannot be read, as training."""
    for data_file in list_data_files(path):
        for number, row in data_file.rows():
            if isinstance(row, Unreadable):
                raise UserError(f"{data_file.where(number)}: {row.problem}")
            yield data_file.where(number), row
