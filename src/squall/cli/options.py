"""Parsers of the commands, and the options that several of them share."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from jsonargparse import ArgumentParser, set_loader

from squall._process.documents import DocumentError, read_yaml
from squall.cli import COMMANDS
from squall.runs.config import refuse_base_60


def _value(text: str) -> Any:
    """A value of the command line or a configuration file; 'name:' and '{name}' stay text.

    >>> _value("name:"), _value("{name}"), _value("{name: 1}")
    ('name:', '{name}', {'name': 1})
    """
    value = read_yaml(text)
    names_only = isinstance(value, dict) and all(x is None for x in value.values()) and "\n" not in text
    return text if names_only and (":" not in text or text.rstrip().endswith(":")) else value


set_loader("squall", _value, (DocumentError,))


def new_parser(parser: type[ArgumentParser] = ArgumentParser, **options: Any) -> ArgumentParser:
    return parser(exit_on_error=False, allow_abbrev=False, parser_mode="squall", **options)


def command_parser(name: str, parser: type[ArgumentParser] = ArgumentParser) -> ArgumentParser:
    return new_parser(parser, prog=f"squall {name}", description=COMMANDS[name])


def parsers_of(parser: ArgumentParser) -> list[ArgumentParser]:
    """A parser and those of its sub-commands."""
    parts = [part for action in parser._actions if isinstance(action.choices, dict) for part in action.choices.values()]
    return [parser, *parts]


def option_names(parser: ArgumentParser) -> list[str]:
    """The options of a parser and its sub-commands: the nearest of them is named where one is misspelt."""
    keys = dict.fromkeys(key for part in parsers_of(parser) for key in part._option_string_actions)
    return [key.lstrip("-") for key in keys if key.startswith("--")]


def refuse_numbers_of_base_60(words: Sequence[str], parser: ArgumentParser) -> None:
    """Refuse 1:30 for a number, also within a value and in a configuration file.

    Raises:
        ConfigError: with the option.
    """
    flag = ""
    for word in words:
        name, equals, value = word.partition("=")
        flag, text = (name, value if equals else None) if word.startswith("--") else (flag, word)
        if text is not None and ":" in text:
            with contextlib.suppress(DocumentError):  # the parser explains what is none
                refuse_base_60({flag.removeprefix("--").replace("-", "_"): read_yaml(text)}, parsers_of(parser))


def add_run(parser: ArgumentParser) -> None:
    """A run folder, and where it came from."""
    parser.add_argument("run", type=Path, help="the run folder")
    parser.add_argument("--data", type=str | None, default=None, help="where the data file is now, if it was moved")
    add_trust(parser)


def add_trust(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--trust", action="store_true", help="run the model's code, also from outside the installed packages"
    )


def add_weights(parser: ArgumentParser) -> None:
    kinds = Literal["best", "last"] | None
    parser.add_argument("--checkpoint", type=kinds, default=None, help="which weights; the best if there are")


def add_animate(parser: ArgumentParser) -> None:
    kinds = Literal["gif", "mp4"] | None
    parser.add_argument("--animate", type=kinds, default=None, help="draw the rollouts as animations too")


def add_reading(parser: ArgumentParser) -> None:
    """What a file may not say of itself."""
    parser.add_argument("--dt", type=float | None, default=None, help="time between two states")
    parser.add_argument("--axes", type=str | None, default=None, help="a word per axis: 'batch time channel x y'")
    parser.add_argument("--fields", type=str, nargs="+", default=None, help="those that make the state")
    parser.add_argument("--lengths", type=float, nargs="+", default=None, help="of the domain, per axis")
    parser.add_argument("--boundary", type=str, nargs="+", default=None, help="periodic, wall or open, per axis")
    parser.add_argument("--fill", type=float | None, default=None, help="a number that means a missing value")
    parser.add_argument("--gaps", type=bool, default=False, help="NaN in The Well's layout means a missing value")


def reading(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of `add_reading` that are given; one value instead of a list of one, which all axes share."""
    given = {name: value for name, value in options.items() if value}
    for name in ("lengths", "boundary"):
        if len(given.get(name, ())) == 1:
            (given[name],) = given[name]
    return given
