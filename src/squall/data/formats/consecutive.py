"""Files that continue each other in time, as one long trajectory: a month, a year or a single state each."""

import bisect
import datetime
import itertools
import re
import warnings
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from squall._types import Trajectories
from squall.data.conditions import Condition, ConditionValues
from squall.data.description import Description
from squall.data.errors import DataError
from squall.data.formats.layout import ArrayFile
from squall.data.missing import Missing, Screened
from squall.data.source import Numbers, Source, View

OPEN_FILES = 128
"""Files that one source holds open; a process may hold about a thousand."""

MONTHS = (0, 31, 59, 90, 120, 151, 181, 212, 243, 273, 304, 334)
"""Days before each month of a year without 29 February."""

DATE = r"(\d+)-(\d+)-(\d+)(?:[T ]+(\d+)(?::(\d+)(?::(\d+(?:\.\d*)?))?)?)?\s*(?:Z|UTC|[+]?0+:?0*)?"
"""Year, month and day, then hour, minute and second, in UTC."""


class Recent:
    """Sources in files, of which those read last stay open."""

    def __init__(self, sources: Sequence[Source]) -> None:
        self.sources = list(sources)
        self._used: dict[int, None] = {}

    def __getitem__(self, number: int) -> Source:
        self._used.pop(number, None)
        self._used[number] = None
        if len(self._used) > OPEN_FILES:
            oldest = next(iter(self._used))
            del self._used[oldest]
            getattr(self.sources[oldest], "close", lambda: None)()
        return self.sources[number]


class Continued(Screened, View):
    """The states of several files one after the other in time; a time that no file has is a gap.

    Args:
        path: the folder.
        files: of the same trajectories, in the order of time.
        offsets: time index of the first state of each file.
        dt: time between two states.
    """

    def __init__(self, path: Path, files: Sequence[ArrayFile], offsets: Sequence[int], dt: float) -> None:
        super().__init__(files[0])
        self.path, self.files, self.offsets = path, list(files), list(offsets)
        self._recent = Recent(self.files)
        self._description = replace(self.files[0].description, dt=dt, name=path.name)
        self._times = self.offsets[-1] + self.files[-1].shape[1]

    @property
    def format(self) -> str:
        """What the files were taken for."""
        first, last = self.files[0].path.name, self.files[-1].path.name
        return f"{len(self.files)} files, each {self.files[0].format}, joined in time from {first} to {last}"

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and what was not understood."""
        notes = [note for file in self.files for note in file.notes]
        if absent := self._times - sum(file.shape[1] for file in self.files):
            notes.append(f"times: {absent} of {self._times} are in no file; they are gaps")
        return tuple(dict.fromkeys(notes))

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.files[0].shape
        return (first[0], self._times, *first[2:])

    @property
    def description(self) -> Description:
        return self._description

    @property
    def piece_bytes(self) -> int:
        return self.files[0].piece_bytes

    @property
    def missing(self) -> Missing:
        known = self._missing is not None
        missing = super().missing
        if not known and missing.valid is not None:
            pairs = [pair for pair in zip(self.files, self.offsets, strict=True) if pair[0].shape[1] > 1]
            left_out = [f.path.name for f, start in pairs if not missing.valid[:, start : start + f.shape[1]].any()]
            if left_out:
                warnings.warn(
                    f"{self.path}: the mask differs between files: every state of {', '.join(left_out[:4])} "
                    f"({len(left_out)} files) lacks values that others have, and is left out as a gap",
                    stacklevel=2,
                )
        return missing

    @property
    def conditions(self) -> tuple[Condition, ...]:
        everywhere = set.intersection(*({c.name for c in file.conditions} for file in self.files))
        layout = self.files[0].layout
        alone = not any(v.by_time for v in layout.states)  # a single state each, without a time axis: any may move
        moving = {v.name for v in layout.conditions if v.by_time or alone}
        return tuple(
            Condition.of(c.name, (c.shape[0], self._times if c.name in moving else 1, *c.shape[2:]))
            for c in self.files[0].conditions
            if c.name in everywhere
        )

    def _pieces(self, starts: Numbers, length: int) -> list[tuple[ArrayFile, Int64[Tensor, " _"], int, int, int]]:
        """Which file has which times of which windows: file, rows, first time in the window, count, its offset."""
        groups: dict[tuple[int, int, int], list[int]] = defaultdict(list)
        for row, start in enumerate(starts.tolist()):
            number = max(0, bisect.bisect_right(self.offsets, start) - 1)
            while number < len(self.files) and self.offsets[number] < start + length:
                first = max(self.offsets[number], start)
                stop = min(self.offsets[number] + self.files[number].shape[1], start + length)
                if first < stop:
                    groups[number, first - start, stop - first].append(row)
                number += 1
        pieces = []
        for (number, first, count), rows in sorted(groups.items()):
            file = self._recent[number]
            assert isinstance(file, ArrayFile)
            pieces.append((file, torch.tensor(rows), first, count, self.offsets[number]))
        return pieces

    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        states = torch.full((len(trajectories), length, *self.shape[2:]), torch.nan, dtype=self.dtype)
        for file, rows, first, count, offset in self._pieces(starts, length):
            states[rows, first : first + count] = file._raw(trajectories[rows], starts[rows] + (first - offset), count)
        return states

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        about = next(c for c in self.conditions if c.name == name)
        if about.shape[1] == 1:
            return self.files[0]._condition(name, trajectories, torch.zeros_like(starts), 1)
        values = torch.full((len(trajectories), length, *about.shape[2:]), torch.nan, dtype=self.dtype)
        for file, rows, first, count, offset in self._pieces(starts, length):
            inside = starts[rows] + (first - offset)
            values[rows, first : first + count] = file._condition(name, trajectories[rows], inside, count)
        known = values[~torch.isnan(values)]
        return values.nan_to_num(float(known.mean()) if len(known) else 0.0)  # in gaps, which no window touches


def join_in_time(path: Path, files: Sequence[Source], *, dt_given: bool) -> list[Source]:
    """Files that continue each other in time as one source each; the files as they are where they do not.

    A file continues another where its first time is one step after the last time of the other. Where this leaves
    trajectories of different lengths, the times between them are gaps of one trajectory.

    Args:
        path: the folder.
        files: as they were opened.
        dt_given: whether the user said dt: times are then taken as equal, and none can be missing.
    """
    spans = [span for file in files if isinstance(file, ArrayFile) and (span := _span(file)) is not None]
    clocks = {clock for clock, *_ in spans}
    if len(spans) < len(files) or len(files) < 2 or len(clocks) != 1:
        return list(files)
    order = sorted(range(len(files)), key=lambda number: spans[number][1])
    ordered = [file for number in order if isinstance(file := files[number], ArrayFile)]
    times = [spans[number][1:] for number in order]
    steps = [
        (last - first) / (file.shape[1] - 1) for file, (first, last) in zip(ordered, times, strict=True) if last > first
    ]
    apart = [after[0] - before[1] for before, after in itertools.pairwise(times)]
    step = min(steps or apart)
    if step <= 0 or min(apart) <= 0:
        return list(files)
    # Months of 28 to 31 days differ by a tenth of their mean: who gives dt takes them as equal. Otherwise times
    # may differ by their rounding in float32, far below a hundredth of a step.
    counts = [1 if dt_given and 0.5 < gap / step < 1.5 else gap / step for gap in apart]
    whole = all(abs(count - round(count)) < 1e-2 for count in counts)
    alike = all(abs(other / step - 1) < (0.2 if dt_given else 1e-3) for other in steps)
    if not whole or not alike:
        return list(files)
    for file in ordered[1:]:
        check_alike(ordered[0], file, times=False)
    dt = step if not steps and not dt_given else max(ordered, key=lambda file: file.shape[1]).dt
    runs = _runs(ordered, [round(count) for count in counts])
    return [Continued(path, group, offsets, dt) if len(group) > 1 else group[0] for group, offsets in runs]


def _runs(files: Sequence[ArrayFile], counts: Sequence[int]) -> list[tuple[list[ArrayFile], list[int]]]:
    """Groups of files without a hole, if these are equally long; else all files with their holes."""
    groups, offsets = [[files[0]]], [[0]]
    for count, before, file in zip(counts, files, files[1:], strict=False):
        if count == 1:
            offsets[-1].append(offsets[-1][-1] + before.shape[1])
            groups[-1].append(file)
        else:
            groups.append([file])
            offsets.append([0])
    lengths = {places[-1] + group[-1].shape[1] for group, places in zip(groups, offsets, strict=True)}
    if len(lengths) == 1:
        return list(zip(groups, offsets, strict=True))
    steps = [file.shape[1] - 1 + count for file, count in zip(files, counts, strict=False)]
    return [(list(files), [0, *itertools.accumulate(steps)])]


def _span(file: ArrayFile) -> tuple[str, float, float] | None:
    """The clock of a file, and its first and last time by that clock; `None` where they are not known."""
    if file.layout.span is None:
        return None
    first, last = file.layout.span
    about = file.description.provenance
    if "first_time" not in about:
        return "", first, last
    begin, _, date = str(about["first_time"]).partition(" hours since ")
    calendar = str(about.get("calendar", "standard")).lower()
    if not date:  # months or years, whose length differs
        return begin, first, last
    hours = date_hours(date, calendar)
    return None if hours is None else (calendar, hours + float(begin), hours + float(begin) + last - first)


def date_hours(date: str, calendar: str = "standard") -> float | None:
    """Hours from the year 0 to a date in a calendar of the CF conventions; `None` where it cannot be read.

    Example:
        >>> date_hours("2001-03-01") - date_hours("2001-02-28T00:00:00"), date_hours("2000-03-01", "360_day")
        (24.0, 17281464.0)
    """
    match = re.fullmatch(DATE, date.strip())
    if match is None:
        return None
    year, month, day = (int(match[i]) for i in (1, 2, 3))
    hour, minute, second = (float(match[i] or 0) for i in (4, 5, 6))
    if not 1 <= month <= 12:
        return None
    if calendar in ("noleap", "365_day"):
        days = 365 * year + MONTHS[month - 1] + day
    elif calendar == "360_day":
        days = 360 * year + 30 * (month - 1) + day
    elif calendar in ("standard", "gregorian", "proleptic_gregorian"):
        try:
            days = datetime.date(year, month, day).toordinal()
        except ValueError:
            return None
    else:
        return None
    return 24.0 * days + hour + minute / 60 + second / 3600


def check_alike(first: Source, other: Source, *, times: bool = True) -> None:
    """Refuse files that differ.

    Raises:
        DataError: in what they differ.
    """
    pairs = {
        "fields": (first.fields, other.fields),
        "sizes (time, channel, *space)": (first.shape[1:], other.shape[1:]),
        "time steps": (first.dt, other.dt),
        "boundaries": (first.boundary, other.boundary),
        "types": (first.dtype, other.dtype),
    }
    if not times:
        del pairs["time steps"]
        pairs["sizes (channel, *space)"] = tuple(shape[1:] for shape in pairs.pop("sizes (time, channel, *space)"))
    for what, (here, there) in pairs.items():
        if here != there:
            raise DataError(
                f"the {what} differ between files: {file_name(first)} has {here}, {file_name(other)} has {there}. "
                "Files in one folder have to be of one kind: open them apart, or choose fields=[...]"
            )
    for axis, here, there in zip(first.description.axes, first.coordinates, other.coordinates, strict=True):
        if not np.allclose(here, there, rtol=1e-6, atol=1e-6 * float(np.ptp(here) or 1)):
            raise DataError(f"the points of the axis {axis} differ between {file_name(first)} and {file_name(other)}")


def file_name(source: Source) -> str:
    """Name of the file of a source, for messages."""
    return Path(getattr(source, "path", source.name)).name


def refuse_single(file: Source) -> None:
    """Refuse a file of one time that no other file continues.

    Raises:
        DataError: that two times are needed.
    """
    if file.shape[1] < 2:
        raise DataError(
            f"{getattr(file, 'path', file.name)}: it has one time, and no file in the folder continues it one step "
            "later; at least two are needed to learn a step from"
        )
