"""What one pass over the points says about the tilted distribution near an inverse temperature."""

import math
import operator
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from squall.losses.population import Tilt

__all__ = ["BOTH", "FAR", "FARTHEST", "LN2", "MOST", "Series", "Sums", "scattered", "tilt_at"]

LN2 = math.log(2)
FAR = 6, 2
"""Highest orders of Σ z^k e and Σ z^k e² where the temperature follows from the first: their series reach far."""
BOTH = 5, 6
"""The same where it follows from both."""
MOST = max(FAR[0], BOTH[0])
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
        heaviest: max e, where points carry a measure max μ e.

    With a measure of mean 1, every sum is one of μ times these.
    """

    count: int
    top: float
    plain: float
    once: tuple[float, ...]
    twice: tuple[float, ...]
    heaviest: float = 1.0

    @classmethod
    def of_doublings(
        cls, count: int, top: float, plain: float, once: Iterable[float], twice: Iterable[float], heaviest: float = 1.0
    ) -> "Sums":
        """From sums over z/log 2 and e = 2^(z/log 2 − top)."""
        once, twice = (tuple(LN2**k * value for k, value in enumerate(sums)) for sums in (once, twice))
        return cls(count, LN2 * top, LN2 * plain, once, twice, heaviest)

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
        head = [self.count, self.top, self.plain, self.heaviest, len(self.once), len(self.twice)]
        return [float(number) for number in (*head, *known, *[0.0] * (2 * MOST + 2 - len(known)))]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> "Sums":
        """The inverse of `numbers`."""
        count, top, plain, heaviest, once, twice = numbers[:6]
        known = tuple(numbers[6 : 6 + int(once + twice)])
        return cls(int(count), top, plain, known[: int(once)], known[int(once) :], heaviest)

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
            max(part.heaviest * shift for part, shift in zip(parts, shifts, strict=True)),
        )

    def series(self, around: int = 1) -> "Series":
        """What the sums say around the inverse temperature `around` · β, 1 or 2.

        With the moments m_k = Σ z^k w of the weights there, κ_k = m_k − Σ_j binom(k−1, j−1) κ_j m_(k−j), 0 < j < k.
        """
        sums = self.once if around == 1 else self.twice
        moments = [value / sums[0] for value in sums]
        cumulants: list[float] = []
        for k in range(1, len(moments)):
            lower = [math.comb(k - 1, j) * cumulants[j] * moments[k - 1 - j] for j in range(k - 1)]
            cumulants.append(moments[k] - math.fsum(lower))
        log_partition = around * self.top + math.log(sums[0] / self.count)
        return Series(log_partition, tuple(c / math.factorial(k) for k, c in enumerate(cumulants)))


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

        With g = max_k (|term_k| / term_1)^(1/(k − 1)), what K terms leave out is at most term_1 (g h)^K / (1 − g h).
        The last terms alone would not do: where no error is larger than the largest, they change their signs.
        """
        first, *others = map(abs, self.terms)
        growth = max((term / first) ** (1 / k) for k, term in enumerate(others, 1)) if first > 0 else math.inf
        return min(FARTHEST, (error / 2) ** (1 / len(self.terms)) / growth) if growth > 0 else FARTHEST


def tilt_at(series: tuple[Series, Series], ratio: float) -> Tilt:
    """The moments of z at ratio · β, from the series around β or that around 2 β."""
    return series[0].at(ratio - 1) if ratio < 1.5 else series[1].at(ratio - 2)
