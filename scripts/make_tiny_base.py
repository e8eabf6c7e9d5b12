"""Make the tiny ChatGLM3-architecture base of the quickstart from scratch: tokenizer, random weights, plain-text
training.

    python scripts/make_tiny_base.py --output_dir tiny_base      # about five minutes on two cores

It learns to repeat and to continue the shipped fault reports, with train.py --train_type all, and never sees a triple
of a report: fine-tuning has everything left to teach.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import sentencepiece
import torch

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))
from glm_finetune import MODE, weights  # noqa: E402 (the repository is not installed)

NUM_ROWS = 12000
STEPS = 1500
CONFIG = dict(
    hidden_size=160,
    num_layers=4,
    num_attention_heads=5,
    kv_channels=32,
    multi_query_attention=True,
    multi_query_group_num=1,
    ffn_hidden_size=432,
    seq_length=256,
    layernorm_epsilon=1e-5,
    rmsnorm=True,
    post_layer_norm=True,
    add_qkv_bias=True,
    add_bias_linear=False,
    apply_residual_connection_post_layernorm=False,
    original_rope=True,
    tie_word_embeddings=False,
    attention_dropout=0.0,
    hidden_dropout=0.0,
    apply_query_key_layer_scaling=True,
    attention_softmax_in_fp32=True,
    bias_dropout_fusion=True,
    fp32_residual_connection=False,
    model_type="chatglm",
    use_cache=True,
    torch_dtype="float32",
    eos_token_id=2,
    pad_token_id=0,
    architectures=["ChatGLMModel"],
    _name_or_path="tiny-chatglm3",
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--train_path", default=str(ROOT / "data/spo_0.json"))
    parser.add_argument("--output_dir", default=str(ROOT / "tiny_base"))
    args = parser.parse_args()
    rows = [json.loads(line) for line in Path(args.train_path).read_text(encoding="utf-8").splitlines()]
    with tempfile.TemporaryDirectory() as work:
        work = Path(work)
        (work / "random").mkdir()
        make_tokenizer(rows, work / "random")
        make_model(work / "random")
        write_rows(rows, work / "plain.jsonl")
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "train.py"),
                "--mode",
                "glm3",
                "--train_type",
                "all",
                "--model_name_or_path",
                work / "random",
                "--train_path",
                work / "plain.jsonl",
                "--output_dir",
                work / "out",
                "--max_len",
                "160",
                "--max_src_len",
                "96",
                "--max_steps",
                str(STEPS),
                "--per_device_train_batch_size",
                "32",
                "--learning_rate",
                "3e-3",
                "--precision",
                "fp32",
                "--show_loss_step",
                "50",
            ],
            check=True,
        )
        trained = next((work / "out").glob(f"epoch-*-step-{STEPS}"))
        publish(trained, work / "base")
        shutil.rmtree(args.output_dir, ignore_errors=True)
        shutil.copytree(work / "base", args.output_dir)


def make_tokenizer(rows, folder):
    """A byte-fallback BPE model with the pieces of ChatGLM3's (unk, bos, eos = 0, 1, 2), about one piece a
    character.
    """
    texts = [row["instruction"] + row["input"] + "\n" + row["output"] for row in rows]
    characters = set("".join(texts)) - {"\n"}
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*"".join(sorted(characters)), *texts]),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=3 + 256 + len(characters) + 8,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=1.0,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    (folder / "tokenizer.vocab").unlink()
    weights.write_json(
        {
            "name_or_path": "tiny-chatglm3",
            "remove_space": False,
            "do_lower_case": False,
            "tokenizer_class": "ChatGLMTokenizer",
        },
        folder / "tokenizer_config.json",
    )


def make_model(folder):
    """Random weights in the original layout."""
    mode = MODE["glm3"]
    vocab_size = -(-len(mode.tokenizer.from_pretrained(folder)) // 32) * 32
    weights.write_json({**CONFIG, "padded_vocab_size": vocab_size}, folder / "config.json")
    torch.manual_seed(0)
    mode.model(mode.config.from_pretrained(folder)).save_weights(folder)


def write_rows(rows, path):
    """Plain-text rows: repeat a report, repeat lines of words joined by _, continue a report."""
    chance = random.Random(0)
    words = sorted({part for row in rows for line in row["output"].split("\n") for part in line.split("_")})
    with open(path, "w", encoding="utf-8") as file:
        for _ in range(NUM_ROWS):
            text, kind = chance.choice(rows)["input"], chance.random()
            if kind < 0.4:
                question, answer = "重复：" + text, text
            elif kind < 0.7:
                answer = "\n".join("_".join(chance.choices(words, k=3)) for _ in range(chance.randint(1, 4)))
                question = "重复：" + answer
            else:
                cut = chance.randint(2, len(text) - 2)
                question, answer = "续写：" + text[:cut], text[cut:]
            file.write(json.dumps({"instruction": question, "input": "", "output": answer}, ensure_ascii=False) + "\n")


def publish(trained, folder):
    """The trained model in fp16, with its tokenizer."""
    folder.mkdir()
    MODE["glm3"].model.from_pretrained(trained, dtype=torch.float16).save_weights(folder)
    MODE["glm3"].tokenizer.from_pretrained(trained).save_pretrained(folder)


if __name__ == "__main__":
    main()
