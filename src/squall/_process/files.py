"""Files that are whole or not there: written beside, and renamed into place."""

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import struct
import time
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from jaxtyping import Float64

HALF_WRITTEN = re.compile(r"\..*\.[0-9a-f]{16}\.part(?:\.gif|\.mp4)?")
"""Names of what a killed process left half-written, animations among them."""

DAMAGED_ARRAYS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, LookupError, AttributeError, SyntaxError, RuntimeError, EOFError),
    *(tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What NumPy, zipfile and their helpers raise for a damaged `.npy` or `.npz` file, besides OSError."""

LOCK_TRIES = 100
"""One second in all, which a sweep of a folder does not take."""

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that cannot do what is asked of it."""


def special_file(path: Path) -> str | None:
    """What a path is instead of a file, such as "a folder"; None for a file. Opening a pipe would block.

    Raises:
        OSError: if nothing is there.
    """
    mode = path.stat().st_mode
    kinds = {"a folder": stat.S_ISDIR, "a named pipe": stat.S_ISFIFO, "a socket": stat.S_ISSOCK}
    if stat.S_ISREG(mode):
        return None
    return next((name for name, is_kind in kinds.items() if is_kind(mode)), "a device")


def sha256(path: Path) -> str:
    """Of the content of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(path: Path, another: str = "another name") -> None:
    """Raise FileExistsError if there is anything at the path, even a link to nothing."""
    if os.path.lexists(path):
        raise FileExistsError(f"{path} exists and is not overwritten: choose {another}, or move it away")


def read_array(path: Path, option: str) -> Float64[np.ndarray, "..."]:
    """The real numbers of a `.npy` file in float64; ValueError, with the option that named it, if there are none."""
    if special := special_file(path):
        raise ValueError(f"{option} {path} is {special}, not a file")
    try:
        values = np.load(path, allow_pickle=False)
    except (OSError, *DAMAGED_ARRAYS) as error:
        raise ValueError(
            f"{option} {path} cannot be read as an array of numbers: save one with `numpy.save`, as float64"
        ) from error
    if not isinstance(values, np.ndarray):
        raise ValueError(f"{option} {path} holds several arrays: save the one of the states with `numpy.save`")
    if not (np.issubdtype(values.dtype, np.floating) or np.issubdtype(values.dtype, np.integer)):
        raise ValueError(f"{option} {path} holds {values.dtype}, but must hold real numbers")
    return np.asarray(values, dtype=np.float64)


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody can guess."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def writing_into(folder: Path) -> Iterator[None]:
    """Hold a folder while a file is written beside its place; first remove what killed processes left there.

    A missing folder and its missing parents are made, and removed again if the block fails. Writers share a lock of the
    folder, which goes with its process however that ends. Who gets it alone knows that nobody else writes there. Where
    folders cannot be locked, nothing is swept away.
    """
    with _made(folder), contextlib.ExitStack() as stack:
        with contextlib.suppress(ImportError, OSError):
            import fcntl

            held = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, held)
            with contextlib.suppress(OSError):
                fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _sweep(folder)
            for _ in range(LOCK_TRIES):  # another process may be sweeping now
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(held, fcntl.LOCK_SH | fcntl.LOCK_NB)
                    break
                time.sleep(0.01)
        yield


@contextlib.contextmanager
def _made(folder: Path) -> Iterator[None]:
    made: list[Path] = []
    missing = [parent for parent in (folder, *folder.parents) if not parent.exists()]
    try:
        for parent in reversed(missing):
            with contextlib.suppress(FileExistsError):  # another process made it: it is not ours to remove
                parent.mkdir()
                made.append(parent)
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for parent in reversed(made):
            with contextlib.suppress(OSError):  # another process wrote into it
                parent.rmdir()
        raise


def _sweep(folder: Path) -> None:
    with os.scandir(folder) as entries:
        left = [entry for entry in entries if HALF_WRITTEN.fullmatch(entry.name)]
    for entry in left:
        with contextlib.suppress(OSError):
            shutil.rmtree(entry.path) if entry.is_dir(follow_symlinks=False) else os.unlink(entry.path)


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, renamed to it if the block succeeds and removed if it does not."""
    temporary = temporary_name(path)
    with writing_into(path.parent):
        # Exclusive: never through a link, never into a file that is there. The mode is that of the user's umask.
        os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
        try:
            yield temporary
            sync(temporary)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> Path:
    """A text file in UTF-8, written beside and renamed into place; returns the path."""
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def write_folder_beside(path: Path, contents: Mapping[str, bytes], *, replace: bool = True) -> None:
    """A folder of files, written beside and renamed into place.

    Raises:
        OSError: if a folder with files is there, which is not to be replaced.
    """
    temporary = temporary_name(path)
    with writing_into(path.parent):
        temporary.mkdir()
        try:
            for name, content in contents.items():
                (temporary / name).write_bytes(content)
                sync(temporary / name)
            if replace:
                shutil.rmtree(path, ignore_errors=True)
            os.replace(temporary, path)
            sync(path.parent)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk, where the file system can say so."""
    folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except OSError:
        if folder:  # one that may be written to but not listed; Windows opens none
            return
        raise
    try:
        sync_descriptor(descriptor)
    finally:
        os.close(descriptor)


def sync_descriptor(descriptor: int) -> None:
    """Wait until an open file is on the disk, where its file system can say so."""
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
