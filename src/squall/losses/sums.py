"""What one pass over the points says about the tilted distribution near an inverse temperature."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from squall.losses.population import Tilt

__all__ = ["BOTH", "FAR", "FARTHEST", "LN2", "MOST", "NEAR", "Series", "Sums", "Tilting", "scattered"]

LN2 = math.log(2)
FAR = 6, 2
"""Highest orders of Σ z^k e and Σ z^k e² where the temperature follows from the first: their series reach far."""
BOTH = 5, 6
"""The same where it follows from both."""
NEAR = 2, 1
"""The same for what a divergence and its slope are at the first."""
MOST = max(*FAR, *BOTH)
BINOMIALS = [[math.comb(k, j) for j in range(k)] for k in range(MOST)]
FACTORIALS = [math.factorial(k) for k in range(MOST)]
POWERS = [LN2**k for k in range(MOST + 1)]
FARTHEST = 0.2
"""The largest relative change of β for which a series is trusted, whatever its terms say."""
GOLDEN = (math.sqrt(5) - 1) / 2


def scattered(count: int, most: int, device: torch.device) -> Tensor:
    """All of `count` places, or as many as `most` all over them: steps of the golden ratio meet no structure."""
    if count <= most:
        return torch.arange(count, device=device)
    places = torch.arange(most, device=device, dtype=torch.float64) * GOLDEN % 1
    return (places * count).long()


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over points of z = β l and e = exp(z − top), dimensionless.

    Args:
        count: n, number of points.
        top: max z.
        plain: Σ z.
        once: Σ z^k e for k = 0, 1, …
        twice: Σ z^k e² for k = 0, …
        heaviest, heaviest_below: max e, where points carry a measure max μ e, and how far below `top` the z of that
            point is.

    With a measure of mean 1, every sum is one of μ times these.
    """

    count: int
    top: float
    plain: float
    once: tuple[float, ...]
    twice: tuple[float, ...]
    heaviest: float = 1.0
    heaviest_below: float = 0.0

    @classmethod
    def of_doublings(
        cls,
        count: int,
        top: float,
        plain: float,
        once: Iterable[float],
        twice: Iterable[float],
        heaviest: float = 1.0,
        heaviest_below: float = 0.0,
    ) -> "Sums":
        """From sums over z/log 2 and e = 2^(z/log 2 − top)."""
        once, twice = tuple(map(operator.mul, POWERS, once)), tuple(map(operator.mul, POWERS, twice))
        return cls(count, LN2 * top, LN2 * plain, once, twice, heaviest, LN2 * heaviest_below)

    @property
    def zeroth(self) -> float:
        """Σ e."""
        return self.once[0]

    @property
    def first(self) -> float:
        """Σ z e."""
        return self.once[1]

    def numbers(self) -> list[float]:
        """All fields as floats, equally many whatever is known, to send to another process."""
        known = [*self.once, *self.twice]
        head = [self.count, self.top, self.plain, self.heaviest, self.heaviest_below, len(self.once), len(self.twice)]
        return [float(number) for number in (*head, *known, *[0.0] * (2 * MOST + 2 - len(known)))]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> "Sums":
        """The inverse of `numbers`."""
        count, top, plain, *heaviest, once, twice = numbers[:7]
        known = tuple(numbers[7 : 7 + int(once + twice)])
        return cls(int(count), top, plain, known[: int(once)], known[int(once) :], *heaviest)

    def without_zeros(self, zeros: int) -> "Sums":
        """The sums without so many points of error 0: their z is 0, and their e is exp(−top)."""
        each = math.exp(-self.top)
        once = (self.once[0] - zeros * each, *self.once[1:])
        twice = (self.twice[0] - zeros * each * each, *self.twice[1:])
        return replace(self, count=self.count - zeros, once=once, twice=twice)

    @classmethod
    def merged(cls, parts: list["Sums"]) -> "Sums":
        """The sums of all parts together, each shifted to the common top."""
        if len(parts) == 1:
            return parts[0]
        tops = [part.top for part in parts]
        top = max(tops) if all(map(math.isfinite, tops)) else math.nan
        shifts = [math.exp(part.top - top) for part in parts]
        once, twice = (
            zip(*(part.once for part in parts), strict=True),
            zip(*(part.twice for part in parts), strict=True),
        )
        return cls(
            sum(part.count for part in parts),
            top,
            math.fsum(part.plain for part in parts),
            tuple(math.fsum(map(operator.mul, sums, shifts)) for sums in once),
            tuple(math.fsum(map(operator.mul, sums, [shift * shift for shift in shifts])) for sums in twice),
            *max(
                (part.heaviest * shift, part.heaviest_below + top - part.top)
                for part, shift in zip(parts, shifts, strict=True)
            ),
        )

    def series(self, around: int = 1) -> "Series":
        """What the sums say around the inverse temperature `around` · β, 1 or 2.

        With the moments m_k = Σ z^k w of the weights there, κ_k = m_k − Σ_j binom(k−1, j−1) κ_j m_(k−j), 0 < j < k.
        """
        sums = self.once if around == 1 else self.twice
        moments = [value / sums[0] for value in sums]
        cumulants = moments[1:2]
        for k, row in enumerate(BINOMIALS[1 : len(moments) - 1], 1):
            cumulant = moments[k + 1]
            for j, ways in enumerate(row):
                cumulant -= ways * cumulants[j] * moments[k - j]
            cumulants.append(cumulant)
        log_partition = around * self.top + math.log(sums[0] / self.count)
        return Series(log_partition, tuple(map(operator.truediv, cumulants, FACTORIALS)))


class Series(NamedTuple):
    """Taylor's series of the moments of z = β l, in the distance h of β′/β from where the sums were taken.

    With κ_k the cumulants there, β^k dᵏA/dβᵏ: log Σ p exp(β′ l) = A + κ₁ h + κ₂ h²/2 + κ₃ h³/6 + …
    """

    log_partition: float
    """A = log Σ p e^z."""
    terms: tuple[float, ...]
    """κ_k / (k − 1)! for k = 1, 2, …: the mean is their sum over h^(k − 1)."""

    def at(self, h: float) -> Tilt:
        """The moments at the distance h."""
        log_partition, mean, variance, power = self.log_partition, 0.0, 0.0, 1.0
        for k, term in enumerate(self.terms):
            if k:
                variance += k * term * power
                power *= h
            mean += term * power
            log_partition += term * power * h / (k + 1)
        return Tilt(log_partition, mean, variance)

    def reach(self, error: float) -> float:
        """|h| up to which the mean is right to this relative error, if its terms go on to fall as they do.

        With g = max_k (|term_k| / term_1)^(1/(k − 1)), also from the second term on, what K terms leave out is taken to
        be at most term_1 (g h)^K / (1 − g h).
        The last terms alone would not do: where no error is larger than the largest, they change their signs.
        """
        terms = list(map(abs, self.terms))
        if not terms[0] > 0:
            return 0.0
        growth = max((term / terms[0]) ** (1 / k) for k, term in enumerate(terms[1:], 1))
        if terms[1] > 0:  # the mean alone would hide how the others grow, where it is large
            growth = max(growth, *((term / terms[1]) ** (1 / k) for k, term in enumerate(terms[2:], 1)))
        return min(FARTHEST, (error / 2) ** (1 / len(terms)) / growth) if growth > 0 else FARTHEST


class Tilting:
    """The moments of z at any inverse temperature near that of the sums or near twice that, by Taylor's series.

    Args:
        sums: of a pass.
    """

    def __init__(self, sums: Sums) -> None:
        self._sums, self._series = sums, {1: sums.series(1)}

    def around(self, factor: int) -> Series:
        """The series around the inverse temperature of the sums, or (2) around twice that."""
        if factor not in self._series:
            self._series[factor] = self._sums.series(factor)
        return self._series[factor]

    def __call__(self, ratio: float) -> Tilt:
        """The moments at `ratio` times that inverse temperature."""
        factor = 1 if ratio < 1.5 else 2
        return self.around(factor).at(ratio - factor)
