"""Medians over seeds with bootstrap intervals, paired tests, and the correction for multiple comparisons."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

RESAMPLES = 10_000
"""Bootstrap samples, drawn with a fixed seed so that tables can be reproduced."""
LEVEL = 0.95
"""Confidence level of an interval."""


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
    """The median with its 95 % percentile bootstrap interval (Efron 1979); None without values.

    Reference:
        B. Efron, Bootstrap Methods: Another Look at the Jackknife, Annals of Statistics 7 (1979) 1.

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


def _medians(rows: Float[np.ndarray, "row n"]) -> Float[np.ndarray, " row"]:
    """Medians of rows that may hold infinity: the mean of two middle numbers is infinite if one is."""
    rows = np.sort(rows, axis=1)
    middle = rows.shape[1] // 2
    return rows[:, middle] if rows.shape[1] % 2 else rows[:, middle - 1 : middle + 1].mean(1)


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test on the logarithms of positive numbers, paired by seed.

    Exact for small samples without ties. A pair in which both diverged is a tie and is left out. None without a pair.

    Reference:
        F. Wilcoxon, Individual Comparisons by Ranking Methods, Biometrics Bulletin 1 (1945) 80.

    >>> round(compare_paired({0: 1.0, 1: 1.0, 2: 1.0}, {0: 2.0, 1: 3.0, 2: 4.0}), 3)
    0.25
    """
    from scipy import stats  # slow to import, and most who read results compare nothing

    pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    if not pairs:
        return None
    differences = np.array([0.0 if a == b else math.log(a) - math.log(b) for a, b in pairs])
    # The test ranks sizes: a diverged run is further off than any other.
    differences = np.nan_to_num(differences[differences != 0], posinf=1e300, neginf=-1e300)
    test: Any = stats.wilcoxon(differences) if len(differences) else None
    return 1.0 if test is None else float(test.pvalue)


@dataclass(frozen=True)
class Ratio:
    """The geometric mean of paired ratios and its confidence interval; infinite where one of ours diverged."""

    mean: float
    low: float
    high: float
    count: int


def paired_ratio(ours: Mapping[int, float], theirs: Mapping[int, float]) -> Ratio | None:
    """The geometric mean of ours/theirs over pairs of seeds, with its 95 % interval by Student's t on the logarithms.

    A pair in which theirs diverged has no ratio and is left out; one in which ours alone diverged makes the mean
    infinite. Of a single pair the interval is (0, ∞). None without a pair.

    >>> ratio = paired_ratio({0: 1.0, 1: 2.0, 2: 4.0}, {0: 2.0, 1: 4.0, 2: 8.0})
    >>> round(ratio.mean, 9), round(ratio.low, 9), round(ratio.high, 9), ratio.count
    (0.5, 0.5, 0.5, 3)
    """
    from scipy import stats

    pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys() if math.isfinite(theirs[seed])]
    if not pairs:
        return None
    logs = np.array([math.log(a) - math.log(b) if math.isfinite(a) else math.inf for a, b in pairs])
    count, mean = len(logs), float(logs.mean())
    if not math.isfinite(mean) or count == 1:
        return Ratio(math.exp(mean), 0.0, math.inf, count)
    half: Any = stats.t.ppf((1 + LEVEL) / 2, count - 1) * logs.std(ddof=1) / math.sqrt(count)
    return Ratio(math.exp(mean), math.exp(mean - half), math.exp(mean + half), count)


def corrected(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's step-down correction for the number of comparisons.

    Reference:
        S. Holm, A Simple Sequentially Rejective Multiple Test Procedure, Scand. J. Statist. 6 (1979) 65.

    >>> corrected({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    adjusted, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        adjusted[name] = largest
    return {name: adjusted[name] for name in p_values}


@dataclass(frozen=True)
class Ranks:
    """Mean ranks of several treatments over blocks, 1 the best.

    Attributes:
        mean, low, high: of every treatment, with the interval of the mean.
        blocks: how many there are.
        p: of Friedman's test that all treatments rank alike; NaN for fewer than three treatments or two blocks.
        difference: the critical difference of two mean ranks by Nemenyi's test.
    """

    mean: Float[np.ndarray, " treatment"]
    low: Float[np.ndarray, " treatment"]
    high: Float[np.ndarray, " treatment"]
    blocks: int
    p: float
    difference: float


def mean_ranks(errors: Sequence[Float[np.ndarray, "_ treatment"]]) -> Ranks:
    """Rank the treatments within every block, a seed of a setting, and average over all of them.

    Equal errors, such as infinity of two that diverged, share their mean rank. The 95 % percentile bootstrap interval
    draws whole seeds, setting by setting.

    Args:
        errors: of every setting, smaller is better.

    Raises:
        ValueError: without a block.

    Reference:
        M. Friedman, The Use of Ranks to Avoid the Assumption of Normality, JASA 32 (1937) 675.

    >>> ranks = mean_ranks([np.array([[1.0, 2.0, 3.0], [1.0, 3.0, 2.0]]), np.array([[2.0, 1.0, np.inf]])])
    >>> [round(float(x), 2) for x in ranks.mean], ranks.blocks
    ([1.33, 2.0, 2.67], 3)
    """
    from scipy import stats

    settings = [np.asarray(stats.rankdata(x, axis=1)) for x in errors if len(x)]
    if not settings:
        raise ValueError("mean_ranks: there is no block in which every treatment has an error")
    ranks, generator = np.concatenate(settings), np.random.default_rng(0)
    drawn = np.zeros((RESAMPLES, ranks.shape[1]))
    for setting in settings:
        drawn += setting[generator.integers(len(setting), size=(RESAMPLES, len(setting)))].sum(1)
    low, high = np.quantile(drawn / len(ranks), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    blocks, count = ranks.shape
    p = math.nan
    if count > 2 and blocks > 1 and (ranks != ranks[:, :1]).any():
        p = float(stats.friedmanchisquare(*ranks.T).pvalue)
    return Ranks(ranks.mean(0), low, high, blocks, p, critical_difference(count, blocks))


def critical_difference(treatments: int, blocks: int, level: float = LEVEL) -> float:
    """Nemenyi's q √(k(k + 1)/6N): mean ranks of k treatments over N blocks that differ by less are not told apart.

    Reference:
        J. Demšar, Statistical Comparisons of Classifiers over Multiple Data Sets, JMLR 7 (2006) 1.

    >>> round(critical_difference(4, 14), 2)  # Demšar's example
    1.25
    """
    from scipy import stats

    q = stats.studentized_range.ppf(level, treatments, math.inf) / math.sqrt(2)
    return float(q * math.sqrt(treatments * (treatments + 1) / (6 * blocks)))
