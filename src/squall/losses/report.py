"""What the loss did in its last call: the numbers of a report, computed on demand, and where the weight went."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall.losses.checks import check_labels, combined_measure
from squall.losses.distributed import ALONE, Sharding, here
from squall.losses.program import Weighed
from squall.losses.rules import SHARPEST

__all__ = ["Account", "of_rows", "weight_shares"]

TOP = 0.01
"""The share of the points that `top_share` looks at."""

QUANTILES = MappingProxyType({"median_error": 0.5, "p90_error": 0.9, "p99_error": 0.99})
"""Of the errors; where samples lie on several processes, of those of one."""

Atoms = Float[np.ndarray, "atom"]
Groups = Float[np.ndarray, "group"]


class Account:
    """The numbers of one call, kept as small arrays until they are asked for.

    Args:
        value: the loss.
        show: computes the other numbers.
    """

    def __init__(self, value: Any, show: Callable[[], dict[str, float]]) -> None:
        self.value, self._show = value, show

    @classmethod
    def of_program(cls, made: Weighed, value: Tensor, sharding: Sharding = ALONE):
        """Of a program of tensors; the other processes have to be asked at once."""
        kept = made.tilt, made.errors, made.mass, made.total, made.share, made.mean
        largest = made.weights.detach().amax() if made.weights.numel() else value.detach() * 0
        show = partial(_of_program, *kept, sharding.within(largest, "max"))
        if sharding.across is not here:
            show = partial(dict, _across(show(), float(made.share.sum()), sharding))
        return cls(value.detach(), show)

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers."""
        return {**self._show(), "loss": float(self.value)}


def of_rows(rows: Float[np.ndarray, "group column"], atoms: Float[np.ndarray, "3 atom"]) -> dict[str, float]:
    """The numbers of what `kernels.weigh` has found, which may have kept some of the groups only."""
    total, mean = rows[:, 8], rows[:, 10]
    share = total / total.sum()
    largest = float((share * rows[:, 11] / rows[:, 6]).max())
    return _numbers(rows[:, :6], share, mean, rows[:, 9], atoms[0], atoms[1], atoms[2].astype(int), largest)


def _of_program(tilt: Any, l: Tensor, mass: Tensor, total: Tensor, share: Tensor, mean: Tensor, largest: Tensor):
    rows = torch.stack(tuple(tilt), 1).cpu().numpy()
    errors, measure, shares, means = (x.cpu().numpy() for x in (l, mass, share, mean))
    group, atom = measure.nonzero()
    top = np.where(measure > 0, errors, 0).max(1, initial=0)
    kept = errors[group, atom], measure[group, atom], group
    return _numbers(rows, shares, means, top, *kept, float(largest))


def _numbers(
    tilt: Float[np.ndarray, "group 6"],
    share: Groups,
    mean: Groups,
    top: Groups,
    l: Atoms,
    mass: Atoms,
    group: Any,
    largest: float,
) -> dict[str, float]:
    """The report, from the atoms of the groups that were kept and from what is known of all."""
    b, reference, scale, lam, _, floor = tilt.T
    with np.errstate(divide="ignore"):
        temperature = np.where(b >= SHARPEST, 0.0, scale / b)
    e = np.exp(np.minimum(b[group] * ((l - reference[group]) / scale[group]) - lam[group], 0)) + floor[group]
    count = len(tilt)
    of_group = np.bincount(group, mass, count)
    sums = np.bincount(group, mass * e, count)
    present = np.where(of_group > 0, share, 0)
    part = present / max(present.sum(), 1e-300)
    p = (part / np.where(of_group > 0, of_group, 1))[group] * mass
    ratio = e * (of_group / np.where(sums > 0, sums, 1))[group]
    kl = (p * ratio * np.log(np.where(ratio > 0, ratio, 1))).sum()
    temperatures = np.sort(temperature[share > 0])
    square = (p * ratio * ratio).sum()
    return {
        "temperature": float(temperatures[(len(temperatures) - 1) // 2]) if len(temperatures) else math.inf,
        "effective_fraction": float(min(1.0, 1 / square)) if square > 0 else 1.0,
        "kl": float(max(kl, 0.0)),
        "max_weight": largest,
        "top_share": _top_share(l, p, p * ratio),
        "mean_error": float(mean @ share),
        **_quantiles(l, p),
        "max_error": float(top.max(initial=0.0)),
    }


def _quantiles(errors: Atoms, points: Atoms) -> dict[str, float]:
    """The smallest errors up to which these shares of the points lie, to the width of a bin (1.6 %)."""
    order = np.argsort(errors, kind="stable")
    share = points[order].cumsum()
    places = np.searchsorted(share, [q * share[-1] * (1 - 1e-12) for q in QUANTILES.values()]) if share.size else []
    return {name: float(errors[order[i]]) for name, i in zip(QUANTILES, places, strict=False)}


def _top_share(errors: Atoms, points: Atoms, weights: Atoms) -> float:
    """Weight of the TOP share of the points with the largest errors."""
    order = np.argsort(errors, kind="stable")[::-1]
    points, weights = points[order], weights[order]
    before = points.cumsum() - points
    taken = np.clip((TOP - before) / np.where(points > 0, points, 1.0), 0.0, 1.0)
    return float(np.clip((weights * taken).sum(), 0.0, 1.0))


def _across(numbers: dict[str, float], share: float, sharding: Sharding) -> dict[str, float]:
    """The numbers of all processes, each of which holds other groups with their share of everything."""
    summed = [share * numbers["kl"], share / numbers["effective_fraction"], share * numbers["top_share"]]
    summed = sharding.across(torch.tensor([*summed, numbers["mean_error"]]).double(), "sum").tolist()
    largest = sharding.across(torch.tensor([numbers["max_weight"], numbers["max_error"]]).double(), "max").tolist()
    return {
        **numbers,
        "kl": summed[0],
        "effective_fraction": min(1.0, 1 / summed[1]),
        "top_share": summed[2],
        "mean_error": summed[3],
        "max_weight": largest[0],
        "max_error": largest[1],
    }


def weight_shares(
    weights: Tensor,
    labels: Tensor | Literal["channel"],
    names: Sequence[str] | None = None,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
) -> dict[str, dict[str, float]]:
    """Where the weight goes: the share of each class of points in the weight, and in the points.

    Args:
        weights: w, as `ImbalanceAwareLoss.weights` or `imbalance_weights` gives them, shape (batch, channel, *space).
        labels: the class of every point, integers from 0, broadcastable; or "channel".
        names: of the classes; the numbers otherwise.
        mask, measure: as the loss was given them: what is masked is no point, and points count by their measure.

    Returns:
        For every class `weight` and `points` (each sums to 1 over the classes) and `ratio`, their quotient: how
        much more a point of the class counts than in the mean.

    Raises:
        ValueError: for labels that do not broadcast or are negative, or fewer names than classes.

    Example:
        >>> shares = weight_shares(torch.tensor([0.1, 0.1, 0.8]), torch.tensor([0, 0, 1]), ["calm", "violent"])
        >>> round(shares["violent"]["ratio"], 3)
        2.4
    """
    if isinstance(labels, str):
        labels = torch.arange(weights.shape[1], device=weights.device).view(-1, *[1] * (weights.dim() - 2))
    total = combined_measure(mask, measure, weights)
    check_labels(labels, weights, names)
    classes = labels.broadcast_to(weights.shape).reshape(-1)
    weight = torch.bincount(classes, weights.reshape(-1).double())
    points = torch.bincount(classes, None if total is None else total.reshape(-1).double()).double()
    weight, points = weight / weight.sum(), points / points.sum()
    return {
        names[k] if names else str(k): {"weight": w, "points": p, "ratio": w / p if p else math.nan}
        for k, (w, p) in enumerate(zip(weight.tolist(), points.tolist(), strict=True))
    }
