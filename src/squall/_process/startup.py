"""Imported first, before PyTorch: the `squall` command starts without garbage collection, and an interrupt of its start
or end shows no traceback."""

import gc
import os
import signal
import sys
import threading

USER_MISTAKE, INTERRUPTED = 2, 130


def _is_the_command() -> bool:
    name = os.path.basename(sys.argv[0]).lower() if sys.argv else ""
    return name in ("squall", "squall.exe") or sys.orig_argv[1:3] in (["-m", "squall"], ["-m", "squall.cli"])


def all_imported() -> None:
    """Collect garbage from now on, among what comes after the imports."""
    if _is_the_command() and not gc.isenabled():
        gc.freeze()
        gc.enable()


def _end(*_: object) -> None:
    os.write(2, b"squall: interrupted\n")
    os._exit(INTERRUPTED)


if (
    _is_the_command()
    and threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) is signal.default_int_handler
):
    signal.signal(signal.SIGINT, _end)

if _is_the_command():
    gc.disable()  # it would look through the objects of PyTorch again and again: a sixth of the time to import it
    try:
        os.getcwd()
    except OSError:  # PyTorch would end the process without saying why
        os.write(2, b"squall: the working folder is gone: change into another one\n")
        os._exit(USER_MISTAKE)
