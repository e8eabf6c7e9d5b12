"""What the user can mend: errors that are told as one message, without a traceback. Everything else keeps its own.

raise UserError("--max_len 0: must be above 0.")       # the flag or the file, its value, what to do
raise_together(config.problems())                      # all problems at once
"""

import difflib
from contextlib import contextmanager


class UserError(ValueError):
    """A refusal of ours. `exits` prints it and ends with 2; any other ValueError is a bug and shows where it is."""


class NotFinite(UserError, FloatingPointError):
    """Loss, gradient or weights are inf or nan, or there is nothing to learn."""


class StandsStill(NotFinite):
    """Nothing is learnt any more. The weights are whole and worth saving."""


class NotWritten(UserError, OSError):
    """Something could not be written; what was there before is as it was."""


class OutOfMemory(UserError, MemoryError):
    """A card or the host has too little memory; the message says what would help."""


def unknown_choice(name, value, allowed):
    """Yield a problem, with the nearest allowed value, unless `value` is None or allowed."""
    if value is not None and value not in allowed:
        names = [str(choice) for choice in allowed]
        yield f"--{name} {value!r}: must be one of {', '.join(names)}.{did_you_mean(str(value).lower(), names)}"


def did_you_mean(name, names):
    """ " Did you mean NAME?" with the nearest of `names`, or "" where none is near."""
    near = difflib.get_close_matches(name, names, 1, cutoff=0.7)
    return f" Did you mean {near[0]}?" if near else ""


@contextmanager
def naming(where):
    """Put the place of a problem, a file and line or the like, before the UserErrors raised inside."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def raise_together(problems):
    """Raise one UserError with every problem, if there is any."""
    if text := "\n".join(problems):
        raise UserError(text)
