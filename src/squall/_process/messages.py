"""Parts of messages."""

import difflib
from collections.abc import Iterable


def counted(count: int, thing: str) -> str:
    """A number with its noun.

    >>> counted(1, "seed"), counted(3, "seed")
    ('1 seed', '3 seeds')
    """
    return f"{count} {thing}{'' if count == 1 else 's'}"


def suggestion(word: str, known: Iterable[str]) -> str:
    """What to say of a word that is not among the known ones.

    >>> suggestion("hiden", ["hidden", "name"]), suggestion("x", ["hidden", "name"])
    ("did you mean 'hidden'? Known are hidden, name", 'known are hidden, name')
    """
    names = list(known)
    near = difflib.get_close_matches(word, names, n=1)
    there = f"nown are {', '.join(names) or 'none'}"
    return f"did you mean '{near[0]}'? K{there}" if near else f"k{there}"


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class if it has none."""
    return next(iter(str(error).splitlines()), "") or type(error).__name__
