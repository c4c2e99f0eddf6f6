"""What one pass sums over the points, and how sums over parts of them are put together."""

import functools
import itertools
import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["LN2", "MOST", "Moments", "Sums", "masses_at_nodes", "scattered"]

LN2 = math.log(2)
MOST = 20
"""Moments of either kind."""
GOLDEN = (math.sqrt(5) - 1) / 2


def scattered(count: int, most: int, device: torch.device) -> Tensor:
    """All of `count` places, or as many as `most` all over them: steps of the golden ratio meet no structure."""
    if count <= most:
        return torch.arange(count, device=device)
    places = torch.arange(most, device=device, dtype=torch.float64) * GOLDEN % 1
    return (places * count).long()


@functools.cache
def masses_at_nodes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """The zeros v_j of T_count, and the matrix that turns moments C_k, k < count, into masses W_j there of the same
    moments: W_j = Σ_k (2 − δ_k0) C_k T_k(v_j) / count. Some masses may be negative."""
    angles = np.pi * (np.arange(count) + 0.5) / count
    matrix = 2 / count * np.cos(np.outer(angles, np.arange(count)))
    matrix[:, 0] /= 2
    return np.cos(angles), matrix


class Moments(NamedTuple):
    """Chebyshev moments of z = β l over [0, span] under e = exp(z − top) and under its square, z = span (1 + v)/2.

    Args:
        span: at least max z, positive.
        once: Σ T_k(v) e for k = 0, 1, …
        twice: Σ T_k(v) e² for k = 0, 1, …
    """

    span: float
    once: np.ndarray
    twice: np.ndarray

    @classmethod
    def of_pairs(cls, span: float, once: Iterable[float], twice: Iterable[float]) -> "Moments":
        """From the sums of T_0, T_1 + T_0, T_2 + T_1, …

        These vanish at v = −1, all but the first, and follow the recurrence of the T_k from w, w with w = 1 + v. Where
        nearly all v are near −1, as in a batch that a few points rule, they keep the digits that the T_k would lose.
        """
        return cls(span, _unpaired(once), _unpaired(twice))

    def over(self, span: float) -> "Moments":
        """The same over a longer span."""
        if span == self.span:
            return self
        ratio = self.span / span
        return Moments(span, _stretched(self.once, ratio), _stretched(self.twice, ratio))

    def scaled(self, factor: float) -> "Moments":
        """Of e times a factor."""
        return Moments(self.span, factor * self.once, factor * factor * self.twice)

    def without_zeros(self, each: float, zeros: int) -> "Moments":
        """Without so many points of z = 0, where v = −1 and e = `each`."""
        once, twice = (zeros * factor * (-1.0) ** np.arange(MOST) for factor in (each, each * each))
        return Moments(self.span, self.once - once[: len(self.once)], self.twice - twice[: len(self.twice)])


def _unpaired(pairs: Iterable[float]) -> np.ndarray:
    return np.fromiter(itertools.accumulate(pairs, lambda moment, pair: pair - moment), np.float64)


def _stretched(moments: np.ndarray, ratio: float) -> np.ndarray:
    """The moments over a span that is 1/ratio times as long: exactly those of the masses at the nodes."""
    nodes, matrix = masses_at_nodes(len(moments))
    angles = np.arccos(ratio * (nodes + 1) - 1)
    return np.cos(np.outer(np.arange(len(moments)), angles)) @ (matrix @ moments)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over points of z = β l and e = exp(z − top), dimensionless.

    Args:
        count: n, number of points.
        top: max z.
        plain: Σ z.
        zeroth, first: Σ e and Σ z e.
        squares: Σ e².
        moments: what moves the temperature without another pass, where it was asked for.
        heaviest, heaviest_below: max e, where points carry a measure max μ e, and how far below `top` the z of that
            point is.

    With a measure of mean 1, every sum is one of μ times these.
    """

    count: int
    top: float
    plain: float
    zeroth: float
    first: float
    squares: float
    moments: Moments | None = None
    heaviest: float = 1.0
    heaviest_below: float = 0.0

    @classmethod
    def of_moments(cls, count: int, top: float, plain: float, moments: Moments, *heaviest: float) -> "Sums":
        """Where all sums are moments."""
        zeroth, first, squares = moments.once.item(0), moments.once.item(1), moments.twice.item(0)
        return cls(count, top, plain, zeroth, (zeroth + first) * moments.span / 2, squares, moments, *heaviest)

    def numbers(self) -> list[float]:
        """All fields as floats, equally many whatever is known, to send to another process."""
        head = [self.count, self.top, self.plain, self.zeroth, self.first, self.squares, self.heaviest]
        known = self.moments or Moments(0.0, np.empty(0), np.empty(0))
        tail = [*known.once, *known.twice]
        sizes = [self.heaviest_below, known.span, len(known.once), len(known.twice)]
        return [float(number) for number in (*head, *sizes, *tail, *[0.0] * (2 * MOST - len(tail)))]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> "Sums":
        """The inverse of `numbers`."""
        count, top, plain, zeroth, first, squares, heaviest, below, span, once, twice = numbers[:11]
        middle, end = 11 + int(once), 11 + int(once + twice)
        moments = Moments(span, np.array(numbers[11:middle]), np.array(numbers[middle:end])) if once else None
        return cls(int(count), top, plain, zeroth, first, squares, moments, heaviest, below)

    def without_zeros(self, zeros: int) -> "Sums":
        """The sums without so many points of error 0: their z is 0, v is −1, and e is exp(−top)."""
        each = math.exp(-self.top)
        moments = None if self.moments is None else self.moments.without_zeros(each, zeros)
        zeroth, squares = self.zeroth - zeros * each, self.squares - zeros * each * each
        return replace(self, count=self.count - zeros, zeroth=zeroth, squares=squares, moments=moments)

    @classmethod
    def merged(cls, parts: list["Sums"]) -> "Sums":
        """The sums of all parts together, each shifted to the common top."""
        if len(parts) == 1:
            return parts[0]
        tops = [part.top for part in parts]
        top = max(tops) if all(map(math.isfinite, tops)) else math.nan
        shifts = [math.exp(part.top - top) for part in parts]
        heaviest, below = max(
            (part.heaviest * shift, part.heaviest_below + top - part.top)
            for part, shift in zip(parts, shifts, strict=True)
        )
        return cls(
            sum(part.count for part in parts),
            top,
            math.fsum(part.plain for part in parts),
            _dot(shifts, (part.zeroth for part in parts)),
            _dot(shifts, (part.first for part in parts)),
            _dot((shift * shift for shift in shifts), (part.squares for part in parts)),
            _merged_moments([part.moments for part in parts], shifts),
            heaviest,
            below,
        )


def _dot(shifts: Iterable[float], values: Iterable[float]) -> float:
    return math.fsum(map(operator.mul, shifts, values))


def _merged_moments(parts: list[Moments | None], shifts: list[float]) -> Moments | None:
    """The moments of all parts over the longest of their spans."""
    known = [part for part in parts if part is not None]
    if len(known) < len(parts):
        return None
    span = max(part.span for part in known)
    alike = [part.over(span).scaled(shift) for part, shift in zip(known, shifts, strict=True)]
    return Moments(span, sum(part.once for part in alike), sum(part.twice for part in alike))  # type: ignore[arg-type]
