"""What the loss did in its last call: the numbers of a report, computed on demand, and where the weight went."""

import math
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from squall.losses import solver
from squall.losses.batch import Stats
from squall.losses.checks import check_labels, combined_measure
from squall.losses.distributed import ALONE, Sharding, here
from squall.losses.sketch import BIAS, WINDOW
from squall.losses.traced import SHARPEST_TRACED, Tilt, Traced
from squall.losses.weights import Weighed

__all__ = ["Account", "weight_shares"]

NAMES = ("temperature", "effective_fraction", "kl", "max_weight", "top_share", "mean_error", "max_error")
TOP = 0.01
"""The share of the points that `top_share` looks at."""
MOST_ATOMS = 1 << 17
"""Points of small groups that are kept for a report: 2 MB."""


class Atoms(NamedTuple):
    """The distribution of the errors and of the weights, (group, atom)."""

    errors: np.ndarray
    shares: np.ndarray
    """p, the share of the group's measure."""
    ratios: np.ndarray
    """w/p."""


class Account:
    """The numbers of one call, kept as small arrays until they are asked for.

    Args:
        made: what the weights were made with.
        value: the loss.
        largest: the largest weight of one point, where `made` does not know it.
        sharding: the other processes, which have to be asked at once.
    """

    def __init__(
        self, made: Weighed | Traced, value: Tensor, largest: Tensor | None = None, sharding: Sharding = ALONE
    ) -> None:
        self.value = value.detach()
        self._made = _kept_traced(made, largest) if isinstance(made, Traced) else _kept(made)
        self._numbers: dict[str, float] | None = None
        if sharding.across is not here:
            self._numbers = _across(_numbers(self._made), float(self._made.share.sum()), sharding)

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers."""
        if self._numbers is None:
            self._numbers = _numbers(self._made)
        return {**self._numbers, "loss": float(self.value)}


class _Kept(NamedTuple):
    """What a report needs of a call; (group,) or (group, atom)."""

    temperature: Any
    share: Any
    mean: Any
    top: Any
    max_weight: Any
    atoms: Any
    """A function without arguments that gives `Atoms`, of some of the groups where they have many points."""
    chosen: slice


def _kept_traced(made: Traced, largest: Tensor | None) -> _Kept:
    tilt = Tilt(*(x.detach() for x in made.tilt))
    atoms, top = [x.detach() for x in made.atoms], made.top
    temperature = torch.where(tilt.b >= SHARPEST_TRACED, 0, tilt.scale / tilt.b)

    def shown() -> Atoms:
        y, p = (x.cpu().numpy() for x in atoms)
        b, reference, scale, lam, _, floor = (x.cpu().double().numpy()[:, None] for x in tilt)
        tops = top.cpu().numpy()[:, None]
        return _atoms(y, p, tops + scale * y, b, (reference - tops) / scale, lam, floor)

    return _Kept(temperature, made.share, made.mean, made.top, largest, shown, slice(None))


def _kept(made: Weighed) -> _Kept:
    seen, batch = made.seen, made.batch
    stats, sketch, tilts = seen.stats, made.sketch, made.tilts
    with np.errstate(divide="ignore"):
        temperature = np.where(tilts.b >= solver.SHARPEST, 0.0, tilts.scale / tilts.b)
    total = np.where(stats[:, Stats.TOTAL] > 0, stats[:, Stats.TOTAL], 1.0)
    weight = (made.share * made.sums[:, 3] / made.partition).max(initial=0.0)
    chosen = slice(None, None, max(1, -(-sketch.mass.size // MOST_ATOMS)) if not sketch.bins else 1)
    dtype, counts = batch.dtype, batch.counts
    if not sketch.bins and chosen.step > 1:
        sketch = sketch._replace(mass=sketch.mass[chosen].copy(), rest=sketch.rest[chosen].copy())
    mean = _mean_errors(seen, dtype, counts) if seen.bins else (seen.mass * seen.rest.astype(float)).sum(1) / total

    def atoms_of(g: int, row: int) -> tuple[np.ndarray, np.ndarray]:
        top, ties = (float(x) for x in sketch.stats[g, :2])
        if sketch.bins:
            first = int(sketch.stats[g, Stats.KEY]) - WINDOW + 1
            return solver.atoms_of_bins(sketch.mass[g], sketch.rest[g], first, BIAS[dtype], top, ties, counts)[:2]
        return solver.atoms_of_points(sketch.rest[row], sketch.mass[row], top, False)[:2]

    def atoms() -> Atoms:
        groups = range(len(stats))[chosen]
        rows = []
        for row, g in enumerate(groups):
            scale, top = tilts.scale[g], sketch.stats[g, Stats.TOP]
            y, p = atoms_of(g, row) if sketch.stats[g, Stats.TOTAL] > 0 else (np.zeros(1), np.zeros(1))
            y_ref = (tilts.reference[g] - top) / scale
            p = p / p.sum() if p.sum() > 0 else p
            rows.append(_atoms(y, p, top + scale * y, tilts.b[g], y_ref, tilts.lam[g], tilts.floor[g]))
        size = max(len(row.errors) for row in rows)
        padded = [[np.pad(x, (0, size - len(x))) for x in row] for row in rows]
        return Atoms(*(np.stack(x) for x in zip(*padded, strict=True)))

    return _Kept(temperature, made.share, mean, stats[:, Stats.TOP], weight, atoms, chosen)


def _mean_errors(sketch: Any, dtype: torch.dtype, counts: bool) -> np.ndarray:
    """Mean error of every group."""
    means = np.zeros(len(sketch.stats))
    for g, stats in enumerate(sketch.stats):
        if stats[Stats.TOTAL] > 0:
            top, ties = float(stats[Stats.TOP]), float(stats[Stats.TIES])
            first = int(stats[Stats.KEY]) - WINDOW + 1
            y, p, _ = solver.atoms_of_bins(sketch.mass[g], sketch.rest[g], first, BIAS[dtype], top, ties, counts)
            means[g] = (p * (top + (top if top > 0 else 1.0) * y)).sum() / p.sum()
    return means


def _atoms(y: np.ndarray, p: np.ndarray, errors: np.ndarray, b: Any, y_ref: Any, lam: Any, floor: Any) -> Atoms:
    e = np.exp(np.minimum(b * (y - y_ref) - lam, 0.0)) + floor
    sums = (p * e).sum(-1, keepdims=True)
    return Atoms(errors, p, e / np.where(sums > 0, sums, 1.0))


def _numbers(kept: _Kept) -> dict[str, float]:
    share, mean, top, temperature = (
        x.detach().cpu().double().numpy() if isinstance(x, Tensor) else x
        for x in (kept.share, kept.mean, kept.top, kept.temperature)
    )
    if not len(share):
        return dict.fromkeys(NAMES, 0.0) | {"temperature": math.inf, "effective_fraction": 1.0}
    atoms = kept.atoms()
    part = share[kept.chosen]
    part = (part / part.sum())[:, None] if part.sum() > 0 else part[:, None]
    p, r = part * atoms.shares, atoms.ratios
    with np.errstate(divide="ignore", invalid="ignore"):
        kl = np.where(r > 0, p * r * np.log(r), 0.0).sum()
    temperatures = np.sort(temperature[share > 0]) if (share > 0).any() else temperature
    return {
        "temperature": float(temperatures[(len(temperatures) - 1) // 2]) if len(temperatures) else math.nan,
        "effective_fraction": float(min(1.0, 1 / (p * r * r).sum())),
        "kl": float(max(kl, 0.0)),
        "max_weight": float(kept.max_weight),
        "top_share": _top_share(atoms.errors.ravel(), p.ravel(), (p * r).ravel()),
        "mean_error": float((share * mean).sum()),
        "max_error": float(top.max(initial=0.0)),
    }


def _top_share(errors: np.ndarray, points: np.ndarray, weights: np.ndarray) -> float:
    """Weight of the TOP share of the points with the largest errors."""
    order = np.argsort(errors, kind="stable")[::-1]
    points, weights = points[order], weights[order]
    before = points.cumsum() - points
    taken = np.clip((TOP - before) / np.where(points > 0, points, 1.0), 0.0, 1.0)
    return float(np.clip((weights * taken).sum(), 0.0, 1.0))


def _across(numbers: dict[str, float], share: float, sharding: Sharding) -> dict[str, float]:
    """The numbers of all processes, each of which holds other groups with their shares of everything."""
    largest = sharding.across(torch.tensor([numbers[name] for name in ("max_weight", "max_error")]).double(), "max")
    summed = sharding.across(
        torch.tensor([numbers["kl"], 1 / numbers["effective_fraction"], numbers["top_share"]]).double() * share, "sum"
    )
    mean = sharding.across(torch.tensor(numbers["mean_error"]).double(), "sum")
    kl, concentration, top = summed.tolist()
    return {
        **numbers,
        "kl": kl,
        "effective_fraction": min(1.0, 1 / concentration),
        "top_share": top,
        "max_weight": largest[0].item(),
        "max_error": largest[1].item(),
        "mean_error": mean.item(),
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
