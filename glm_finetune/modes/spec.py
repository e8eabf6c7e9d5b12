"""What a mode is: the record that everything else reads instead of asking `if mode ==`."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from glm_finetune.errors import UserError

TRUNCATIONS = ("tail", "head", "middle")


@dataclass(frozen=True)
class Limits:
    """Lengths in tokens, and what is cut to keep them. The defaults are ChatGLM-Finetuning's behaviour.

    max_len: a whole sample. max_src_len: the turn before an answer; in a prompt all that stands before the answer.
    truncation: what of a longer turn is cut; None: samples that do not fit are marked as cut and left as they are. The
    oldest rounds of a conversation that is longer than max_len are forgotten, see `modes.cutting`. end_cut_answers: an
    answer that was cut ends in the end token all the same, which teaches the model to stop in the middle of a sentence.
    """

    max_len: int
    max_src_len: int
    truncation: str | None = "tail"
    end_cut_answers: bool = True


@dataclass(frozen=True)
class Mode:
    """One member of the ChatGLM family.

    A message is a dict: role (system, user, assistant, observation), content, and optionally metadata (of an assistant:
    the tool it calls), tools (of a system message), loss (False: an answer that is not trained). A list with one
    message of the role "text" is text to continue training on.

    render(tokenizer, messages, limits=None, style="train") -> Rendered: with a last assistant message a training
    sample of that answer alone, without one the prompt for generation, the same ids.
    samples(tokenizer, messages, limits=None, style="train", train_on="all") -> list of Rendered that together train
    every assistant message ("last": the last one); empty if none is to be trained. As few samples as the mode allows
    without changing the ids that stand before an answer.
    style, a value of --template: "train" is ChatGLM-Finetuning's and the default of training, "official" the released
    model's chat, "official_rounds" that of its chat fine-tuning scripts (ChatGLM-6B: a first question is counted, too),
    "raw" the question as it is, for base models; and in prediction "text": a text that is continued.
    positions(num_tokens, num_prefix) -> position ids, (T,) or (2, T) int64.
    clean(text) -> the text as the official chat cleans it. names_tools: whether an answer begins with a line for the
    name of a tool that it calls, empty if it calls none.
    clean_response(text, history) -> (response, history) as the original's process_response.
    finish_turn(history, query, role, text) -> (response, new history): the form of a history differs between modes.
    template: how a conversation is written, see modes/template.py; render and samples are its methods.
    rope_rule: the rule of its long-context variants (`models.rope`) where the checkpoint does not say it, or None.
    stop_token_ids(tokenizer) -> ids that end an answer.
    """

    name: str
    config: type
    model: type
    tokenizer: type
    template: object
    positions: Callable
    clean: Callable
    clean_response: Callable
    finish_turn: Callable
    stop_token_ids: Callable
    lora_targets: tuple
    released: tuple  # its models, in words
    names: str  # pattern of what its checkpoints are called: `_name_or_path` of config.json, or their folder
    rope_rule: str | None = None
    names_tools: bool = False

    def missing_in(self, fields):
        """Fields of this mode's architecture, which modes may share, that a config.json (a dict) lacks."""
        return [name for name in self.config.required_fields if name not in fields]

    def named_in(self, text):
        """Where in `text` a checkpoint of this mode is named, or None."""
        match = re.search(self.names, text, re.IGNORECASE)
        return match and match.start()

    render = property(lambda self: self.template.render)
    samples = property(lambda self: self.template.samples)


def system_text(message):
    """The text of a message: its content, and behind it the tools of a system message as JSON (ChatGLM3's form)."""
    if "tools" not in message:
        return message["content"]
    return message["content"] + "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)


def split_turns(messages, style="train"):
    """Messages of user and assistant in turn -> (list of past (question, answer), question, answer or None).

    A system message is put in front of the first question, on a line of its own: these modes have no such role.
    Raises UserError for another order or another role, and for several questions in the style "raw".
    """
    roles = [message["role"] for message in messages]
    if roles == ["user", "assistant"] and len(messages[0]) == len(messages[1]) == 2:  # most rows: be quick
        return [], messages[0]["content"], messages[1]["content"]
    if any(m["role"] == "observation" or m.get("metadata") or "tools" in m for m in messages):
        raise UserError("tools and their results: this mode has no form for them. Use --mode glm3.")
    if messages and messages[0]["role"] == "system" and len(messages) > 1:
        system, first, *rest = messages
        messages, roles = [{**first, "content": f"{system['content']}\n{first['content']}"}, *rest], roles[1:]
    expected = ["user", "assistant"] * (len(roles) // 2 + 1)
    if not roles or roles != expected[: len(roles)]:
        raise UserError(f"roles {roles}: this mode knows user and assistant in turn, beginning with the user.")
    contents = [message["content"] for message in messages]
    answer = contents.pop() if roles[-1] == "assistant" else None
    question = contents.pop()
    if contents and style == "raw":
        raise UserError("--template raw has one question and its answer; this is a conversation. Give another one.")
    return list(zip(contents[::2], contents[1::2])), question, answer


def finish_pair(clean_response, history, query, role, text):
    """Mode.finish_turn where a history is a list of (question, answer)."""
    response, _ = clean_response(text)
    return response, [*history, (query, response)]
