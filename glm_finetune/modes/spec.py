"""What a mode is: the record that everything else reads instead of asking `if mode ==`; and how lengths are cut."""

from collections.abc import Callable
from dataclasses import dataclass, field

from glm_finetune.loss import IGNORE

TRUNCATIONS = ("tail", "head", "middle")


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and what is cut to keep them. The defaults are ChatGLM-Finetuning's behaviour.

    max_len: a whole sample. max_src_len: what stands before an answer. truncation: the part of it that is cut; "head"
    forgets the oldest rounds of a conversation first. end_cut_answers: an answer that was cut ends in the end token
    all the same, which teaches the model to stop in the middle of a sentence.
    """

    max_len: int
    max_src_len: int
    truncation: str = "tail"
    end_cut_answers: bool = True


@dataclass(frozen=True)
class Rendered:
    """A conversation, or a part of it, as the model sees it.

    input_ids, labels: equal length, label -100 = not a target, not shifted.
    num_prefix: tokens of the bidirectional prefix (0 in causal modes).
    source_cut, target_cut: whether question or answer was shortened to fit. answer_empty: an answer to train is "".
    num_source: tokens before the last answer that Limits.max_src_len counts.
    """

    input_ids: list
    labels: list
    num_prefix: int = 0
    source_cut: bool = False
    target_cut: bool = False
    answer_empty: bool = False
    num_source: int = 0


@dataclass(frozen=True)
class Mode:
    """One member of the ChatGLM family.

    A message is a dict: role (system, user, assistant, observation), content, and optionally metadata (of an assistant:
    the tool it calls), tools (of a system message), loss (False: an answer that is not trained). A list with one
    message of the role "text" is text to continue training on.

    render(tokenizer, messages, limits=None, template="train") -> Rendered: with a last assistant message a training
    sample of that answer alone, without one the prompt for generation, the same ids.
    samples(tokenizer, messages, limits=None, template="train", train_on="all") -> list of Rendered that together train
    every assistant message ("last": the last one); empty if none is to be trained. As few samples as the mode allows
    without changing the ids that stand before an answer.
    Templates: "train" is ChatGLM-Finetuning's and the default of training, "official" the released model's chat,
    "official_rounds" that of its chat fine-tuning scripts (ChatGLM-6B: a first question is counted, too).
    positions(num_tokens, num_prefix) -> position ids, (T,) or (2, T) int64.
    clean_response(text, history) -> (response, history) as the original's process_response.
    finish_turn(history, query, role, text) -> (response, new history): the form of a history differs between modes.
    question_tail: tokens at the end of a question that are never cut. overhead: tokens kept free beside both texts.
    dataset(path, tokenizer, max_len=, max_src_len=, is_skip=): the data set with ChatGLM-Finetuning's settings.
    stop_token_ids(tokenizer) -> ids that end an answer.
    """

    name: str
    config: type
    model: type
    tokenizer: type
    dataset: Callable
    render: Callable
    samples: Callable
    question_tail: int
    overhead: int
    positions: Callable
    clean_response: Callable
    finish_turn: Callable
    entries_per_turn: int  # of a history: 1 pair, or 2 messages
    stop_token_ids: Callable
    lora_targets: tuple
    other_names: str  # pattern of `_name_or_path` that belongs to another mode
    tiny_config: dict = field(repr=False)


def cut_source(ids, limits, fixed):
    """Shorten what stands before an answer to limits.max_src_len tokens. fixed: a bool for each id, True = it stays.

    Raises ValueError if what stays is too long by itself.
    """
    excess, free = len(ids) - limits.max_src_len, [i for i, stays in enumerate(fixed) if not stays]
    if excess > len(free):
        raise ValueError(
            f"its role tokens alone are more than --max_src_len {limits.max_src_len}: raise it, or use --truncation "
            "head, which forgets the oldest rounds."
        )
    start = {"tail": len(free) - excess, "head": 0, "middle": (len(free) - excess) // 2}[limits.truncation]
    gone = set(free[start : start + excess])
    return [token for i, token in enumerate(ids) if i not in gone]


def finish_target(ids, room, end, limits):
    """Ids of an answer cut to `room` tokens, with the end token (unless it was cut: Limits). Returns ids, whether cut.

    limits: None for no limit.
    """
    if limits is None or len(ids) <= room:
        return ids + [end], False
    return ids[: max(0, room)] + ([end] if limits.end_cut_answers else []), True


def trained_turns(messages, train_on):
    """Places of the assistant messages to train: all ("last": the last one), without those whose `loss` is False."""
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    return [i for i in answers[-1 if train_on == "last" else 0 :] if messages[i].get("loss", True)]


def newest_rounds(messages, fits):
    """The conversation without its oldest rounds, until fits(messages); a system message and the last round stay."""
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    for start in users:
        kept = messages[: users[0]] + messages[start:]
        if fits(kept):
            break
    return kept if users else messages


def each_turn(render, tokenizer, messages, limits, template, train_on):
    """Mode.samples where every trained answer is a sample of its own."""
    return [render(tokenizer, messages[: i + 1], limits, template) for i in trained_turns(messages, train_on)]


def text_samples(ids, begin, end, limits, num_prefix):
    """Mode.samples of plain text: pieces of at most max_len tokens, each after `begin`, only the last one ended.

    Everything after the prefix and the mode's own beginning is a target: nothing is lost, nothing overlaps.
    """
    room = limits.max_len - len(begin) - 1 if limits else len(ids) or 1
    pieces = [ids[i : i + room] for i in range(0, len(ids), room)]
    rows = [begin + piece + ([end] if piece is pieces[-1] else []) for piece in pieces]
    hidden = num_prefix or len(begin)
    return [Rendered(row, [IGNORE] * hidden + row[hidden:], num_prefix) for row in rows]


def prompt_ids(tokenizer, messages, limits, prompt, template, tail):
    """The prompt of ChatGLM-6B and 2, which is one text -> (ids, whether they were cut). `tail` last tokens stay."""

    def encode(messages):
        history, question, _ = split_turns(messages)
        return tokenizer.encode_text(prompt(history, question, template))

    ids = encode(messages)
    if limits is None or len(ids) <= limits.max_src_len:
        return ids, False
    if limits.truncation == "head":
        ids = encode(newest_rounds(messages, lambda kept: len(encode(kept)) <= limits.max_src_len))
    return cut_source(ids, limits, [i >= len(ids) - tail for i in range(len(ids))]), True


def split_turns(messages):
    """Messages of user and assistant in turn -> (list of past (question, answer), question, answer or None).

    A system message is put in front of the first question, on a line of its own: these modes have no such role.
    Raises ValueError for another order or another role.
    """
    if any(m["role"] == "observation" or m.get("metadata") or "tools" in m for m in messages):
        raise ValueError("tools and their results: this mode has no form for them. Use --mode glm3.")
    if messages and messages[0]["role"] == "system" and len(messages) > 1:
        system, first, *rest = messages
        messages = [{**first, "content": f"{system['content']}\n{first['content']}"}, *rest]
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
