"""A row -> samples: a pure function of the row and the settings.

settings = settings_of(config, MODE["glm3"], tokenizer)
for data_file in list_data_files(path):
    for number, row in data_file.rows(): prepare_row(data_file.where(number), row, of_file(data_file, settings))
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from glm_finetune.data.conversation import with_tags
from glm_finetune.data.files import Unreadable, list_data_files
from glm_finetune.data.formats import NUM_DETECTED, detect, further, named, parse_columns, refuse_further, renamed
from glm_finetune.data.manifest import reading_of
from glm_finetune.data.roles import parse_roles
from glm_finetune.errors import UserError, naming
from glm_finetune.modes.spec import TRUNCATIONS, Limits
from glm_finetune.modes.template import Template, remembering


@dataclass(frozen=True)
class Settings:
    """All that samples depend on besides their rows; picklable.

    template: Mode.template. style: the flag --template. data_format: name of a format, None: told from the first rows
    of each file, which is_told then says. columns: field -> column. roles: name of who speaks -> role. tags: the fields
    of a message that hold the name and the text, () = told from them. too_long: what becomes of a sample that does not
    fit: "cut", "drop" or "error". on_bad_row: "stop" or "skip". drafts: what makes drafts of messages, as
    Template.drafts does.
    """

    template: object
    tokenizer: object
    limits: Limits
    style: str = "train"
    train_on: str = "all"
    too_long: str = "cut"
    data_format: str | None = None
    columns: dict = field(default_factory=dict)
    roles: dict = field(default_factory=dict)
    tags: tuple = ()
    is_told: bool = False
    prompt_text: str = ""
    separator: str = ""
    repair: bool = False
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
    roles = parse_roles(config.roles) if config.roles else {}
    texts = dict(prompt_text=config.prompt_text or "", separator=config.input_separator or "")
    return dict(data_format=data_format, columns=columns, roles=roles, repair=config.repair_turns, **texts)


def check_limits(max_len, max_src_len, template, min_room=0):
    """Raise UserError unless a question of max_src_len fits into max_len, its ending into it, and min_room is left."""
    room, tail = max_len - max_src_len - template.overhead, template.question_tail
    if max_src_len >= max_len or room < min_room or max_src_len < max(1, tail, template.question_head + 1):
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
    fixed = template.question_head + template.question_tail
    return UserError(f"--max_src_len {max_src_len} is too small: what is not text of a question is {fixed} tokens.")


def of_file(data_file, settings, needs_answer=True):
    """The settings with the format of a file, told from its first rows. Raises UserError naming the file."""
    settings = _as_described(data_file, settings)
    if settings.data_format is None:
        rows = first_rows(data_file, settings)
        with naming(data_file.where(rows[0][0])):
            file_format = detect([renamed(row, settings.columns) for _, row in rows], needs_answer)
        settings = replace(settings, data_format=file_format.name, is_told=needs_answer)
    return settings


TAKEN = {  # field of Settings that a flag fills: (what of a Format takes it, the flag and what it is for)
    "prompt_text": ("takes_prompt", "--prompt_text goes with the format text_answer"),
    "separator": ("takes_separator", "--input_separator goes between instruction and input"),
    "roles": ("has_roles", "--roles goes with conversations"),
}


def of_files(data_files, settings, needs_answer=True):
    """`of_file` of each. Raises UserError for a text or roles that none of them has a use for."""
    known = [of_file(data_file, settings, needs_answer) for data_file in data_files]
    for field_name, (taker, purpose) in TAKEN.items():
        if getattr(settings, field_name) and not any(getattr(named(one.data_format), taker) for one in known):
            found = f"{data_files[-1].path} is {known[-1].data_format}"
            raise UserError(f"{purpose}; {found}. Leave it out.")
    return known


def _as_described(data_file, settings):
    """The settings with what dataset_info.json says of a file, where no flag says it."""
    said = reading_of(data_file.entry) if data_file.entry else {}
    if settings.data_format or settings.columns:
        said = {name: value for name, value in said.items() if name in ("roles", "tags")}
    return replace(settings, **said | {"roles": said.get("roles", {}) | settings.roles}) if said else settings


def reading_in(settings):
    """{field of Settings: value} of all that `of_file` decides, to hand on without the tokenizer."""
    return {name: getattr(settings, name) for name in ("data_format", "columns", "roles", "tags", "is_told")}


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
    file_format, row = named(settings.data_format), renamed(row, settings.columns)
    try:
        row = with_tags(row, file_format.fields[0], settings.tags) if settings.tags else row
        texts = settings.prompt_text, needs_answer, settings.roles, settings.separator
        messages = file_format.messages(row, *texts, settings.repair)
        if settings.is_told and messages[0]["role"] == "text":
            refuse_further(further(row))
        return messages
    except UserError as error:
        names = "".join(f", {name} from the column {column!r}" for name, column in settings.columns.items() if column)
        hint = f"(The file is read as format {file_format.name}{names}; --data_format and --columns change that.)"
        hint = hint if names else f"(The file is read as format {file_format.name}; --data_format changes that.)"
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
        if one.is_cut:
            name, flag = ("question", "max_src_len") if one.question_cut else ("conversation", "max_len")
            name = name if one.question_cut or one.history_cut else "answer"
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


def read_questions(config, prompt=None):
    """Yield (where, row, messages up to the last answer, that answer) of --test_path, as `question_in`.

    config: PredictConfig. prompt: `record.Prompt` of the training, whose texts are used where the format takes them and
    config has none. Raises UserError naming the place of a bad row.
    """
    settings = Settings(None, None, None, **format_settings(config))
    data_files = list_data_files(config.test_path)
    for data_file, known in zip(data_files, of_files(data_files, settings, needs_answer=False)):
        if prompt and named(known.data_format).takes_prompt:
            known = replace(known, prompt_text=known.prompt_text or prompt.prompt_text or "")
        if prompt and named(known.data_format).takes_separator:
            known = replace(known, separator=known.separator or prompt.input_separator or "")
        if data_file.weight != 1:
            name = f"{data_file.path}:{float(data_file.weight):g}"
            raise UserError(f"--test_path {name}: answers need no weight. Leave it out.")
        for number, row in data_file.rows():
            where = data_file.where(number)
            with naming(where):
                messages, answer = question_in(row, known)
                if "prediction" in row:
                    raise UserError("its answer would take the place of the field 'prediction'. Rename that.")
            yield where, _as_json(row, where), messages, answer


def question_in(row, settings):
    """(messages up to the last answer, that answer: a text, a list of several right ones, or None) of a row."""
    messages = messages_in(row, settings, needs_answer=False)
    asked = len(messages)
    while asked and messages[asked - 1]["role"] == "assistant":
        asked -= 1
    if asked < len(messages):
        return messages[:asked], messages[-1]["content"]
    return messages, named(settings.data_format).references(renamed(row, settings.columns))
