"""From errors to weights: sketch the errors, solve the rule on the sketch, weigh exactly; and the guards on the way."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from squall.losses import solver
from squall.losses._tracing import is_traced
from squall.losses.batch import Batch, Sketch, Stats, Tilts, batch_of, compiled_kernels
from squall.losses.checks import check_any, check_errors, check_finite, check_not_empty, combined_measure
from squall.losses.distributed import ALONE, Reduce, Sharding, here
from squall.losses.errors import Over
from squall.losses.rules import DEFAULT_TEMPERATURE, Demand, Schedule, Temperature, TemperatureRule, as_rule
from squall.losses.sketch import BIAS, REST_BITS, SMALL, WINDOW
from squall.losses.traced import SHARPEST_TRACED, Atoms, solve, trace

__all__ = [
    "Weighed",
    "Weighing",
    "from_groups",
    "imbalance_weights",
    "merged",
    "needs_bins",
    "needs_trace",
    "solve_shared",
    "to_groups",
    "weigh",
    "weights_of",
]

UNRESOLVED = 1e-3
"""Share of a budget that the width of the bins may be off before the points are looked at one by one."""
SETTLED = 1e-6
"""Relative error of Σw at which a cap or a mixture has settled."""
BINDS, MET, OFF = range(3)
"""Notes of the solver: whether a cap binds, whether the budget is met, and by how many nats the bins may be off."""
FEW_GROUPS, POINTS_AT_ONCE = 8, 1 << 16
"""Without numba, more groups than a few are solved together, and as many as make a grid of 8 MB."""
MOST_CORRECTIONS = 50
"""Each settles unless it changes which points are at the cap, of which there are few in a bin."""


def to_groups(values: Tensor, over: Over) -> Tensor:
    """(batch, channel, *space) → (group, point), a view where the memory allows."""
    if over == "all":
        return values.reshape(1, -1)
    if over == "sample":
        return values.reshape(values.shape[0], math.prod(values.shape[1:]))
    return values.movedim(1, 0).reshape(values.shape[1], values.shape[0] * math.prod(values.shape[2:]))


def from_groups(values: Tensor, shape: torch.Size, over: Over) -> Tensor:
    """The inverse of `to_groups`."""
    if over == "channel":
        batch, channel, *space = shape
        return values.reshape(channel, batch, *space).movedim(0, 1)
    return values.reshape(shape)


@dataclass(frozen=True)
class Weighing:
    """How errors become weights; `ImbalanceAwareLoss` documents the fields."""

    rule: TemperatureRule | Schedule
    cap: float = math.inf
    mean_share: float = 0.0
    trim: float = 0.0
    winsorize: float = 0.0
    differentiate: bool = False

    def __post_init__(self) -> None:
        if self.cap is None:
            object.__setattr__(self, "cap", math.inf)
        if not self.cap >= 1:
            raise ValueError(f"cap is in units of the uniform weight and must be at least 1, got {self.cap}")
        for name in ("mean_share", "trim", "winsorize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction and must be in [0, 1], got {getattr(self, name)}")
        if self.trim == 1:
            raise ValueError("trim=1 drops every point; it must be below 1")
        if self.mean_share == 1 or self.cap == 1:  # both leave the mean alone
            object.__setattr__(self, "rule", as_rule(math.inf))
            object.__setattr__(self, "mean_share", 0.0)
            object.__setattr__(self, "cap", math.inf)

    @property
    def final(self) -> TemperatureRule:
        """The rule, once a schedule has ended."""
        return self.rule.final if isinstance(self.rule, Schedule) else self.rule

    def softness(self, step: Tensor | None) -> Any:
        """How much of the rule applies at a step, in [0, 1]."""
        if not isinstance(self.rule, Schedule):
            return 1.0
        softness = self.rule.softness(torch.zeros((), dtype=torch.int64) if step is None else step)
        return softness if is_traced(softness) or softness.is_cuda else softness.item()


class Weighed(NamedTuple):
    """What a batch was weighed with; arrays of (group, …)."""

    seen: Sketch
    """The sketch of all points."""
    sketch: Sketch
    """The one after trimming and winsorizing."""
    tilts: np.ndarray
    sums: np.ndarray
    """Σμe, Σμel, Σμ of the points at the cap, and the largest μe."""
    share: np.ndarray
    """Share of each group in the measure of everything."""
    out: Tensor | None
    """μe, times the difference of a squared error, of the batch's shape."""
    batch: Batch

    partition: np.ndarray
    """Σμe, or 1 for a group of no measure."""

    @property
    def values(self) -> np.ndarray:
        """Σ w l of every group by itself."""
        return self.sums[:, 1] / self.partition

    @property
    def factors(self) -> np.ndarray:
        """What turns `out` into weights that sum to 1 over everything."""
        return self.share / self.partition

    def density(self) -> Tensor:
        """μe, of the batch's shape."""
        batch = self.batch
        if batch.b is not None:
            batch = type(batch)((batch.a - batch.b).square(), None, batch.measure)
        out = batch.weigh(self.tilts, False, True)[1]
        assert out is not None
        return out

    def weights(self) -> Tensor:
        """w, of the batch's shape (outer, group, inner), from `out` if that has no differences in it."""
        out = self.density() if self.out is None or self.batch.b is not None else self.out
        return out * torch.from_numpy(self.factors).to(out.dtype).reshape(1, -1, 1)


def weigh(
    batch: Batch,
    sketch: Sketch,
    weighing: Weighing,
    softness: float = 1.0,
    sharding: Sharding = ALONE,
    wanted: bool = True,
) -> Weighed:
    """The weights of a batch on a CPU, from this process's sketch of it.

    Raises:
        ValueError: where no point is left.
    """
    seen = sketch = sketch if sharding.within is here else _shared(sketch, batch, sharding)
    demand = weighing.final.demand(softness)
    limit = math.inf
    if weighing.winsorize:
        sketch, _ = _cut(batch, sketch, weighing.winsorize, sharding, keep=True)
    if weighing.trim:
        before = sketch.stats[:, Stats.TOP]
        sketch, level = _cut(batch, sketch, weighing.trim, sharding, keep=False)
        limit = np.where(level < before, level, math.inf)
    total = sketch.stats[:, Stats.TOTAL]
    everything = float(_sum(total.sum(), sharding.across))
    check_any(everything)
    tilts, binds = _solved(batch, sketch, demand, weighing.cap, limit, sharding)
    tilts[:, Tilts.LIMIT] = limit
    caps, write = bool(binds.any()), wanted and not weighing.mean_share
    if caps:
        room = total / min(demand.cap, weighing.cap)
        _place_edges(batch, sketch, tilts, binds, room, sharding)
        sums, out = _settled(batch, tilts, binds, room, sharding, write)
    else:
        sums, out = _weighed(batch, tilts, False, write, sharding)
    if weighing.mean_share:
        uniform = weighing.mean_share / (1 - weighing.mean_share)
        tilts[:, Tilts.FLOOR] = uniform * sums[:, 0] / np.where(total > 0, total, 1.0)
        sums, out = _weighed(batch, tilts, caps, wanted, sharding)
    partition = sums[:, 0]
    if not partition.all():
        partition = np.where(partition > 0, partition, 1.0)
    return Weighed(seen, sketch, tilts, sums, total / everything, out, batch, partition)


def needs_bins(batch: Batch, sharding: Sharding) -> bool:
    """Whether the groups of all processes together have more points than are atoms of their own."""
    points = batch.points if sharding.within is here else int(_sum(batch.points, sharding.within))
    return points > SMALL


def _sum(value: Any, reduce: Reduce) -> Any:
    """A sum over processes."""
    return value if reduce is here else reduce(torch.as_tensor(value, dtype=torch.float64), "sum").numpy()


def _max(values: np.ndarray, reduce: Reduce) -> np.ndarray:
    return values if reduce is here else reduce(torch.from_numpy(values.copy()), "max").numpy()


def _shared(sketch: Sketch, batch: Batch, sharding: Sharding) -> Sketch:
    """The sketch of the groups of all processes."""
    within = sharding.within
    if within is here:
        return sketch
    stats = sketch.stats.copy()
    own = stats[:, Stats.TOP].copy()
    stats[:, Stats.TOP], stats[:, Stats.KEY] = _max(own, within), _max(stats[:, Stats.KEY], within)
    ties = np.where(own == stats[:, Stats.TOP], stats[:, Stats.TIES], 0.0)
    stats[:, Stats.TIES], stats[:, Stats.TOTAL] = _sum(np.stack((ties, stats[:, Stats.TOTAL])), within)
    if sketch.bins:
        mass, rest = _sum(_aligned(sketch, stats[:, Stats.KEY]), within)
        return Sketch(stats, mass, rest, bins=True)
    sizes = np.zeros(sharding.world)
    sizes[sharding.rank] = batch.points
    sizes = _sum(sizes, within).astype(int)
    start = sizes[: sharding.rank].sum()
    points = np.zeros((2, batch.groups, sizes.sum()))
    points[:, :, start : start + batch.points] = sketch.mass, sketch.rest
    mass, errors = _sum(points, within)
    return Sketch(stats, mass, errors.astype(sketch.rest.dtype), bins=False)


def merged(parts: Sequence[Sketch]) -> Sketch:
    """The bins of all parts of a batch together."""
    stats = parts[0].stats.copy()
    for column in (Stats.TOP, Stats.KEY, Stats.WORST):
        stats[:, column] = np.max([part.stats[:, column] for part in parts], axis=0)
    stats[:, Stats.TOTAL] = sum(part.stats[:, Stats.TOTAL] for part in parts)
    tied = [np.where(p.stats[:, Stats.TOP] == stats[:, Stats.TOP], p.stats[:, Stats.TIES], 0.0) for p in parts]
    stats[:, Stats.TIES] = np.sum(tied, axis=0)
    mass, rest = np.sum([_aligned(part, stats[:, Stats.KEY]) for part in parts], axis=0)
    return Sketch(stats, mass, rest, bins=True)


def solve_shared(batch: Batch, sketch: Sketch, demand: Demand, sharding: Sharding) -> tuple[float, Sketch]:
    """β of one group, from the bins of its parts on all processes; and these together."""
    shared = _shared(sketch, batch, sharding)
    tilt = _solve(shared, batch.dtype, batch.counts, demand, math.inf)[0][0]
    b, scale = float(tilt[Tilts.B]), float(tilt[Tilts.SCALE])
    return (math.inf if b >= solver.SHARPEST else b / scale), shared


def _aligned(sketch: Sketch, keys: np.ndarray) -> np.ndarray:
    """Σμ and Σμr of all groups, (2, group, WINDOW), in windows with these largest keys."""
    shifts = np.where(sketch.stats[:, Stats.TOTAL] > 0, keys - sketch.stats[:, Stats.KEY], WINDOW)
    return np.stack([_shifted(sketch, g, min(int(by), WINDOW)) for g, by in enumerate(shifts)], axis=1)


def _shifted(sketch: Sketch, group: int, by: int) -> np.ndarray:
    """Σμ and Σμr of a group's bins in a window that lies so many bins higher."""
    moved = np.zeros((2, WINDOW))
    moved[:, : WINDOW - by] = sketch.mass[group, by:], sketch.rest[group, by:]
    if by:
        moved[0, 0] += sketch.mass[group, :by].sum()
        moved[1, 0] = 0.0  # the lowest bin stands at 0, whatever is in it
    return moved


def _solved(
    batch: Batch, sketch: Sketch, demand: Demand, cap: float, limit: Any, sharding: Sharding
) -> tuple[np.ndarray, np.ndarray]:
    """What the solver finds for every group, and where a cap binds."""
    tilts, notes = _solve(sketch, batch.dtype, batch.counts, demand, cap)
    if demand.kind >= solver.KL and sketch.bins and sharding.within is here:
        off = notes[:, OFF] > UNRESOLVED * demand.number
        if demand.cap < math.inf:  # the bins cannot tell T → 0 from a small T, unless the number decides it
            sharpest = tilts[:, Tilts.B] >= solver.SHARPEST
            off = off & ~sharpest if demand.number >= math.log(demand.cap) else off | sharpest
        for g in off.nonzero()[0] if off.any() else ():
            errors, mass = batch.between(int(g), 0.0, math.inf)  # errors that lie closer together than the bins tell
            top = sketch.stats[g, Stats.TOP]
            trimmed = (errors > top) & (np.broadcast_to(limit, off.shape)[g] < math.inf)
            points = np.minimum(errors, top), np.where(trimmed, 0.0, mass)
            part = Sketch(sketch.stats[g : g + 1], points[1][None], points[0][None], bins=False)
            tilts[g : g + 1], notes[g : g + 1] = _solve(part, batch.dtype, batch.counts, demand, cap)
    if not notes[:, MET].all():
        missed = len(notes) - int(notes[:, MET].sum())
        warnings.warn(
            f"the temperature budget {demand.number:.3g} cannot be met in {missed} of {len(notes)} groups: "
            f"too few points, or too many tied at the largest error, which takes all the weight there. Use a smaller "
            f"budget or larger groups.",
            RuntimeWarning,
            stacklevel=2,
        )
    return tilts, notes[:, BINDS] > 0


def _solve(
    sketch: Sketch, dtype: torch.dtype, counts: bool, demand: Demand, cap: float
) -> tuple[np.ndarray, np.ndarray]:
    """Tilts (group, 6), and notes (group, 3)."""
    groups = len(sketch.stats)
    tilts, notes = np.empty((groups, 6)), np.empty((groups, 3))
    kernels = compiled_kernels()
    if kernels is not None:
        common = demand.kind, float(demand.number), demand.cap, cap, tilts, notes
        if sketch.bins:
            kernels.solve_bins(sketch.mass, sketch.rest, sketch.stats, BIAS[dtype], counts, *common)
        else:
            kernels.solve_points(sketch.rest, sketch.mass, sketch.stats, *common)
        return tilts, notes
    if not sketch.bins and groups > FEW_GROUPS:
        for start in range(0, groups, max(1, POINTS_AT_ONCE // sketch.rest.shape[1])):
            part = slice(start, start + max(1, POINTS_AT_ONCE // sketch.rest.shape[1]))
            tilts[part], notes[part] = _solve_together(
                sketch.stats[part], sketch.mass[part], sketch.rest[part], demand, cap
            )
        return tilts, notes
    for g, stats in enumerate(sketch.stats):
        top, ties, total = (float(x) for x in stats[:3])
        found = 0.0, 0.0, 0.0, False, True, 0.0
        if sketch.bins and total > 0:
            first = int(stats[Stats.KEY]) - WINDOW + 1
            atoms = solver.atoms_of_bins(sketch.mass[g], sketch.rest[g], first, BIAS[dtype], top, ties, counts)
            found = solver.solve(*atoms, total, top, *demand, cap)
        elif total > 0:
            atoms = solver.atoms_of_points(sketch.rest[g], sketch.mass[g], top, min(demand.cap, cap) < math.inf)
            found = solver.solve(*atoms, total, top, *demand, cap)
        b, y_ref, lam, *notes[g] = found
        scale = top if top > 0 else 1.0
        tilts[g] = b, top + scale * y_ref, scale, lam, math.inf, 0.0
    return tilts, notes


def _solve_together(
    stats: np.ndarray, mass: np.ndarray, errors: np.ndarray, demand: Demand, cap: float
) -> tuple[np.ndarray, np.ndarray]:
    """`_solve` for many small groups in plain PyTorch: the solver of traced programs takes them all at once."""
    top, total = (torch.from_numpy(stats[:, column].copy()).unsqueeze(1) for column in (Stats.TOP, Stats.TOTAL))
    scale = torch.where(top > 0, top, 1.0)
    weights = torch.from_numpy(mass).double()
    y = torch.where(weights > 0, (torch.from_numpy(errors).double() - top) / scale, -1.0).clamp(max=0)
    p = weights / torch.where(total > 0, total, 1.0)
    if min(demand.cap, cap) < math.inf:
        y, order = y.sort(dim=1)
        p = p.gather(1, order)
    mean = (top + scale * (p * y).sum(1, keepdim=True)).clamp(min=0).squeeze(1)
    scale, top = scale.squeeze(1), top.squeeze(1)
    b, y_ref, lam, binds = solve(Atoms(y, p), demand, scale, mean, min(demand.cap, cap))
    sharpest = b >= SHARPEST_TRACED
    b = torch.where(sharpest, solver.SHARPEST, b)
    met = ~sharpest | binds | (demand.kind < solver.KL) | (total.squeeze(1) <= 0)
    tilts = torch.stack((b, top + scale * y_ref, scale, lam, torch.full_like(b, math.inf), torch.zeros_like(b)), 1)
    return tilts.numpy(), torch.stack((binds.double(), met.double(), torch.zeros_like(b)), 1).numpy()


def _order_statistic(batch: Batch, sketch: Sketch, group: int, need: float, sharding: Sharding) -> tuple[float, Any]:
    """The largest error of a group that has more than `need` of the measure at or above it; and the errors and measures
    in its bin.

    Its bin is known from the sketch; in it, bit by bit, which is exact and needs no other process's points.
    """
    integer = np.int32 if batch.dtype == torch.float32 else np.int64
    need, within = need * (1 + 1e-9), sharding.within if sketch.bins else here
    if sketch.bins:
        above = np.cumsum(sketch.mass[group][::-1])
        place = WINDOW - 1 - min(int(np.searchsorted(above, need, side="right")), WINDOW - 1)
        key = int(sketch.stats[group, Stats.KEY]) - WINDOW + 1 + place
        edges = np.array([key if place else 0, key + 1], integer) << (REST_BITS if integer == np.int32 else 46)
        low, high = (edges - np.array([0, 1], integer)).view(np.float32 if integer == np.int32 else np.float64)
        errors, mass = batch.between(group, float(low), float(high))
        need -= sketch.mass[group, place + 1 :].sum()
    else:
        place, (errors, mass) = 0, (sketch.rest[group], sketch.mass[group].astype(np.float64))
    bits = errors.view(integer)
    found = 0
    for bit in reversed(range(31 if integer == np.int32 else 63)):
        candidate = found | (1 << bit)
        if float(_sum(mass[bits >= candidate].sum(), within)) > need:
            found = candidate
    value = np.array([found], integer).view(errors.dtype)[0]
    return float(value), (place, errors, mass)


def _cut(batch: Batch, sketch: Sketch, fraction: float, sharding: Sharding, keep: bool) -> tuple[Sketch, np.ndarray]:
    """What is above the order statistic lowered to it, or taken away."""
    stats, mass, rest = (x.copy() for x in sketch[:3])
    for g, (total, top) in enumerate(zip(stats[:, Stats.TOTAL], stats[:, Stats.TOP], strict=True)):
        level, (place, errors, weights) = _order_statistic(batch, sketch, g, fraction * total, sharding)
        if level >= top:
            continue
        if sketch.bins:
            removed = mass[g, place:].sum()
            stays = errors <= level
            rests = _rests(errors)
            inside = np.array([weights[stays].sum(), (weights * rests)[stays].sum(), weights[errors == level].sum()])
            kept, kept_rest, ties = _sum(inside, sharding.within)
            removed -= kept
            mass[g, place:] = rest[g, place:] = 0.0
            mass[g, place], rest[g, place] = kept, kept_rest
            if keep:
                mass[g, place] += removed
                rest[g, place] += removed * _rests(np.array([level], errors.dtype))[0]
            stats[g, Stats.KEY] += place - (WINDOW - 1)
            mass[g], rest[g] = np.roll(mass[g], WINDOW - 1 - place), np.roll(rest[g], WINDOW - 1 - place)
        else:
            above = errors > level
            removed, ties = weights[above].sum(), weights[errors == level].sum()
            if keep:
                rest[g] = np.minimum(rest[g], level)
            else:
                mass[g][above] = 0
        stats[g, Stats.TOP], stats[g, Stats.TIES] = level, ties + (removed if keep else 0.0)
        stats[g, Stats.TOTAL] -= 0.0 if keep else removed
    return Sketch(stats, mass, rest, sketch.bins), stats[:, Stats.TOP].copy()


def _rests(errors: np.ndarray) -> np.ndarray:
    """Where in its bin an error is, in [0, 2^17)."""
    single = errors.dtype == np.float32
    bits = errors.view(np.int32 if single else np.int64)
    return (bits if single else bits >> 29) & ((1 << REST_BITS) - 1)


def _place_edges(
    batch: Batch, sketch: Sketch, tilts: np.ndarray, binds: np.ndarray, room: np.ndarray, sharding: Sharding
) -> None:
    """Where T → 0 and a cap binds, it is the largest points that fill the cap: put the reference at the smallest."""
    for g in (binds & (tilts[:, Tilts.B] >= solver.SHARPEST)).nonzero()[0]:
        edge, _ = _order_statistic(batch, sketch, int(g), room[g] * (1 - 2e-9), sharding)
        tilts[g, Tilts.REFERENCE], tilts[g, Tilts.LAM] = edge, 0.0


def _settled(
    batch: Batch, tilts: np.ndarray, binds: np.ndarray, room: np.ndarray, sharding: Sharding, wanted: bool
) -> tuple[np.ndarray, Tensor | None]:
    """The exact pass, after λ is moved so that the points at the cap and the others have all the weight."""
    sums, out = _weighed(batch, tilts, True, wanted, sharding)
    for _ in range(MOST_CORRECTIONS):
        if (np.abs(sums[binds, 0] - room[binds]) <= SETTLED * room[binds]).all():
            break
        free = sums[:, 0] - sums[:, 2]
        possible = binds & (free > 0) & (room > sums[:, 2])
        change = np.log(np.where(possible, free, 1.0) / np.where(possible, room - sums[:, 2], 1.0))
        tilts[:, Tilts.LAM] += change
        sums, out = _weighed(batch, tilts, True, wanted, sharding)
    return sums, out


def _weighed(
    batch: Batch, tilts: np.ndarray, caps: bool, wanted: bool, sharding: Sharding
) -> tuple[np.ndarray, Tensor | None]:
    """An exact pass, with the sums over the processes that hold points of the same groups."""
    sums, out = batch.weigh(tilts, caps, wanted)
    if sharding.within is not here:
        sums = np.column_stack((_sum(sums[:, :3], sharding.within), _max(sums[:, 3], sharding.within)))
    return sums, out


def imbalance_weights(
    errors: Tensor,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
    over: Over = "all",
    cap: float | None = None,
    mean_share: float = 0.0,
    trim: float = 0.0,
    winsorize: float = 0.0,
) -> Tensor:
    """Weights w_i = p_i exp(l_i/T) / Σ_j p_j exp(l_j/T) of pointwise errors; detached.

    Args:
        errors: l ≥ 0, shape (batch, channel, *space) or any other shape for `over="all"`.
        temperature: T in the unit of the errors, or a rule that finds it.
        mask: True where a point counts; broadcastable to the errors.
        measure: μ ≥ 0, such as cell areas; broadcastable to the errors. p = μ/Σμ.
        over: what is normalised over together; every group gets its share of the measure.
        cap: no weight above `cap` times the uniform one.
        mean_share: α of uniform weights mixed in.
        trim: fraction of the measure, largest errors first, that gets no weight.
        winsorize: fraction of the measure whose errors are lowered to the largest of the rest.

    Returns:
        w of the shape of the errors, summing to 1.

    Example:
        >>> imbalance_weights(torch.tensor([0.0, 1.0]), temperature=1.0)
        tensor([0.2689, 0.7311])
        >>> imbalance_weights(torch.tensor([1.0, 3.0, 3.0]), temperature=0)
        tensor([0.0000, 0.5000, 0.5000])
    """
    weighing = Weighing(as_rule(temperature), math.inf if cap is None else cap, mean_share, trim, winsorize)
    errors = check_errors(errors.detach(), over)
    check_not_empty(errors)
    total = combined_measure(mask, measure, errors)
    if mask is not None:
        errors = torch.where(mask, errors, 0)
    check_finite(errors)
    return weights_of(errors, mask, measure, total, weighing, over, 1.0, ALONE)[0]


def needs_trace(values: Tensor, weighing: Weighing) -> bool:
    """Whether the weights have to be a program of tensors: traced, on a device, or differentiated themselves."""
    return weighing.differentiate or is_traced(values) or values.device.type != "cpu"


def weights_of(
    errors: Tensor,
    mask: Tensor | None,
    measure: Tensor | None,
    total: Tensor | None,
    weighing: Weighing,
    over: Over,
    softness: Any,
    sharding: Sharding,
) -> tuple[Tensor, Any]:
    """The weights of checked errors, of their shape, and what they were made with."""
    if needs_trace(errors, weighing):
        grouped = None if total is None else to_groups(total, over)
        found = trace(to_groups(errors, over), grouped, weighing, softness, sharding)
        weights = found.weights * found.share.to(found.weights.dtype).unsqueeze(1)
        return from_groups(weights, errors.shape, over), found
    batch = batch_of(errors, None, mask, measure, over)
    weighed = weigh(batch, batch.sketch(needs_bins(batch, sharding)), weighing, softness, sharding)
    return weighed.weights().reshape(errors.shape), weighed
