"""Fill, solve and weigh on a CPU in loops that numba compiles; `program` does the same with tensors.

Optional (`pip install squall[fast]`). A batch is an array (outer, group, inner): a group's points are the slabs
`[o, g, :]`, so that samples and channels need no copy. One thread, no memory but the gradient: a block of points stays
in the innermost cache while it is used. Arguments that all functions share:

    a, b: prediction and target; or errors, and None.
    m: the measure μ, (outer or 1, group or 1, inner), negative where a point is hidden; or None.
    seen: 0 where a point is hidden, int8, of such a shape; or None.
    delta: δ of Huber's error; None for the square, True where a is the errors.

What is hidden may be NaN. It counts like an error of 0 of no measure.
"""

import math
from functools import partial

import numpy as np
from numba import types
from numba.extending import overload

from squall._process import compiled as _compiled
from squall._process.compiled import bits_of, real_of
from squall.losses.rules import KL, LARGEST_EXPONENT, RELATIVE, SHARPEST, TEMPERATURE
from squall.losses.sketch import BELOW, REST_BITS, SMALL, WINDOW

__all__ = ["COLUMNS", "between", "cut", "keep", "sketch", "solve", "weigh"]

COLUMNS = B, REFERENCE, SCALE, LAM, LIMIT, FLOOR, PARTITION, VALUE, TOTAL, TOP, MEAN, LARGEST, BINDS, COARSE = range(14)
"""Of what is found for a group: the six of `program.Tilt`, Σμe (or 1), Σμel, Σμ, the largest error, the mean error, the
largest μe, whether a cap binds and whether the bins are too coarse. Trimmed points have no part but in the mean
error."""
BLOCK = 1024
"""Points of a block: its scratch arrays (8 KB in float32) stay in the 32 KB cache of a core."""
FEW = 128
"""Points whose sums stay in their own precision: 8 lanes add up 16 numbers each, which loses 1e-7 at most."""
FLUSH = 1 << 22
"""Points after which the packed counters are emptied: a sum of rests stays below 2^(22 + 17), under their counts."""
ONE = 1 << 40
"""A count of one in a packed counter."""
REST = (1 << REST_BITS) - 1
OCTAVE = 64
"""Bins of an octave."""
MET = 1e-6
"""Relative distance from the budget at which one more of Newton's steps, which squares it, is the last."""
MOST_STEPS = 200
"""Where the bracket is halved each time, a hundred bisections reach the spacing of floats."""
UNRESOLVED = 1e-3
"""Share of a budget that the width of the bins may be off before the points are looked at one by one."""
SETTLED = 2e-7
"""Relative error of Σw at which a cap has settled: a few roundings of float32."""
MOST_PASSES = 8
"""A bound: where many points crowd at the cap, λ may step to and fro between two of float32. The weights are then off
the cap by that rounding, and sum to 1 all the same."""
FAST = frozenset({"contract", "reassoc", "nsz"})
"""Sums may be reordered, which is what makes vectors of them. NaN and infinity keep their meaning."""

compiled = partial(_compiled.compiled, fastmath=FAST)
part = partial(compiled, inlined=True)
"""For what other loops call."""


def _series(terms: int) -> np.ndarray:
    """Coefficients of (2^x − 1)/x on [−1/2, 1/2], by Chebyshev interpolation: 6 terms give 1e-8, 12 give 1e-16."""
    series = np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda x: np.where(x == 0, np.log(2), np.expm1(np.log(2) * x) / np.where(x == 0, 1, x)),
        terms - 1,
        domain=[-0.5, 0.5],
    )
    return series.convert(kind=np.polynomial.Polynomial).coef


A1, A2, A3, A4, A5, A6 = _series(6).astype(np.float32)
B1, B2, B3, B4, B5, B6, B7, B8, B9, B10, B11, B12 = _series(12)
PER_LN2 = 1 / np.log(2)


@part
def _exp2_single(x):
    x = x if x > np.float32(-126) else np.float32(-126)
    whole = np.int32(x - np.float32(0.5))
    f = x - np.float32(whole)
    series = A1 + f * (A2 + f * (A3 + f * (A4 + f * (A5 + f * A6))))
    value = (np.float32(1) + f * series) * real_of(np.int32((whole + 127) << 23))  # pyright: ignore[reportCallIssue]
    return value if x > np.float32(-126) else np.float32(0)


@part
def _exp2_double(x):
    x = x if x > -1022.0 else -1022.0
    whole = np.int32(x - 0.5)
    f = x - np.float64(whole)
    series = B7 + f * (B8 + f * (B9 + f * (B10 + f * (B11 + f * B12))))
    series = B1 + f * (B2 + f * (B3 + f * (B4 + f * (B5 + f * (B6 + f * series)))))
    value = (1.0 + f * series) * real_of(np.int64(whole + 1023) << 52)  # pyright: ignore[reportCallIssue]
    return value if x > -1022.0 else 0.0


def _exp2(x):
    """2^x for x ≤ 0 by a polynomial, which becomes vectors as the C library's does not; 0 below the normal numbers."""
    raise NotImplementedError("compiled only")


@overload(_exp2, jit_options={"fastmath": set(FAST), "forceinline": True})
def _overloaded_exp2(x):
    return (lambda x: _exp2_single(x)) if x == types.float32 else (lambda x: _exp2_double(x))


# The solver. An atom has a share p of the measure and a position y = (l − l_max)/l_max ≤ 0; b = l_max/T.


@part
def _moments(y, p, b):
    """Σ p e, Σ p e y and Σ p e y² for e = exp(b y)."""
    total, first, second, unit = 0.0, 0.0, 0.0, b * PER_LN2
    for i in range(y.size):
        e = p[i] * _exp2(unit * y[i])
        f = e * y[i]
        total += e
        first += f
        second += f * y[i]
    return total, first, second


@part
def _edge(p, share):
    """The place k of the atom (of ascending ones) with Σ p from k on ≥ share > Σ p from k + 1 on, but for rounding."""
    above, share = 0.0, share * (1 - 1e-12)
    for k in range(p.size - 1, -1, -1):
        above += p[k]
        if above >= share:
            return k
    return 0


@part
def _capped(y, p, b, cap, edge, e, sums):
    """The place of the largest atom below the cap, ν − b y_edge, the weight of it and of all smaller ones, and whether
    the cap binds; fills e with p exp(b (y − y_edge))."""
    for i in range(y.size):
        x = min(b * (y[i] - y[edge]), LARGEST_EXPONENT)
        value = _exp2(-abs(x) * PER_LN2)
        e[i] = p[i] * (value if x <= 0 else 1 / value)
    total, above = 0.0, 0.0
    for i in range(y.size):
        total += e[i]
        sums[i] = total
    for k in range(y.size - 1, -1, -1):
        room = 1 / cap - above
        if p[k] > 0 and room * cap > 1e-13 and e[k] * room <= sums[k] * p[k] * (1 + 1e-12):
            nu = math.log(sums[k] / room)
            return k, nu, cap * room, nu < min(-b * y[edge], LARGEST_EXPONENT) - 1e-14
        above += p[k]
    return 0, 0.0, 1.0, False


@part
def _divergence(y, p, b, kind, cap, edge, e, sums):
    """The divergence at b, its slope over log b, and whether the cap binds."""
    if cap < math.inf:
        k, nu, free, binds = _capped(y, p, b, cap, edge, e, sums)
        if binds:
            first, second = 0.0, 0.0
            for i in range(k + 1):
                f = e[i] * (y[i] - y[edge])
                first += f
                second += f * (y[i] - y[edge])
            mean = first / sums[k]
            slope = b * b * free * (second / sums[k] - mean * mean)
            return math.log(cap) + free * (b * mean - nu), slope, True
    total, first, second = _moments(y, p, b)
    mean = first / total
    if kind == KL:
        return b * mean - math.log(total), b * b * (second / total - mean * mean), False
    twice, first, _ = _moments(y, p, 2 * b)
    return math.log(twice) - 2 * math.log(total), 2 * b * (first / twice - mean), False


@part
def _newton(b, divergence, slope, budget, low, high):
    """The next b within the bracket."""
    change = 1.0 if divergence < budget else -1.0
    if divergence > 0 and slope > 0:
        change = math.log(budget / divergence) * divergence / slope
    following = b * math.exp(min(1.0, max(-1.0, change)))  # a larger step overshoots where the divergence saturates
    # b is an end of the bracket and stays where it solves to rounding; elsewhere the ends could lead back and forth
    if following != b and not low < following < high:
        following = math.sqrt(low * high) if low > 0 else high / 2
    return following


@part
def _search(y, p, kind, budget, cap, e, sums):
    """b at which the divergence is the budget: 0 where all atoms are equal, `SHARPEST` where it cannot be met, and
    whether it is met."""
    mean, square, ties = 0.0, 0.0, 0.0
    for i in range(y.size):
        mean += p[i] * y[i]
        ties += p[i] if y[i] == 0 else 0.0
    for i in range(y.size):
        square += p[i] * (y[i] - mean) * (y[i] - mean)
    if budget <= 0 or square <= 0:
        return 0.0, True
    edge, most, capped = 0, -math.log(ties), cap * ties < 1 and cap < math.inf
    if cap < math.inf:
        edge = _edge(p, 1 / cap)
    if capped:
        most = _divergence(y, p, SHARPEST, kind, cap, edge, e, sums)[0]
    if budget >= most * (1 - 1e-9):
        return SHARPEST, capped
    b, low, high = min(math.sqrt((2 if kind == KL else 1) * budget / square), SHARPEST / 10), 0.0, SHARPEST
    for _ in range(MOST_STEPS):
        divergence, slope, _ = _divergence(y, p, b, kind, cap, edge, e, sums)
        low, high = (low, b) if divergence > budget else (b, high)
        before, b = b, _newton(b, divergence, slope, budget, low, high)
        if abs(divergence / budget - 1) < MET or abs(b / before - 1) < 1e-15:
            break
    return b, True


@part
def _solve(y, p, top, demand, e, sums):
    """For one group b, whether the budget is met, whether a cap binds, and y_ref ≤ 0 and λ ≥ 0: weights are in
    proportion to exp(min(0, b (y − y_ref) − λ)). `e` and `sums` have room for a number of each atom."""
    kind, number, budget_cap, cap = demand[0], demand[1], demand[2], demand[3]
    scale, met = top if top > 0 else 1.0, True
    if kind == TEMPERATURE:
        b = scale / number if number > scale / SHARPEST else SHARPEST
    elif kind == RELATIVE:
        mean = number * (top + scale * (p * y).sum())
        b = scale / mean if mean > 0 else 0.0
    else:
        b, met = _search(y, p, kind, number, budget_cap, e, sums)
    cap = min(cap, budget_cap)
    if not cap < math.inf:
        return b, met, False, 0.0, 0.0
    edge = _edge(p, 1 / cap)
    k, nu, _, binds = _capped(y, p, b, cap, edge, e, sums)
    if not binds:
        return b, met, False, 0.0, 0.0
    return b, met, True, y[k], max(nu - b * (y[k] - y[edge]), 0.0)


@part
def _resolved(y, p, total, tiny, counts, b, y_ref, lam, demand):
    """Whether the width of the bins changes the divergence by less than UNRESOLVED of the budget: w b² v/2 each, with
    the variance v = width²/12, and the width 1/64 to 1/128 of the error (its square half of 1/64² on average), or of
    the smallest normal number. Where all errors of a bin are at the cap, where they are in it does not matter."""
    if demand[0] < KL or y.size == 1:
        return True
    if b >= SHARPEST:  # with a cap, bins cannot tell T → 0 from a small T, unless the number decides it
        return demand[2] == np.inf or demand[1] >= math.log(demand[2])
    weight, width, offset, above = 0.0, 0.0, 0.0, False
    for i in range(y.size - 1):  # the last has none
        z = b * (y[i] - y_ref) - lam
        e = p[i] * _exp2(min(z, 0.0) * PER_LN2)
        weight += e
        exact = above or (counts and p[i] * total <= 1.5)  # a bin above another one at the cap is whole at the cap
        width += 0.0 if exact else e * max(1 + y[i], tiny) ** 2
        offset += e if y[i] == -1 and not exact else 0.0
        above = z > 0
    weight += p[y.size - 1] * math.exp(min(-b * y_ref - lam, 0.0))
    return b * b * width / (48 * OCTAVE * OCTAVE) + b * offset * BELOW <= UNRESOLVED * demand[1] * weight


@compiled
def solve(l, mass, sizes, tiny, counts, demand, rows):
    """The tilts of groups from their atoms.

    Args:
        l, mass, sizes: as `sketch` fills them, perhaps cut.
        tiny: the smallest normal error where atoms are bins, else 0.
        counts: whether the measure is a count of points.
        demand: kind, number and cap of the `Demand`; another cap, applied at the temperature found without it.
        rows: filled, (group, COLUMNS).

    Returns:
        In how many groups the bins are too coarse; and of the others, in how many the budget is not met, and a cap
        binds where T → 0.
    """
    missed, coarse, edges, room = 0, 0, 0, 0
    for i in range(sizes.size):
        room = max(room, sizes[i])
    atoms = np.empty((4, room))
    for i in range(sizes.size):
        n, row = sizes[i], rows[i]
        y, p, top, total = atoms[0, :n], atoms[1, :n], 0.0, 0.0
        for j in range(n):
            top = max(top, l[i, j])
            total += mass[i, j]
        scale = top if top > 0 else 1.0
        row[B], row[REFERENCE], row[SCALE], row[LAM], row[FLOOR], row[TOTAL] = 0.0, top, scale, 0.0, 0.0, total
        row[TOP], row[BINDS], row[COARSE] = top, 0.0, 0.0
        if not total > 0:
            continue
        for j in range(n):
            y[j], p[j] = min((l[i, j] - top) / scale, 0.0), mass[i, j] / total
        b, met, binds, y_ref, lam = _solve(y, p, top, demand, atoms[2], atoms[3])
        row[B], row[REFERENCE], row[LAM], row[BINDS] = b, top + scale * y_ref, lam, 1.0 if binds else 0.0
        if tiny > 0 and not _resolved(y, p, total, tiny / scale, counts, b, y_ref, lam, demand):
            row[COARSE] = 1.0
            coarse += 1
            continue
        missed += 0 if met else 1
        edges += 1 if binds and b >= SHARPEST else 0
    return coarse, missed, edges


# The sketch of a group.


@part
def _slab(a, b, m, seen, o, g, start, stop):
    """Where a block of points is: values, targets, measures, and which points count."""
    y = None if b is None else b[o, g, start:stop]
    w = None if m is None else m[o % m.shape[0], g % m.shape[1], start:stop]
    k = None if seen is None else seen[o % seen.shape[0], g % seen.shape[1], start:stop]
    return a[o, g, start:stop], y, w, k


@part
def _square(d, _):
    return abs(d * d)  # NaN without a sign


@part
def _same(d, _):
    return abs(d)


@part
def _huber(d, delta):
    e = abs(d)
    s = e if e < delta else delta
    return s * (e - np.float32(0.5) * s)  # of the type of d in either precision


def _error(d, delta):
    """l of a difference, or of an error itself. No array is an argument, or every point would count references to
    it."""
    raise NotImplementedError("compiled only")


@overload(_error, jit_options={"fastmath": set(FAST), "forceinline": True})
def _overloaded_error(d, delta):
    if isinstance(delta, types.NoneType):
        return lambda d, delta: _square(d, delta)
    if isinstance(delta, types.Boolean):
        return lambda d, delta: _same(d, delta)
    return lambda d, delta: _huber(d, delta)


@part
def _measures(m, mu):
    """μ, 0 where a point is hidden."""
    zero = mu.dtype.type(0)  # of this type, or the comparison would be one of float64
    for i in range(m.size):
        w = mu.dtype.type(m[i])
        mu[i] = w if w > zero else zero


@part
def _bits(x, y, m, seen, delta, bits, mu):
    """Bits of the errors of a block, 0 where they carry no measure: lowest, highest, highest of all, and whether one is
    negative."""
    zero, none, negative = bits.dtype.type(0), x.dtype.type(0), bits.dtype.type(0)
    low, high, worst = ~zero, zero, zero
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if m is not None:
            d = d if m[i] >= m.dtype.type(0) else none
        if seen is not None:
            d = d if seen[i] != 0 else none
        if y is None:
            negative |= bits.dtype.type(1) if d < none else zero
        q = bits.dtype.type(bits_of(_error(d, delta)))  # pyright: ignore[reportCallIssue]
        worst = q if q > worst else worst
        if m is not None:
            q = q if mu[i] > none else zero
        bits[i] = q
        low = q if q < low else low
        high = q if q > high else high
    return np.int64(low), np.int64(high), np.int64(worst), negative > zero


@part
def _scatter(bits, mu, m, key_shift, rest_shift, rest_mask, packed, sums):
    """Add a block to the counters; without a measure the hidden points too, as errors of 0."""
    if m is None:
        for i in range(bits.size):
            packed[bits[i] >> key_shift] += ONE + np.int64((bits[i] >> rest_shift) & rest_mask)
    else:
        for i in range(bits.size):
            key = bits[i] >> key_shift
            w = np.float64(mu[i])
            sums[key, 0] += w
            sums[key, 1] += w * np.float64(np.int64((bits[i] >> rest_shift) & rest_mask))


@part
def _ties(bits, mu, m, high):
    ties = 0.0
    for i in range(bits.size):
        if bits[i] == high:
            ties += 1.0 if m is None else mu[i]
    return ties


@part
def _hidden(seen):
    gone = np.int64(0)
    if seen is not None:
        for i in range(seen.size):
            gone += 1 - seen[i]
    return gone


@part
def _flush(packed, sums, lowest, highest):
    """Move packed counters into the sums."""
    for key in range(lowest, highest + 1):
        sums[key, 0] += packed[key] >> 40
        sums[key, 1] += packed[key] & (ONE - 1)
        packed[key] = 0


@part
def _fill(a, b, m, seen, delta, g, scratch):
    """Fill the counters with a group: lowest and highest key in use, bits of the largest error and Σμ there, bits of
    the largest of all (measure or not, NaN and ∞ above all), and whether an error is negative."""
    bits, _, mu, packed, sums, shift = scratch
    # Unsigned, or every index would be asked whether it counts from the end.
    key_shift, rest_shift = bits.dtype.type(shift), bits.dtype.type(shift - REST_BITS)
    rest_mask = bits.dtype.type(REST)
    lowest, highest, last, worst = np.int64(packed.size - 1), np.int64(0), np.int64(-1), np.int64(0)
    since, gone, ties, negative = 0, np.int64(0), 0.0, False
    for o in range(a.shape[0]):
        for start in range(0, a.shape[2], BLOCK):
            n = min(BLOCK, a.shape[2] - start)
            x, y, w, k = _slab(a, b, m, seen, o, g, start, start + n)
            if m is not None:
                _measures(w, mu[:n])
            low, high, most, below = _bits(x, y, w, k, delta, bits[:n], mu[:n])
            worst, negative, gone = max(worst, most), negative or below, gone + _hidden(k)
            lowest = min(lowest, low >> shift)
            if high >= last:
                ties = _ties(bits[:n], mu[:n], m, bits.dtype.type(high)) + (ties if high == last else 0.0)
                last, highest = high, high >> shift
            _scatter(bits[:n], mu[:n], m, key_shift, rest_shift, rest_mask, packed, sums)
            since += n
            if since >= FLUSH:
                _flush(packed, sums, lowest, highest)
                since = 0
    packed[0] -= ONE * gone
    ties -= gone if last == 0 else 0
    return lowest, highest, last, ties, worst, negative


@part
def _collect(packed, sums, summed, lowest, highest, bias, top, ties, l, mass, keys):
    """The atoms of the bins, ascending, with the points that tie at the largest error last; leaves zeros. How many they
    are. What lies below the window stands at 0. `summed`: whether the sums are in use."""
    floor, below, size = highest - WINDOW + 1, 0.0, 0
    for key in range(lowest, min(floor + 1, highest)):
        below += sums[key, 0] + (packed[key] >> 40)
        packed[key] = sums[key, 0] = sums[key, 1] = 0
    if below > 0:
        l[0], mass[0], keys[0], size = 0.0, below, max(floor, 0), 1
    for key in range(max(lowest, floor + 1), highest + 1):
        counter = packed[key]
        packed[key] = 0
        w, r = np.float64(counter >> 40), np.float64(counter & (ONE - 1))
        if summed:
            w, r = w + sums[key, 0], r + sums[key, 1]
            sums[key, 0] = sums[key, 1] = 0
        exponent = max(key >> 6, 1)
        power = real_of(np.int64(exponent + 1023 - bias) << 52)  # pyright: ignore[reportCallIssue]
        leading = 1.0 if key >= OCTAVE else 0.0
        l[size] = power * (leading + (key & (OCTAVE - 1)) / OCTAVE + r / w / (OCTAVE << REST_BITS))
        mass[size], keys[size] = w, key
        size += 1 if w > 0 else 0  # no branch: which bins are empty is hard to predict
    if size:
        last = size - 1
        left = mass[last] - ties
        keys[size] = keys[last]
        if left > 1e-9 * mass[last]:
            l[last], mass[last] = min((mass[last] * l[last] - ties * top) / left, top), left
            size += 1
        l[size - 1], mass[size - 1] = top, ties
    return size


@part
def _bins(a, b, m, seen, delta, g, scratch, l, mass, keys):
    """The bins of a group as atoms, the points that tie at the largest error last: how many, whether every error is a
    number, whether one is negative."""
    signed, packed, sums = scratch[1], scratch[3], scratch[4]
    lowest, highest, last, ties, worst, negative = _fill(a, b, m, seen, delta, g, scratch)
    top = np.float64(real_of(signed.dtype.type(last)))  # pyright: ignore[reportCallIssue]
    most = np.float64(real_of(signed.dtype.type(worst)))  # pyright: ignore[reportCallIssue]
    summed, bias = m is not None or a.shape[0] * a.shape[2] >= FLUSH, 127 if a.itemsize == 4 else 1023
    size = _collect(packed, sums, summed, lowest, highest, bias, top, ties, l, mass, keys)
    return size, most < np.inf and not negative


@part
def _errors_of(x, y, m, seen, delta, l, mass):
    """l and μ of a block; l = 0 where μ is. Whether every error is a number ≥ 0."""
    zero, bad = x.dtype.type(0), np.int32(0)
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if m is not None:
            d = d if m[i] >= m.dtype.type(0) else zero
        if seen is not None:
            d = d if seen[i] != 0 else zero
        e = _error(d, delta)
        bad |= np.int32(0) if e < np.inf else np.int32(1)
        if y is None:
            bad |= np.int32(1) if d < zero else np.int32(0)
        w = x.dtype.type(1)
        if m is not None:
            w = x.dtype.type(m[i]) if m[i] > m.dtype.type(0) else zero
        if seen is not None:
            w = w if seen[i] != 0 else zero
        l[i], mass[i] = e if w > zero else zero, w
    return bad == 0


@part
def _points(a, b, m, seen, delta, g, l, mass):
    """Every point of a group as an atom; see `_bins`."""
    size, fine = 0, True
    for o in range(a.shape[0]):
        x, y, w, k = _slab(a, b, m, seen, o, g, 0, a.shape[2])
        fine &= _errors_of(x, y, w, k, delta, l[size : size + x.size], mass[size : size + x.size])
        size += x.size
    return size, fine


@compiled
def sketch(a, b, m, seen, delta, scratch, start, l, mass, keys, sizes, rows):
    """The atoms of the groups from `start` on: of few points each point, else bins of a window below the largest error.

    Args:
        scratch: bits of a block, unsigned integers as wide as the errors; an array of signed ones; measures of a block;
            counters of all keys, of zeros, and two sums for each; bits of the mantissa below the key.
        l, mass, keys, sizes: filled: error and measure of the atoms, (group, some), the keys of bins, and how many
        they are. rows: the mean error and no limit are filled in, (group, COLUMNS).

    Returns:
        Whether all errors are numbers and none is negative.
    """
    small = a.shape[0] * a.shape[2] <= SMALL
    for i in range(sizes.size):
        if small:
            sizes[i], fine = _points(a, b, m, seen, delta, start + i, l[i], mass[i])
        else:
            sizes[i], fine = _bins(a, b, m, seen, delta, start + i, scratch, l[i], mass[i], keys[i])
        if not fine:
            return False
        total, value = 0.0, 0.0
        for j in range(sizes[i]):
            total += mass[i, j]
            value += mass[i, j] * l[i, j]
        rows[i, MEAN], rows[i, LIMIT] = value / total if total > 0 else 0.0, np.inf
    return True


# Trim and winsorize: an order statistic, exact, from the points of one bin.


@part
def _count_between(x, y, delta, low, high):
    count = np.int64(0)
    for i in range(x.size):
        l = _error(x[i] if y is None else x[i] - y[i], delta)
        count += np.int64(1) if (l >= low) & (l <= high) else np.int64(0)
    return count


@part
def _gather(x, y, m, seen, delta, low, high, errors, mass, size):
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        weight = 1.0
        if m is not None:
            weight = np.float64(m[i])
        if seen is not None:
            weight = np.float64(seen[i])
        l = _error(d, delta)
        if weight > 0 and low <= l <= high:
            errors[size], mass[size] = l, weight
            size += 1
    return size


@part  # `cut` calls it too
def between(a, b, m, seen, delta, g, low, high):
    """The errors of group g in [low, high], and their measures."""
    low, high = a.dtype.type(low), a.dtype.type(high)
    errors, mass, size = np.empty(BLOCK, a.dtype), np.empty(BLOCK), 0
    for o in range(a.shape[0]):
        for start in range(0, a.shape[2], FEW):
            x, y, w, k = _slab(a, b, m, seen, o, g, start, min(start + FEW, a.shape[2]))
            if _count_between(x, y, delta, low, high) == 0:  # most blocks have none, and vectors tell
                continue
            if size + FEW > errors.size:
                errors, mass = np.append(errors, errors), np.append(mass, mass)
            size = _gather(x, y, w, k, delta, low, high, errors, mass, size)
    return errors[:size], mass[:size]


@part
def _order_statistic(errors, mass, need):
    """The largest of these errors that has more than `need` of the measure at or above it, bit by bit."""
    found, width = np.int64(0), 31 if errors.itemsize == 4 else 63
    for place in range(width - 1, -1, -1):
        candidate, above = found | (np.int64(1) << place), 0.0
        for i in range(errors.size):
            if np.int64(bits_of(errors[i])) >= candidate:  # pyright: ignore[reportCallIssue]
                above += mass[i]
        found = candidate if above > need else found
    return found


@part
def _split(errors, mass, level):
    """Of the points of a bin, Σμ and Σμl below the level, and Σμ at it."""
    below, total, ties = 0.0, 0.0, 0.0
    for i in range(errors.size):
        if errors[i] < level:
            below += mass[i]
            total += mass[i] * errors[i]
        elif errors[i] == level:
            ties += mass[i]
    return below, total, ties


@compiled
def cut(a, b, m, seen, delta, signed, g, need, keep, size, l, mass, keys):
    """Lower the atoms of a group that lie above its order statistic to it, or take them away: how many are left. The
    order statistic is the largest error that has more than `need` of the measure at or above it."""
    above, k, need = 0.0, size - 1, need * (1 + 1e-9)
    while k > 0 and above + mass[k] <= need:
        above += mass[k]
        k -= 1
    if a.shape[0] * a.shape[2] <= SMALL or k == size - 1:  # points, or nothing is above
        while k + 1 < size and l[k + 1] == l[k]:
            k += 1
        for i in range(k + 1, size):
            l[i] = l[k]
        return size if keep else k + 1
    shift, top = 17 if a.itemsize == 4 else 46, l[size - 1]
    low = np.float64(real_of(signed.dtype.type(keys[k] << shift if k > 0 else 0)))  # pyright: ignore[reportCallIssue]
    high = np.float64(real_of(signed.dtype.type(((keys[k] + 1) << shift) - 1)))  # pyright: ignore[reportCallIssue]
    errors, weights = between(a, b, m, seen, delta, g, low, high)
    for i in range(errors.size):  # the ties at the largest error are an atom of their own
        weights[i] = weights[i] if errors[i] < top else 0.0
    found = _order_statistic(errors, weights, need - above)
    level = np.float64(real_of(signed.dtype.type(found)))  # pyright: ignore[reportCallIssue]
    below, total, ties = _split(errors, weights, a.dtype.type(level))
    removed = above + mass[k] - below - ties if keep else 0.0
    keys[k + 1] = keys[k]
    if below > 0:
        l[k], mass[k] = total / below, below
        k += 1
    l[k], mass[k] = level, ties + max(removed, 0.0)
    return k + 1


# The exact pass.


@part
def _weigh_part(x, y, mu, seen, delta, beta, ref, lam, limit, floor, s, out):
    """Σμe and Σμel over few points, in their own precision; writes `out`, and μe into μ."""
    zero = x.dtype.type(0)
    total, value = zero, zero
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if mu is not None:
            d = d if mu[i] > zero else zero
        if seen is not None:
            d = d if seen[i] != 0 else zero
        l = _error(d, delta)
        z = beta * (l * s - ref) - lam
        e = _exp2(z if z < zero else zero) + floor
        w = e if l <= limit else zero
        if seen is not None:
            w = w if seen[i] != 0 else zero
        if mu is not None:
            w *= mu[i]
            mu[i] = w
        total += w
        value += w * l
        if y is None:
            out[i] = w
        elif delta is None:
            out[i] = w * d
        else:
            c = d if d < delta else delta
            out[i] = w * (c if c > -delta else -delta)
    return total, value


@part
def _above_part(x, y, mu, seen, delta, beta, ref, lam, limit, s):
    """Σμ of the points whose exponent is positive."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    above = zero
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if mu is not None:
            d = d if mu[i] > zero else zero
        if seen is not None:
            d = d if seen[i] != 0 else zero
        l = _error(d, delta)
        c = one if beta * (l * s - ref) - lam > zero else zero
        c = c if l <= limit else zero
        if seen is not None:
            c = c if seen[i] != 0 else zero
        above += c if mu is None else c * mu[i]
    return above


@part
def _highest(w):
    """Bits of the largest of these numbers, none negative: unlike that of the numbers, their maximum is a vector."""
    highest = bits_of(w[0])  # pyright: ignore[reportCallIssue]
    for i in range(w.size):
        q = bits_of(w[i])  # pyright: ignore[reportCallIssue]
        highest = q if q > highest else highest
    return highest


@part
def _weigh_group(a, b, m, seen, delta, g, row, signed, mu, caps, write, out):
    """Σμe, Σμel, Σμ of the points for which the exponent is positive, and the largest μe, of
    e = exp(min(0, b (l − ref)/scale − λ)) + floor where l ≤ limit; writes μ e times the derivative of l, or μ e."""
    scale, real = row[SCALE], a.dtype.type
    # Errors times a power of two near 1/scale are exact, and their differences neither over- nor underflow.
    s = math.ldexp(1.0, min(max(-math.frexp(scale)[1], -126), 126))
    beta, ref, lam = real(row[B] / (scale * s) * PER_LN2), real(row[REFERENCE] * s), real(row[LAM] * PER_LN2)
    limit, floor, s = real(row[LIMIT]), real(row[FLOOR]), real(s)
    total, value, above, highest = 0.0, 0.0, 0.0, np.int64(0)
    for o in range(a.shape[0]):
        for start in range(0, a.shape[2], FEW):
            stop = min(start + FEW, a.shape[2])
            x, y, w, k = _slab(a, b, m, seen, o, g, start, stop)
            part = None if m is None else mu[: stop - start]
            if m is not None:
                _measures(w, part)
            if caps:
                above += np.float64(_above_part(x, y, part, k, delta, beta, ref, lam, limit, s))
            to = out[o, g, start:stop] if write else mu[FEW : FEW + stop - start]  # no choice in the loop over points
            few = _weigh_part(x, y, part, k, delta, beta, ref, lam, limit, floor, s, to)
            total += few[0]
            value += few[1]
            if m is not None:
                highest = max(highest, np.int64(_highest(part)))
    largest = (1.0 if above > 0 else math.exp(-row[LAM])) + row[FLOOR]  # where points count alike
    if m is not None:
        largest = np.float64(real_of(signed.dtype.type(highest)))  # pyright: ignore[reportCallIssue]
    return total, value, above, largest


@compiled
def weigh(a, b, m, seen, delta, scratch, start, cap, share, write, out, rows):
    """The exact pass over the groups of these rows, from group `start` on: Σμe, Σμel and the largest μe go into the
    rows.

    Where a cap binds, λ is moved until the points at the cap and the others have all the weight; a share α of the
    mean is a floor under the exponential. With cap = ∞ and share = 0, it repeats a pass.

    Args:
        write: whether `out` is wanted, μ e ∂l/∂a (half of it for squares), or μ e without b; of the shape of a.

    Returns:
        Σμ over these groups.
    """
    total = 0.0
    for i in range(rows.shape[0]):
        row = rows[i]
        settles, mixes, passes = cap < np.inf and row[BINDS] > 0, share > 0, 0
        while True:
            last = write and not mixes  # or written too early
            sums = _weigh_group(a, b, m, seen, delta, start + i, row, scratch[1], scratch[2], settles, last, out)
            free, room, lam = sums[0] - sums[2], row[TOTAL] / cap, row[LAM]
            if settles and abs(sums[0] - room) > SETTLED * room and free > 0 and room > sums[2]:
                row[LAM] += math.log(free / (room - sums[2]))
                passes += 1
                if row[LAM] != lam and passes < MOST_PASSES:
                    continue
            if not mixes:
                break
            row[FLOOR], mixes, settles = share / (1 - share) * sums[0] / max(row[TOTAL], 1e-300), False, False
        row[PARTITION], row[VALUE], row[LARGEST] = sums[0] if sums[0] > 0 else 1.0, sums[1], sums[3]
        total += row[TOTAL]
    return total


@compiled
def keep(l, mass, sizes, start, step, atoms, kept):
    """Copy the atoms of every `step`-th group, with its number, to those that a report keeps: how many they are."""
    for i in range((-start) % step, sizes.size, step):
        for j in range(min(sizes[i], atoms.shape[1] - kept)):
            atoms[0, kept], atoms[1, kept], atoms[2, kept] = l[i, j], mass[i, j], start + i
            kept += 1
    return kept
