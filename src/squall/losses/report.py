"""What the loss did in its last call: the numbers of a report, computed on demand, and where the weight went."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from squall.losses import solver
from squall.losses.batch import Sketch, Stats, Tilts
from squall.losses.checks import check_labels, combined_measure
from squall.losses.distributed import ALONE, Sharding, here
from squall.losses.sketch import BIAS, WINDOW
from squall.losses.traced import SHARPEST_TRACED, Traced
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
        self, made: Weighed | Traced, value: Any, largest: Tensor | None = None, sharding: Sharding = ALONE
    ) -> None:
        self.value = value
        if isinstance(made, Traced):
            self._show: Callable[[], dict[str, float]] = partial(_numbers_of_traced, _light(made), largest)
        else:
            self._show = partial(_numbers_of_weighed, made.batch.dtype, made.batch.counts, *_thinned(made))
        if sharding.across is not here:
            numbers = _across(self._show(), float(made.share.sum()), sharding)
            self._show = partial(dict, numbers)

    def numbers(self) -> dict[str, float]:
        """Everything as plain numbers."""
        return {**self._show(), "loss": float(self.value)}


def _light(made: Traced) -> Traced:
    """Without the weights themselves, and without a graph."""
    tilt, atoms = type(made.tilt)(*(x.detach() for x in made.tilt)), type(made.atoms)(*(x.detach() for x in made.atoms))
    return made._replace(weights=made.tilt.b.detach(), tilt=tilt, atoms=atoms)


def _thinned(made: Weighed) -> tuple[Any, ...]:
    """Seen and weighed sketches, tilts, sums, shares: of some groups only where all points of many are kept."""
    seen, sketch, tilts, sums, share = made[:5]
    step = 1 if sketch.bins else max(1, -(-sketch.mass.size // MOST_ATOMS))
    if step > 1:
        seen, sketch = (x._replace(mass=x.mass[::step].copy(), rest=x.rest[::step].copy()) for x in (seen, sketch))
    return seen, sketch, tilts, sums, share, step


def _numbers_of_traced(made: Traced, largest: Tensor | None) -> dict[str, float]:
    y, p = (x.cpu().numpy() for x in made.atoms)
    b, reference, scale, lam, _, floor = (x.cpu().double().numpy()[:, None] for x in made.tilt)
    share, mean, top = (x.detach().cpu().double().numpy() for x in (made.share, made.mean, made.top))
    tops = top[:, None]
    atoms = _atoms(y, p, tops + scale * y, b, (reference - tops) / scale, lam, floor)
    temperature = np.where(b >= SHARPEST_TRACED, 0.0, scale / np.where(b > 0, b, np.nan))[:, 0]
    temperature = np.where(b[:, 0] > 0, temperature, np.inf)
    return _numbers(atoms, share, share, mean, top, temperature, 0.0 if largest is None else float(largest))


def _numbers_of_weighed(
    dtype: torch.dtype,
    counts: bool,
    seen: Sketch,
    sketch: Sketch,
    tilts: np.ndarray,
    sums: np.ndarray,
    share: np.ndarray,
    step: int,
) -> dict[str, float]:
    means, rows = [], []
    for row, g in enumerate(range(0, len(tilts), step)):
        scale, top = tilts[g, Tilts.SCALE], sketch.stats[g, Stats.TOP]
        y, p = _positions(seen, g, row, dtype, counts)
        means.append((p * (seen.stats[g, Stats.TOP] + max(seen.stats[g, Stats.TOP], 1e-300) * y)).sum())
        y, p = _positions(sketch, g, row, dtype, counts)
        y_ref = (tilts[g, Tilts.REFERENCE] - top) / scale
        b, lam, floor = (tilts[g, column] for column in (Tilts.B, Tilts.LAM, Tilts.FLOOR))
        rows.append(_atoms(y, p, top + scale * y, b, y_ref, lam, floor))
    size = max((len(row.errors) for row in rows), default=0)
    padded = [[np.pad(x, (0, size - len(x))) for x in row] for row in rows]
    atoms = Atoms(*(np.stack(x) for x in zip(*padded, strict=True))) if rows else Atoms(*np.zeros((3, 0, 0)))
    partition = np.where(sums[:, 0] > 0, sums[:, 0], 1.0)
    largest = float((share * sums[:, 3] / partition).max(initial=0.0))
    with np.errstate(divide="ignore"):
        temperature = tilts[:, Tilts.SCALE] / tilts[:, Tilts.B]
    temperature = np.where(tilts[:, Tilts.B] >= solver.SHARPEST, 0.0, temperature)
    top = seen.stats[:, Stats.TOP]
    return _numbers(atoms, share, share[::step], np.array(means), top, temperature, largest)


def _positions(sketch: Sketch, g: int, row: int, dtype: torch.dtype, counts: bool) -> tuple[np.ndarray, np.ndarray]:
    """Positions and shares of the atoms of a group."""
    top, ties, total = (float(x) for x in sketch.stats[g, :3])
    if not total > 0:
        return np.zeros(1), np.zeros(1)
    if sketch.bins:
        first = int(sketch.stats[g, Stats.KEY]) - WINDOW + 1
        y, p, _ = solver.atoms_of_bins(sketch.mass[g], sketch.rest[g], first, BIAS[dtype], top, ties, counts)
    else:
        y, p, _ = solver.atoms_of_points(sketch.rest[row], sketch.mass[row], top, False)
    return y, p / p.sum()


def _atoms(y: np.ndarray, p: np.ndarray, errors: np.ndarray, b: Any, y_ref: Any, lam: Any, floor: Any) -> Atoms:
    e = np.exp(np.minimum(b * (y - y_ref) - lam, 0.0)) + floor
    sums = (p * e).sum(-1, keepdims=True)
    return Atoms(errors, p, e / np.where(sums > 0, sums, 1.0))


def _numbers(
    atoms: Atoms,
    share: np.ndarray,
    shown: np.ndarray,
    mean: np.ndarray,
    top: np.ndarray,
    temperature: np.ndarray,
    largest: float,
) -> dict[str, float]:
    """The report, from the atoms and means of the groups that are shown, and from what is known of all."""
    if not shown.sum() > 0:
        return dict.fromkeys(NAMES, 0.0) | {"temperature": math.inf, "effective_fraction": 1.0}
    part = shown / shown.sum()
    p, r = part[:, None] * atoms.shares, atoms.ratios
    kl = np.where(r > 0, p * r * np.log(np.where(r > 0, r, 1.0)), 0.0).sum()
    temperatures = np.sort(temperature[share > 0])
    return {
        "temperature": float(temperatures[(len(temperatures) - 1) // 2]),
        "effective_fraction": float(min(1.0, 1 / (p * r * r).sum())),
        "kl": float(max(kl, 0.0)),
        "max_weight": largest,
        "top_share": _top_share(atoms.errors.ravel(), p.ravel(), (p * r).ravel()),
        "mean_error": float(part @ mean * share.sum()),
        "max_error": float(top.max()),
    }


def _top_share(errors: np.ndarray, points: np.ndarray, weights: np.ndarray) -> float:
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
