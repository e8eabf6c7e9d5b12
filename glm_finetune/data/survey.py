"""What is in a data set before anything is cut: lengths, and what may surprise who trains on it.

    found = survey(path, settings, context=8192, eval_path="eval.json")
    print(*found.lines(), sep="\\n")

Bad rows are passed over: the report has them. All texts of a block are encoded in one call, as for training.
"""

from collections import Counter
from dataclasses import dataclass, field
from itertools import compress

from tqdm import tqdm

from glm_finetune.data.blocks import blocks_of
from glm_finetune.data.files import list_data_files, occurrences
from glm_finetune.data.formats import named
from glm_finetune.data.near import NearIndex
from glm_finetune.data.prepare import num_cores, uncollected
from glm_finetune.data.samples import drafts_in, messages_in, of_file, of_files
from glm_finetune.errors import UserError
from glm_finetune.modes.drafts import num_tokens
from glm_finetune.modes.template import remembering

SURPRISES = {  # in this order: what it is, and what changes it
    "question cut": "questions longer than --max_src_len are cut: raise it, or choose --truncation",
    "sample cut": "samples longer than --max_len all the same lose their oldest rounds, or the end of the answer",
    "beyond the model": "samples longer, before anything is cut, than the model was made for (config.json)",
    "answer changes": "answers that the tokenizer changes: no model can answer otherwise (predict.py scores them so)",
    "no separator": "instructions that run into their input, nothing between them: --input_separator",
    "the same": "copies of earlier rows: the model sees those more often",
    "in evaluation": "rows whose questions are (nearly) in --eval_path: what is learnt by heart looks like skill",
}


@dataclass
class Survey:
    """questions: tokens of a turn before an answer, samples: tokens of a sample -> how many have that many, uncut.

    surprises: name -> [how many rows or samples, an example]. columns: path of a file -> (its settings, {column of its
    rows: a value}).
    """

    questions: Counter = field(default_factory=Counter)
    samples: Counter = field(default_factory=Counter)
    surprises: dict = field(default_factory=dict)
    columns: dict = field(default_factory=dict)

    def note(self, name, place, example, *arguments):
        """Count a surprise. example: function that makes a text of the arguments, called for the first one."""
        if name not in self.surprises:
            self.surprises[name] = [0, f"{place}: {example(*arguments)}"]
        self.surprises[name][0] += 1

    def lines(self):
        """The section of the report; nothing where nothing is surprising."""
        columns = [*_described(self.columns)]
        if self.surprises:
            columns.append("what may surprise you:")
        for name in filter(self.surprises.get, SURPRISES):
            count, example = self.surprises[name]
            columns += [f"  {count:,} {SURPRISES[name]}", f"      {example}"]
        return columns


def survey(path, settings, context=None, eval_path=None, progress=False):
    """Read the files of --train_path -> Survey. settings: `samples.settings_of`. context: tokens of the model, or None.

    eval_path: files to look for in them. Raises UserError for a file that cannot be read.
    """
    found, seen = Survey(), {}
    index = NearIndex(_texts(eval_path, settings)) if eval_path else None
    with tqdm(desc="survey", unit=" rows", disable=not progress) as bar:
        data_files = list_data_files(path)
        for data_file, known in zip(data_files, of_files(data_files, settings)):
            columns = {}
            found.columns[data_file.path] = known, columns
            for block in blocks_of(data_file):
                bar.update(_look_at(found, data_file, block, known, columns, context, seen, index))
    return found


@uncollected()
def _look_at(found, data_file, block, settings, columns, context, seen, index):
    rows = [(i, number, row) for i, (number, row) in enumerate(block.rows(), block.first_row)]
    rows = [(i, number, row, drafts) for i, number, row in rows if (drafts := _drafts(row, settings)) is not None]
    drafts = [draft for *_, drafts in rows for draft in drafts]
    parts = settings.template.all_parts(settings.tokenizer, drafts, settings.style)
    encode = remembering(settings.tokenizer, parts, num_cores())
    held = _held(settings.tokenizer, drafts, encode)
    for i, number, row, drafts in rows:
        columns.update(row)  # the names: what takes no time
        if times := occurrences(i, data_file.weight):
            place = data_file.where(number)
            for draft in drafts:
                _measure(found, draft, encode, settings, context, place, times)
                _compare(found, draft, held, place)
            _look_at_row(found, row, drafts, settings, place, seen, index)
    return len(rows)


def _drafts(row, settings):
    try:
        return drafts_in(row, settings)
    except UserError:
        return None


def _measure(found, draft, encode, settings, context, place, times):
    """Note the lengths of a sample, and which are over a limit."""
    template, limits = settings.template, settings.limits
    ids = encode(draft.parts)
    length, left = sum(map(len, ids)), sum(num_tokens(draft, ids))
    found.samples[length] += times
    for tokens in template.turn_lengths(settings.tokenizer, draft, encode, settings.style):
        found.questions[tokens] += times
        if tokens > limits.max_src_len:
            left -= tokens - limits.max_src_len
            found.note("question cut", place, "{:,} tokens, --max_src_len {}".format, tokens, limits.max_src_len)
    is_text = draft.messages[0]["role"] == "text"  # which becomes several samples
    if left > limits.max_len - template.overhead and not is_text:
        found.note("sample cut", place, "{:,} tokens, --max_len {}".format, left + template.overhead, limits.max_len)
    if context and length > context and not is_text:
        found.note("beyond the model", place, "{:,} tokens, the model has {:,}".format, length, context)


def _held(tokenizer, drafts, encode):
    """{answer: what the tokenizer makes of it} of all answers that are trained."""
    texts = [part for draft in drafts for part in compress(draft.parts, draft.is_target) if isinstance(part, str)]
    texts = [*dict.fromkeys(texts)]
    return dict(zip(texts, tokenizer.decode_parts(encode(texts))))


def _compare(found, draft, held, place):
    for text in compress(draft.parts, draft.is_target):
        if held.get(text, text) != text:
            found.note("answer changes", place, _difference, text, held[text])


def _difference(text, held):
    """Where two texts begin to differ, with a little of what stands around."""
    at = next((i for i, (a, b) in enumerate(zip(text, held)) if a != b), min(len(text), len(held)))
    return f"{text[max(0, at - 8) : at + 8]!r} becomes {held[max(0, at - 8) : at + 8]!r}"


def _look_at_row(found, row, drafts, settings, place, seen, index):
    if not drafts:
        return
    file_format = named(settings.data_format)
    if file_format.takes_separator and not settings.separator and (pair := file_format.glued(row, settings.columns)):
        found.note("no separator", place, "{0[0]}{0[1]}".format, pair)
    text = "\n".join([message["content"] for message in drafts[-1].messages])
    if (first := seen.setdefault(hash(text), place)) is not place:
        found.note("the same", place, "as {}".format, first)
    if index and (near := index.nearest(_asked(drafts[-1].messages))):
        found.note("in evaluation", place, "like {}".format, near)


def _asked(messages):
    """What the user asks in a row; of plain text the text."""
    return "\n".join([message["content"] for message in messages if message["role"] in ("user", "text")])


def _texts(path, settings):
    """(place, what is asked) of every row of --eval_path; bad ones are passed over."""
    for data_file in list_data_files(path):
        known = of_file(data_file, settings)
        for number, row in data_file.rows():
            try:
                messages = messages_in(row, known)
            except UserError:
                continue
            yield data_file.where(number), _asked(messages)


def _described(columns):
    """A line for each file: its format, and the columns that are left alone, with the flag that reads them."""
    for path, (known, found) in columns.items():
        file_format, read = named(known.data_format), {*known.columns.values()}
        read |= {*file_format.known} - known.columns.keys()
        alone = [str(name) for name in found if name not in read]
        line = f"{path}: format {file_format.name}"
        if alone:
            line += (
                f"; left alone: {', '.join(name or repr(name) for name in alone)} (--columns FIELD=COLUMN reads one)"
            )
        yield line
