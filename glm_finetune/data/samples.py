"""A row -> samples: a pure function of the row and the settings.

settings = settings_of(config, MODE["glm3"], tokenizer)
for data_file in list_data_files(path):
    for number, row in data_file.rows(): prepare_row(data_file.where(number), row, of_file(data_file, settings))
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from glm_finetune.data.files import Unreadable, list_data_files
from glm_finetune.data.formats import NUM_DETECTED, detect, named, parse_columns, renamed
from glm_finetune.errors import UserError, naming
from glm_finetune.modes.spec import TRUNCATIONS, Limits
from glm_finetune.modes.template import Template, remembering


@dataclass(frozen=True)
class Settings:
    """All that samples depend on besides their rows; picklable.

    template: Mode.template. style: the flag --template. data_format: name of a format, None: told from the first rows
    of each file. columns: field -> column. too_long: what becomes of a sample that does not fit: "cut", "drop" or
    "error". on_bad_row: "stop" or "skip". drafts: what makes drafts of messages, as Template.drafts does.
    """

    template: object
    tokenizer: object
    limits: Limits
    style: str = "train"
    train_on: str = "all"
    too_long: str = "cut"
    data_format: str | None = None
    columns: dict = field(default_factory=dict)
    prompt_text: str = ""
    on_bad_row: str = "stop"
    drafts: Callable = Template.drafts


def settings_of(config, mode, tokenizer, drafts=Template.drafts):
    """Flags -> Settings. drafts: of the objective.

    Raises UserError for lengths that leave no room and names that no format has.
    """
    check_limits(config.max_len, config.max_src_len, mode.template, min_room=1)
    too_long = "drop" if config.is_skip else "cut" if config.truncation in TRUNCATIONS else config.truncation
    way = config.truncation if too_long == "cut" else None
    limits = Limits(config.max_len, config.max_src_len, way, config.end_cut_answers)
    options = config.template, config.train_on, too_long
    known = format_settings(config)
    return Settings(mode.template, tokenizer, limits, *options, **known, on_bad_row=config.on_bad_row, drafts=drafts)


def format_settings(config):
    """{field of Settings: value} of the flags that training and prediction have in common."""
    data_format = config.data_format and named(config.data_format).name
    columns = parse_columns(config.columns) if config.columns else {}
    return dict(data_format=data_format, columns=columns, prompt_text=config.prompt_text or "")


def check_limits(max_len, max_src_len, template, min_room=0):
    """Raise UserError unless a question of max_src_len fits into max_len, its ending into it, and min_room is left."""
    room, tail = max_len - max_src_len - template.overhead, template.question_tail
    if max_src_len >= max_len or room < min_room or max_src_len < max(1, tail):
        raise _no_room(max_len, max_src_len, template, room < min_room)


def _no_room(max_len, max_src_len, template, lacks_answer):
    if max_src_len >= max_len:
        return UserError(f"--max_src_len {max_src_len} must be below --max_len {max_len}: the answer needs room too.")
    if lacks_answer:
        return UserError(
            f"--max_len {max_len} leaves no room for an answer after --max_src_len {max_src_len} and the "
            f"{template.overhead} special tokens of this mode: use --max_len {max_src_len + template.overhead + 1} or "
            "more."
        )
    tail = template.question_tail
    return UserError(f"--max_src_len {max_src_len} is too small: the ending of a question alone is {tail}.")


def of_file(data_file, settings, needs_answer=True):
    """The settings with the format of a file, told from its first rows. Raises UserError naming the file."""
    if settings.data_format is None:
        rows = first_rows(data_file, settings)
        with naming(data_file.where(rows[0][0])):
            file_format = detect([renamed(row, settings.columns) for _, row in rows], needs_answer)
        settings = replace(settings, data_format=file_format.name)
    if settings.prompt_text and not named(settings.data_format).takes_prompt:
        raise UserError(
            f"--prompt_text goes with the format text_answer; {data_file.path} is {settings.data_format}. Leave it out."
        )
    return settings


def first_rows(data_file, settings):
    """[(number, row)] to tell the format from. Raises UserError for an unreadable one that is not to be skipped."""
    first, problems = [], []
    for number, row in data_file.rows():
        if not isinstance(row, Unreadable):
            first.append((number, row))
        elif settings.on_bad_row == "skip":
            problems = problems or [f"{data_file.where(number)}: {row.problem}"]
        else:
            raise UserError(f"{data_file.where(number)}: {row.problem}")
        if len(first) == NUM_DETECTED:
            break
    if not first:
        raise UserError(f"{data_file.path}: no row can be read. The first: {problems[0]}")
    return first


def messages_in(row, settings, needs_answer=True):
    """The messages of a row of a known format (`of_file`). Raises UserError naming field and remedy."""
    if isinstance(row, Unreadable):
        raise UserError(row.problem)
    file_format = named(settings.data_format)
    try:
        return file_format.messages(renamed(row, settings.columns), settings.prompt_text, needs_answer)
    except UserError as error:
        hint = f"(The file is read as format {file_format.name}; --data_format changes that.)"
        raise UserError(f"{error} {hint}") from None


def drafts_in(row, settings):
    """The samples of a row as drafts, none if it has no answer to train. Raises UserError for a bad row, and for one
    that this mode cannot express.
    """
    messages = messages_in(row, settings)
    return settings.drafts(settings.template, settings.tokenizer, messages, settings.style, settings.train_on)


def fitted(drafts, settings, encode):
    """Drafts of a row -> list of Rendered, cut where they must be. encode: see Template.fitted.

    Raises UserError for what cannot be cut, or (too_long "error") must not be.
    """
    rendered = settings.template.fitted(settings.tokenizer, drafts, encode, settings.limits, settings.style)
    if settings.too_long == "error":
        _refuse_cut(rendered)
    return rendered


def _refuse_cut(rendered):
    for one in rendered:
        if one.question_cut or one.answer_cut:
            name, flag = ("question", "max_src_len") if one.question_cut else ("answer", "max_len")
            remedy = "Raise it, or choose another --truncation than error."
            raise UserError(f"the {name} does not fit into --{flag}. {remedy}")


def prepare_row(where, row, settings):
    """The samples of a row -> list of Rendered. Raises UserError naming `where`, as `drafts_in` and `fitted`."""
    with naming(where):
        return fitted(drafts_in(row, settings), settings, remembering(settings.tokenizer))


def _as_json(row, where):
    """The row as it can be written beside its answer: dates and the like (of Parquet) as text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a field has {text[error.start]!r}, half of a character.") from None
    return json.loads(text)


def read_questions(config, trained_prompt=None):
    """Yield (where, row, messages up to the last answer, that answer or None) of --test_path. config: PredictConfig.

    trained_prompt: the --prompt_text of the training, used where the format takes one and config has none.
    Raises UserError naming the place of a bad row.
    """
    settings = Settings(None, None, None, **format_settings(config))
    for data_file in list_data_files(config.test_path):
        known = of_file(data_file, settings, needs_answer=False)
        if named(known.data_format).takes_prompt:
            known = replace(known, prompt_text=known.prompt_text or trained_prompt or "")
        if data_file.weight != 1:
            name = f"{data_file.path}:{float(data_file.weight):g}"
            raise UserError(f"--test_path {name}: answers need no weight. Leave it out.")
        for number, row in data_file.rows():
            where = data_file.where(number)
            with naming(where):
                messages = messages_in(row, known, needs_answer=False)
                if "prediction" in row:
                    raise UserError("its answer would take the place of the field 'prediction'. Rename that.")
            asked = len(messages)
            while asked and messages[asked - 1]["role"] == "assistant":
                asked -= 1
            answer = messages[-1]["content"] if asked < len(messages) else None
            yield where, _as_json(row, where), messages[:asked], answer
