"""Medians over seeds with their intervals, paired tests, and the correction for several of them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

__all__ = ["Summary", "compare_paired", "corrected", "least_median", "summarize"]

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Summary:
    """The median of several numbers and a bootstrap interval of it; infinite where that many diverged."""

    median: float
    low: float
    high: float
    count: int


def least_median(summaries: Iterable[Summary | None]) -> float:
    """The least finite median; NaN where fewer than two have one, since there is nothing to compare."""
    medians = [s.median for s in summaries if s is not None and math.isfinite(s.median)]
    return min(medians) if len(medians) > 1 else math.nan


def summarize(values: Sequence[float]) -> Summary | None:
    """The median with its 95 % percentile bootstrap interval; None of nothing. Of one number, the number alone.

    >>> summarize([3.0, 1.0, 2.0])
    Summary(median=2.0, low=1.0, high=3.0, count=3)
    """
    if not values:
        return None
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    medians = np.sort(_medians(numbers[drawn]))
    low, high = (medians[round(q * (RESAMPLES - 1))] for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Summary(float(_medians(numbers[None])[0]), float(low), float(high), len(numbers))


def _medians(rows: np.ndarray) -> np.ndarray:
    """Medians that know infinity: of two middle ones the mean, infinite if one is."""
    rows = np.sort(rows, axis=1)
    middle = rows.shape[1] // 2
    return rows[:, middle] if rows.shape[1] % 2 else rows[:, middle - 1 : middle + 1].mean(1)


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """p of Wilcoxon's signed-rank test, two-sided, exact where it can be, on the logarithms of positive numbers that
    are paired by seed. None without a pair. Two that both diverged are a tie, and are left out.

    >>> round(compare_paired({0: 1.0, 1: 1.0, 2: 1.0}, {0: 2.0, 1: 3.0, 2: 4.0}), 3)
    0.25
    """
    from scipy import stats  # slow to import, and most who read results compare nothing

    pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    if not pairs:
        return None
    differences = np.array([0.0 if a == b else math.log(a) - math.log(b) for a, b in pairs])
    differences = np.nan_to_num(differences[differences != 0], posinf=1e300, neginf=-1e300)
    found: Any = stats.wilcoxon(differences) if len(differences) else None
    return 1.0 if found is None else float(found.pvalue)


def corrected(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's correction for the number of comparisons.

    >>> corrected({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    found, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        found[name] = largest
    return {name: found[name] for name in p_values}
