"""One command from its words to its exit code; every mistake of the user's becomes a message."""

import errno
import importlib
import re
import signal
import warnings
from collections.abc import Sequence

from jsonargparse import ArgumentError
from rich.console import Console

import squall
from squall._process.console import say
from squall._process.limits import too_large
from squall._process.messages import first_line
from squall._process.signals import Stopped, notices_raise
from squall.cli import USER_MISTAKE
from squall.cli.options import option_names, refuse_numbers_of_base_60
from squall.data import DataError
from squall.data.endless import endless_refused
from squall.runs.config import explain
from squall.runs.installed import failed_in
from squall.runs.ranks import OtherProcessError
from squall.systems import ConvergenceError
from squall.training.loop import TrainingDiverged

ASKED = r"\b(axes|dt|fields|lengths|boundary|fill)="
"""How messages of `squall.data` name what the options of `squall.data.open` say of a file."""

REPORT = (
    f"This is a fault of squall {squall.__version__}, not yours. Please report the command and the lines above as an "
    "issue in squall's repository"
)


@notices_raise()
@endless_refused()
def execute(words: Sequence[str]) -> int:
    """Run the command that the first of the words names, a module of this room; return its exit code."""
    command, *options = words
    console, errors, known = Console(stderr=True), Console(stderr=True), []
    try:
        module = importlib.import_module(f"squall.cli.{command}")
        parser = module.parser()
        known = option_names(parser)
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: say(console, f"warning: {message}", "yellow")
            warnings.simplefilter("always", UserWarning)
            _warn_of_repeats(options)
            refuse_numbers_of_base_60(options, parser)
            return module.run(parser.instantiate(parser.parse_args(options)), console)
    except (ArgumentError, ValueError, OSError, TrainingDiverged, ConvergenceError, OtherProcessError) as error:
        message = _as_options(error, known)
        text = "\n".join([explain(message, known), *getattr(error, "__notes__", []), *_advice(error)])
        if not getattr(error, "known", False):  # to the user, by the first of several processes
            say(errors, f"squall: {text}", "red")
        return USER_MISTAKE
    except KeyboardInterrupt as stop:
        number = stop.number if isinstance(stop, Stopped) else signal.SIGINT
        text = "interrupted" if number == signal.SIGINT else f"stopped by {signal.Signals(number).name}"
        console.print(f"squall: {text}", style="red")
        return 128 + number  # as shells report a signal
    except Exception as error:
        place = failed_in(error)
        if too_large(error) and not (place and isinstance(error, ArithmeticError)):
            text = f"the numbers asked for are too large or too small for this machine: {first_line(error)}"
            say(errors, f"squall: {text}", "red")
            return USER_MISTAKE
        if place:
            say(errors, f"squall: code of your own, {place}, raised {type(error).__name__}: {error}", "red")
            return USER_MISTAKE
        error.add_note(REPORT)
        raise


def _warn_of_repeats(words: Sequence[str]) -> None:
    names = [word.split("=")[0] for word in words if word.startswith("--") and not word.startswith("--config")]
    for name in dict.fromkeys(name for name in names if names.count(name) > 1):
        warnings.warn(f"{name} is given {names.count(name)} times: the last one counts", stacklevel=2)


def _as_options(error: Exception, known: Sequence[str]) -> str:
    """The message, in which what a reader of data asks for is named as an option, and what has such options."""
    text = str(error)
    if not isinstance(error, DataError) or not re.search(ASKED, text):
        return text
    text = re.sub(ASKED, r"--\1 ", text)
    if "axes" in known:
        return text
    return f"{text}. `squall data convert FILE --axes ... --dt ... --out NEW.hdf5` writes a file that says so itself"


def _advice(error: Exception) -> list[str]:
    """What to do about a disk that is full or cannot do something; what is on it already stays whole."""
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ["The disk is full: what was saved is whole. Make room and give the same command again"]
    if number in (errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS):
        return ["The disk cannot do what squall needs, such as renaming a file: choose a folder on another disk"]
    return []
