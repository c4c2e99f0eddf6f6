"""Imported first, before PyTorch: an interrupt of the starting or ending `squall` command shows no traceback."""

import os
import signal
import sys
import threading

USER_MISTAKE, INTERRUPTED = 2, 130


def _is_the_command() -> bool:
    name = os.path.basename(sys.argv[0]).lower() if sys.argv else ""
    return name in ("squall", "squall.exe") or sys.orig_argv[1:3] == ["-m", "squall.cli"]


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
    try:
        os.getcwd()
    except OSError:  # PyTorch would end the process without saying why
        os.write(2, b"squall: the working folder is gone: change into another one\n")
        os._exit(USER_MISTAKE)
