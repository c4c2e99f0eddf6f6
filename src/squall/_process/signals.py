"""Ctrl-C, and the notices of batch systems and containers before they kill."""

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

STOPPING = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name))
"""Ctrl-C; what containers send; what batch systems send before the time of a job is over."""


class Stopped(KeyboardInterrupt):
    """A signal asks the process to stop; `number` is the signal."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Call a function at every signal to stop, in the main thread; another thread gets none."""
    before: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, signal.SIG_DFL if previous is None else previous)  # None: not set by Python


@contextlib.contextmanager
def notices_raise() -> Iterator[None]:
    """Raise `Stopped` at the first signal to stop, so that what is half-done is cleared up, and at each Ctrl-C."""
    received: list[int] = []

    def stop(number: int, _: object) -> None:
        if not received or number == signal.SIGINT:
            received.append(number)
            raise Stopped(received[0])

    with handled(stop):
        yield


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Let signals to stop wait in this thread until the block ends; processes started in it begin with them waiting."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
