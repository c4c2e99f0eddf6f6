"""The temperature that a rule asks for, found on the atoms of one group: its points, or the bins of a sketch.

An atom has a share p of the measure and a position y = (l − l_max)/l_max ≤ 0. With the sharpness b = l_max/T,

    w = p min(c, a exp(b y)),   a such that Σ w = 1,

and c = ∞ where there is no cap. Let exp(−ν) = a/c: then w/p = c exp(min(0, b y − ν)). The divergences of w from p that
a budget may prescribe (the Kullback-Leibler divergence, order 1, and Rényi's of order 2) grow with b: Newton's method
on their logarithms, within a bracket, until the budget is met.

Plain NumPy and floats. `kernels` compiles these functions as they stand, with its own `tilted`.
"""

import math

import numpy as np

__all__ = ["KL", "RELATIVE", "RENYI", "SHARPEST", "TEMPERATURE", "atoms_of_bins", "atoms_of_points", "solve"]

TEMPERATURE, RELATIVE, KL, RENYI = range(4)
"""What a rule prescribes: T, T over the mean error, or a divergence from the measure in nats."""

SHARPEST = 1e18
"""b of T = 0: it tells errors apart that differ by one rounding of float64."""
LARGEST_STEP = 1.0
"""Most that log b may change in a step: more overshoots where the divergence saturates."""
MET = 1e-6
"""Relative distance from the budget at which to stop: well below what the bins leave."""
MOST_STEPS = 200
"""Where the bracket is halved each time, a hundred bisections reach the spacing of floats."""
OCTAVE = 64
"""Bins of an octave."""


def atoms_of_bins(mass, rest, first, bias, top, ties, counts):
    """Positions y (ascending), masses and variances of y within the bins of a window.

    The lowest bin takes all that lies 32 octaves below the largest error, and stands at 0. The points that tie at
    the largest error are an atom of their own, so that T → 0 is exact.

    Args:
        mass, rest: Σμ of each bin and Σμ r, where r in [0, 2^17) says where in the bin a point is.
        first: key of the lowest bin; `bias` is that of its exponent.
        top, ties: the largest error, and Σμ of the points there.
        counts: the masses are counts, so that a bin of mass 1 has no width.
    """
    scale = top if top > 0 else 1.0
    used = np.flatnonzero(mass)
    m, r = mass[used], rest[used]
    key = used + first
    exponent = key >> 6
    power = ((np.maximum(exponent, 1) + (1023 - bias)) << 52).view(np.float64)
    value = power * (np.minimum(exponent, 1) + (key & (OCTAVE - 1)) / OCTAVE + r / m / (OCTAVE << 17))
    value[used == 0] = 0.0
    size = used.size
    y, p, v = np.empty(size + 1), np.empty(size + 1), np.empty(size + 1)
    y[:size], p[:size], v[:size] = value, m, (power / (OCTAVE * scale)) ** 2 / 12
    if counts:
        v[:size][m <= 1] = 0.0
    last = size - 1
    if p[last] - ties > 1e-9 * p[last]:
        y[last] = (m[last] * value[last] - ties * top) / (m[last] - ties)
        p[last] = m[last] - ties
    else:
        p[last] = 0.0
    y[size], p[size], v[size] = top, ties, 0.0
    return np.minimum((y - top) / scale, 0.0), p, v


def atoms_of_points(errors, mass, top, ordered):
    """Positions, masses and variances where every point is an atom, ascending if they have to be in order."""
    y, p = np.minimum((errors.astype(np.float64) - top) / (top if top > 0 else 1.0), 0.0), mass.astype(np.float64)
    y = np.where(p > 0, y, -1.0)  # what has no measure may be above the top
    if ordered:
        order = np.argsort(y)
        y, p = y[order], p[order]
    return y, p, np.zeros(y.size)


def tilted(y, p, b, nu):
    """Sums of p e, p e y, p e y² and p e z over the atoms of z ≤ 0, and that of p over the others, for z = b y − ν and
    e = exp(z)."""
    z = b * y - nu
    free = z <= 0
    e = np.where(free, p * np.exp(np.minimum(z, 0.0)), 0.0)
    first = e * y
    return e.sum(), first.sum(), (first * y).sum(), (e * z).sum(), np.where(free, 0.0, p).sum()


def share_above(p, share):
    """The place k of the atom (of ascending ones) with Σ p from k on ≥ share > Σ p from k + 1 on."""
    above = 0.0
    for k in range(p.size - 1, -1, -1):
        above += p[k]
        if above >= share:
            return k
    return 0


def level(y, p, b, cap, nu, lowest):
    """ν < 0 at which the atoms of y > ν/b are at the cap, or 0 where none is.

    Every step is exact where it does not change which atoms are at the cap; from the right it only takes more in.

    Args:
        nu: a start.
        lowest: the place of the atom up to which all mass together fills the cap.
    """
    total = tilted(y, p, b, 0.0)[0]
    if cap * total >= 1:
        return 0.0
    floor = b * y[lowest]
    nu = min(max(nu, floor), 0.0)
    for _ in range(MOST_STEPS):
        free, _, _, _, capped = tilted(y, p, b, nu)
        if abs(cap * (free + capped) - 1) < 1e-12:
            break
        following = nu + math.log(cap * free / (1 - cap * capped)) if cap * capped < 1 and free > 0 else floor
        following = min(max(following, floor), 0.0)
        if following == nu:
            break
        nu = following
    return nu


def _spread(y, p, b, order, cap, nu, lowest):
    """The divergence at b, its slope over log b, and ν."""
    if cap < math.inf:
        nu = level(y, p, b, cap, nu, lowest)
        if nu < 0:
            free, first, second, entropy, _ = tilted(y, p, b, nu)
            variance = second / free - (first / free) ** 2 if free > 0 else 0.0
            return math.log(cap) + cap * entropy, b * b * cap * free * variance, nu
    total, first, second, _, _ = tilted(y, p, b, 0.0)
    mean = first / total
    if order == 1:
        return b * mean - math.log(total), b * b * (second / total - mean * mean), nu
    twice, first, _, _, _ = tilted(y, p, 2 * b, 0.0)
    return math.log(twice) - 2 * math.log(total), 2 * b * (first / twice - mean), nu


def _most(y, p, cap, lowest):
    """The divergence for T → 0, and whether the atoms tied at the largest error have all the weight then."""
    ties = p[y == 0].sum()
    if cap * ties >= 1:
        return -math.log(ties), True
    above = p[y > y[lowest]].sum()
    rest, share = 1 - cap * above, p[y == y[lowest]].sum()
    tail = rest * math.log(rest / share) if rest > 0 else 0.0
    return cap * above * math.log(cap) + tail, False


def solve_budget(y, p, order, budget, cap):
    """b at which the divergence of order 1 or 2 is the budget: 0 where all atoms are equal, `SHARPEST` where it cannot
    be met, and whether it is met."""
    lowest = share_above(p, 1 / cap) if cap < math.inf else 0
    most, tied = _most(y, p, cap, lowest)
    mean = (p * y).sum()
    variance = (p * (y - mean) ** 2).sum()
    if budget <= 0 or variance <= 0:
        return 0.0, True
    if budget >= most * (1 - 1e-9):
        return SHARPEST, not tied
    b, nu, low, high = math.sqrt((2 if order == 1 else 1) * budget / variance), 0.0, 0.0, SHARPEST
    b = min(b, 1e17)
    for _ in range(MOST_STEPS):
        divergence, slope, nu = _spread(y, p, b, order, cap, nu, lowest)
        if abs(divergence / budget - 1) < MET:
            break
        low, high = (low, b) if divergence > budget else (b, high)
        if divergence > 0 and slope > 0:
            change = math.log(budget / divergence) * divergence / slope
        else:
            change = -LARGEST_STEP if divergence > budget else LARGEST_STEP
        following = b * math.exp(min(LARGEST_STEP, max(-LARGEST_STEP, change)))
        if not low < following < high:  # not its ends: two steps could lead back and forth
            following = math.sqrt(low * high) if low > 0 else high / 2
        nu *= following / b
        if abs(following / b - 1) < 1e-15:
            break
        b = following
    return b, True


def unresolved(y, p, v, b, nu):
    """Σ w b² v / 2: by how much the width of the bins changes a divergence, in nats."""
    free, _, _, _, above = tilted(y, p, b, nu)
    width, _, _, _, width_above = tilted(y, p * v, b, nu)
    return b * b * (width + width_above) / (2 * (free + above))


def solve(y, p, v, total, top, kind, number, budget_cap, cap):
    """The sharpness b and the place where the cap sets in, for one group.

    Args:
        y, p, v: the atoms, p before it is divided by `total`.
        kind, number: what the rule prescribes.
        budget_cap: a cap that is part of the budget.
        cap: one that is applied at the temperature found without it.

    Returns:
        b; y_ref ≤ 0 and λ ≥ 0, with weights in proportion to exp(min(0, b (y − y_ref) − λ)); whether a cap binds;
        whether the budget is met (if not, the largest error has all weight); by how many nats the bins may be off.
    """
    p, scale, met = p / total, top if top > 0 else 1.0, True
    if kind == TEMPERATURE:
        b = scale / number if number > scale / SHARPEST else SHARPEST
    elif kind == RELATIVE:
        mean = number * (top + scale * (p * y).sum())
        b = scale / mean if mean > 0 else 0.0
    else:
        b, met = solve_budget(y, p, 1 if kind == KL else 2, number, budget_cap)
    cap = min(cap, budget_cap)
    if not cap < math.inf:
        return b, 0.0, 0.0, False, met, unresolved(y, p, v, b, 0.0)
    lowest = share_above(p, 1 / cap)
    nu = level(y, p, b, cap, 0.0, lowest) if b < SHARPEST else b * y[lowest]
    if nu >= 0:
        return b, 0.0, 0.0, False, met, unresolved(y, p, v, b, 0.0)
    reference = y[np.flatnonzero(b * y <= nu)[-1]] if b * y[0] <= nu else y[0]
    return b, reference, max(nu - b * reference, 0.0), True, met, unresolved(y, p, v, b, nu)
