"""predict.py on every format: what the model is asked is what it was trained on, and answers are scored."""

import json
import sys
from pathlib import Path

import pytest

import predict
from glm_finetune import MODE
from glm_finetune.data.formats import detect
from glm_finetune.weights import write_json
from tests.tiny import make_checkpoint, read_rows

SAMPLES = sorted((Path(__file__).parents[1] / "data/formats").iterdir())


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """Function: checkpoint, file, flags -> (prompts as ids, written rows), with the answer "水泵_部件故障_漏水"."""

    def run(checkpoint, path, *arguments):
        prompts = []

        def answer_batch(model, tokenizer, folder, config, conversations):
            template = folder.prompt.template
            prompts.extend(folder.mode.render(tokenizer, m, None, template).input_ids for _, m in conversations)
            return ["水泵_部件故障_漏水"] * len(conversations), 0

        monkeypatch.setattr(predict, "answer_batch", answer_batch)
        output = tmp_path / "answers.jsonl"
        flags = ["--model_path", checkpoint, "--test_path", path, "--output_path", output, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", [str(part) for part in ("predict.py", *flags, "--overwrite", *arguments)])
        predict.main()
        return prompts, [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]

    return run


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.name)
@pytest.mark.parametrize("mode", MODE)
def test_every_format_is_asked_up_to_its_last_answer(mode, path, checkpoints, asked):
    rows, tokenizer = [row for _, row in read_rows(path)], MODE[mode].tokenizer.from_pretrained(checkpoints[mode])
    if path.stem == "tools" and mode != "glm3":
        with pytest.raises(ValueError, match="--mode glm3"):
            asked(checkpoints[mode], path)
        return
    prompts, written = asked(checkpoints[mode], path, "--template", "train")
    assert written == [{**row, "prediction": "水泵_部件故障_漏水"} for row in rows]
    if path.stem != "text":
        form = detect(rows)
        for prompt, row in zip(prompts, rows, strict=True):
            sample = MODE[mode].render(tokenizer, form.messages(row))
            assert sample.input_ids[: len(prompt)] == prompt
            assert sample.labels[len(prompt) :] == sample.input_ids[len(prompt) :]


def test_references_of_any_format_are_scored(checkpoints, asked, capsys):
    path = next(path for path in SAMPLES if path.stem == "text_answer")
    asked(checkpoints["glm3"], path)
    assert "F1" not in capsys.readouterr().out  # nobody said that these are triples
    asked(checkpoints["glm3"], path, "--metrics", "triples")
    assert "triples of 2 samples: F1 0.3333" in capsys.readouterr().out  # one of two triples of the first row


def test_the_prompt_of_the_training_is_asked_with_again(tmp_path, asked):
    path = next(path for path in SAMPLES if path.stem == "text_answer")
    folder = make_checkpoint("glm2", tmp_path / "trained")
    tokenizer = MODE["glm2"].tokenizer.from_pretrained(folder)
    record = {"mode": "glm2", "template": "train", "saves": "weights", "flags": {"prompt_text": "抽取三元组："}}
    write_json(record, folder / "train_config.json")
    text = tokenizer.decode(asked(folder, path)[0][0])
    assert "问：抽取三元组：检查发现水泵漏水" in text
    assert "问：别的检查发现水泵漏水" in tokenizer.decode(asked(folder, path, "--prompt_text", "别的")[0][0])
    other = next(path for path in SAMPLES if path.stem == "question_answer")
    assert "抽取三元组" not in tokenizer.decode(asked(folder, other)[0][0])  # a format that takes no prompt
