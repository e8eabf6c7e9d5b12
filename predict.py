"""Ask a model: one question, a whole file, or a conversation in the terminal.

    python predict.py --model_path output-glm3/epoch-2-step-3900 --instruction "你好"
    python predict.py --model_path output-glm3/epoch-2-step-3900-merged --test_path data/spo_1.json
    python predict.py --model_path ChatGLM3-6B/ --chat

--model_path is a base checkpoint, a trained or merged folder, or an adapter (its base is found by itself). What was
trained here is asked with the prompt of its training, a bare base with its official chat prompt.
"""

import json
import sys
from functools import partial

from tqdm import tqdm

from glm_finetune import build, dist, exits
from glm_finetune.answer import answers
from glm_finetune.answer.chat import check_rounds, converse
from glm_finetune.answer.flags import MIN_PROMPT, PredictConfig
from glm_finetune.answer.reply import Reply, as_answered, text_of
from glm_finetune.bars import keep_alive
from glm_finetune.data.samples import read_questions
from glm_finetune.errors import UserError, naming
from glm_finetune.evaluate.metrics import triple_scores
from glm_finetune.flags import parse
from glm_finetune.generator import generate, sampling_of
from glm_finetune.modes.spec import Limits
from glm_finetune.weights import LARGE_BYTES, weight_bytes


def main():
    config = parse(PredictConfig, sys.argv[1:], __doc__)
    device = dist.choose_device(config.device)
    where = config.model_path, config.mode, config.ori_model_dir
    folder = build.find_model_folder(*where, flags=config, force=config.force, rope_rule=config.rope_rule)
    is_large = weight_bytes(folder.base) > LARGE_BYTES
    precision, why = dist.choose_precision(config.precision, device, is_large)
    config.max_length = length_of(config, folder)
    if config.chat:
        check_rounds(folder.prompt.template)
    rows = list(read_questions(config, folder.prompt)) if config.test_path else []
    path, settings = answers.output_path(config, folder), answers.settings_of(config, folder, precision)
    done = answers.answered(path, rows, config, settings) if config.test_path else []
    dist.seed_all(config.seed)
    if is_large:
        keep_alive()
        print(f"{device}, {precision} ({why})", file=sys.stderr)
    tokenizer, model = build.load_model_folder(folder, precision, device, config.quantization_bit)
    if config.chat:
        converse(model, tokenizer, folder, config)
    elif config.test_path:
        answers.begin(path, done, settings)
        answer_file(model, tokenizer, folder, config, rows, path, done)
    else:
        messages = [{"role": "user", "content": folder.prompt.question(config.instruction, config.input)}]
        _, num_cut = answer_batch(model, tokenizer, folder, config, [("the question", messages)], show)
        print()
        if num_cut:
            print(f"the question was cut to fit --max_length {config.max_length}", file=sys.stderr)


def show(piece):
    print(piece, end="", flush=True)


def length_of(config, folder):
    """Tokens of prompt and answer: --max_length, or by default no more than the model was made for.

    Raises UserError for more than that.
    """
    context, needed = folder.context(), (config.max_new_tokens or 0) + MIN_PROMPT
    if config.allow_longer:
        return config.max_length
    if "max_length" in config.given and config.max_length > context:
        raise UserError(
            f"--max_length {config.max_length}: {folder.base} was made for {context} tokens (its config.json). Lower "
            "it, or add --allow_longer."
        )
    if needed > context:
        raise UserError(
            f"--max_new_tokens {config.max_new_tokens}: {folder.base} was made for {context} tokens (its config.json), "
            f"of which the prompt needs {MIN_PROMPT}. Lower it."
        )
    return min(config.max_length, context)


def answer_batch(model, tokenizer, folder, config, conversations, on_text=None):
    """(answers, number of questions cut to fit) for a list of (where, messages), generated together.

    on_text: called with each piece of the only answer as it is made.
    Raises UserError naming `where` for one that cannot be cut to fit.
    """
    room = config.max_new_tokens or config.max_length // 4  # kept free for the answer when a question is too long
    limits = Limits(config.max_length, max(8, config.max_length - room - 8), config.truncation)
    template = folder.prompt.template
    rendered = []
    for where, messages in conversations:
        with naming(where):
            rendered.append(folder.mode.render(tokenizer, messages, limits, template))
    prompts = [one.input_ids for one in rendered]
    lengths = [config.max_new_tokens or config.max_length - len(prompt) for prompt in prompts]
    reply = Reply.of(folder, tokenizer)
    on_token = on_text and (lambda token: on_text(reply.push(token)))
    rows = generate(model, tokenizer, folder.mode, prompts, lengths, on_token, **sampling_of(config))
    if on_text:
        on_text(reply.finish())
        texts = [reply.text]
    else:
        texts = [text_of(ids, folder, tokenizer) for ids in rows]
    return texts, sum(one.is_cut for one in rendered)


def answer_file(model, tokenizer, folder, config, rows, path, done):
    """Answer `rows` (`read_questions`) in order, one JSON line each, after those `done` by an earlier run."""
    if done:
        print(f"{len(done)} of {len(rows)} answers are there from an earlier run of the same settings")
    num_cut = 0
    with open(path, "a", encoding="utf-8") as file:
        for start in tqdm(range(len(done), len(rows), config.batch_size), desc="predict", unit=" batches"):
            part = rows[start : start + config.batch_size]
            asked = [(where, messages) for where, _, messages, _ in part]
            texts, cut = answer_batch(model, tokenizer, folder, config, asked)
            num_cut += cut
            for (_, row, _, _), text in zip(part, texts):
                done.append({**row, "prediction": text})
                file.write(json.dumps(done[-1], ensure_ascii=False) + "\n")
            file.flush()
    print(f"{len(done)} answers in {path}" + (f"; {num_cut} questions cut to fit --max_length" if num_cut else ""))
    if config.metrics:
        held = partial(as_answered, folder=folder, tokenizer=tokenizer)
        print_scores([(own["prediction"], [*map(held, references(row[-1]))]) for own, row in zip(done, rows)])


def references(answer):
    """The reference answers of a row, none to several. answer: of `read_questions`."""
    return answer if isinstance(answer, list) else [] if answer is None else [answer]


def print_scores(pairs):
    """Scores of (predicted answer, its references), of the rows that have some."""
    if not (pairs := [(text, known) for text, known in pairs if known]):
        print("no row has a reference answer: there is nothing to score")
    else:
        scores = triple_scores(pairs)
        print(
            f"triples of {len(pairs)} samples: F1 {scores.mean_f1:.4f} (mean of the samples')  micro precision "
            f"{scores.precision:.4f} recall {scores.recall:.4f} F1 {scores.f1:.4f}  exact {scores.exact:.4f}"
        )


if __name__ == "__main__":
    exits.exit_with_message(main)
