"""How unevenly the change of data, or the error of a model, is spread over points, fields, places and times."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int, Int64
from torch import Tensor

from squall._types import Rate, State, Trajectories
from squall.data import DataError, Source, Transitions
from squall.integrators import IntegratorLike, increment
from squall.losses import ErrorSketch
from squall.models.placement import evaluating, like_model

__all__ = ["RULE", "UNEVENNESS", "Advice", "Unevenness", "Worst", "advise", "change", "errors"]

PIECE_BYTES = 16 * 2**20
"""Of the states in memory at a time; four times as many do not fit the cache, and take twice as long."""

BLOCK = 2**20
"""Numbers that are counted at a time: they stay in the cache."""

MOST_NUMBERS = 2**26
"""Numbers of which a model's errors are taken; of more, transitions spread evenly over the data."""

SOME_STATES = 8
"""From which the unit of a field is taken: it only keeps squares within float32, for which a rough one does."""

WORST = 5
"""How many of the largest errors are named."""

UNEVENNESS: Mapping[str, float] = MappingProxyType(
    {
        "Gaussian noise": 0.085,
        "Kuramoto-Sivashinsky": 0.12,
        "a storm, 6-hourly": 0.18,
        "Kolmogorov flow": 0.22,
        "Korteweg-de Vries": 0.28,
        "Burgers": 0.34,
        "MMT": 0.52,
    }
)
"""Share of the squared one-step change that the top 1 % of the points carry, of known systems as first measured; it
depends on their coefficients and dt."""

EVEN = 0.15
"""Share below which the change is spread almost as in Gaussian noise or on the control, Kuramoto-Sivashinsky."""

RULE = (
    "checked on systems it was not fitted on (python benchmarks/advice.py). Whether the model predicts the rate or "
    "the next state was right in 14 of 15 cases about rollouts with KL budget 0.3; rates were tried on two systems "
    "only. The share of the top 1% was right in 7 of 15, and in 4 of 11 with a cap of 3: no better than a coin, and "
    "worse than 'no' every time (11 and 7). It tells an imbalance, not a gain. Compare with --loss.name mse on "
    "validation rollouts, with several seeds"
)


@dataclass(frozen=True)
class Unevenness:
    """How squares, of changes or of errors, are spread. One row per field.

    Attributes:
        fields: the names of the fields.
        sketches: the distribution over points and steps.
        place: means at every point, (field, *space); NaN where masked.
        time: means at every step, (field, step); NaN where there is none.
        trajectory: means of every trajectory, (field, trajectory); NaN where there is none.
        worst: the largest squares, the largest first.
        regimes: by field the share of the sum in the quiet half, the rest and the top 1 % of the change; of errors.
    """

    fields: tuple[str, ...]
    sketches: tuple[ErrorSketch, ...]
    place: Float[np.ndarray, "field *space"]
    time: Float[np.ndarray, "field step"]
    trajectory: Float[np.ndarray, "field trajectory"]
    worst: tuple["Worst", ...] = ()
    regimes: Mapping[str, tuple[float, ...]] = field(default_factory=dict)

    @property
    def constant(self) -> tuple[str, ...]:
        """Fields of which every square is 0."""
        return tuple(name for name, x in zip(self.fields, self.sketches, strict=True) if x.max == 0)

    @cached_property
    def ladder(self) -> dict[str, dict[str, float]]:
        """By field that is not constant: how much of the sum its largest parts carry, each a share in [0, 1]."""
        rows = zip(self.fields, self.sketches, self.place, self.time, self.trajectory, strict=True)
        return {
            name: {
                "top 1 % of points": sketch.share_of_top(0.01),
                "top 0.1 % of points": sketch.share_of_top(0.001),
                "quiet half of points": 1 - sketch.share_of_top(0.5),
                "Gini coefficient": sketch.gini(),
                "top 10 % of places": _share_of_top(place.ravel()),
                "top 10 % of times": _share_of_top(time),
                "top 10 % of trajectories": _share_of_top(trajectory),
            }
            for name, sketch, place, time, trajectory in rows
            if name not in self.constant
        }

    @property
    def top(self) -> float:
        """The share that the top 1 % of the points carry, the mean over fields that are not constant."""
        return float(np.mean([shares["top 1 % of points"] for shares in self.ladder.values()]))


@dataclass(frozen=True)
class Worst:
    """A square among the largest: its field, trajectory, step, and place by the numbers of the points."""

    field: str
    trajectory: int
    step: int
    point: tuple[int, ...]
    square: float


@dataclass(frozen=True)
class Advice:
    """Whether to weight: `no`, `perhaps` or `try`; why; and the options of `squall train` to begin with."""

    verdict: str
    reason: str
    options: str


def advise(unevenness: Unevenness, predicts: Literal["rate", "state"] | None = None) -> Advice:
    """Where to begin: by what the model predicts, and by the share of the top 1 % where the change is spread evenly.

    Args:
        unevenness: of the squared change.
        predicts: what the model predicts, if there is one.
    """
    share = unevenness.top
    nearest = min(UNEVENNESS, key=lambda name: abs(UNEVENNESS[name] - share))
    reason = f"the top 1 % of the points carry {share:.0%} of the squared change, nearest to {nearest}"
    if share < EVEN:
        return Advice("no", f"{reason}: the change is spread almost evenly", "--loss.name mse")
    if predicts == "state":
        return Advice("no", f"{reason}, but the model predicts the next state", "--loss.name mse")
    weighted = "--loss.kl_budget 0.3"
    if predicts == "rate":
        return Advice("try", f"{reason}, and the model predicts the rate", weighted)
    return Advice("perhaps", reason, f"{weighted} for a model of the rate, --loss.name mse for one of the next state")


def change(source: Source) -> Unevenness:
    """The unevenness of the squared change over one step, each field in units of its own spread, read piece by piece.

    Masked points and steps across gaps are left out; points count by their cell's area, if it is known.

    Args:
        source: the trajectories.

    Raises:
        squall.data.DataError: if nothing changes, or every step touches a gap.

    Example:
        >>> from squall.data import InMemory
        >>> u = torch.zeros(1, 2, 1, 100)
        >>> u[0, 1, 0, 7] = 3.0
        >>> change(InMemory(u, dt=1.0)).top
        1.0
    """
    tally = _Tally(source)
    unit = _unit(source)
    for states, trajectories, starts in _pieces(source):
        tally.add(states.diff(dim=1).div_(unit.to(states)).square_(), trajectories, starts)
    unevenness = tally.result()
    if len(unevenness.constant) == len(unevenness.fields):
        raise DataError(f"{source.name}: no field changes in time, so there is no unevenness to diagnose")
    return unevenness


def errors(model: Rate, source: Source, integrator: IntegratorLike, scale: Sequence[float]) -> Unevenness:
    """The unevenness of a model's squared one-step error, of the rate in units of `scale`.

    Args:
        model: state → rate; with `integrator=next_state`, state → next state.
        source: the trajectories of the truth.
        integrator: that the model is trained through.
        scale: one number per channel by which errors are divided.

    Raises:
        squall.data.DataError: as `change`.
    """
    tally, regimes = _Tally(source, worst=WORST), _Regimes(source, change(source))
    unit = torch.tensor(scale, dtype=torch.float64).reshape(-1, *[1] * len(source.space))
    transitions = Transitions(source)
    size = source.channels * int(np.prod(source.space))
    chosen = transitions.evenly(MOST_NUMBERS // size)
    with torch.no_grad(), evaluating(model):
        for batch in chosen.split(max(1, BLOCK // (4 * size))):
            u, after = (x.double() for x in transitions.fetch(batch))
            rate = increment(integrator, model, like_model(model, u), source.dt).to(u)
            squares = (((after - u) / source.dt - rate) / unit).square()
            trajectories, starts = transitions.locate(batch)
            tally.add(squares[:, None], trajectories, starts)
            regimes.add(after - u, squares)
    return replace(tally.result(), regimes=regimes.shares())


Rows = Int64[Tensor, " n"]


def _pieces(source: Source) -> Iterator[tuple[Trajectories, Rows, Rows]]:
    """Stretches of states without gaps, their trajectories and first times, so that every step is in one of them."""
    if source.valid is not None:
        pairs = Transitions(source)
        size = max(1, 2 * source.nbytes // (source.trajectories * source.shape[1]))
        for batch in torch.arange(len(pairs)).split(max(1, PIECE_BYTES // size)):
            yield pairs.windows(batch), *pairs.locate(batch)
        return
    for chosen, start, stop in source.chunks(PIECE_BYTES):
        stop = min(stop + 1, source.shape[1])
        if stop - start > 1:
            rows = torch.tensor(chosen)
            starts = torch.full_like(rows, start)
            yield source.windows(rows, starts, stop - start), rows, starts


def _unit(source: Source) -> Float[Tensor, "channel *ones"]:
    """The spread of every field over a few states without gaps; it keeps squares of any unit within float32."""
    pairs = Transitions(source)
    some = pairs.evenly(SOME_STATES)
    u = torch.cat(pairs.fetch(some)).double().transpose(0, 1).flatten(1)
    if source.mask is not None:
        counts = source.mask.flatten(1).repeat(1, 2 * len(some))
        u = torch.where(counts, u, (u * counts).sum(1, keepdim=True) / counts.sum(1, keepdim=True).clamp(min=1))
    spread = u.std(1, correction=0)
    size = u.abs().amax(1)
    spread = torch.where(spread > 0, spread, torch.where(size > 0, size, 1))  # 1 where all of them are 0
    return spread.reshape(-1, *[1] * len(source.space))


class _Tally:
    """Squares counted by value, place, step and trajectory, in one pass."""

    def __init__(self, source: Source, worst: int = 0) -> None:
        self.source, self.most = source, worst
        self.worst: list[Worst] = []
        self.counts = torch.ones(source.shape[2:]).bool() if source.mask is None else source.mask
        areas = torch.ones(source.space) if source.measure is None else source.measure
        self.weights = (areas * self.counts).double()
        self.plain = source.mask is None and source.measure is None
        self.sketches = [ErrorSketch() for _ in source.fields]
        self.place = torch.zeros(source.shape[2:], dtype=torch.float64)
        self.sums = torch.zeros(source.channels, source.trajectories, source.steps, dtype=torch.float64)
        self.seen = torch.zeros(source.trajectories, source.steps, dtype=torch.float64)

    def add(self, squares: Float[Tensor, "n step channel *space"], trajectories: Rows, starts: Rows) -> None:
        times = starts[:, None] + torch.arange(squares.shape[1])
        rows = trajectories[:, None].expand_as(times)
        self.seen[rows, times] += 1
        squares = squares.float()
        if not self.plain:
            squares = torch.where(self.counts, squares, 0)
        self.place += squares.sum((0, 1))
        of_step = squares.flatten(3).sum(-1) if self.plain else (squares * self.weights.float()).flatten(3).sum(-1)
        self.sums[:, rows, times] += of_step.movedim(2, 0).double()
        for c, sketch in enumerate(self.sketches):
            of_field, kept = squares[:, :, c].flatten(0, 1), self.counts[c]
            weights = None if self.plain else self.weights[c][kept]
            for block in of_field.split(max(1, BLOCK // max(1, of_field[0].numel()))):
                sketch.merge(_sketch(block.flatten(1) if self.plain else block[:, kept], weights))
        if self.most:
            self._keep_worst(squares, rows, times)

    def _keep_worst(
        self,
        squares: Float[Tensor, "window step channel *space"],
        rows: Int[Tensor, "window step"],
        times: Int[Tensor, "window step"],
    ) -> None:
        flat = squares.flatten()
        for value, index in zip(*(x.tolist() for x in flat.topk(min(self.most, len(flat)))), strict=True):
            n, step, channel, *point = (int(i) for i in np.unravel_index(index, squares.shape))
            name = self.source.fields[channel]
            self.worst.append(Worst(name, int(rows[n, step]), int(times[n, step]), tuple(point), value))
        self.worst = sorted(self.worst, key=lambda worst: -worst.square)[: self.most]

    def result(self) -> Unevenness:
        if any(not sketch.count for sketch in self.sketches):
            raise DataError(f"{self.source.name}: a field is masked at every point; leave it out")
        points = self.weights.flatten(1).sum(1)
        seen, per_step = self.seen, self.sums / points[:, None, None]
        return Unevenness(
            tuple(self.source.fields),
            tuple(self.sketches),
            torch.where(self.counts, self.place / seen.sum(), torch.nan).numpy(),
            (per_step.sum(1) / seen.sum(0)).numpy(),
            (per_step.sum(2) / seen.sum(1)).numpy(),
            tuple(self.worst),
        )


def _sketch(squares: Float[Tensor, "n points"], weights: Float[Tensor, " points"] | None) -> ErrorSketch:
    """The sketch of squares in float32, counted bin by bin: ten times as fast as `ErrorSketch.add`."""
    flat = squares.reshape(-1)
    # The bits of a float that is not negative are ordered as the floats are: 8 of the exponent, with the bias 127 in
    # float32 and 1023 in the float64 of `ErrorSketch`, and the first 6 of 23 of the mantissa.
    keys = (flat.view(torch.int32) >> 17).numpy()  # the exponent and 6 bits of the mantissa
    values, bins = flat.numpy(), 256 * 64
    measure = None if weights is None else weights.expand(squares.shape).reshape(-1).numpy()
    mass = np.bincount(keys, measure, bins).astype(np.float64)
    total = np.bincount(keys, values if measure is None else measure * values, bins)
    mass[0] = mass[:64].sum()  # 0 and what float32 holds with fewer digits
    mass[1:64] = total[:64] = 0
    used = np.flatnonzero(mass)
    places = np.where(used > 0, used + 64 * (1023 - 127), 0)
    least, largest = torch.aminmax(flat)
    return ErrorSketch.from_arrays(
        {
            "bits": np.array(6),
            "keys": places,
            "mass": mass[None, used],
            "total": total[None, used],
            "count": np.array([len(values)]),
            "least": np.array([float(least)]),
            "largest": np.array([float(largest)]),
        }
    )


class _Regimes:
    """The share of the errors in the quiet, the active and the extreme change."""

    def __init__(self, source: Source, of_change: Unevenness) -> None:
        self.fields = source.fields
        self.counts = torch.ones(source.shape[2:]).bool() if source.mask is None else source.mask
        self.unit = _unit(source)
        quantiles = [[sketch.quantile(q) for q in (0.5, 0.99)] for sketch in of_change.sketches]
        self.limits = torch.tensor(quantiles, dtype=torch.float64)
        self.sums = torch.zeros(source.channels, 3, dtype=torch.float64)

    def add(self, changes: State, squares: State) -> None:
        sizes = (changes / self.unit).square().transpose(0, 1).flatten(1).contiguous()
        weights = torch.where(self.counts, squares, 0).transpose(0, 1).flatten(1)
        labels = torch.searchsorted(self.limits, sizes)
        self.sums.scatter_add_(1, labels, weights)

    def shares(self) -> dict[str, tuple[float, ...]]:
        shares = self.sums / self.sums.sum(1, keepdim=True)
        return dict(zip(self.fields, map(tuple, shares.tolist()), strict=True))


def _share_of_top(means: Float[np.ndarray, " parts"]) -> float:
    """The share of the sum that the largest tenth of the parts carries; NaN of fewer than ten parts."""
    means = np.sort(means[np.isfinite(means)])[::-1]
    if len(means) < 10:
        return float("nan")
    return float(np.interp(0.1, np.linspace(0, 1, len(means) + 1), np.append(0, means.cumsum()) / means.sum()))
