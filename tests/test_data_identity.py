"""What a run remembers of its data, so that resuming with other samples is refused."""

from dataclasses import fields

import pytest

from glm_finetune.config import TrainConfig
from glm_finetune.data.flags import DataFlags
from glm_finetune.flags import parse
from glm_finetune.modes import MODE
from glm_finetune.record import SAMPLES, train_record
from glm_finetune.run.resume import check_same_run
from glm_finetune.tuning import TRAIN_TYPE
from glm_finetune.weights import write_json
from tests.refusal import refused


@pytest.fixture
def record(checkpoints, data_file):
    """Function: flags -> what train_config.json holds."""

    def make(*flags, train_path=data_file):
        arguments = ["--model_name_or_path", str(checkpoints["glm3"]), "--train_path", str(train_path)]
        config = parse(TrainConfig, [*arguments, "--mode", "glm3", "--output_dir", "x", *flags])
        tokenizer = MODE["glm3"].tokenizer.from_pretrained(checkpoints["glm3"])
        return train_record(config, TRAIN_TYPE["lora"], tokenizer, 1)

    return make


CHANGES = {
    "max_len": "100",
    "max_src_len": "60",
    "is_skip": "True",
    "truncation": "head",
    "end_cut_answers": "True",
    "data_format": "instruction",
    "columns": "output=output",
    "roles": "client=user",
    "input_separator": "：",
    "repair_turns": "True",
    "prompt_text": "x",
    "template": "official",
    "train_on": "last",
    "on_bad_row": "skip",
}


def test_every_flag_that_changes_samples_is_part_of_a_runs_identity(record, tmp_path):
    assert CHANGES.keys() == {flag.name for flag in fields(DataFlags)} == SAMPLES.keys() - {"objective"}
    write_json(record(), tmp_path / "train_config.json")
    check_same_run(tmp_path, record(), force=False)
    for name, value in CHANGES.items():
        changed = record(f"--{name}", value)
        refused(lambda changed=changed: check_same_run(tmp_path, changed, False), "is of another run", name)


def test_weights_of_files_and_their_bytes_are_part_of_it(record, data_file, tmp_path):
    write_json(record(), tmp_path / "train_config.json")
    weighted = record(train_path=f"{data_file}:2")
    refused(lambda: check_same_run(tmp_path, weighted, False), "training data")
    with open(data_file, "a", encoding="utf-8") as file:
        file.write("\n")
    refused(lambda: check_same_run(tmp_path, record(), False), "training data")


def test_a_checkpoint_from_before_these_flags_goes_on_with_what_was_done_then(record, tmp_path):
    old = record()
    for name in [name for name in SAMPLES if name not in ("max_len", "max_src_len", "is_skip", "template")]:
        del old["identity"][name]
    write_json(old, tmp_path / "train_config.json")
    refused(lambda: check_same_run(tmp_path, record(), False), "end_cut_answers: True there, False here")
    check_same_run(tmp_path, record("--end_cut_answers"), force=False)


def test_the_template_of_the_training_is_recorded_for_prediction(record):
    assert record()["template"] == "train"
    assert record("--template", "official_rounds")["template"] == "official_rounds"
