"""Turns of a conversation with a model, in the mode's own form: one at a time, or in the terminal.

response, history = chat(model, tokenizer, MODE["glm3"], "你好", history=[], max_new_tokens=64)
"""

from glm_finetune.answer.decoder import Decoder
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


def converse(model, tokenizer, mode, template, config):
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
        elif query:
            history = answer_turn(model, tokenizer, mode, template, config, query, history)


def answer_turn(model, tokenizer, mode, template, config, query, history):
    """Print the answer while it is made; returns the new history, without the oldest turns when it grows too long."""
    room = config.max_length - (config.max_new_tokens or MIN_ANSWER)
    while (num_tokens := len(chat_ids(mode, tokenizer, query, history, template=template))) > room and history:
        history = history[mode.entries_per_turn :]
        print("(the oldest turn is forgotten: the conversation is too long)")
    if num_tokens > room:
        print(f"The question has {num_tokens} tokens, --max_length {config.max_length} leaves room for {room}.")
        return history
    print("\nChatGLM：", end="", flush=True)
    length = config.max_new_tokens or config.max_length - num_tokens
    options = {"template": template, "on_text": lambda text: print(text, end="", flush=True), **sampling_of(config)}
    try:
        _, history = chat(model, tokenizer, mode, query, history, length, **options)
    except KeyboardInterrupt:
        print(" (interrupted; this turn is forgotten)", end="")
    print()
    return history
