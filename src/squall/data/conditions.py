"""What stands beside the states: masks, gaps, areas of cells, and conditions that are known in advance."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Float64, Int64
from torch import Tensor

from squall._process.messages import suggestion
from squall.data.errors import DataError

Mask = Bool[Tensor, "channel *space"]
"""Points that count."""

Valid = Bool[Tensor, "batch time"]
"""States without a gap."""

Areas = Float64[Tensor, "*space"]
"""Relative areas of cells, with mean 1."""

ConditionValues = Float[Tensor, "batch time part *space"]
"""Values of a condition; an axis along which it does not vary has length 1."""


class Condition(NamedTuple):
    """Something that the state depends on and a model may be told.

    Attributes:
        name: by which `Source.condition` gives it.
        kind: "parameter" of a trajectory, "static" field, or time-varying "forcing".
        shape: (trajectories, times, channel, *space) of the whole, 1 along what it does not depend on.
    """

    name: str
    kind: str
    shape: tuple[int, ...]

    @classmethod
    def of(cls, name: str, shape: Iterable[int]) -> "Condition":
        """Its kind by its shape."""
        shape = tuple(map(int, shape))
        return cls(name, "forcing" if shape[1] > 1 else "static" if max(shape[3:]) > 1 else "parameter", shape)


def known(name: str, conditions: Iterable[Condition]) -> Condition:
    """The condition of this name.

    Raises:
        DataError: where there is none, with the names that there are.
    """
    by_name = {condition.name: condition for condition in conditions}
    if name not in by_name:
        there = suggestion(name, by_name) if by_name else "the data have no condition"
        raise DataError(f"no condition '{name}': {there}")
    return by_name[name]


def pick(
    values: ConditionValues, trajectories: Int64[Tensor, " n"], starts: Int64[Tensor, " n"], length: int
) -> Float[Tensor, "window length part *space"]:
    """Windows of a condition held whole (trajectories or 1, times or 1, channel, *space or 1)."""
    times = starts[:, None] + torch.arange(length) if values.shape[1] > 1 else torch.zeros(1, 1, dtype=torch.int64)
    rows = trajectories[:, None] if values.shape[0] > 1 else torch.zeros(1, 1, dtype=torch.int64)
    return values[rows, times]


def as_conditions(
    conditions: Mapping[str, Any] | None, shape: tuple[int, ...], dtype: torch.dtype
) -> dict[str, ConditionValues]:
    """Conditions by name, each (trajectories or 1, times or 1, channel, *space or 1).

    Short forms: (trajectories,) a parameter, (trajectories, time) a forcing, (*space) a static field.

    Raises:
        DataError: where a shape fits none or several of these, or a value is NaN or infinite.
    """
    batch, times, _, *space = shape
    ones = (1,) * len(space)
    short = [((batch,), (batch, 1, 1, *ones)), ((batch, times), (batch, times, 1, *ones))]
    short += [((), (1, 1, 1, *ones)), (tuple(space), (1, 1, 1, *space))]
    checked: dict[str, Tensor] = {}
    for name, given in (conditions or {}).items():
        value = torch.as_tensor(given).to(dtype)
        fits = [full for form, full in short if value.shape == form]
        wanted = [{batch, 1}, {times, 1}, range(1, 1 << 30), *({points, 1} for points in space)]
        if value.ndim == len(shape) and all(n in allowed for n, allowed in zip(value.shape, wanted, strict=True)):
            fits.append(tuple(value.shape))
        if len(set(fits)) != 1:
            raise DataError(
                f"conditions: '{name}' has the shape {tuple(value.shape)}, which fits {len(set(fits))} of "
                f"(trajectories,), (trajectories, time), (*space) for states {shape}; give (trajectories or 1, "
                "times or 1, channel, *space or 1)"
            )
        if not torch.isfinite(value).all():
            raise DataError(f"conditions: '{name}' holds NaN or infinity; a model cannot be told that")
        checked[name] = value.reshape(fits[0])
    return checked


def as_mask(mask: Any, shape: tuple[int, ...]) -> Mask | None:
    """Valid points (channel, *space), bool; a mask (*space) holds for all channels. `None` where all are valid."""
    if mask is None:
        return None
    value = torch.as_tensor(mask)
    if value.dtype != torch.bool or tuple(value.shape) not in (shape[2:], shape[3:]):
        raise DataError(
            f"mask: got {value.dtype} of shape {tuple(value.shape)}; expected bool {shape[3:]} or {shape[2:]}, True "
            "where a point counts"
        )
    value = value.expand(shape[2:]).clone()
    if not value.flatten(1).any(1).all():
        raise DataError("mask: all points of a channel are masked; leave that channel out")
    return None if value.all() else value


def as_valid(valid: Any, shape: tuple[int, ...]) -> Valid | None:
    """Whole states (trajectory, time), bool; `None` where all are."""
    if valid is None:
        return None
    value = torch.as_tensor(valid)
    if value.dtype != torch.bool or tuple(value.shape) != shape[:2]:
        raise DataError(f"valid: got {value.dtype} of shape {tuple(value.shape)}; expected bool {shape[:2]}")
    if not value.any():
        raise DataError("valid: no state is whole; there is nothing to learn from")
    return None if value.all() else value.clone()


def as_measure(measure: Any, space: tuple[int, ...]) -> Areas | None:
    """Relative areas of cells (*space), float64, with mean 1; `None` where all are equal."""
    if measure is None:
        return None
    value = torch.as_tensor(measure).to(torch.float64)
    if tuple(value.shape) != space or not torch.isfinite(value).all() or (value < 0).any() or value.sum() == 0:
        wrong = int((~torch.isfinite(value) | (value < 0)).sum())
        raise DataError(
            f"measure: got shape {tuple(value.shape)} with {wrong} numbers that are no areas; expected {space}, "
            "finite, none negative, not all zero"
        )
    mean = value.mean()
    value = value if abs(mean - 1) < 1e-12 else value / mean  # once: areas come back from a file to the bit
    return None if bool(((value - 1).abs() < 1e-6).all()) else value
