"""What a mode is: the record that everything else reads instead of asking `if mode ==`."""

from collections.abc import Callable
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens. max_len: a whole sample. max_src_len: its question."""

    max_len: int
    max_src_len: int


@dataclass(frozen=True)
class Rendered:
    """A conversation as the model sees it.

    input_ids, labels: equal length, label -100 = not a target, not shifted.
    num_prefix: tokens of the bidirectional prefix (0 in causal modes).
    source_cut, target_cut: whether question or answer was shortened to fit.
    """

    input_ids: list
    labels: list
    num_prefix: int = 0
    source_cut: bool = False
    target_cut: bool = False


@dataclass(frozen=True)
class Mode:
    """One member of the ChatGLM family.

    render(tokenizer, messages, limits=None, template="train") -> Rendered: with a last assistant message a training
    sample, without one the prompt for generation. The template "train" is what fine-tuning here has always used,
    "official" what the released model was trained for.
    positions(num_tokens, num_prefix) -> position ids, (T,) or (2, T) int64.
    clean_response(text, history) -> (response, history) as the original's process_response.
    finish_turn(history, query, role, text) -> (response, new history): the form of a history differs between modes.
    dataset(path, tokenizer, max_len=, max_src_len=, is_skip=) -> sequence of {"input_ids", "labels", "num_prefix"}.
    stop_token_ids(tokenizer) -> ids that end an answer.
    """

    name: str
    config: type
    model: type
    tokenizer: type
    dataset: Callable
    render: Callable
    positions: Callable
    clean_response: Callable
    finish_turn: Callable
    entries_per_turn: int  # of a history: 1 pair, or 2 messages
    stop_token_ids: Callable
    lora_targets: tuple
    other_names: str  # pattern of `_name_or_path` that belongs to another mode
    tiny_config: dict = field(repr=False)


def cut_source(ids, max_src_len, tail):
    """Shorten a question to `max_src_len` tokens, keeping its last `tail` tokens (the ending that asks for the answer).

    Returns ids, whether they were cut.
    """
    if len(ids) <= max_src_len:
        return ids, False
    return ids[: max_src_len - tail] + (ids[-tail:] if tail else []), True


def split_turns(messages):
    """Messages of user and assistant in turn -> (list of past (question, answer), question, answer or None).

    Raises ValueError for another order or another role.
    """
    roles = [message["role"] for message in messages]
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != expected[: len(roles)]:
        raise ValueError(f"roles {roles}: this mode knows user and assistant in turn, beginning with the user.")
    answer = messages[-1]["content"] if roles[-1] == "assistant" else None
    contents = [message["content"] for message in messages[: len(messages) - (answer is not None)]]
    return list(zip(contents[0:-1:2], contents[1::2])), contents[-1], answer


def finish_pair(clean_response, history, query, role, text):
    """Mode.finish_turn where a history is a list of (question, answer)."""
    response, _ = clean_response(text)
    return response, [*history, (query, response)]
