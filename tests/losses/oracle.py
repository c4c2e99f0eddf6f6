"""The weights and the loss of one group in float64 NumPy, written from the definitions alone, by bisection."""

import math
from typing import Any

import numpy as np
from scipy.special import logsumexp, rel_entr


def weights(errors: np.ndarray, beta: float) -> np.ndarray:
    """w ∝ exp(β l)."""
    z = beta * np.asarray(errors, dtype=np.float64).ravel()
    return np.exp(z - logsumexp(z))


def loss(prediction: np.ndarray, target: np.ndarray, beta: float) -> tuple[float, np.ndarray]:
    """Σ w l, and 2 w (prediction − target)."""
    difference = np.asarray(prediction, dtype=np.float64).ravel() - np.asarray(target, dtype=np.float64).ravel()
    w = weights(difference**2, beta)
    return float(w @ difference**2), 2 * w * difference


def kl(w: np.ndarray) -> float:
    """KL(w‖uniform)."""
    return float(rel_entr(w, 1 / w.size).sum())


def divergence(w: np.ndarray, p: np.ndarray) -> float:
    """KL(w‖p)."""
    return float(rel_entr(w[p > 0], p[p > 0]).sum())


def tilted(errors: np.ndarray, p: np.ndarray, beta: float, cap: float = math.inf) -> np.ndarray:
    """w = p min(c, a exp(β l)) with Σw = 1; β = ∞ shares ties."""
    if beta == math.inf:
        return _largest(errors, p, cap)
    with np.errstate(divide="ignore"):
        z = beta * errors + np.log(p)
    w = np.exp(z - logsumexp(z))
    if cap == math.inf or (w <= cap * p).all():
        return w
    ratio = z - np.log(np.where(p > 0, p, 1)) - logsumexp(z)
    low, high = 0.0, float(-ratio[p > 0].min()) + math.log(cap) + 1
    for _ in range(200):
        middle = (low + high) / 2
        total = (p * np.exp(np.minimum(ratio + middle, math.log(cap)))).sum()
        low, high = (middle, high) if total < 1 else (low, middle)
    return p * np.exp(np.minimum(ratio + low, math.log(cap)))


def _largest(errors: np.ndarray, p: np.ndarray, cap: float) -> np.ndarray:
    """The largest 1/c of the measure, ties shared; without a cap the points tied at the largest error."""
    left, w = 1.0, np.zeros_like(p)
    for value in np.unique(errors[p > 0])[::-1]:
        ties = (errors == value) & (p > 0)
        share = min(left, cap * p[ties].sum())
        w[ties] = share * p[ties] / p[ties].sum()
        left -= share
        if left <= 0:
            break
    return w


def order_statistic(errors: np.ndarray, p: np.ndarray, fraction: float) -> float:
    """The smallest error that at most `fraction` of the measure exceeds."""
    return next(v for v in np.unique(errors[p > 0]) if p[errors > v].sum() <= fraction * (1 + 1e-9))


def beta_of(rule: dict[str, Any], errors: np.ndarray, p: np.ndarray) -> float:
    """1/T of a rule: {"temperature": T}, {"relative": τ}, {"kl": ρ, "cap": c} or {"fraction": f}."""
    if "temperature" in rule:
        return math.inf if rule["temperature"] == 0 else 1 / rule["temperature"]
    if "relative" in rule:
        return 1 / (rule["relative"] * (p * errors).sum())
    cap = rule.get("cap", math.inf)

    def over(beta: float) -> bool:
        w = tilted(errors, p, beta, cap)
        if "kl" in rule:
            return divergence(w, p) > rule["kl"]
        return 1 / (w**2 / np.where(p > 0, p, 1)).sum() < rule["fraction"]

    if not over(math.inf):
        return math.inf
    low, high = -60.0, 80.0
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (low, middle) if over(math.exp(middle) / errors.max()) else (middle, high)
    return math.exp(low) / errors.max()


def group_weights(
    errors: np.ndarray, measure: np.ndarray, rule: dict[str, Any], guard: dict[str, float]
) -> tuple[np.ndarray, float]:
    """w of one group under a guard, summing to 1, and Σμ of what is not trimmed."""
    errors, measure = np.asarray(errors, np.float64), np.asarray(measure, np.float64)
    total = measure.sum()
    p = measure / total
    if guard.get("winsorize"):
        errors = np.minimum(errors, order_statistic(errors, p, guard["winsorize"]))
    if guard.get("trim"):
        p = np.where(errors <= order_statistic(errors, p, guard["trim"]), p, 0)
        total, p = total * p.sum(), p / p.sum()
    cap = min(guard.get("cap", math.inf), rule.get("cap", math.inf))
    w = tilted(errors, p, beta_of(rule, errors, p), cap)
    share = guard.get("mean_share", 0.0)
    return share * p + (1 - share) * w, total
