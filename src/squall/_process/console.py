"""Standard streams that never cost the work: of any encoding, closed, broken or full."""

import functools
import os
import sys
import unicodedata
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # `squall --help` needs no extra
    from rich.console import Console

PLAIN = {"×": "x", "−": "-", "–": "-", "‖": "||", "²": "^2", "…": "...", "≤": "<=", "≥": ">=", "∞": "inf", "━": "-"}
"""What stands for a sign that an encoding lacks; a Greek letter is spelt out, the rest is a question mark."""

WIDE = 240
"""Columns of a table that goes into a file."""


def with_safe_output(command: Callable[..., int]) -> Callable[..., int]:
    """Run a command whose output may be impossible: a terminal that is gone ends its messages, not its work.

    Output that cannot be written is dropped. Results that are lost otherwise than by a reader that stopped reading,
    as `head` does, are an error at the end: they would be missing from the file that they were directed to.
    """

    @functools.wraps(command)
    def run(*arguments: Any, **options: Any) -> int:
        _occupy_standard_descriptors()
        before = sys.stdout, sys.stderr
        out, messages = _Output(sys.stdout), _Output(sys.stderr)
        sys.stdout, sys.stderr = out, messages
        try:
            code = command(*arguments, **options)
            out.flush()
            if isinstance(out.lost, OSError) and not isinstance(out.lost, BrokenPipeError):
                messages.write(f"squall: the results could not be printed ({out.lost}); what was written is whole\n")
                code = code or 2
            return code
        finally:
            out.flush()
            messages.flush()
            sys.stdout, sys.stderr = before

    return run


def results_console() -> "Console":
    """For results on standard output: as wide as the terminal, and wide enough where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=WIDE)


def say(console: "Console", text: str, style: str) -> None:
    """Print as it is: no markup, and no line broken inside a path."""
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)


class _Output:
    """A text stream that replaces what its encoding lacks, and drops what cannot be written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: Exception | None = None

    def write(self, text: str) -> int:
        encoding = getattr(self._stream, "encoding", None) or "utf-8"
        self._attempt(lambda: self._stream.write(_encodable(text, encoding)))
        return len(text)

    def flush(self) -> None:
        self._attempt(lambda: self._stream.flush())

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, action: Callable[[], object]) -> None:
        if self._stream is None or self.lost is not None:
            return
        try:
            action()
        except (OSError, ValueError) as error:  # ValueError: the stream was closed
            self.lost = error
            self._discard()

    def _discard(self) -> None:
        """Let what is still buffered go nowhere: Python writes it again at its end, and would fail."""
        try:
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self._stream.fileno())
            os.close(nowhere)
        except (OSError, ValueError, AttributeError):
            pass  # no descriptor of its own


def _encodable(text: str, encoding: str) -> str:
    try:
        text.encode(encoding)
    except UnicodeError:
        return "".join(_plain(sign, encoding) for sign in text)
    except LookupError:
        return text
    return text


def _plain(sign: str, encoding: str) -> str:
    try:
        sign.encode(encoding)
    except UnicodeError:
        name = unicodedata.name(sign, "")
        return PLAIN.get(sign, name.split()[-1].lower() if name.startswith("GREEK SMALL LETTER") else "?")
    return sign


def _occupy_standard_descriptors() -> None:
    """Open what is closed of 0, 1 and 2: else the next file, perhaps a data file, would become standard output."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
