"""Look at data before training: what would be cut, dropped or refused, how long it is, what the model would see.

    python -m glm_finetune.data data/spo_0.json --mode glm3 --model_name_or_path ChatGLM3-6B/ --preview 3

Takes the data flags of train.py. Reads the tokenizer of the checkpoint, no weights. The histogram in lengths.png is of
the lengths before anything is cut.
"""

import os
import sys
from pathlib import Path

from glm_finetune import MODE, exits
from glm_finetune.data.dataset import InstructionDataset
from glm_finetune.data.flags import ReportConfig
from glm_finetune.data.histogram import Panel, save_histograms
from glm_finetune.data.report import describe_sample, write_bad_rows
from glm_finetune.data.samples import settings_of
from glm_finetune.data.survey import survey
from glm_finetune.errors import raise_together, unknown_choice
from glm_finetune.flags import parse
from glm_finetune.modes import refuse_others
from glm_finetune.modes.identity import check_default, refuse_foreign
from glm_finetune.weights import read_json

GREEN, PLAIN = "\x1b[32m", "\x1b[0m"


def main():
    arguments = sys.argv[1:]
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--train_path", *arguments]
    config = parse(ReportConfig, arguments, __doc__)
    raise_together(unknown_choice("mode", config.mode, tuple(MODE)))
    mode = MODE[config.mode]
    refuse_foreign(config.model_name_or_path)
    if "mode" not in config.given:
        check_default(mode, config.model_name_or_path)
    config_json = Path(config.model_name_or_path) / "config.json"
    if config_json.is_file():
        refuse_others(mode, config.model_name_or_path, read_json(config_json))
    tokenizer = mode.tokenizer.from_pretrained(config.model_name_or_path)
    settings = settings_of(config, mode, tokenizer)
    data = InstructionDataset(config.train_path, settings, progress=sys.stderr.isatty())
    print(config.train_path, *data.report.table(), *data.report.bad_hints(), sep="\n")
    context = mode.config.from_pretrained(config.model_name_or_path).max_positions if config_json.is_file() else None
    found = survey(config.train_path, settings, context, config.eval_path, sys.stderr.isatty())
    print(*found.lines(), sep="\n")
    panels = [
        Panel("tokens of a question before an answer, uncut", found.questions, "max_src_len", config.max_src_len),
        Panel("tokens of a sample, uncut", found.samples, "max_len", config.max_len),
    ]
    save_histograms(panels, config.output_path)
    print(f"lengths in {config.output_path}")
    if bad := write_bad_rows(config.bad_rows_path, data):
        print(f"bad rows in {bad}")
    for i in range(min(config.preview, len(data))):
        print(f"\n{data.where(i)}\n{preview(data[i], tokenizer, in_colour())}")


def in_colour():
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def preview(row, tokenizer, colour):
    """A sample as text, its targets between marks and in green."""
    text = describe_sample(row, tokenizer)
    return text.replace("⟦", GREEN + "⟦").replace("⟧", "⟧" + PLAIN) if colour else text


if __name__ == "__main__":
    exits.exit_with_message(main)
