"""Turns of a conversation with a model, in the mode's own form: one at a time, or in the terminal.

response, history = chat(model, tokenizer, MODE["glm3"], "你好", history=[], max_new_tokens=64)
"""

from glm_finetune.answer.decoder import Decoder
from glm_finetune.answer.flags import is_text
from glm_finetune.answer.reply import Reply
from glm_finetune.errors import UserError
from glm_finetune.generator import generate, sampling_of

MIN_ANSWER = 16  # tokens of --max_length that a conversation keeps free for an answer


def chat_ids(mode, tokenizer, query, history, role="user", template="official"):
    """Prompt ids for the next answer. history: messages, or pairs (question, answer), as some modes keep them.

    role: of the query ("observation" for a tool's result in ChatGLM3).
    """
    messages = []
    for turn in history:
        if isinstance(turn, dict):
            messages.append(turn)
        else:
            messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1]}]
    return mode.render(tokenizer, [*messages, {"role": role, "content": query}], None, template).input_ids


def chat(
    model, tokenizer, mode, query, history, max_new_tokens, role="user", template="official", on_text=None, **sampling
):
    """Ask once. history: of the mode's own form (Mode.finish_turn); it is not modified.

    on_text: called with each piece of text as it becomes final, for streaming. sampling: of `generator.generate`.
    Returns (response, new history): as the original's chat(), but a last token that is no stop token is kept.
    """
    prompt, decoder = chat_ids(mode, tokenizer, query, history, role, template), Decoder(tokenizer)
    on_token = on_text and (lambda token: on_text(decoder.push(token)))
    (ids,) = generate(model, tokenizer, mode, [prompt], [max_new_tokens], on_token, **sampling)
    if on_text:
        on_text(decoder.finish())
    return mode.finish_turn(list(history), query, role, tokenizer.decode(ids))


def check_rounds(template):
    """Raise UserError for a template that has no rounds."""
    if template in ("raw", "text"):
        raise UserError(f"--chat has several rounds, the template {template} has one: ask with --instruction.")


def converse(model, tokenizer, folder, config):
    """A conversation in the terminal: `clear` forgets it, `stop` (or Ctrl-D) ends it. config: PredictConfig."""
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
        elif not is_text(query):
            print("That is no UTF-8. Set the terminal to UTF-8 and ask again.")
        elif query:
            history = answer_turn(model, tokenizer, folder, config, query, history)


def answer_turn(model, tokenizer, folder, config, query, history):
    """Print the answer while it is made; returns the new history (messages), without the oldest turns when it grows
    too long.
    """
    mode, template, query = folder.mode, folder.prompt.template, folder.prompt.question(query)
    room = config.max_length - (config.max_new_tokens or MIN_ANSWER)
    while len(prompt := chat_ids(mode, tokenizer, query, history, template=template)) > room and history:
        history = history[2:]
        print("(the oldest turn is forgotten: the conversation is too long)")
    if len(prompt) > room:
        print(f"The question has {len(prompt)} tokens, --max_length {config.max_length} leaves room for {room}.")
        return history
    print("\nChatGLM：", end="", flush=True)
    length, reply = config.max_new_tokens or config.max_length - len(prompt), Reply.of(folder, tokenizer)

    def show(token):
        print(reply.push(token), end="", flush=True)

    try:
        generate(model, tokenizer, mode, [prompt], [length], show, **sampling_of(config))
        print(reply.finish())
    except KeyboardInterrupt:
        print(" (interrupted; this turn is forgotten)")
        return history
    return [*history, {"role": "user", "content": query}, reply.message()]
