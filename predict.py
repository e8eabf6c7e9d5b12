"""Ask a model: one question, a whole file, or a conversation in the terminal.

    python predict.py --model_path output-glm3/epoch-2-step-3900 --instruction "你好"
    python predict.py --model_path output-glm3/epoch-2-step-3900-merged --test_path data/spo_1.json
    python predict.py --model_path ChatGLM3-6B/ --chat

--model_path is a base checkpoint, a trained or merged folder, or an adapter (its base is found by itself). What was
trained here is asked with the prompt of its training, a bare base with its official chat prompt.
"""

import json
import os
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from glm_finetune import build, dist, exits
from glm_finetune.answer.chat import answer_ids, chat, chat_ids
from glm_finetune.config import PredictConfig
from glm_finetune.data.samples import read_questions
from glm_finetune.errors import UserError
from glm_finetune.evaluate.metrics import triple_scores
from glm_finetune.flags import parse
from glm_finetune.modes.spec import Limits
from glm_finetune.weights import read_json, write_json

MIN_ANSWER = 16  # tokens of --max_length that a conversation keeps free for an answer
ELSEWHERE = "Give another --output_path, or --overwrite to answer everything again."


def main():
    config = parse(PredictConfig, sys.argv[1:], __doc__)
    device = dist.choose_device(config.device)
    precision = dist.choose_precision(config.precision, device)
    source = build.find_source(config.model_path, config.mode, config.ori_model_dir, config.template)
    rows = list(read_questions(config, source.prompt_text)) if config.test_path else []
    path, settings = output_path(config, source), answer_settings(config, source, precision)
    done = answered(path, rows, config, settings) if config.test_path else []
    dist.seed_all(config.seed)
    tokenizer, model = build.load_source(source, precision, device)
    if config.chat:
        converse(model, tokenizer, source, config)
    elif config.test_path:
        write_json(settings, settings_path(path))
        answer_file(model, tokenizer, source, config, rows, path, done)
    else:
        messages = [{"role": "user", "content": config.instruction + config.input}]
        (answer,), num_cut = answer_batch(model, tokenizer, source, config, [messages])
        print(answer)
        if num_cut:
            print(f"the question was cut to fit --max_length {config.max_length}", file=sys.stderr)


def output_path(config, source):
    """Where the answers go. Raises UserError for a bare base without --output_path: nothing is written into one."""
    if config.test_path and not config.output_path and source.is_bare:
        raise UserError(f"--output_path must be given: {config.model_path} is a base, which is not written to.")
    return Path(config.output_path or Path(config.model_path) / "predictions.jsonl")


def settings_path(path):
    return path.with_name(path.name + ".settings.json")


def answer_settings(config, source, precision):
    """What an answer depends on besides its question; answers of other settings are not mixed into one file."""
    names = ("max_length", "max_new_tokens", "do_sample", "top_p", "temperature", "num_beams", "seed")
    names += ("truncation", "data_format", "columns", "prompt_text")
    files = [path for folder in filter(None, (source.base, source.adapter)) for path in weight_files_in(folder)]
    return {
        "model": str(Path(config.model_path).resolve()),
        "weights": {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in files},
        "template": source.template,
        "precision": precision,
        **{name: getattr(config, name) for name in names},
    }


def weight_files_in(folder):
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")])


def sampling(config):
    """Arguments of `generate` from the flags."""
    if not config.do_sample:
        return {"do_sample": False, "num_beams": config.num_beams}
    return {"do_sample": True, "top_p": config.top_p, "temperature": config.temperature, "num_beams": config.num_beams}


@torch.inference_mode()
def answer_batch(model, tokenizer, source, config, conversations):
    """(answers, number of questions cut to fit) for a list of conversations, generated together."""
    stop = source.mode.stop_token_ids(tokenizer)
    room = config.max_new_tokens or config.max_length // 4  # kept free for the answer when a question is too long
    limits = Limits(config.max_length, max(8, config.max_length - room - 8), config.truncation)
    rendered = [source.mode.render(tokenizer, messages, limits, source.template) for messages in conversations]
    rows = [one.input_ids for one in rendered]
    width = max(map(len, rows))
    batch = {
        name: torch.stack([torch.as_tensor(row) for row in values]).to(model.device)
        for name, values in tokenizer.pad(rows, width, "left").items()
    }
    limits = [config.max_new_tokens or config.max_length - len(row) for row in rows]
    output = model.generate(
        **batch, max_new_tokens=max(limits), eos_token_id=stop, pad_token_id=tokenizer.pad_token_id, **sampling(config)
    )
    new_ids = [answer_ids(ids[:limit], stop) for ids, limit in zip(output[:, width:].tolist(), limits)]
    answers = [tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() for ids in new_ids]
    return answers, sum(one.question_cut for one in rendered)


def answer_file(model, tokenizer, source, config, rows, path, done):
    """Answer `rows` (`read_questions`) in order, one JSON line each, after those `done` by an earlier run.

    Prints scores at the end.
    """
    if done:
        print(f"{len(done)} of {len(rows)} answers are there from an earlier run of the same settings")
    write_lines(path, done)  # drops what a killed run left half written
    num_cut = 0
    with open(path, "a", encoding="utf-8") as file:
        for start in tqdm(range(len(done), len(rows), config.batch_size), desc="predict", unit=" batches"):
            part = rows[start : start + config.batch_size]
            answers, cut = answer_batch(model, tokenizer, source, config, [messages for _, messages, _ in part])
            num_cut += cut
            for (row, _, _), answer in zip(part, answers):
                done.append({**row, "prediction": answer})
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(done)} answers in {path}" + (f"; {num_cut} questions cut to fit --max_length" if num_cut else ""))
    pairs = [(answered["prediction"], answer) for answered, (_, _, answer) in zip(done, rows) if answer is not None]
    if pairs and any(len(line.split("_")) == 3 for _, gold in pairs for line in gold.split("\n")):
        scores = triple_scores(pairs)
        print(
            f"triples of {len(pairs)} samples: F1 {scores.mean_f1:.4f} (mean of the samples')  micro precision "
            f"{scores.precision:.4f} recall {scores.recall:.4f} F1 {scores.f1:.4f}  exact {scores.exact:.4f}"
        )


def answered(path, rows, config, settings):
    """The complete lines of an earlier run (a killed one ends within a line, or within a character).

    Raises UserError if they are not answers to `rows` in this order, were made with other settings, or would be
    written over the questions.
    """
    if path.exists() and path.samefile(config.test_path):
        raise UserError(f"--output_path {path} is the file of --test_path: give another one.")
    path.parent.mkdir(parents=True, exist_ok=True)
    if config.overwrite or not path.exists():
        return []
    old = read_json(settings_path(path)) if settings_path(path).is_file() else {}
    different = [name for name, value in settings.items() if old.get(name) != value]
    if different:
        raise UserError(f"{path}: its answers were made with other settings ({', '.join(different)}). {ELSEWHERE}")
    lines = path.read_bytes().split(b"\n")[:-1]
    if len(lines) > len(rows):
        raise UserError(f"{path}: has {len(lines)} answers, --test_path {len(rows)} rows. {ELSEWHERE}")
    return [answer_in(text, row, f"{path}, line {i}") for i, (text, (row, *_)) in enumerate(zip(lines, rows), 1)]


def answer_in(text, row, where):
    """The object in a line of an earlier run. Raises UserError naming `where` unless it is `row` with a prediction."""
    try:
        old = json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise UserError(f"{where}: not JSON. {ELSEWHERE}") from None
    if not isinstance(old, dict) or "prediction" not in old or {**row, "prediction": old["prediction"]} != old:
        raise UserError(f"{where}: answers another row than --test_path has there. {ELSEWHERE}")
    return old


def write_lines(path, rows):
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    os.replace(temporary, path)


def converse(model, tokenizer, source, config):
    """A conversation in the terminal: `clear` forgets it, `stop` (or Ctrl-D) ends it."""
    print("Ask something; clear: begin anew, stop: leave.")
    history = []
    while True:
        try:
            query = input("\n用户：").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if query == "stop":
            break
        if query == "clear":
            history = []
        elif query:
            history = answer_turn(model, tokenizer, source, config, query, history)


def answer_turn(model, tokenizer, source, config, query, history):
    """Print the answer while it is made; returns the new history, without the oldest turns when it grows too long."""
    room = config.max_length - (config.max_new_tokens or MIN_ANSWER)
    while len(prompt := chat_ids(source.mode, tokenizer, query, history, template=source.template)) > room and history:
        history = history[source.mode.entries_per_turn :]
        print("(the oldest turn is forgotten: the conversation is too long)")
    if len(prompt) > room:
        print(f"The question has {len(prompt)} tokens, --max_length {config.max_length} leaves room for {room}.")
        return history
    print("\nChatGLM：", end="", flush=True)
    length = {"max_new_tokens": config.max_new_tokens or config.max_length - len(prompt)}
    try:
        _, history = chat(
            model,
            tokenizer,
            source.mode,
            query,
            history,
            template=source.template,
            on_text=lambda text: print(text, end="", flush=True),
            **length,
            **sampling(config),
        )
    except KeyboardInterrupt:
        print(" (interrupted; this turn is forgotten)", end="")
    print()
    return history


if __name__ == "__main__":
    exits.exit_with_message(main)
