"""Files that are whole or not there: written beside, and renamed into place."""

import contextlib
import errno
import os
import re
import secrets
import shutil
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path

__all__ = [
    "DAMAGED_ARRAYS",
    "LEFTOVER",
    "UNSUPPORTED",
    "sync",
    "sync_descriptor",
    "temporary_name",
    "write_beside",
    "write_folder_beside",
]

LEFTOVER = re.compile(r"\..*\.(?:[0-9a-f]{16}|\d+)\.part")
"""Names of what a killed process left half-written; those of earlier versions have the number of the process."""

DAMAGED_ARRAYS: tuple[type[Exception], ...] = (
    *(ValueError, TypeError, LookupError, AttributeError, SyntaxError, RuntimeError, EOFError),
    *(tokenize.TokenError, struct.error, zipfile.BadZipFile, zlib.error),
)
"""What NumPy, zipfile and their helpers raise for a damaged `.npy` or `.npz` file, besides OSError."""

UNSUPPORTED = (errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS)
"""What a file system says that cannot do what is asked of it."""


def temporary_name(path: Path) -> Path:
    """A name beside `path` that nobody can guess."""
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.part")


@contextlib.contextmanager
def write_beside(path: Path) -> Iterator[Path]:
    """A new, empty file beside `path`, renamed to it if the block succeeds and removed if it does not."""
    temporary = temporary_name(path)
    # Exclusive: never through a link, never into a file that is there. The mode is that of the user's umask.
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666))
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def write_folder_beside(path: Path, contents: Mapping[str, bytes]) -> None:
    """A folder of files, written beside and renamed into place; replaces one that is there."""
    temporary = temporary_name(path)
    temporary.mkdir(parents=True)
    try:
        for name, content in contents.items():
            (temporary / name).write_bytes(content)
            sync(temporary / name)
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
