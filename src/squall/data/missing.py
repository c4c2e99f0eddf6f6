"""Missing values: NaN that never changes is a mask, NaN that comes and goes is a gap."""

import abc
import warnings
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float64, Int64
from torch import Tensor

from squall._types import Trajectories
from squall.data.conditions import Mask, Valid
from squall.data.errors import GAPS, DataError, NonFinite, all_finite
from squall.data.source import CHUNK_BYTES, Numbers, Source, View


class Missing(NamedTuple):
    """Where values are missing.

    Attributes:
        mask: (channel, *space), False where every state lacks a value; `None` where that is nowhere.
        valid: (trajectory, time), False where a state lacks a value that others have; `None` where none does.
        fill: (channel,), the mean of each field over what is there: it stands at masked points.
    """

    mask: Mask | None
    valid: Valid | None
    fill: Float64[Tensor, " channel"]


class Screened(Source):
    """A source whose NaN stand for missing values.

    All values are read once, piece by piece, when the first NaN is met or `mask` or `valid` is asked for. At masked
    points the mean of the field is put, which a normalized model sees as zero. Windows that touch a gap are refused.
    """

    _missing: Missing | None = None

    @property
    def piece_bytes(self) -> int:
        """Bytes that are read for one state at least."""
        return self.nbytes // (self.shape[0] * self.shape[1])

    def chunks(self, limit_bytes: int = CHUNK_BYTES) -> Iterator[tuple[range, int, int]]:
        """At least what is unpacked together, so that it is unpacked once."""
        return super().chunks(max(limit_bytes, min(self.piece_bytes, 2**30)))

    @abc.abstractmethod
    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        """Windows as they stand, NaN where a value is missing."""

    @property
    def missing(self) -> Missing:
        """What is missing in all states.

        Raises:
            DataError: where all points of a field are masked, or no state is whole.
        """
        if self._missing is None:
            self._missing = find_missing(self)
        return self._missing

    @property
    def mask(self) -> Mask | None:
        return self.missing.mask

    @property
    def valid(self) -> Valid | None:
        return self.missing.valid

    def _known_valid(self) -> Valid | None:
        return None if self._missing is None else self._missing.valid

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        states = self._raw(trajectories, starts, length)
        if all_finite(states):
            return states
        mask, valid, fill = self.missing
        if mask is not None:
            columns = fill.to(states.dtype).reshape(-1, *(1,) * len(self.space))
            states = torch.where(mask, states, columns)
        refuse_unexpected(self, states, valid, trajectories, starts)
        return states


def refuse_unexpected(
    source: Source,
    states: Trajectories,
    valid: Bool[Tensor, "trajectories times"] | None,
    trajectories: Numbers,
    starts: Numbers,
) -> None:
    """Refuse NaN and infinity in states that are not said to be gaps.

    Raises:
        DataError: how many there are, and where the first is.
    """
    opened = "; `squall.data.open(path).check()` looks at all" + GAPS.format("squall.data.open(path, gaps=True)")
    more = opened if hasattr(source, "path") else ""
    errors = NonFinite(source.fields)
    errors.look(whole_only(states, valid, trajectories, starts), trajectories, starts)
    errors.refuse(f"{getattr(source, 'path', source.name)}, in what was read now", more)


def whole_only(
    states: Trajectories, valid: Bool[Tensor, "trajectories times"] | None, trajectories: Numbers, starts: Numbers
) -> Trajectories:
    """The states of windows with 0 for those that have a gap."""
    if valid is None or all_finite(states):
        return states
    whole = valid[trajectories[:, None], starts[:, None] + torch.arange(states.shape[1])]
    return torch.where(whole.reshape(*whole.shape, *(1,) * (states.ndim - 2)), states, 0.0)


def find_missing(source: Screened) -> Missing:
    """Read all states once and tell masks from gaps."""
    seen = torch.zeros(source.shape[2:], dtype=torch.bool)
    lacking = torch.zeros(source.shape[:2], dtype=torch.int64)
    total, count = torch.zeros(2, source.channels, dtype=torch.float64)
    for chosen, start, stop in source.chunks():
        trajectories = torch.tensor(chosen)
        values = source._raw(trajectories, torch.full_like(trajectories, start), stop - start)
        axes = (0, 1, *range(3, values.ndim))
        finite = all_finite(values)
        known = values if finite else values.nan_to_num(0.0, 0.0, 0.0)
        total += known.sum(axes, dtype=torch.float64)
        if finite:
            seen[:] = True
            count += values.numel() // source.channels
            continue
        absent = torch.isnan(values)
        lacking[chosen.start : chosen.stop, start:stop] = absent.flatten(2).sum(2)
        seen |= ~absent.all(dim=1).all(dim=0)
        count += (~absent).sum(axes)
    return judge(source, seen, lacking, total / count)


def judge(
    source: Source,
    seen: Mask,
    lacking: Int64[Tensor, "trajectory time"],
    mean: Float64[Tensor, " channel"],
) -> Missing:
    """Masks and gaps from the points ever seen (channel, *space) and the values each state lacks (trajectory, time)."""
    shown = getattr(source, "path", source.name)
    empty = [name for name, points in zip(source.fields, seen.flatten(1), strict=True) if not points.any()]
    if empty:
        raise DataError(
            f"{shown}: all points of {', '.join(empty)} are masked (missing at every time); leave the field out "
            "by fields=[...]"
        )
    valid = lacking == (~seen).sum()
    if not valid.any():
        raise DataError(
            f"{shown}: no state is whole: NaN comes and goes at every time, in {int((lacking > 0).sum())} of "
            f"{lacking.numel()} states. Fill small holes before, or leave out the field that has them"
        )
    never = (~valid.any(1)).nonzero().flatten().tolist()
    if never:
        listed = ", ".join(map(str, never[:8])) + (", ..." if len(never) > 8 else "")
        warnings.warn(
            f"trajectories {listed} ({len(never)}) lack values at every time that others have, and are left out: one "
            "mask holds for all trajectories",
            stacklevel=2,
        )
    return Missing(None if seen.all() else seen, None if valid.all() else valid, mean)


def fill_missing(source: Source) -> tuple[Trajectories, Mask | None, Valid | None]:
    """States of a source in memory with masked points filled, the mask and the whole states."""
    whole = Whole(source)
    chosen = torch.arange(source.trajectories)
    mask, valid, _ = whole.missing
    return whole._gather(chosen, torch.zeros_like(chosen), source.shape[1]), mask, valid


class Whole(Screened, View):
    """A source that holds NaN, screened."""

    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self.source._gather(trajectories, starts, length)
