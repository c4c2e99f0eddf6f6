"""The distribution of the errors, small and additive: a histogram over the logarithm of the error.

The key of an error is what its floating-point bits say first: the exponent and the leading bits of the mantissa, so
that 2^bits bins divide an octave evenly and no scale has to be known beforehand. Sketches of parts add up to that of
the whole: over blocks, micro-batches and processes.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from squall.losses.checks import check_errors, check_finite, check_labels, combined_measure

__all__ = ["BELOW", "BIAS", "KEY_SHIFT", "REST_BITS", "SMALL", "WINDOW", "ErrorSketch"]

REST_BITS = 17
"""Bits below the key that say where in its bin an error is: all that float32 has."""
KEY_SHIFT = {torch.float32: 17, torch.float64: 46}
"""Bits of the mantissa below the 6 that the key keeps: 64 bins an octave."""
BIAS = {torch.float32: 127, torch.float64: 1023}
"""Of the exponent."""
WINDOW = 2048
"""Bins that the loss looks at, 32 octaves below the largest error: what is below counts as 0."""
BELOW = 2.0**-32
"""Where the window ends, in units of the largest error: what is below is off by as much."""
SMALL = 2048
"""Points up to which every point of a group is an atom of its own: no more than a window has bins."""
DOUBLE_MANTISSA = 52
CHUNK = 1 << 20
"""Points that are added at a time: their keys and errors in float64 take 16 MB."""


class ErrorSketch:
    """The distribution of weighted errors as a mergeable log-histogram, in some 2 000 numbers.

    For every bin it keeps the measure Σμ and the sum Σμl of the errors in it. Means are exact to rounding; a quantile
    lies in the bin of the true one, and so is within a relative 2^−bits (1.6 % by default) of it.

    Args:
        groups: number of distributions kept side by side, one for every label that `add` is given.
        bits: 2^bits bins divide every octave evenly, 1 to 12.

    Example:
        >>> sketch = ErrorSketch()
        >>> sketch.add(torch.tensor([1.0, 1.0, 2.0]))
        >>> sketch.add(torch.tensor([16.0]))
        >>> sketch.mean, sketch.max, sketch.count
        (5.0, 16.0, 4)
        >>> sketch.share_of_top(0.25)  # the largest quarter of the points carries 16 of 20
        0.8
        >>> round(sketch.quantile(0.5), 1)
        1.0

    Reference:
        C. Masson, J. Rim, H. Lee, DDSketch: a fast and fully-mergeable quantile sketch, VLDB 2019.
    """

    def __init__(self, groups: int = 1, bits: int = 6) -> None:
        if groups < 1:
            raise ValueError(f"ErrorSketch: groups must be at least 1, got {groups}")
        if not 1 <= bits <= 12:
            raise ValueError(f"ErrorSketch: bits must be from 1 to 12, got {bits}")
        self.groups, self.bits = groups, bits
        self._keys = np.zeros(0, np.int64)
        self._mass, self._total = np.zeros((groups, 0)), np.zeros((groups, 0))
        self._count = np.zeros(groups, np.int64)
        self._least, self._largest = np.full(groups, np.inf), np.full(groups, -np.inf)

    @torch.no_grad()
    def add(
        self,
        errors: Tensor,
        measure: Tensor | None = None,
        mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> None:
        """Take in the errors of a batch or a part of one.

        Args:
            errors: l ≥ 0, of any shape, in any unit.
            measure: μ ≥ 0, broadcastable; 1 if left out.
            mask: True where a point counts, broadcastable.
            labels: the group of every point, integers from 0 to groups − 1, broadcastable; 0 if left out.

        Raises:
            ValueError: for errors that are negative, NaN or infinite where they count, or labels beyond the groups.
        """
        errors = check_errors(errors, "all")
        weights = combined_measure(mask, measure, errors)
        if mask is not None:
            errors = torch.where(mask, errors, 0)
        check_finite(errors)
        if labels is not None:
            check_labels(labels, errors, None)
            if labels.numel() and int(labels.max()) >= self.groups:
                raise ValueError(f"labels go up to {int(labels.max())}, but the sketch has {self.groups} groups")
            labels = labels.expand(errors.shape).reshape(-1)
        flat = errors.reshape(-1)
        weights = None if weights is None else weights.reshape(-1)
        for start in range(0, len(flat), CHUNK):
            part = slice(start, start + CHUNK)
            self._add(
                flat[part].double().cpu().numpy(),
                None if weights is None else weights[part].double().cpu().numpy(),
                None if labels is None else labels[part].cpu().numpy(),
            )

    def _add(self, errors: np.ndarray, weights: np.ndarray | None, labels: np.ndarray | None) -> None:
        weights = np.ones(len(errors)) if weights is None else weights
        keep = weights > 0
        errors, weights = errors[keep] + 0.0, weights[keep]  # −0 has another key than 0
        labels = np.zeros(len(errors), np.int64) if labels is None else labels[keep]
        keys, places = np.unique(errors.view(np.int64) >> (DOUBLE_MANTISSA - self.bits), return_inverse=True)
        shape = self.groups, len(keys)
        index, size = labels * len(keys) + places, self.groups * len(keys)
        mass, total = (np.bincount(index, x, size).reshape(shape) for x in (weights, weights * errors))
        least, largest = np.full(self.groups, np.inf), np.full(self.groups, -np.inf)
        np.minimum.at(least, labels, errors)
        np.maximum.at(largest, labels, errors)
        self._merge(keys, mass, total, np.bincount(labels, minlength=self.groups), least, largest)

    def merge(self, other: "ErrorSketch") -> "ErrorSketch":
        """Add another sketch to this one, which is returned: the result is that of all points together.

        Raises:
            ValueError: if the other one has other bins or another number of groups.
        """
        if (other.bits, other.groups) != (self.bits, self.groups):
            raise ValueError(
                f"only sketches of equal bins and groups can be merged: this one has bits={self.bits} and "
                f"groups={self.groups}, the other bits={other.bits} and groups={other.groups}"
            )
        self._merge(other._keys, other._mass, other._total, other._count, other._least, other._largest)
        return self

    def _merge(self, keys: np.ndarray, mass: np.ndarray, total: np.ndarray, *rest: np.ndarray) -> None:
        union = np.union1d(self._keys, keys)
        merged = np.zeros((2, self.groups, len(union)))
        for own, (m, t) in ((self._keys, (self._mass, self._total)), (keys, (mass, total))):
            places = np.searchsorted(union, own)
            merged[0][:, places] += m
            merged[1][:, places] += t
        count, least, largest = rest
        self._keys, (self._mass, self._total) = union, merged
        self._count = self._count + count
        self._least, self._largest = np.minimum(self._least, least), np.maximum(self._largest, largest)

    @property
    def mean(self) -> Any:
        """Σμl/Σμ, in the unit of the errors: a number, or one for each of several groups."""
        self._check()
        return self._shown(self._total.sum(1) / self._mass.sum(1))

    @property
    def max(self) -> Any:
        """The largest error, exact."""
        self._check()
        return self._shown(self._largest)

    @property
    def count(self) -> Any:
        """How many points of positive measure were added."""
        return self._shown(self._count)

    def quantile(self, q: float) -> Any:
        """The error that a share q of the measure does not exceed, within a relative 2^−bits.

        Raises:
            ValueError: if q is not in [0, 1], or nothing was added.
        """
        self._check()
        if not 0 <= q <= 1:
            raise ValueError(f"quantile: q must be in [0, 1], got {q}")
        return self._shown(np.array([self._quantile(g, q) for g in range(self.groups)]))

    def _quantile(self, group: int, q: float) -> float:
        mass = self._mass[group]
        upto = mass.cumsum()
        place = min(int(np.searchsorted(upto, q * upto[-1] * (1 - 1e-12))), len(mass) - 1)
        shift = DOUBLE_MANTISSA - self.bits
        low, high = (self._keys[place : place + 1] + np.arange(2) << shift).view(np.float64)
        below = upto[place] - mass[place]
        inside = (q * upto[-1] - below) / mass[place] if mass[place] else 0.0
        value = low + inside * (high - low)
        return float(min(max(value, self._least[group]), self._largest[group]))

    def share_of_top(self, f: float) -> Any:
        """Share of Σμl that the fraction f of the measure with the largest errors carries.

        Raises:
            ValueError: if f is not in [0, 1], or nothing was added.
        """
        if not 0 <= f <= 1:
            raise ValueError(f"share_of_top: f must be in [0, 1], got {f}")
        points, errors = self._lorenz()
        rows = zip(points, errors, strict=True)
        return self._shown(np.array([1 - np.interp(1 - f, x, y) for x, y in rows]))

    def lorenz(self) -> tuple[Any, Any]:
        """The Lorenz curve: the cumulative share of the measure, smallest errors first, and of Σμl; both from 0 to 1.

        Returns:
            Two arrays (bin + 1,), or (group, bin + 1) for several groups.
        """
        points, errors = self._lorenz()
        return (points[0], errors[0]) if self.groups == 1 else (points, errors)

    def gini(self) -> Any:
        """Gini's coefficient of the errors: 0 where all are equal, 1 where one point carries everything."""
        points, errors = self._lorenz()
        return self._shown(1 - ((errors[:, 1:] + errors[:, :-1]) * np.diff(points, axis=1)).sum(1))

    def _lorenz(self) -> tuple[np.ndarray, np.ndarray]:
        self._check()
        total = np.where(self._total.sum(1, keepdims=True) > 0, self._total, self._mass)  # all errors are 0: equal
        curves = [np.pad(x.cumsum(1), ((0, 0), (1, 0))) for x in (self._mass, total)]
        points, errors = (x / x[:, -1:] for x in curves)
        return points, errors

    def arrays(self) -> dict[str, np.ndarray]:
        """The whole state as plain arrays, to be saved or sent; `from_arrays` is the inverse."""
        return {
            "bits": np.array(self.bits),
            "keys": self._keys,
            "mass": self._mass,
            "total": self._total,
            "count": self._count,
            "least": self._least,
            "largest": self._largest,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> "ErrorSketch":
        """The sketch of these arrays.

        Raises:
            ValueError: if an array is missing or does not fit the others.
        """
        names = ("bits", "keys", "mass", "total", "count", "least", "largest")
        if missing := [name for name in names if name not in arrays]:
            raise ValueError(f"these arrays are no ErrorSketch: missing {', '.join(missing)}")
        bits, keys, mass, total, count, least, largest = (np.array(arrays[name]) for name in names)
        fits = mass.ndim == 2 and mass.shape == total.shape and mass.shape[1:] == keys.shape
        if not fits or any(x.shape != mass.shape[:1] for x in (count, least, largest)):
            raise ValueError(f"these arrays are no ErrorSketch: mass has shape {mass.shape}, keys {keys.shape}")
        sketch = cls(len(mass), int(bits))
        sketch._keys, sketch._mass, sketch._total = keys, mass, total
        sketch._count, sketch._least, sketch._largest = count, least, largest
        return sketch

    def _check(self) -> None:
        if not self._count.all():
            where = "" if self.groups == 1 else f" in group {int(np.flatnonzero(self._count == 0)[0])}"
            raise ValueError(f"the sketch is empty{where}: add errors first")

    def _shown(self, values: np.ndarray) -> Any:
        return values[0].item() if self.groups == 1 else values

    def __repr__(self) -> str:
        return f"ErrorSketch(groups={self.groups}, bits={self.bits}, count={self._count.tolist()})"
