"""The tilted distributions around a pass: at any inverse temperature near it, without another.

The point is what Σ exp(β′ l) needs. With z = β l in [0, span] at the β of the pass, v = 2z/span − 1 and
x = (β′/β − 1) span/2,

    exp(β′ l) = exp(β l) exp(x) [I₀(x) + 2 I₁(x) T₁(v) + 2 I₂(x) T₂(v) + …],

and the modified Bessel functions I_k(x) fall like (x/2)^k / k!: a few Chebyshev moments Σ T_k(v) exp(β l) give the sum
at every β′ with β′ l within a few units of β l, whatever the distribution of the errors is. The sum of the terms left
out is bounded, since |T_k| ≤ 1. (Powers of z in place of T_k would need twice as many, and lose digits.)
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from squall.losses.fused_cpu import compiled_tools
from squall.losses.population import Tilt
from squall.losses.sums import MOST, Sums, masses_at_nodes

__all__ = ["Expansion", "Tilting"]

FARTHEST = 100.0
"""The largest |(β − β_c) l|: so far from the β of a pass nothing is known."""
NEARER_TWICE = 1.7
"""Factor on the lowest β of a pass from which on what one says around twice its own may be better."""
FACTORIALS = [math.factorial(k) for k in range(MOST)]
ROUNDING = 2.0**-24
"""Relative error of a moment: it counts the more, the less of the largest errors is left by a smaller β."""


@functools.cache
def powers_at_nodes(count: int) -> np.ndarray:
    """1, y and y² of the places y = (1 + v)/2 of the masses, (3, node)."""
    nodes, _ = masses_at_nodes(count)
    return np.vander((1 + nodes) / 2, 3, increasing=True).T.copy()


@functools.cache
def tilted() -> Callable[[np.ndarray, np.ndarray, float], Sequence[float]]:
    """The function of masses, powers and s that sums W exp(s y) times the powers of y: compiled where passes are."""
    compiled = compiled_tools()
    return _tilted if compiled is None else compiled.tilted


def _tilted(masses: np.ndarray, powers: np.ndarray, stretch: float) -> Sequence[float]:
    return (powers @ (masses * np.exp(stretch * powers[1]))).tolist()


@dataclass(frozen=True, slots=True)
class Expansion:
    """The tilted distributions around one inverse temperature, from Chebyshev moments of e = exp(β_c l − top) there.

    As many masses W as there are moments stand for all points: every polynomial in l up to their number has its sum.

    Args:
        beta: β_c.
        span: the length of the interval of l, from 0.
        log_scale: top − log n.
        total: Σ e.
        masses: W, (node,).
    """

    beta: float
    span: float
    log_scale: float
    total: float
    masses: np.ndarray

    @classmethod
    def of(cls, moments: np.ndarray, span: float, beta: float, log_scale: float) -> "Expansion":
        """From the moments over l in [0, span]."""
        return cls(beta, span, log_scale, moments.item(0), masses_at_nodes(len(moments))[1] @ moments)

    def at(self, beta: float) -> tuple[Tilt, float]:
        """The moments of l tilted by β, and a bound of their relative error: ∞ where they say nothing."""
        step = beta - self.beta
        stretch = max(-FARTHEST, min(step * self.span, FARTHEST))
        total, mean, square = tilted()(self.masses, powers_at_nodes(len(self.masses)), stretch)
        if step and not (abs(stretch) < FARTHEST and total > 0 and mean > 0):
            return self._tangent(step), math.inf
        mean, square = mean / total, square / total
        tilt = Tilt(self.log_scale + math.log(total), self.span * mean, self.span**2 * (square - mean * mean))
        return tilt, self._error(stretch, self.total / total, mean) if step else 0.0

    def _error(self, stretch: float, left: float, mean: float) -> float:
        """From `left`, Σ e over Σ W exp(stretch y), and the mean of y.

        With half = |x|/2 and k one below the number of masses, I_k(x) ≤ half^k/k! exp(half²/(k + 1)) is the largest
        term left out of the derivative, and more than that of the sum.
        """
        half, k = abs(stretch) / 4, len(self.masses) - 1
        error = 4 * left * half**k / FACTORIALS[k] * math.exp(half * half / (k + 1) + stretch / 2)
        if stretch < 0:
            error += ROUNDING * (left - 1)
        return error * (1 + 1 / (2 * mean))

    def distance(self, beta: float) -> float:
        """To order expansions by what they know of β: log of half^k/k! in `_error`."""
        half, k = abs(beta - self.beta) * self.span / 4, len(self.masses) - 1
        return k * math.log(half) - math.log(FACTORIALS[k]) if half > 0 else -math.inf

    def _tangent(self, step: float) -> Tilt:
        """What is below the convex log Σ p exp(β l)."""
        (log_partition, mean, variance), _ = self.at(self.beta)
        return Tilt(log_partition + step * mean, mean, variance)


class Tilting:
    """The moments of l at any inverse temperature, by the best of the expansions that the passes so far have left."""

    def __init__(self) -> None:
        self._passes: list[tuple[Sums, float]] = []
        self._lowest = math.inf
        self._expansions: dict[int, list[Expansion]] = {}
        self._known: dict[float, tuple[Tilt, float]] = {}

    def add(self, sums: Sums, beta: float) -> None:
        """What a pass at β says around β and around 2β."""
        self._passes.append((sums, beta))
        self._lowest = min(beta, self._lowest)
        self._expansions.clear()
        self._known.clear()

    def _around(self, factor: int) -> list[Expansion]:
        """The expansions around the β of the passes, or around twice that."""
        if factor not in self._expansions:
            self._expansions[factor] = [_expansion(sums, beta, factor) for sums, beta in self._passes]
        return self._expansions[factor]

    def near(self, beta: float) -> tuple[Tilt, float]:
        """The moments at β, and a bound of their relative error."""
        known = self._known.get(beta)
        if known is None:
            expansions = self._around(1)
            if beta > NEARER_TWICE * self._lowest:
                expansions = expansions + self._around(2)
            best = expansions[0] if len(expansions) == 1 else min(expansions, key=lambda one: one.distance(beta))
            known = self._known[beta] = best.at(beta)
        return known

    def __call__(self, beta: float) -> Tilt:
        return self.near(beta)[0]

    def error(self, beta: float) -> float:
        return self.near(beta)[1]


def _expansion(sums: Sums, beta: float, factor: int) -> Expansion:
    """Around `factor` · β, 1 or 2."""
    moments = sums.moments
    assert moments is not None
    values = moments.once if factor == 1 else moments.twice
    return Expansion.of(values, moments.span / beta, factor * beta, factor * sums.top - math.log(sums.count))
