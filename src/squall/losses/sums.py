"""What one pass over the points says about the tilted distribution near an inverse temperature."""

import math
import operator
from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

from squall.losses.population import Tilt

__all__ = ["Sums", "scattered"]

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
        squares: Σ e².
        zeroth, first: Σ e, Σ z e.
        second, third: Σ z² e, Σ z³ e. NaN, like those that follow, where not asked for.
        squares_first, squares_second: Σ z e², Σ z² e².
        heaviest: max e, where points carry a measure max μ e.

    With a measure of mean 1, every sum is one of μ times these.
    """

    count: int
    top: float
    plain: float
    squares: float
    zeroth: float
    first: float
    second: float = math.nan
    third: float = math.nan
    squares_first: float = math.nan
    squares_second: float = math.nan
    heaviest: float = 1.0

    def numbers(self) -> list[float]:
        """All fields as floats, to send to another process."""
        return [float(number) for number in astuple(self)]

    @classmethod
    def of_numbers(cls, numbers: list[float]) -> "Sums":
        """The inverse of `numbers`."""
        return cls(int(numbers[0]), *numbers[1:])

    def without_zeros(self, zeros: int) -> "Sums":
        """The sums without so many points of error 0: their z is 0, and their e is exp(−top)."""
        each = math.exp(-self.top)
        return replace(
            self,
            count=self.count - zeros,
            zeroth=self.zeroth - zeros * each,
            squares=self.squares - zeros * each * each,
        )

    @classmethod
    def merged(cls, parts: list["Sums"]) -> "Sums":
        """The sums of all parts together, each shifted to the common top."""
        if len(parts) == 1:
            return parts[0]
        tops = [part.top for part in parts]
        top = max(tops) if all(map(math.isfinite, tops)) else math.nan
        shifts = [math.exp(part.top - top) for part in parts]
        once = zip(*((p.zeroth, p.first, p.second, p.third) for p in parts), strict=True)
        twice = zip(*((p.squares, p.squares_first, p.squares_second) for p in parts), strict=True)
        zeroth, first, second, third = (math.fsum(map(operator.mul, terms, shifts)) for terms in once)
        squared = [shift * shift for shift in shifts]
        squares, squares_first, squares_second = (math.fsum(map(operator.mul, terms, squared)) for terms in twice)
        return cls(
            sum(part.count for part in parts),
            top,
            math.fsum(part.plain for part in parts),
            squares,
            zeroth,
            first,
            second,
            third,
            squares_first,
            squares_second,
            max(part.heaviest * shift for part, shift in zip(parts, shifts, strict=True)),
        )

    @property
    def cumulants(self) -> tuple[float, float, float]:
        """Mean, variance and third central moment of z under the weights: β^k dᵏA/dβᵏ, k = 1, 2, 3."""
        mean, second, third = (s / self.zeroth for s in (self.first, self.second, self.third))
        return mean, second - mean**2, third - 3 * mean * second + 2 * mean**3

    def tilt(self, ratio: float) -> Tilt:
        """The moments of z at the inverse temperature ratio · β, by Taylor's series around β, or around 2 β.

        With κ_k the cumulants at β and h = ratio − 1: log Σ p e^(ratio z) = A + κ₁ h + κ₂ h²/2 + κ₃ h³/6.
        """
        if ratio < 1.5:
            first, second, third = self.cumulants
            log_partition, h = self.top + math.log(self.zeroth / self.count), ratio - 1
        else:
            first = self.squares_first / self.squares
            second, third = self.squares_second / self.squares - first**2, 0.0
            log_partition, h = 2 * self.top + math.log(self.squares / self.count), ratio - 2
        return Tilt(
            log_partition + h * (first + h * (second / 2 + h * third / 6)),
            first + h * (second + h * third / 2),
            second + h * third,
        )
