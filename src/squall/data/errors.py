"""Errors of the data layer: each says the file, what was found, what is expected, and what to do."""

import difflib
import os
import re
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor

from squall._process.files import special_file
from squall._process.limits import too_large
from squall._types import Trajectories

GAPS = ". Where NaN stands for land or for missing times, `{}` takes it so"
"""Advice that follows a count of NaN; the braces take the option that it is about."""


DAMAGE = (
    ArithmeticError,
    AttributeError,
    LookupError,
    MemoryError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""What HDF5 and NumPy raise where the structure of a file is scrambled."""


class DataError(ValueError):
    """The data are not what they have to be."""


class MissingFileError(DataError, FileNotFoundError):
    """There is no such data file."""


def all_finite(values: Shaped[Tensor, "..."]) -> bool:
    """Whether no value is NaN or infinite. A sum keeps every NaN and infinity, and needs no second array."""
    return bool(torch.isfinite(values.sum())) or bool(torch.isfinite(values).all())


class NonFinite:
    """Counts what is not finite over pieces of a data set, and remembers where the first one is."""

    def __init__(self, fields: tuple[str, ...]) -> None:
        self.fields = fields
        self.count = 0
        self.values = 0
        self.trajectories: set[int] = set()
        self.first: tuple[int, int, str, tuple[int, ...]] | None = None
        self.everywhere: Tensor | None = None

    def look(self, values: Trajectories, trajectories: Any, starts: Any) -> None:
        """Look through windows (batch, time, channel, *space) that begin at `starts` of `trajectories`."""
        self.values += values.numel()
        if values.numel() == 0:
            return
        if all_finite(values):
            self.everywhere = torch.tensor(False)
            return
        bad = ~torch.isfinite(values)
        always = bad.flatten(0, 1).all(0)
        self.everywhere = always if self.everywhere is None else self.everywhere & always
        self.count += int(bad.sum())
        rows = bad.flatten(1).any(1).nonzero().flatten().tolist()
        self.trajectories.update(int(trajectories[row]) for row in rows)
        if self.first is None:
            row, time, channel, *point = bad.nonzero()[0].tolist()
            position = int(trajectories[row]), int(starts[row]) + time
            self.first = (*position, self.fields[channel], tuple(point))

    def refuse(self, what: str, more: str = "") -> None:
        """Raise `DataError` if anything was found.

        Raises:
            DataError: with the number of values that are NaN or infinite, and the place of the first.
        """
        if self.first is None:
            return
        trajectory, time, field, point = self.first
        concerned = sorted(self.trajectories)
        listed = ", ".join(map(str, concerned[:8])) + (", ..." if len(concerned) > 8 else "")
        raise DataError(
            f"{what}: {self.count} of {self.values} values are NaN or infinite; the first is at trajectory "
            f"{trajectory}, time index {time}, field '{field}', point {point}; trajectories concerned "
            f"({len(concerned)}): {listed}. {self._advice()}{more}"
        )

    def _advice(self) -> str:
        """What keeps all that is good: leaving out trajectories would leave out everything where land is NaN."""
        states = self.everywhere is not None and self.everywhere.ndim > 0 and self.values // self.everywhere.numel()
        points = 0 if self.everywhere is None else int(self.everywhere.sum())
        if states and self.count == points * states:
            return (
                f"These are the same {points} points of every state, as land or another mask would be: in a copy, "
                "write finite numbers there, such as 0, and give the loss the mask (`mask=`) that leaves them out"
            )
        return "In a copy, end these trajectories before the first such value, or leave them out"


def check_exists(path: Path, location: Path) -> None:
    """Refuse a path at which there is nothing, with the names that come near."""
    if not location.exists():
        raise MissingFileError(_missing(path, location))
    if not location.is_dir() and (special := special_file(location)):
        raise DataError(f"{path}: this is {special}; name a file or a folder of data")
    if location.is_file() and location.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty (0 bytes). Let its writer finish, or make or fetch it again")


def _missing(path: Path, location: Path) -> str:
    if address := re.search(r"(^|/)(https?|s3|gs|gcs|ftp|abfs):/", str(path)):
        return f"{path}: '{address[2]}:' begins an address, and only files of this machine are read: fetch it first"
    if location.is_symlink():
        return f"{path}: this is a link that leads nowhere (to {os.readlink(location)})"
    folder = next(parent for parent in location.parents if parent.is_dir())
    if folder != location.parent:
        return f"{path}: there is no such file; of its path, {folder} is there and the rest is not"
    names = sorted(entry.name for entry in folder.iterdir() if not entry.name.startswith("."))
    data = [name for name in names if name.endswith((".hdf5", ".h5"))]
    near = difflib.get_close_matches(location.name, names, n=3) or data[:3]
    return f"{path}: there is no such file" + (f"; the folder has {', '.join(near)}" if near else "")


def damaged(path: Path, error: Exception, what: str = "the file") -> str:
    """What to say about a file that cannot be read, or a part of it."""
    reason = str(error).strip("'\"")
    if too_large(error) and not isinstance(error, ZeroDivisionError):  # of chunks without a size
        return f"{path}: the memory does not suffice to read it ({reason})"
    advice = "Compare its checksum with that of its source; make or fetch it again if they differ"
    if "truncated" in reason or "ends before" in reason:
        return f"{path}: the file is truncated ({reason}). Let its writer finish, or make or fetch it again"
    return f"{path}: {what} cannot be read and may be damaged ({reason}). {advice}"
