"""Whether HDF5 comes to an end with the structure of a file: found out in a process of its own.

A damaged file can send HDF5 round in a circle, which no signal of Python's and no thread can end.
"""

import contextlib
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import h5py

from squall.data.arrays import stamp
from squall.data.errors import DataError

SECONDS = 3.0
"""Processor time that HDF5 may take for one file, a hundred times what a small one takes; waiting for a disk does not
count."""

ENOUGH = 1.0
"""Processor time after which the rest of a large file is not looked at: well below `SECONDS`, so that no sound file is
refused."""

_refusing = ContextVar("refusing", default=False)
_passed: set[tuple[Path, int, int]] = set()


@contextlib.contextmanager
def endless_refused() -> Iterator[None]:
    """Within this block, `refuse_endless` looks at files, each once in a process: a command may not hang."""
    token = _refusing.set(True)
    try:
        yield
    finally:
        _refusing.reset(token)


def refuse_endless(locations: Sequence[Path]) -> None:
    """Read the structure of HDF5 files in a forked process; files of other formats, and those seen before, are skipped.

    Raises:
        DataError: where this process is ended by its timer or a crash, with the name of the file.
    """
    if not (_refusing.get() and hasattr(os, "fork")):
        return
    stamps = {location: (location, *stamp(location)) for location in locations if location.is_file()}
    new = [location for location in stamps if stamps[location] not in _passed]
    if not new:
        return
    finished, ended_by = _in_a_process(new)
    _passed.update(stamps[location] for location in new[:finished])
    if ended_by in (signal.SIGPROF, signal.SIGSEGV, signal.SIGBUS, signal.SIGABRT):
        problem = "loops endlessly" if ended_by == signal.SIGPROF else f"crashes ({signal.Signals(ended_by).name})"
        raise DataError(
            f"{new[finished]}: HDF5 {problem} when it reads the structure of this file, which is damaged. Compare its "
            "checksum with that of its source; make or fetch it again"
        )


def _in_a_process(locations: Sequence[Path]) -> tuple[int, int]:
    """How many files were read, and the signal that ended the process (0: none)."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside threads: the child touches HDF5 only
        try:
            child = os.fork()
        except OSError:  # no more processes are allowed: then without
            child = None
    if child is None:
        os.close(reader)
        os.close(writer)
        return 0, 0
    if child == 0:
        try:
            for number in (signal.SIGPROF, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            for location in locations:
                signal.setitimer(signal.ITIMER_PROF, SECONDS)
                with contextlib.suppress(Exception):  # the parent meets it again, and explains it
                    _walk(location)
                os.write(writer, b".")
        finally:
            os._exit(0)
    os.close(writer)
    try:
        with open(reader, "rb") as progress:
            finished = len(progress.read())
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    finally:
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return finished, max(0, -code)


def _walk(location: Path) -> None:
    """Read all that opening a file reads: links within it, attributes, and the tables of its chunks."""
    if not h5py.is_hdf5(location):
        return
    end = time.process_time() + ENOUGH
    with h5py.File(location, "r", locking=False) as file:
        left: list[Any] = [file]
        seen: set[Any] = set()
        while left and time.process_time() < end:
            here: Any = left.pop()
            if here in seen:  # by another link
                continue
            seen.add(here)
            for name in _names(here.attrs):
                with contextlib.suppress(Exception):
                    here.attrs[name]
            if not isinstance(here, h5py.Group):
                with contextlib.suppress(Exception):  # neither in chunks nor even a dataset
                    here.id.get_num_chunks()
                continue
            for name in _names(here):
                with contextlib.suppress(Exception):
                    if isinstance(here.get(name, getlink=True), h5py.HardLink):
                        left.append(here[name])


def _names(items: Any) -> list[str]:
    """The names of the members or attributes that can be listed."""
    try:
        return list(items)
    except Exception:  # whatever HDF5 makes of the damage
        return []
