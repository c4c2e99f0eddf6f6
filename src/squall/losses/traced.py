"""The weights as one branch-free program of tensors: under torch.compile, export, vmap, and on devices, where nothing
may wait for a number. Fill, solve, weigh, as elsewhere; the solver searches a grid that is refined, since it cannot
stop when it is done.
"""

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from squall.losses.distributed import ALONE, Sharding
from squall.losses.rules import Demand
from squall.losses.sketch import BIAS, REST_BITS, SMALL, WINDOW, keys_and_rests
from squall.losses.solver import RELATIVE, RENYI, TEMPERATURE

if TYPE_CHECKING:
    from squall.losses.weights import Weighing

__all__ = ["SHARPEST_TRACED", "Atoms", "Tilt", "Traced", "fill", "solve", "trace"]

BLOCK = 1 << 22
"""Points of which a packed counter can add up the rests."""
ONE = 1 << 40
CANDIDATES, ROUNDS = 16, 4
"""Of the search: 27 octaves by 15^4 leave 1e-3 of log b, of which the interpolation leaves the square."""
CORRECTIONS = 3
"""Of the place of a cap by exact sums; each is exact where it does not change which points are at the cap."""

SHARPEST_TRACED = 1e12
"""b of T = 0 for errors in float32: it tells errors apart that differ by one rounding, and the grid is a short one."""

Groups = Float[Tensor, "group"]
Points = Float[Tensor, "group point"]


class Atoms(NamedTuple):
    """Positions y ≤ 0 of the atoms, and their shares of the measure."""

    y: Float[Tensor, "group atom"]
    p: Float[Tensor, "group atom"]


class Tilt(NamedTuple):
    """Weights in proportion to μ (exp(min(0, b (l − ref)/scale − λ)) + floor) where l ≤ limit."""

    b: Groups
    reference: Groups
    scale: Groups
    lam: Groups
    limit: Groups
    floor: Groups

    def density(self, errors: Points) -> Points:
        """The exponential, in the type of the errors."""
        b, reference, scale, lam, limit, _ = (x.to(errors.dtype).unsqueeze(1) for x in self)
        z = (b * ((errors - reference) / scale) - lam).clamp(max=0)
        return torch.where(errors <= limit, z.exp(), 0)

    def above(self, errors: Points) -> Bool[Tensor, "group point"]:
        """Where the exponent is positive: the points at the cap."""
        b, reference, scale, lam, limit, _ = (x.to(errors.dtype).unsqueeze(1) for x in self)
        return (b * ((errors - reference) / scale) > lam) & (errors <= limit)


class Traced(NamedTuple):
    """Weights, the share of every group, and what a report needs."""

    weights: Points
    """w, which sums to 1 in every group."""
    share: Groups
    total: Groups
    """Σμ."""
    tilt: Tilt
    atoms: Atoms
    top: Groups
    mean: Groups


def trace(
    errors: Points, measure: Points | None, weighing: "Weighing", softness: Any, sharding: Sharding = ALONE
) -> Traced:
    """The weights of errors (group, point)."""
    held = errors.detach()
    measure = None if measure is None else measure.to(held.dtype)
    total = _total(held, measure, sharding)
    lowered, limit = held, torch.full_like(total, math.inf)
    if weighing.winsorize:
        level = _order_statistic(lowered, measure, weighing.winsorize * total, sharding)
        lowered = torch.minimum(lowered, level.to(held.dtype).unsqueeze(1))
    if weighing.trim:
        limit = _order_statistic(lowered, measure, weighing.trim * total, sharding)
        kept = lowered <= limit.to(held.dtype).unsqueeze(1)
        measure = kept.to(held.dtype) if measure is None else torch.where(kept, measure, 0)
        total = _total(held, measure, sharding)
    counted = lowered if measure is None else torch.where(measure > 0, lowered, 0)
    top = sharding.within(_amax(counted), "max").double()
    scale = torch.where(top > 0, top, 1)
    demand = weighing.final.demand(softness)
    cap = min(demand.cap, weighing.cap)
    atoms = _atoms(lowered, measure, top, total, cap < math.inf, sharding)
    mean = (top + scale * (atoms.p * atoms.y).sum(1)).clamp(min=0)
    b, y, lam, binds = solve(atoms, demand, scale, mean, cap)
    tilt = Tilt(b, top + scale * y, scale, lam, limit, torch.zeros_like(b))
    if cap < math.inf:
        extreme = (demand.kind == TEMPERATURE and weighing.final.demand().number == 0) or (
            not isinstance(demand.number, Tensor) and demand.cap < math.inf and demand.number >= math.log(demand.cap)
        )
        if extreme:  # the largest 1/cap of the points, exactly
            edge = _order_statistic(lowered, measure, total / cap * (1 - 2e-9), sharding)
            tilt = tilt._replace(b=torch.where(binds, SHARPEST_TRACED, b), reference=torch.where(binds, edge, top))
            tilt = tilt._replace(lam=torch.where(binds, 0, lam))
        tilt = _settle(lowered, measure, tilt, binds, total / cap, sharding)
    density = tilt.density(errors if weighing.differentiate else lowered)
    sum_of = sharding.within
    partition = sum_of(_sum(density, measure), "sum")
    if weighing.differentiate and cap < math.inf:
        density = _at_the_cap(density, measure, tilt, errors, binds, total / cap)
        partition = _sum(density, measure)
    if weighing.mean_share:
        floor = weighing.mean_share / (1 - weighing.mean_share) * partition / torch.where(total > 0, total, 1)
        tilt = tilt._replace(floor=floor.detach())
        inside = lowered <= limit.to(held.dtype).unsqueeze(1)
        density = torch.where(inside, density + floor.to(density.dtype).unsqueeze(1), 0)
        partition = sum_of(_sum(density, measure), "sum")
    weights = density / torch.where(partition > 0, partition, 1).to(density.dtype).unsqueeze(1)
    weights = weights if measure is None else weights * measure
    everything = sharding.across(total.sum(), "sum")
    share = total / torch.where(everything > 0, everything, 1)
    return Traced(weights, share, total, tilt, atoms, top, mean)


def _sum(values: Points, measure: Points | None) -> Groups:
    return (values if measure is None else values * measure).sum(1, dtype=torch.float64)


def _total(errors: Points, measure: Points | None, sharding: Sharding) -> Groups:
    """Σμ of every group."""
    local = _sum(torch.ones_like(errors), None) if measure is None else _sum(measure, None)
    return sharding.within(local, "sum")


def _amax(values: Points) -> Groups:
    return values.amax(1) if values.shape[1] else values.new_zeros(len(values))


def _order_statistic(errors: Points, measure: Points | None, need: Groups, sharding: Sharding) -> Groups:
    """The largest error that has more than `need` of the measure at or above it, bit by bit: exact, without a sort."""
    integer, width = (torch.int32, 31) if errors.dtype == torch.float32 else (torch.int64, 63)
    bits = errors.abs().contiguous().view(integer)
    found = torch.zeros(len(errors), dtype=integer, device=errors.device)
    for place in reversed(range(width)):
        candidate = found + (1 << place)
        inside = (bits >= candidate.unsqueeze(1)).to(errors.dtype)
        above = sharding.within(_sum(inside, measure), "sum")
        found = torch.where(above > need * (1 + 1e-9), candidate, found)
    return found.view(errors.dtype).double()


def _atoms(
    errors: Points, measure: Points | None, top: Groups, total: Groups, ordered: bool, sharding: Sharding
) -> Atoms:
    """Bins of a window below the largest error; of few points the points themselves, in order if asked for."""
    scale = torch.where(top > 0, top, 1).unsqueeze(1)
    mass = torch.where(total > 0, total, 1).unsqueeze(1)
    if sharding.world == 1 and errors.shape[1] <= SMALL:
        y = ((errors.double() - top.unsqueeze(1)) / scale).clamp(max=0)
        p = (torch.ones_like(y) if measure is None else measure.double()) / mass
        if ordered:
            y, order = y.sort(dim=1)
            p = p.gather(1, order)
        return Atoms(y, p)
    bins, rests = (sharding.within(x, "sum") for x in fill(errors, measure, top))
    ties = (errors == top.to(errors.dtype).unsqueeze(1)).to(errors.dtype)
    ties = sharding.within(_sum(ties, measure), "sum").unsqueeze(1)
    values = _decoded(bins, rests, top, errors.dtype)
    last = bins[:, -1:] - ties
    rest = torch.where(last > 0, (bins[:, -1:] * values[:, -1:] - ties * top.unsqueeze(1)) / last, top.unsqueeze(1))
    y = torch.cat((values[:, :-1], rest, top.unsqueeze(1)), 1)
    p = torch.cat((bins[:, :-1], last.clamp(min=0), ties), 1)
    return Atoms(((y - top.unsqueeze(1)) / scale).clamp(max=0), p / mass)


def fill(errors: Points, measure: Points | None, top: Groups) -> tuple[Tensor, Tensor]:
    """Σμ and Σμr of the bins of a window below `top`, (group, WINDOW), float64; of the lowest, Σμr means nothing."""
    shape = (len(errors), WINDOW)
    first = keys_and_rests(top.to(errors.dtype))[0].unsqueeze(1) - (WINDOW - 1)
    rows = torch.arange(len(errors), device=errors.device).unsqueeze(1) * WINDOW
    mass, rest = errors.new_zeros(2, math.prod(shape), dtype=torch.float64)
    for start in range(0, errors.shape[1], BLOCK):
        part = slice(start, start + BLOCK)
        keys, rests = keys_and_rests(errors[:, part])
        places = ((keys - first).clamp(0, WINDOW - 1) + rows).reshape(-1)
        if measure is None:
            packed = torch.zeros(len(mass), dtype=torch.int64, device=errors.device)
            packed = packed.scatter_add(0, places, (rests + ONE).reshape(-1))
            mass, rest = mass + (packed >> 40), rest + (packed & (ONE - 1))
        else:
            weights = measure[:, part].double()
            mass = mass.scatter_add(0, places, weights.reshape(-1))
            rest = rest.scatter_add(0, places, (weights * rests).reshape(-1))
    return mass.reshape(shape), rest.reshape(shape)


def _decoded(mass: Tensor, rest: Tensor, top: Groups, dtype: torch.dtype) -> Tensor:
    """The mean error of every bin."""
    first = keys_and_rests(top.to(dtype))[0].unsqueeze(1) - (WINDOW - 1)
    key = (first + torch.arange(WINDOW, device=mass.device)).clamp(min=0)
    exponent = (key >> 6).clamp(min=1)
    power = ((exponent + (1023 - BIAS[dtype])) << 52).view(torch.float64)
    inside = rest / torch.where(mass > 0, mass, 1) / (64 << REST_BITS)
    values = power * ((key >= 64) + (key & 63) / 64 + inside)
    return torch.cat((torch.zeros_like(values[:, :1]), values[:, 1:]), 1)


def solve(atoms: Atoms, demand: Demand, scale: Groups, mean: Groups, cap: float) -> tuple[Tensor, ...]:
    """b, y_ref, λ and whether the cap binds; see `solver.solve`."""
    sharpest = SHARPEST_TRACED
    number = demand.number
    if demand.kind == TEMPERATURE:
        b = (scale / number).clamp(max=sharpest)
    elif demand.kind == RELATIVE:
        b = torch.where(mean > 0, scale / (number * torch.where(mean > 0, mean, 1)), 0)
    else:
        b = _search(atoms, demand, torch.zeros_like(scale) + number, sharpest)
    if not cap < math.inf:
        return b, torch.zeros_like(b), torch.zeros_like(b), b < 0
    nu, reference = (x.squeeze(1) for x in _level(atoms, b.unsqueeze(1), cap))
    binds = nu < 0
    return b, torch.where(binds, reference, 0), torch.where(binds, (nu - b * reference).clamp(min=0), 0), binds


def _search(atoms: Atoms, demand: Demand, budget: Groups, sharpest: float) -> Groups:
    """log b by a grid, refined around the place where the divergence passes the budget."""
    low = ((2 * budget).clamp(min=1e-300).sqrt() / 2).log().clamp(max=math.log(sharpest) - 1)  # D ≤ b²/2
    high = torch.full_like(low, math.log(sharpest))
    bottom = torch.full_like(low, -math.inf)
    top = _divergence(atoms, high.unsqueeze(1).exp(), demand).squeeze(1)
    ends = bottom, top
    steps = torch.linspace(0, 1, CANDIDATES, dtype=low.dtype, device=low.device)
    for _ in range(ROUNDS):
        grid = low.unsqueeze(1) + (high - low).unsqueeze(1) * steps
        divergence = _divergence(atoms, grid.exp(), demand)
        passed = (divergence < budget.unsqueeze(1)).long().cumprod(1).sum(1, keepdim=True).clamp(1, CANDIDATES - 1)
        low, high = (grid.gather(1, place).squeeze(1) for place in (passed - 1, passed))
        ends = tuple(divergence.gather(1, place).squeeze(1).clamp(min=1e-300).log() for place in (passed - 1, passed))
    part = (budget.clamp(min=1e-300).log() - ends[0]) / (ends[1] - ends[0]).clamp(min=1e-300)
    b = (low + (high - low) * part.clamp(0, 1)).exp()
    equal = (atoms.p * (atoms.y - (atoms.p * atoms.y).sum(1, keepdim=True)).square()).sum(1) <= 0
    return torch.where(equal | (budget <= 0), 0, torch.where(top < budget, sharpest, b))


def _divergence(atoms: Atoms, b: Float[Tensor, "group candidate"], demand: Demand) -> Float[Tensor, "group candidate"]:
    once, first = _moments(atoms, b)
    if demand.kind == RENYI:
        return _moments(atoms, 2 * b)[0].log() - 2 * once.log()
    free = b * first / once - once.log()
    if demand.cap == math.inf:
        return free
    nu, _ = _level(atoms, b, demand.cap)
    z = (b.unsqueeze(2) * atoms.y.unsqueeze(1) - nu.unsqueeze(2)).clamp(max=0)
    capped = math.log(demand.cap) + demand.cap * (atoms.p.unsqueeze(1) * z.exp() * z).sum(2)
    return torch.where(nu < 0, capped, free)


def _moments(atoms: Atoms, b: Float[Tensor, "group candidate"]) -> tuple[Tensor, Tensor]:
    """Σ p e and Σ p e y for e = exp(b y)."""
    e = (b.unsqueeze(2) * atoms.y.unsqueeze(1)).exp()
    columns = torch.stack((atoms.p, atoms.p * atoms.y), 2)
    sums = e @ columns
    return sums[..., 0], sums[..., 1]


def _level(atoms: Atoms, b: Float[Tensor, "group candidate"], cap: float) -> tuple[Tensor, Tensor]:
    """ν < 0 where the cap binds (0 where it does not) and the largest y that is not at the cap.

    Were atom k the largest that is not, ν_k = log Σ_{j ≤ k} p_j exp(b y_j) − log(1/c − Σ_{j > k} p_j); the right k is
    the largest for which b y_k ≤ ν_k.
    """
    y, p = atoms.y.unsqueeze(1), atoms.p.unsqueeze(1)
    room = 1 / cap - (p.sum(2, keepdim=True) - p.cumsum(2))
    exponent = b.unsqueeze(2) * y
    summed = (exponent + p.clamp(min=1e-300).log()).logcumsumexp(2)
    nu = torch.where(room > 1e-12, summed - room.clamp(min=1e-12).log(), -math.inf)
    nu = torch.where(p > 0, nu, -math.inf)  # nobody stands there
    places = torch.arange(y.shape[2], device=y.device)
    k = torch.where(exponent <= nu, places, -1).amax(2, keepdim=True).clamp(min=0)
    level = nu.gather(2, k).squeeze(2)
    return torch.where(level < 0, level, 0), y.expand_as(exponent).gather(2, k).squeeze(2)


def _settle(
    errors: Points, measure: Points | None, tilt: Tilt, binds: Tensor, room: Groups, sharding: Sharding
) -> Tilt:
    """λ at which the points at the cap and the others have all the measure that there is, by exact sums."""
    for _ in range(CORRECTIONS):
        above = sharding.within(_sum(tilt.above(errors).to(errors.dtype), measure), "sum")
        free = sharding.within(_sum(tilt.density(errors), measure), "sum") - above
        possible = binds & (free > 0) & (room > above)
        change = torch.where(possible, (torch.where(possible, free / (room - above), 1)).log(), 0)
        tilt = tilt._replace(lam=(tilt.lam + change))
    return tilt


def _at_the_cap(
    density: Points, measure: Points | None, tilt: Tilt, errors: Points, binds: Tensor, room: Groups
) -> Points:
    """The same density, differentiated through the sum of what is below the cap alone."""
    at_cap = tilt.above(errors.detach()) & binds.unsqueeze(1)
    above = _sum(at_cap.to(density.dtype), measure)
    free = _sum(torch.where(at_cap, 0, density), measure)
    scaled = density * ((room - above) / torch.where(free > 0, free, 1)).to(density.dtype).unsqueeze(1)
    return torch.where(binds.unsqueeze(1), torch.where(at_cap, 1, scaled), density)
