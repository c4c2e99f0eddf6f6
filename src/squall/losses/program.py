"""Fill, solve and weigh as a program of tensors, for all groups at once: traced (torch.compile, export, vmap), on
devices, over processes, where the weights are differentiated, and on a CPU without numba (`kernels` has the same
there).

An atom is a bin of a group's sketch, or each of its points where they are few: it has an error l and a measure. With
y = (l − l_max)/l_max ≤ 0, the share p of the measure and the sharpness b = l_max/T, the weights are

    w = p min(c, a exp(b y)),   a such that Σ w = 1,

and c = ∞ where there is no cap. The divergences of w from p that a budget may prescribe grow with b: Newton's method on
their logarithms, within a bracket. A traced program takes all steps; elsewhere on a CPU the last is the one that is
met.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.checks import warn_unmet
from squall.losses.distributed import ALONE, Reduce, Sharding
from squall.losses.rules import KL, LARGEST_EXPONENT, RELATIVE, RENYI, SHARPEST, TEMPERATURE, Demand
from squall.losses.sketch import BELOW, BIAS, KEY_SHIFT, REST_BITS, SMALL, WINDOW

if TYPE_CHECKING:
    from squall.losses.weights import Weighing

__all__ = ["Tilt", "Weighed", "solve", "sum_of_rows", "weigh"]

BLOCK, TRACED_BLOCK = 1 << 16, 1 << 22
"""Points of a block: its temporaries stay in the cache; in a trace, as many as a packed counter can add up."""
ONE = 1 << 40
"""A count of one in a packed counter, above the sums of rests."""
TRACED_STEPS, MOST_STEPS = 14, 200
"""Of Newton's method: steps change log b by up to 1, and the last few square the error each."""
MET = 1e-6
"""Relative distance from the budget at which the next step is the last."""
UNRESOLVED = 1e-3
"""Share of a budget that the width of the bins may be off before the points are looked at one by one."""
LATE = 1e-3
"""By how much a cap first sets in too late, more than the bins are off: the corrections only take points in."""
CORRECTIONS = 3
"""Of the place of a cap by exact sums; each squares the error, which the bins leave at 1e-4."""

Groups = Float[Tensor, "group"]
Points = Float[Tensor, "group point"]
Column = Float[Tensor, "group 1"]
Atoms = Float[Tensor, "group atom"]


class Tilt(NamedTuple):
    """Weights in proportion to μ (exp(min(0, b (l − reference)/scale − λ)) + floor) where l ≤ limit."""

    b: Groups
    reference: Groups
    scale: Groups
    lam: Groups
    limit: Groups
    floor: Groups

    def exponent(self, errors: Points) -> Points:
        """b (l − reference)/scale − λ, in the type of the errors."""
        b, reference, scale, lam = (x.to(errors.dtype).unsqueeze(1) for x in self[:4])
        return errors.sub(reference).div_(scale).mul_(b).sub_(lam)


class Weighed(NamedTuple):
    """Weights, and what a report needs."""

    weights: Points
    """w, which sums to 1 over everything."""
    tilt: Tilt
    errors: Atoms
    """l of the atoms, after winsorizing."""
    mass: Atoms
    """μ of the atoms, after trimming."""
    total: Groups
    """Σμ."""
    share: Groups
    """Of each group in the measure of everything."""
    mean: Groups
    """The mean error, before trimming and winsorizing."""
    met: Bool[Tensor, "group"]
    """Whether the budget is met."""


def weigh(
    errors: Points, measure: Points | None, weighing: "Weighing", softness: Any, sharding: Sharding = ALONE
) -> Weighed:
    """The weights of errors (group, point)."""
    held, within = errors.detach(), sharding.within
    waits = held.device.type == "cpu" and not is_traced(held)
    measure = None if measure is None else measure.to(held.dtype)
    demand = weighing.final.demand(softness)
    cap = min(demand.cap, weighing.cap)
    top = within(_amax(held if measure is None else torch.where(measure > 0, held, 0)), "max").double()
    ordered = bool(weighing.trim or weighing.winsorize) or cap < math.inf
    l, mass, first = _atoms(held, measure, top, ordered, sharding, waits)
    mean = (l * mass).sum(1) / _positive(mass.sum(1))
    points = _Points(held, measure, first, within, waits)
    if weighing.winsorize:
        l, mass, _ = _cut(l, mass, points, weighing.winsorize * mass.sum(1), True)
    limit = torch.full_like(top, math.inf)
    if weighing.trim:
        l, mass, limit = _cut(l, mass, points, weighing.trim * mass.sum(1), False)
    solution = solve(l, mass, demand, cap, waits)
    top, total = torch.where(mass > 0, l, 0).amax(1) if l.shape[1] else top, mass.sum(1)
    if waits and first is not None and sharding.world == 1:
        off = ~_resolved(l, mass, demand, measure is None, held.dtype, top, *solution[:3])
        if bool(off.any()):  # their errors lie closer together than the bins tell
            rows = held[off], None if measure is None else measure[off]
            for old, new in zip(
                solution, solve(*_each(*rows, top[off], limit[off], True), demand, cap, waits), strict=True
            ):
                old[off] = new
    b, y_ref, lam, binds, met = solution
    if waits and not bool(met.all()):
        warn_unmet(int((~met).sum()), len(met), float(demand.number))
    tilt = Tilt(b, top + _positive(top) * y_ref, _positive(top), lam, limit, torch.zeros_like(b))
    if cap < math.inf:
        tilt = _place_edge(tilt, l, mass, points, binds, total / cap, demand)
    weights, tilt = _density(errors, points, tilt, binds, total, cap, weighing)
    partition = within(sum_of_rows(weights), "sum")
    share = total / _positive(sharding.across(total.sum(), "sum"))
    factor = (share / _positive(partition)).to(weights.dtype).unsqueeze(1)
    weights = weights * factor if weighing.differentiate else weights.mul_(factor)
    return Weighed(weights, tilt, l, mass, total, share, mean, met)


class _Points(NamedTuple):
    """The points themselves, and how they may be looked at."""

    errors: Points
    measure: Points | None
    first: Int[Tensor, "group 1"] | None
    """The key of the lowest bin; None where every point is an atom."""
    within: Reduce
    waits: bool
    """Whether Python may wait for a number."""

    def sum(self, values: Shaped[Tensor, "group point"]) -> Groups:
        """Σμ of values, over all processes."""
        return _sum(values.to(self.errors.dtype), self.measure, self.within)


def _positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, 1)


def _sum(values: Points, measure: Points | None, within: Reduce) -> Groups:
    """Σμ of values, over all processes, in float64: one point more or less can decide an order statistic."""
    return within((values if measure is None else values * measure).sum(1, dtype=torch.float64), "sum")


def sum_of_rows(values: Points) -> Groups:
    """Sums to 1e-7, without a copy in float64 where PyTorch's own sums are that exact; compiled ones are not."""
    return values.sum(1, dtype=torch.float64) if is_traced(values) else values.sum(1).double()


def _amax(values: Points) -> Groups:
    return values.amax(1) if values.shape[1] else values.new_zeros(len(values))


# The atoms of every group


def _atoms(
    errors: Points, measure: Points | None, top: Groups, ordered: bool, sharding: Sharding, waits: bool
) -> tuple[Atoms, Atoms, Int[Tensor, "group 1"] | None]:
    """l and μ of the bins of a window below the largest error, ascending, with the points that tie there last, and
    the key of the lowest bin; of few points the points themselves, ascending if they have to be."""
    within, few = sharding.within, (errors, measure)
    if sharding.within is not ALONE.within:
        few = _gathered(errors, measure, sharding)
    elif errors.shape[1] > SMALL:
        few = None
    if few is not None:
        return *_each(*few, top, torch.full_like(top, math.inf), ordered), None
    largest = _bits(top.to(errors.dtype)).unsqueeze(1)
    first = (largest >> KEY_SHIFT[errors.dtype]) - (WINDOW - 1)
    mass, rest = (within(x, "sum") for x in _fill(errors, measure, first, largest, BLOCK if waits else TRACED_BLOCK))
    values = _decoded(mass[:, :-1], rest[:, :-1], first, errors.dtype)
    return torch.cat((values, top.unsqueeze(1)), 1), mass, first


def _each(errors: Points, measure: Points | None, top: Groups, limit: Groups, ordered: bool) -> tuple[Atoms, Atoms]:
    """Every point as an atom, lowered to the top and without those beyond the limit."""
    l = errors.double()
    mass = torch.ones_like(l) if measure is None else measure.double()
    mass = torch.where(l <= limit.unsqueeze(1), mass, 0)
    l = torch.where(mass > 0, torch.minimum(l, top.unsqueeze(1)), 0)
    if ordered:
        l, order = l.sort(dim=1)
        mass = mass.gather(1, order)
    return l, mass


def _gathered(errors: Points, measure: Points | None, sharding: Sharding) -> tuple[Points, Points] | None:
    """The points of all processes where they are few."""
    sizes = torch.zeros(sharding.world, dtype=torch.float64, device=errors.device)
    sizes[sharding.rank] = errors.shape[1]
    counts = [int(size) for size in sharding.within(sizes, "sum")]
    if sum(counts) > SMALL:
        return None
    start = sum(counts[: sharding.rank])
    both = errors.new_zeros((2, len(errors), sum(counts)), dtype=torch.float64)
    both[0, :, start : start + errors.shape[1]] = errors
    both[1, :, start : start + errors.shape[1]] = 1 if measure is None else measure
    l, mass = sharding.within(both, "sum")
    return l.to(errors.dtype), mass


def _bits(errors: Tensor) -> Tensor:
    return errors.view(torch.int32 if errors.dtype == torch.float32 else torch.int64)


def _fill(
    errors: Points, measure: Points | None, first: Int[Tensor, "group 1"], largest: Int[Tensor, "group 1"], size: int
) -> tuple[Atoms, Atoms]:
    """Σμ and Σμr of the bins of a window, and last of the points that tie at the largest error, (group, WINDOW + 1); of
    the lowest, Σμr means nothing."""
    groups, shift, bits = len(errors), KEY_SHIFT[errors.dtype], _bits(errors)
    rows = torch.arange(groups, device=errors.device).unsqueeze(1) * (WINDOW + 1)
    mass, rest = errors.new_zeros(2, groups * (WINDOW + 1), dtype=torch.float64)
    columns = max(1, size // max(groups, 1))
    for start in range(0, bits.shape[1], columns):
        part = bits[:, start : start + columns]
        places = (part >> shift).sub_(first).clamp(0, WINDOW - 1).add_(part >= largest).long().add_(rows).reshape(-1)
        rests = (part >> (shift - REST_BITS)).bitwise_and_((1 << REST_BITS) - 1)
        if measure is None:
            packed = torch.zeros(len(mass), dtype=torch.int64, device=errors.device)
            packed = packed.scatter_add(0, places, rests.long().add_(ONE).reshape(-1))
            mass, rest = mass + (packed >> 40), rest + (packed & (ONE - 1))
        else:
            weights = measure[:, start : start + columns].double()
            mass = mass.scatter_add(0, places, weights.reshape(-1))
            rest = rest.scatter_add(0, places, (weights * rests).reshape(-1))
    return mass.reshape(groups, WINDOW + 1), rest.reshape(groups, WINDOW + 1)


def _decoded(mass: Atoms, rest: Atoms, first: Int[Tensor, "group 1"], dtype: torch.dtype) -> Atoms:
    """The mean error of every bin; that of the lowest counts as 0."""
    key = (first.long() + torch.arange(WINDOW, device=mass.device)).clamp(min=0)
    power = (((key >> 6).clamp(min=1) + (1023 - BIAS[dtype])) << 52).view(torch.float64)
    inside = rest / _positive(mass) / (64 << REST_BITS)
    values = power * ((key >= 64) + (key & 63) / 64 + inside)
    return torch.cat((torch.zeros_like(values[:, :1]), values[:, 1:]), 1)


# Trim and winsorize


def _statistic(l: Atoms, mass: Atoms, points: _Points, need: Groups) -> tuple[Groups, Tensor, _Points]:
    """The largest error that has more than `need` of the measure at or above it, the atom that it is in, and the points
    of that bin (in a trace all points, those elsewhere without measure)."""
    need = need * (1 + 1e-9)
    upwards = mass.flip(1).cumsum(1).flip(1)
    k = ((upwards > need.unsqueeze(1)).sum(1, keepdim=True) - 1).clamp(min=0)
    errors, measure, first, within, waits = points
    if first is None:
        return l.gather(1, k).squeeze(1), k, points
    need = need - (upwards.gather(1, k) - mass.gather(1, k)).squeeze(1)
    keys = (_bits(errors) >> KEY_SHIFT[errors.dtype]).sub_(first).clamp(0)
    inside = (keys == k) & (errors < l[:, -1:].to(errors.dtype))  # what ties at the largest error is an atom of its own
    inside = inside if measure is None else inside & (measure > 0)
    if waits:
        errors, weights = _narrowed(errors, measure, inside)
    else:
        weights = inside.to(errors.dtype) if measure is None else torch.where(inside, measure, 0)
    bin_of_k = _Points(errors, weights, first, within, waits)
    bits = _bits(errors)
    found = torch.zeros_like(k).to(bits.dtype)
    for place in reversed(range(31 if errors.dtype == torch.float32 else 63)):  # bit by bit: exact, without a sort
        candidate = found + (1 << place)
        found = torch.where((bin_of_k.sum(bits >= candidate) > need).unsqueeze(1), candidate, found)
    level = torch.where(k < l.shape[1] - 1, found.view(errors.dtype).double(), l[:, -1:])
    return level.squeeze(1), k, bin_of_k


def _narrowed(
    errors: Points, measure: Points | None, inside: Bool[Tensor, "group point"]
) -> tuple[Float[Tensor, "group some"], Float[Tensor, "group some"]]:
    """The points inside, in rows as long as the longest, filled up with points of no measure."""
    rows, columns = inside.nonzero(as_tuple=True)
    counts = inside.sum(1)
    places = torch.arange(len(rows)) - (counts.cumsum(0) - counts)[rows]
    points = errors.new_zeros((2, len(errors), max(counts.tolist(), default=0)))
    points[0, rows, places] = errors[rows, columns]
    points[1, rows, places] = 1 if measure is None else measure[rows, columns]
    return points[0], points[1]


def _cut(l: Atoms, mass: Atoms, points: _Points, need: Groups, keep: bool) -> tuple[Atoms, Atoms, Groups]:
    """Atoms of which what lies above the order statistic is lowered to it, or taken away; and that statistic, infinite
    where nothing lies above."""
    level, k, inside = _statistic(l, mass, points, need)
    limit, column = torch.where(level < l[:, -1], level, math.inf), level.unsqueeze(1)
    if points.first is None:
        return torch.minimum(l, column), mass if keep else torch.where(l <= column, mass, 0), limit
    at, errors = column.to(points.errors.dtype), inside.errors
    below, ties = (inside.sum(x).unsqueeze(1) for x in (errors < at, errors == at))
    value = inside.sum(torch.where(errors < at, errors, 0)).unsqueeze(1)
    places, last = torch.arange(l.shape[1], device=l.device), l.shape[1] - 1
    removed = torch.where(places >= k, mass, 0).sum(1, keepdim=True) - below - ties
    ties = ties + removed.clamp(min=0) if keep else ties
    new_l = torch.where(places == k, value / _positive(below), torch.where(places == last, column, l))
    new_mass = torch.where(places == k, below, torch.where(places == last, ties, mass * (places < k)))
    return torch.where(k < last, new_l, l), torch.where(k < last, new_mass, mass), limit


# The solver


def solve(
    l: Atoms, mass: Atoms, demand: Demand, cap: float, waits: bool
) -> tuple[Groups, Groups, Groups, Bool[Tensor, "group"], Bool[Tensor, "group"]]:
    """b; y_ref ≤ 0 and λ ≥ 0, with weights in proportion to exp(min(0, b (y − y_ref) − λ)); whether a cap binds, and
    whether the budget is met (if not, the largest error has all weight)."""
    total = mass.sum(1, keepdim=True)
    p = mass / _positive(total)
    top = torch.where(mass > 0, l, 0).amax(1, keepdim=True) if l.shape[1] else torch.zeros_like(total)
    scale = _positive(top)
    y = ((l - top) / scale).clamp(max=0)
    met = torch.ones_like(total, dtype=torch.bool)
    if demand.kind == TEMPERATURE:
        b = (scale / demand.number).clamp(max=SHARPEST)
    elif demand.kind == RELATIVE:
        mean = (top + scale * (p * y).sum(1, keepdim=True)).clamp(min=0)
        b = torch.where(mean > 0, scale / (demand.number * _positive(mean)), 0)
    else:
        b, met = _search(y, p, demand, waits)
    b = torch.where(total > 0, b, 0)
    if not cap < math.inf:
        return (
            b.squeeze(1),
            torch.zeros_like(b).squeeze(1),
            torch.zeros_like(b).squeeze(1),
            (b < 0).squeeze(1),
            met.squeeze(1),
        )
    edge, room = _edge(y, p, cap)
    _, _, nu, k, binds = _capped(y, p, b, cap, edge, room)
    reference = torch.where(binds, y.gather(1, k), 0)
    lam = torch.where(binds, (nu - b * (reference - edge)).clamp(min=0), 0)
    return b.squeeze(1), reference.squeeze(1), lam.squeeze(1), (binds & (total > 0)).squeeze(1), met.squeeze(1)


def _edge(y: Atoms, p: Atoms, cap: float) -> tuple[Column, Atoms]:
    """y of the atom up to which all mass together fills the cap; and 1/c less what lies above each atom."""
    upwards = p.flip(1).cumsum(1).flip(1)
    k = ((upwards >= 1 / cap).sum(1, keepdim=True) - 1).clamp(min=0)
    return y.gather(1, k), 1 / cap - (upwards - p)


def _capped(
    y: Atoms, p: Atoms, b: Column, cap: float, edge: Column, room: Atoms
) -> tuple[Atoms, Column, Column, Int[Tensor, "group 1"], Bool[Tensor, "group 1"]]:
    """p exp(b (y − y_edge)) of the atoms below the cap, the weight of these together, ν − b y_edge, the largest of
    them, and whether the cap binds at all.

    Were atom k the largest below the cap, ν_k = log Σ_{j ≤ k} p_j exp(b y_j) − log(1/c − Σ_{j > k} p_j); the right k is
    the largest for which b y_k ≤ ν_k.
    """
    x = (b * (y - edge)).clamp(max=LARGEST_EXPONENT)
    e = p * x.exp()
    nu = e.cumsum(1).log() - room.clamp(min=1e-300).log()
    nu = torch.where((room > 1e-14) & (p > 0), nu, -math.inf)
    places = torch.arange(y.shape[1], device=y.device)
    k = torch.where(x <= nu, places, -1).amax(1, keepdim=True).clamp(min=0)
    nu = nu.gather(1, k)
    binds = nu + b * edge < -1e-14
    free = torch.where(binds, cap * room.gather(1, k), 1)
    return torch.where(binds & (places > k), 0, e), free, nu, k, binds


def _search(y: Atoms, p: Atoms, demand: Demand, waits: bool) -> tuple[Column, Bool[Tensor, "group 1"]]:
    """b at which the divergence is the budget: 0 where all atoms are equal, `SHARPEST` where it cannot be met; and
    whether it is met."""
    mean = (p * y).sum(1, keepdim=True)
    variance = (p * (y - mean).square()).sum(1, keepdim=True)
    budget = torch.zeros_like(mean) + demand.number
    flat = (variance <= 0) | (budget <= 0)
    edge, room = _edge(y, p, demand.cap) if demand.cap < math.inf else (None, None)
    most, tied = _most(y, p, demand.cap, edge)
    sharp = budget >= most * (1 - 1e-9)
    goal = torch.where(flat | sharp, 1, budget)
    b = (goal * (2 if demand.kind == KL else 1) / _positive(variance)).sqrt().clamp(max=SHARPEST / 10)
    low, high = torch.zeros_like(b), torch.full_like(b, SHARPEST)
    for _ in range(MOST_STEPS if waits else TRACED_STEPS):
        divergence, slope = _divergence(y, p, b, demand, edge, room)
        over = divergence > goal
        low, high = torch.where(over, low, b), torch.where(over, b, high)
        usable = (divergence > 0) & (slope > 0)
        change = (goal / torch.where(usable, divergence, 1)).log() * divergence / torch.where(usable, slope, 1)
        change = torch.where(usable, change, torch.where(over, -1.0, 1.0)).clamp(-1, 1)
        following = b * change.exp()  # a larger step overshoots where the divergence saturates
        outside = (following <= low) | (following >= high)  # its ends too: two steps could lead back and forth
        middle = torch.where(low > 0, (low * high).sqrt(), high / 2)
        done = (divergence - goal).abs() < MET * goal
        b, before = torch.where(outside & ~done, middle, following), b
        if waits and bool((done | flat | sharp | ((b / before - 1).abs() < 1e-15)).all()):
            break
    return torch.where(flat, 0, torch.where(sharp, SHARPEST, b)), flat | ~(sharp & tied)


def _most(y: Atoms, p: Atoms, cap: float, edge: Column | None) -> tuple[Column, Bool[Tensor, "group 1"]]:
    """The divergence for T → 0, and whether the atoms tied at the largest error have all the weight then."""
    ties = torch.where(y == 0, p, 0).sum(1, keepdim=True)
    most = -_positive(ties).log()
    if edge is None:
        return most, ties > -1
    above, share = (torch.where(x, p, 0).sum(1, keepdim=True) for x in (y > edge, y == edge))
    rest = (1 - cap * above).clamp(min=0)
    capped = cap * above * math.log(cap) + torch.where(rest > 0, rest * (_positive(rest) / _positive(share)).log(), 0)
    alone = cap * ties >= 1
    return torch.where(alone, most, capped), alone


def _divergence(
    y: Atoms, p: Atoms, b: Column, demand: Demand, edge: Column | None, room: Atoms | None
) -> tuple[Column, Column]:
    """The divergence at b, and its slope over log b."""
    if edge is None or room is None:
        e, free, shift = p * (b * y).exp(), 1.0, None
    else:
        e, free, nu, _, binds = _capped(y, p, b, demand.cap, edge, room)
        shift = nu, binds
    total = e.sum(1, keepdim=True)
    y = y if edge is None else y - edge  # the capped weights turn on differences far below the largest error
    mean = (e * y).sum(1, keepdim=True) / total
    if demand.kind == RENYI:
        twice = e * e / _positive(p)
        sum_of_twice = twice.sum(1, keepdim=True)
        slope = 2 * b * ((twice * y).sum(1, keepdim=True) / sum_of_twice - mean)
        return sum_of_twice.log() - 2 * total.log(), slope
    slope = b * b * free * (e * (y - mean).square()).sum(1, keepdim=True) / total
    if shift is None:
        return b * mean - total.log(), slope
    nu, binds = shift
    return torch.where(binds, math.log(demand.cap) + free * (b * mean - nu), b * mean - total.log()), slope


def _resolved(
    l: Atoms, mass: Atoms, demand: Demand, counts: bool, dtype: torch.dtype, top: Groups, b: Groups, y_ref: Groups,
    lam: Groups,
) -> Bool[Tensor, "group"]:  # fmt: skip
    """Whether the width of the bins changes the divergence by less than UNRESOLVED of the budget: w b² v/2 each, with
    the variance v = width²/12, and the width 1/64 to 1/128 of the error (its square half of 1/64² on average), or
    of the smallest normal number. Where all errors of a bin are at the cap, where they are in it does not matter."""
    if demand.kind < KL:
        return torch.ones_like(b, dtype=torch.bool)
    ratio = l / _positive(top).unsqueeze(1)
    least = torch.finfo(dtype).tiny / _positive(top).unsqueeze(1)
    z = b.unsqueeze(1) * (ratio - 1 - y_ref.unsqueeze(1)) - lam.unsqueeze(1)
    e = mass * z.clamp(max=0).exp()
    exact = (mass <= 1.5) if counts else torch.zeros_like(mass, dtype=torch.bool)
    exact[:, -1] = True  # the ties
    exact |= ((z > 0) & (mass > 0)).cumsum(1) > 1  # a bin above another one at the cap is whole at the cap
    e_free = torch.where(exact, 0, e)
    width = (e_free * torch.maximum(ratio, least).square()).sum(1) / (48 * 64**2)
    below = torch.where(ratio == 0, e_free, 0).sum(1) * BELOW
    fine = b * b * width + b * below <= UNRESOLVED * demand.number * e.sum(1)
    # With a cap, bins cannot tell T → 0 from a small T, unless the number decides it.
    decided = demand.cap == math.inf or demand.number >= math.log(demand.cap)
    return torch.where(b >= SHARPEST, decided, fine)


# The exact pass


def _place_edge(
    tilt: Tilt, l: Atoms, mass: Atoms, points: _Points, binds: Bool[Tensor, "group"], room: Groups, demand: Demand
) -> Tilt:
    """Where T → 0 and a cap binds, the largest points fill the cap: put the reference at the smallest of them."""
    number, sharp = demand.number, binds & (tilt.b >= SHARPEST)
    extreme = not isinstance(number, Tensor) and (
        number == 0 if demand.kind == TEMPERATURE else demand.cap < math.inf and number >= math.log(demand.cap)
    )
    if not (bool(sharp.any()) if points.waits else extreme):
        return tilt
    edge = _statistic(l, mass, points, room * (1 - 2e-9))[0]
    return tilt._replace(reference=torch.where(sharp, edge, tilt.reference), lam=torch.where(sharp, 0, tilt.lam))


def _density(
    errors: Points, points: _Points, tilt: Tilt, binds: Bool[Tensor, "group"], total: Groups, cap: float,
    weighing: "Weighing",
) -> tuple[Points, Tilt]:  # fmt: skip
    """μ (e + floor), and the tilt with the λ and the floor that the exact sums ask for."""
    z, inside = tilt.exponent(errors if weighing.differentiate else points.errors), None
    if weighing.trim:
        inside = points.errors <= tilt.limit.to(errors.dtype).unsqueeze(1)
        z = torch.where(inside, z, -math.inf)
    if cap < math.inf:
        e, tilt = _settled(z, points, tilt, binds, total / cap)
    else:  # what winsorizing lowers, and what has no measure, may lie above the reference
        e = (z.clamp(max=0) if weighing.winsorize or points.measure is not None else z).exp_()
    if weighing.mean_share:
        uniform = weighing.mean_share / (1 - weighing.mean_share)
        floor = uniform * points.sum(e) / _positive(total)
        tilt, e = tilt._replace(floor=floor.detach()), e + floor.to(e.dtype).unsqueeze(1)
        e = e if inside is None else torch.where(inside, e, 0)
    return e if points.measure is None else e * points.measure, tilt


def _settled(z: Points, points: _Points, tilt: Tilt, binds: Bool[Tensor, "group"], room: Groups) -> tuple[Points, Tilt]:
    """The exponential with the λ at which the points at the cap and the others have all the measure that there is."""
    late = torch.where(binds, LATE, 0.0)
    tilt = tilt._replace(lam=tilt.lam + late)
    e = (z - late.to(z.dtype).unsqueeze(1)).clamp(max=1).exp()  # above the cap, by how much does not matter
    for _ in range(CORRECTIONS):
        at_cap = e.detach() > 1
        above, free = points.sum(at_cap), points.sum(torch.where(at_cap, 0, e))
        factor = torch.where(binds & (free > 0) & (room > above), (room - above) / _positive(free), 1)
        e = torch.where(at_cap, e, e * factor.to(e.dtype).unsqueeze(1))
        tilt = tilt._replace(lam=tilt.lam - factor.detach().log())
        if points.waits and bool(((factor - 1).abs() < 1e-7).all()):
            break
    return e.clamp(max=1), tilt
