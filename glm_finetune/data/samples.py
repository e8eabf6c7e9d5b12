"""A row -> samples: a pure function of the row and the settings.

settings = settings_of(config, MODE["glm3"], tokenizer)
for source in list_sources(path):
    for number, row in source.rows(): prepare_row(source.where(number), row, of_source(source, settings))
"""

import json
from dataclasses import dataclass, field, replace

from glm_finetune.data.files import Unreadable, list_sources
from glm_finetune.data.formats import NUM_DETECTED, detect, named, parse_columns, renamed
from glm_finetune.errors import UserError
from glm_finetune.modes.spec import TRUNCATIONS, Limits


@dataclass(frozen=True)
class Settings:
    """All that samples depend on besides their rows; picklable.

    form: Mode.form. data_format: name of a format, None: told from the first rows of each file. columns: field
    -> column. too_long: what becomes of a sample that does not fit: "cut", "drop" or "error". on_bad_row: "stop" or
    "skip".
    """

    form: object
    tokenizer: object
    limits: Limits
    template: str = "train"
    train_on: str = "all"
    too_long: str = "cut"
    data_format: str | None = None
    columns: dict = field(default_factory=dict)
    prompt_text: str = ""
    on_bad_row: str = "stop"


def settings_of(config, mode, tokenizer):
    """Flags -> Settings. Raises UserError for lengths that leave no room and names that no format has."""
    check_limits(config.max_len, config.max_src_len, mode.form, min_room=1)
    cuts = config.truncation in TRUNCATIONS
    limits = Limits(
        config.max_len,
        config.max_src_len,
        config.truncation if cuts else "tail",
        end_cut_answers=config.end_cut_answers,
    )
    return Settings(
        mode.form,
        tokenizer,
        limits,
        config.template,
        config.train_on,
        "drop" if config.is_skip else "cut" if cuts else config.truncation,
        config.data_format and named(config.data_format).name,
        parse_columns(config.columns),
        config.prompt_text or "",
        config.on_bad_row,
    )


def check_limits(max_len, max_src_len, form, min_room=0):
    """Raise UserError unless a question of max_src_len tokens fits into max_len, and its ending into max_src_len.

    min_room: tokens that must be left for its answer; ChatGLM-Finetuning asks for none.
    """
    if max_src_len >= max_len:
        raise UserError(f"--max_src_len {max_src_len} must be below --max_len {max_len}: the answer needs room too.")
    if max_src_len + form.overhead + min_room > max_len:
        raise UserError(
            f"--max_len {max_len} leaves no room for an answer after --max_src_len {max_src_len} and the "
            f"{form.overhead} special tokens of this mode: use --max_len {max_src_len + form.overhead + 1} or more."
        )
    if max_src_len < max(1, form.question_tail):
        raise UserError(
            f"--max_src_len {max_src_len} is too small: the ending of a question alone is {form.question_tail}."
        )


def of_source(source, settings, needs_answer=True):
    """The settings with the format of a file, told from its first rows. Raises UserError naming the file."""
    if settings.data_format is None:
        rows = first_rows(source, settings)
        try:
            form = detect([renamed(row, settings.columns) for _, row in rows], needs_answer)
        except UserError as error:
            raise UserError(f"{source.where(rows[0][0])}: {error}") from None
        settings = replace(settings, data_format=form.name)
    if settings.prompt_text and not named(settings.data_format).takes_prompt:
        raise UserError(
            f"--prompt_text goes with the format text_answer; {source.path} is {settings.data_format}. Leave it out."
        )
    return settings


def first_rows(source, settings):
    """[(number, row)] to tell the format from. Raises UserError for an unreadable one that is not to be skipped."""
    first, problems = [], []
    for number, row in source.rows():
        if not isinstance(row, Unreadable):
            first.append((number, row))
        elif settings.on_bad_row == "skip":
            problems = problems or [f"{source.where(number)}: {row.problem}"]
        else:
            raise UserError(f"{source.where(number)}: {row.problem}")
        if len(first) == NUM_DETECTED:
            break
    if not first:
        raise UserError(f"{source.path}: no row can be read. The first: {problems[0]}")
    return first


def messages_in(where, row, settings, needs_answer=True):
    """The messages of a row of a known format (`of_source`). Raises UserError naming `where`, field and remedy."""
    if isinstance(row, Unreadable):
        raise UserError(f"{where}: {row.problem}")
    form = named(settings.data_format)
    try:
        return form.messages(renamed(row, settings.columns), settings.prompt_text, needs_answer)
    except UserError as error:
        raise UserError(
            f"{where}: {error} (The file is read as format {form.name}; --data_format changes that.)"
        ) from None


def prepare_row(where, row, settings):
    """The samples of a row -> list of Rendered, empty if it has no answer to train.

    Raises UserError naming `where`: a bad row, one that this mode cannot express, or (too_long "error") one that does
    not fit.
    """
    messages = messages_in(where, row, settings)
    form, tokenizer = settings.form, settings.tokenizer
    try:
        rendered = form.samples(tokenizer, messages, settings.limits, settings.template, settings.train_on)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    for one in rendered:
        if settings.too_long == "error" and (one.source_cut or one.target_cut):
            name, flag = ("question", "max_src_len") if one.source_cut else ("answer", "max_len")
            raise UserError(
                f"{where}: the {name} does not fit into --{flag}. Raise it, or choose another --truncation than error."
            )
    return rendered


def drafts_of(rows, settings):
    """The samples of each row as drafts (see modes/form.py). None: it is bad, or text alone; ask `prepare_row`."""
    convert, columns, prompt_text = named(settings.data_format).messages, settings.columns, settings.prompt_text
    form, tokenizer, template, train_on = settings.form, settings.tokenizer, settings.template, settings.train_on
    drafts = []
    for row in rows:
        try:
            messages = None if isinstance(row, Unreadable) else convert(renamed(row, columns), prompt_text)
            is_talk = messages and messages[0]["role"] != "text"
            drafts.append(form.drafts(tokenizer, messages, template, train_on) if is_talk else None)
        except UserError:
            drafts.append(None)
    return drafts


def _as_json(row, where):
    """The row as it can be written beside its answer: dates and the like (of Parquet) as text."""
    text = json.dumps(row, ensure_ascii=False, default=str)
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: a field has {text[error.start]!r}, half of a character.") from None
    return json.loads(text)


def read_questions(config, trained_prompt=None):
    """Yield (row, messages up to the last answer, that answer or None) of --test_path. config: PredictConfig.

    trained_prompt: the --prompt_text of the training, used where the format takes one and config has none.
    Raises UserError naming the place of a bad row.
    """
    settings = Settings(
        None,
        None,
        None,
        data_format=config.data_format and named(config.data_format).name,
        columns=parse_columns(config.columns),
        prompt_text=config.prompt_text or "",
    )
    for source in list_sources(config.test_path):
        known = of_source(source, settings, needs_answer=False)
        if named(known.data_format).takes_prompt:
            known = replace(known, prompt_text=known.prompt_text or trained_prompt or "")
        if source.weight != 1:
            raise UserError(
                f"--test_path {source.path}:{float(source.weight):g}: answers need no weight. Leave it out."
            )
        for number, row in source.rows():
            messages = messages_in(source.where(number), row, known, needs_answer=False)
            asked = len(messages)
            while asked and messages[asked - 1]["role"] == "assistant":
                asked -= 1
            answer = messages[-1]["content"] if asked < len(messages) else None
            yield _as_json(row, source.where(number)), messages[:asked], answer
