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
from squall.data.conditions import Condition, ConditionValues, Mask, Valid
from squall.data.description import Description
from squall.data.endless import refuse_endless
from squall.data.errors import DataError
from squall.data.formats.consecutive import Continued, Recent, check_alike, file_name, join_in_time, refuse_single
from squall.data.formats.layout import ArrayFile, OneTimeError
from squall.data.missing import Screened
from squall.data.reading import TrajectoryFile
from squall.data.source import Numbers, Source, View

Rows = Int64[Tensor, " _"]
"""Numbers of those windows that lie in one file."""

SUFFIXES = (".hdf5", ".h5", ".nc", ".nc4", ".cdf", ".zarr", ".npy", ".npz", ".pt", ".mat")
PARTS = ("train", "valid", "test")
"""Names of the folders in The Well's data sets."""


class Joint(View):
    """The trajectories of several sources one after the other.

    Raises:
        DataError: where fields, sizes, points, steps or masks differ.
    """

    def __init__(self, path: Path, sources: Sequence[Source], statistics: dict | None = None) -> None:
        super().__init__(sources[0])
        self.path, self.sources, self._recent = path, list(sources), Recent(sources)
        self._statistics = _statistics(statistics, self.sources[0].fields)
        self._ends = torch.tensor([source.trajectories for source in self.sources]).cumsum(0)
        self._mask: Tensor | None = None
        self._checked_masks = False
        for source in self.sources[1:]:
            check_alike(self.sources[0], source)
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
    def description(self) -> Description:
        return self._description

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
                        f"{self.path}: the mask differs between files: {file_name(self.sources[0])} masks {counts[0]} "
                        f"points, {file_name(source)} {counts[1]}, not the same ones. One mask holds for all: open "
                        "them apart"
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
        parts = [source.valid for source in self.sources]
        return _stacked(parts, self.sources)

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
        pieces = []
        for number in files.unique().tolist():
            rows = (files == number).nonzero().flatten()
            first = int(self._ends[number - 1]) if number else 0
            pieces.append((self._recent[number], rows, trajectories[rows] - first))
        return pieces


def read_folder(
    path: Path,
    location: Path,
    open_file: Callable[[Path, float | None], TrajectoryFile | ArrayFile],
    known: Callable[[Path], str],
    *,
    dt_given: bool,
) -> Joint | Continued:
    """All data files of a folder, or of its train, valid and test; those that continue each other in time are joined.

    Args:
        path: for messages.
        location: the folder.
        open_file: opens a file; with a number also one of a single time, whose time step is then this.
        known: the format of a file, "" for none.
        dt_given: whether the user said the time step.

    Raises:
        DataError: where there is none, or the files differ.
    """
    base = location / "data" if (location / "data").is_dir() else location
    folders = {part: base / part for part in PARTS if (base / part).is_dir()} or {"": base}
    groups = {part: _files(folder, known) for part, folder in folders.items()}
    if not any(groups.values()):
        names = ", ".join(sorted(entry.name for entry in location.iterdir())[:6]) or "nothing"
        raise DataError(
            f"{path}: this is a folder without data files: looked for {', '.join(SUFFIXES)} in it, in data/ and in "
            f"train/, valid/ and test/, and for Zarr (zarr.json, .zgroup); found {names}"
        )
    refuse_endless([file for files in groups.values() for file in files])  # all in one process
    written = next(
        (p for p in (location / "stats.yaml", base.parent / "stats.yaml", base / "stats.yaml") if p.is_file()), None
    )
    joined = {
        part: join_in_time(path, _open_all(files, open_file), dt_given=dt_given) for part, files in groups.items()
    }
    sources = [source for part in joined.values() for source in part]
    for source in sources:
        refuse_single(source)
    if len(sources) == 1 and isinstance(sources[0], Continued):
        return sources[0]
    joint = Joint(path, sources, load_yaml(written) if written else None)
    if set(groups) & set(PARTS):
        sizes = [sum(source.trajectories for source in joined.get(part, ())) for part in PARTS]
        ends = np.cumsum([0, *sizes]).tolist()
        joint._own_parts = {part: range(*pair) for part, pair in zip(PARTS, itertools.pairwise(ends), strict=True)}
    return joint


def _files(folder: Path, known: Callable[[Path], str]) -> list[Path]:
    """The data files of a folder by their names; by their content, where no name ends as those of data do."""
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    named = [entry for entry in entries if entry.suffix in SUFFIXES]
    return named or [entry for entry in entries if entry.is_file() and known(entry)]


def _open_all(files: list[Path], open_file: Callable[[Path, float | None], TrajectoryFile | ArrayFile]) -> list[Source]:
    try:
        return [open_file(file, None) for file in files]
    except OneTimeError:
        return [open_file(file, 1.0) for file in files]


def _stacked(valid: list[Tensor | None], sources: list[Source]) -> Valid | None:
    if all(part is None for part in valid):
        return None
    whole = [torch.ones(source.shape[:2], dtype=torch.bool) for source in sources]
    return torch.cat([ones if part is None else part for part, ones in zip(valid, whole, strict=True)])


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
