"""Imported first, before PyTorch: an interrupt of the starting or ending `squall` command shows no traceback."""

import contextlib
import gc
import os
import signal
import sys
import threading
from collections.abc import Iterator

USER_MISTAKE, INTERRUPTED = 2, 130


def _is_the_command() -> bool:
    name = os.path.basename(sys.argv[0]).lower() if sys.argv else ""
    return name in ("squall", "squall.exe") or sys.orig_argv[1:3] in (["-m", "squall"], ["-m", "squall.cli"])


@contextlib.contextmanager
def imports_uncollected() -> Iterator[None]:
    """Collect no garbage in a block that imports PyTorch for the first time, and do not look at its objects later.

    Most of a million objects are looked through again and again otherwise: a sixth of the time that the imports take.
    """
    first = gc.isenabled() and "torch" not in sys.modules
    if first:
        gc.disable()
    try:
        yield
    finally:
        if first:
            gc.freeze()
            gc.enable()


def _end(*_: object) -> None:
    os.write(2, b"squall: interrupted\n")
    os._exit(INTERRUPTED)


if _is_the_command():
    in_main_thread = threading.current_thread() is threading.main_thread()
    if in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)
    try:
        os.getcwd()
    except OSError:  # PyTorch would end the process without saying why
        os.write(2, b"squall: the working folder is gone: change into another one\n")
        os._exit(USER_MISTAKE)
