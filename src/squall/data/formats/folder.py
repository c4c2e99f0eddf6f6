"""Several files as one source: a folder of The Well with train, valid and test, or files of one kind."""

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from squall._process.documents import load_yaml
from squall._types import Trajectories
from squall.data.conditions import Areas, Condition, ConditionValues, Mask, Valid
from squall.data.description import Description
from squall.data.errors import DataError
from squall.data.missing import Screened
from squall.data.source import Numbers, Source

Rows = Int64[Tensor, " _"]
"""Numbers of those windows that lie in one file."""

SUFFIXES = (".hdf5", ".h5", ".nc", ".cdf", ".npy", ".npz", ".pt", ".mat")
PARTS = ("train", "valid", "test")
"""Names of the folders in The Well's data sets."""


class Joint(Source):
    """The trajectories of several sources one after the other.

    Raises:
        DataError: where fields, sizes, points, steps or masks differ.
    """

    def __init__(self, path: Path, sources: Sequence[Source], statistics: dict | None = None) -> None:
        self.path, self.sources = path, list(sources)
        self._statistics = _statistics(statistics, self.sources[0].fields)
        self._ends = torch.tensor([source.trajectories for source in self.sources]).cumsum(0)
        self._mask: Tensor | None = None
        self._checked_masks = False
        for source in self.sources[1:]:
            _check_alike(self.sources[0], source)
        first = self.sources[0].description
        everywhere = set.intersection(*(set(source.parameters.items()) for source in self.sources))
        shared = {name: value for name, value in first.parameters.items() if (name, value) in everywhere}
        self._description = dataclasses.replace(first, parameters=shared)

    @property
    def format(self) -> str:
        """What the files were taken for."""
        return f"{len(self.sources)} files, each {getattr(self.sources[0], 'format', 'unknown')}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and what was not understood."""
        return tuple(dict.fromkeys(note for source in self.sources for note in getattr(source, "notes", ())))

    @property
    def shape(self) -> tuple[int, ...]:
        return (int(self._ends[-1]), *self.sources[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        return self.sources[0].dtype

    @property
    def description(self) -> Description:
        return self._description

    @property
    def measure(self) -> Areas | None:
        return self.sources[0].measure

    @property
    def mask(self) -> Mask | None:
        """The mask that all files share.

        Raises:
            DataError: where the masks of two files differ.
        """
        if not self._checked_masks:
            first, *others = (source.mask for source in self.sources)
            for source, mask in zip(self.sources[1:], others, strict=True):
                same = mask is None if first is None else mask is not None and torch.equal(mask, first)
                if not same:
                    counts = [0 if m is None else int((~m).sum()) for m in (first, mask)]
                    raise DataError(
                        f"{self.path}: the mask differs between files: {_name(self.sources[0])} masks {counts[0]} "
                        f"points, {_name(source)} {counts[1]}, not the same ones. One mask holds for all: open them "
                        "apart"
                    )
            self._mask, self._checked_masks = first, True
            screened = [source for source in self.sources if isinstance(source, Screened)]
            if first is not None and screened:  # one number at a masked point, in whichever file
                fill = torch.stack([source.missing.fill for source in screened]).mean(0)
                for source in screened:
                    source._missing = source.missing._replace(fill=fill)
        return self._mask

    @property
    def valid(self) -> Valid | None:
        found = [source.valid for source in self.sources]
        return _stacked(found, self.sources)

    def _known_valid(self) -> Valid | None:
        return _stacked([source._known_valid() for source in self.sources], self.sources)

    @property
    def conditions(self) -> tuple[Condition, ...]:
        everywhere = set.intersection(*({c.name for c in source.conditions} for source in self.sources))
        return tuple(
            Condition(c.name, c.kind, (self.trajectories, *c.shape[1:]))
            for c in self.sources[0].conditions
            if c.name in everywhere
        )

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        states = torch.empty((len(trajectories), length, *self.shape[2:]), dtype=self.dtype)
        for source, rows, within in self._by_file(trajectories):
            states[rows] = source._gather(within, starts[rows], length)
        if not self._checked_masks and any(isinstance(s, Screened) and s._missing is not None for s in self.sources):
            _ = self.mask  # a first NaN was met: from now on, all files fill masked points alike
            return self._gather(trajectories, starts, length)
        return states

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        values: Tensor | None = None
        for source, rows, within in self._by_file(trajectories):
            piece = source._condition(name, within, starts[rows], length)
            if values is None:
                values = piece.new_empty((len(trajectories), *piece.shape[1:]))
            values[rows] = piece
        return torch.empty(0) if values is None else values

    def _by_file(self, trajectories: Numbers) -> list[tuple[Source, Rows, Rows]]:
        files = torch.bucketize(trajectories, self._ends, right=True)
        found = []
        for number in files.unique().tolist():
            rows = (files == number).nonzero().flatten()
            first = int(self._ends[number - 1]) if number else 0
            found.append((self.sources[number], rows, trajectories[rows] - first))
        return found


def read_folder(path: Path, place: Path, open_file: Callable[[Path], Source]) -> Joint:
    """All data files of a folder, or of its train, valid and test.

    Raises:
        DataError: where there is none, or the files differ.
    """
    base = place / "data" if (place / "data").is_dir() else place
    groups = {part: _files(base / part) for part in PARTS if (base / part).is_dir()} or {"": _files(base)}
    files = [(part, file) for part, listed in groups.items() for file in listed]
    if not files:
        found = ", ".join(sorted(entry.name for entry in place.iterdir())[:6]) or "nothing"
        raise DataError(
            f"{path}: this is a folder without data files: looked for {', '.join(SUFFIXES)} in it, in data/ and in "
            f"train/, valid/ and test/, and for Zarr (zarr.json, .zgroup); found {found}"
        )
    written = next(
        (p for p in (place / "stats.yaml", base.parent / "stats.yaml", base / "stats.yaml") if p.is_file()), None
    )
    sources = [open_file(file) for _, file in files]
    joint = Joint(path, sources, load_yaml(written) if written else None)
    if set(groups) & set(PARTS):
        names, counts = [part for part, _ in files], [source.trajectories for source in sources]
        sizes = [sum(n for name, n in zip(names, counts, strict=True) if name == part) for part in PARTS]
        ends = np.cumsum([0, *sizes]).tolist()
        joint._own_parts = {part: range(*pair) for part, pair in zip(PARTS, itertools.pairwise(ends), strict=True)}
    return joint


def _files(folder: Path) -> list[Path]:
    return sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES and not entry.name.startswith("."))


def _name(source: Source) -> str:
    return Path(getattr(source, "path", source.name)).name


def _stacked(valid: list[Tensor | None], sources: list[Source]) -> Valid | None:
    if all(part is None for part in valid):
        return None
    whole = [torch.ones(source.shape[:2], dtype=torch.bool) for source in sources]
    return torch.cat([ones if part is None else part for part, ones in zip(valid, whole, strict=True)])


def _check_alike(first: Source, other: Source) -> None:
    pairs = {
        "fields": (first.fields, other.fields),
        "sizes (time, channel, *space)": (first.shape[1:], other.shape[1:]),
        "time steps": (first.dt, other.dt),
        "boundaries": (first.boundary, other.boundary),
        "types": (first.dtype, other.dtype),
    }
    for what, (one, two) in pairs.items():
        if one != two:
            raise DataError(
                f"the {what} differ between files: {_name(first)} has {one}, {_name(other)} has {two}. Files in one "
                "folder have to be of one kind: open them apart, or choose fields=[...]"
            )
    for axis, one, two in zip(first.description.axes, first.coordinates, other.coordinates, strict=True):
        if not np.allclose(one, two, rtol=1e-6, atol=1e-6 * float(np.ptp(one) or 1)):
            raise DataError(f"the points of the axis {axis} differ between {_name(first)} and {_name(other)}")


def _statistics(values: dict | None, fields: tuple[str, ...]) -> tuple[tuple[float, ...], tuple[float, ...]] | None:
    """Means and deviations of `stats.yaml`, a number per field or one per component; `None` where a field lacks."""
    if not isinstance(values, dict) or not {"mean", "std"} <= values.keys():
        return None
    columns = []
    for key in ("mean", "std"):
        flat: list[float] = []
        for value in (values[key].get(name) for name in _stems(fields, values[key])):
            flat.extend(np.ravel(np.asarray(value, dtype=float)).tolist())
        columns.append(tuple(flat))
    mean, std = columns
    fit = len(mean) == len(std) == len(fields) and all(np.isfinite([*mean, *std])) and min(std) > 0
    return (mean, std) if fit else None


def _stems(fields: tuple[str, ...], stats: dict) -> list[str]:
    """Names of the fields as `stats.yaml` has them: velocity for velocity_x and velocity_y."""
    stems = []
    for name in fields:
        stem = name if name in stats else name.rpartition("_")[0]
        if stem in stats and stem not in stems:
            stems.append(stem)
    return stems
