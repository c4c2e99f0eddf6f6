"""The passes over the points on a CPU, compiled by numba: each does in one loop what `plain` does operator by operator.

Optional (`pip install squall[fast]`). A batch is an array (outer, group, inner): a group's points are the slabs
`[o, g, :]`. One thread, no memory but the gradient: a block of points stays in the innermost cache while it is used.
A point is hidden where `seen` is 0 or the measure m is negative: it counts like an error of 0 of no measure.
"""

import inspect
import math
import types as python_types
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from squall._process import compiled as _compiled
from squall._process.compiled import bits_of, real_of
from squall.losses import solver
from squall.losses.sketch import REST_BITS, WINDOW
from squall.losses.solver import OCTAVE

__all__ = ["between", "fill", "points", "solve_bins", "solve_points", "weigh"]

BLOCK = 1024
"""Points of a block: its scratch arrays (8 KB in float32) stay in the 32 KB cache of a core."""
FEW = 128
"""Points whose sums stay in their own precision: 8 lanes add up 16 numbers each, which loses 1e-7 at most."""
FLUSH = 1 << 22
"""Points after which the packed counters are emptied: a sum of rests stays below 2^(22 + 17), under their counts."""
ONE = 1 << 40
"""A count of one in a packed counter."""
REST = (1 << REST_BITS) - 1
FAST = frozenset({"contract", "reassoc", "nsz"})
"""Sums may be reordered, which is what makes vectors of them. NaN and infinity keep their meaning."""


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

compiled = partial(_compiled.compiled, fastmath=FAST)


@compiled
def _exp2_single(x):
    x = x if x > np.float32(-126) else np.float32(-126)
    whole = np.int32(x - np.float32(0.5))
    f = x - np.float32(whole)
    series = A1 + f * (A2 + f * (A3 + f * (A4 + f * (A5 + f * A6))))
    value = (np.float32(1) + f * series) * real_of(np.int32((whole + 127) << 23))  # pyright: ignore[reportCallIssue]
    return value if x > np.float32(-126) else np.float32(0)


@compiled
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


@overload(_exp2, jit_options={"fastmath": set(FAST)})
def _overloaded_exp2(x):
    return (lambda x: _exp2_single(x)) if x == types.float32 else (lambda x: _exp2_double(x))


@compiled
def _tilted(y, p, b, nu):
    """`solver.tilted` in one loop."""
    total, first, second, entropy, above = 0.0, 0.0, 0.0, 0.0, 0.0
    unit, shift = b * PER_LN2, nu * PER_LN2
    for i in range(y.size):
        z = unit * y[i] - shift
        free = z <= 0
        e = p[i] * _exp2(min(z, 0.0))
        above += 0.0 if free else p[i]
        e = e if free else 0.0
        f = e * y[i]
        total += e
        first += f
        second += f * y[i]
        entropy += e * z
    return total, first, second, entropy / PER_LN2, above


@compiled
def _atoms_of_bins(mass, rest, first, bias, top, ties, counts):
    """`solver.atoms_of_bins` in one loop."""
    y, p, v = np.empty(WINDOW + 1), np.empty(WINDOW + 1), np.empty(WINDOW + 1)
    scale = top if top > 0 else 1.0
    size, value = 0, 0.0
    for j in range(WINDOW):
        if mass[j] > 0:
            key = first + j
            exponent = max(key >> 6, 1)
            power = real_of(np.int64(exponent + 1023 - bias) << 52)  # pyright: ignore[reportCallIssue]
            leading = 1.0 if key >= OCTAVE else 0.0
            value = power * (leading + (key & (OCTAVE - 1)) / OCTAVE + rest[j] / mass[j] / (OCTAVE << REST_BITS))
            value = value if j > 0 else 0.0
            width = 0.0 if counts and mass[j] <= 1 else power / (OCTAVE * scale)
            y[size], p[size], v[size] = min((value - top) / scale, 0.0), mass[j], width * width / 12
            size += 1
    last = size - 1
    left = p[last] - ties
    y[last] = min(((p[last] * value - ties * top) / left - top) / scale, 0.0) if left > 1e-9 * p[last] else y[last]
    p[last] = left if left > 1e-9 * p[last] else 0.0
    y[size], p[size], v[size] = 0.0, ties, 0.0
    return y[: size + 1], p[: size + 1], v[: size + 1]


def _from_solver(*names: str) -> dict[str, Any]:
    """These functions of `solver` compiled as they stand, each with those before it and `_tilted` in its reach."""
    reach: dict[str, Any] = {**vars(solver), "tilted": _tilted}
    for name in names:
        source = inspect.unwrap(getattr(solver, name))
        reach[name] = compiled(python_types.FunctionType(source.__code__, reach, name))
    return reach


_reach = _from_solver(
    "atoms_of_points", "share_above", "level", "_spread", "_most", "solve_budget", "unresolved", "solve"
)
_atoms_of_points, _solve = _reach["atoms_of_points"], _reach["solve"]


@compiled
def _slab(a, b, m, seen, o, g, start, stop):
    """Where a block of points is: values, targets, measures, and which points count."""
    y = None if b is None else b[o, g, start:stop]
    w = None if m is None else m[o % m.shape[0], g % m.shape[1], start:stop]
    k = None if seen is None else seen[o % seen.shape[0], g % seen.shape[1], start:stop]
    return a[o, g, start:stop], y, w, k


@compiled
def _measures(m, mu):
    """μ, 0 where a point is hidden."""
    zero = mu.dtype.type(0)  # of this type, or the comparison would be one of float64
    for i in range(m.size):
        w = mu.dtype.type(m[i])
        mu[i] = w if w > zero else zero


@compiled
def _bits(x, y, m, seen, bits, mu):
    """Bits of the errors of a block, 0 where they carry no measure: lowest, highest, highest of all; and how
    many points are hidden."""
    zero, gone = bits.dtype.type(0), 0
    if seen is not None:
        for i in range(seen.size):
            gone += 1 - seen[i]
    if m is not None:
        _measures(m, mu)
    low, high, worst = ~zero, zero, zero
    for i in range(x.size):
        e = x[i] if y is None else x[i] - y[i]
        if m is not None:
            e = e if m[i] >= m.dtype.type(0) else x.dtype.type(0)
        if seen is not None:
            e = e if seen[i] != 0 else x.dtype.type(0)
        q = bits.dtype.type(bits_of(abs(e) if y is None else abs(e * e)))  # pyright: ignore[reportCallIssue]
        worst = q if q > worst else worst
        if m is not None:
            q = q if mu[i] > x.dtype.type(0) else zero
        bits[i] = q
        low = q if q < low else low
        high = q if q > high else high
    return np.int64(low), np.int64(high), np.int64(worst), gone


@compiled
def _least(x, m, seen):
    """The least value of those that are not hidden, or 0."""
    least = x.dtype.type(0)
    for i in range(x.size):
        e = x[i]
        if m is not None:
            e = e if m[i] >= m.dtype.type(0) else x.dtype.type(0)
        if seen is not None:
            e = e if seen[i] != 0 else x.dtype.type(0)
        least = e if e < least else least
    return np.float64(least)


@compiled
def _put(row, a, b, c, d, e, f):
    row[0], row[1], row[2], row[3], row[4], row[5] = a, b, c, d, e, f


@compiled
def _flush(packed, mass, rest):
    """Move packed counters into the sums."""
    for i in range(packed.size):
        mass[i] += packed[i] >> 40
        rest[i] += packed[i] & (ONE - 1)
        packed[i] = 0


@compiled
def _take(packed, whole, whole_rest, mass, rest):
    """Add up counters and sums, and leave zeros."""
    for i in range(packed.size):
        mass[i] += whole[i] + (packed[i] >> 40)
        rest[i] += whole_rest[i] + (packed[i] & (ONE - 1))
    packed[:] = 0
    whole[:] = 0.0
    whole_rest[:] = 0.0


@compiled
def fill(a, b, m, seen, shift, bits, signed, packed, whole, mass, rest, stats):
    """The bins of every group, in a window below its largest error.

    Args:
        shift: bits of the mantissa below the key.
        bits: scratch of a block, unsigned integers as wide as the errors.
        signed: the type of signed integers as wide.
        packed, whole: scratch, of zeros: a counter for every key, and two sums.
        mass, rest: what is filled, (group, WINDOW).
        stats: (group, 6): the largest error, Σμ of the points there, Σμ, the least value, the largest key, and the
            largest error of all, measure or not: NaN or ∞ if there is one.
    """
    mu = np.empty(BLOCK if m is not None else 1, a.dtype)
    # Unsigned, or every index would be asked whether it counts from the end.
    unsigned = bits.dtype.type
    key_shift, rest_shift, rest_mask = unsigned(shift), unsigned(shift - REST_BITS), unsigned(REST)
    for g in range(a.shape[1]):
        lowest, highest, last, beyond = np.int64(packed.size - 1), np.int64(-1), np.int64(0), np.int64(0)
        since, gone, ties, least = 0, 0, 0.0, 0.0
        for o in range(a.shape[0]):
            for start in range(0, a.shape[2], BLOCK):
                n = min(BLOCK, a.shape[2] - start)
                x, y, w, k = _slab(a, b, m, seen, o, g, start, start + n)
                low, high, worst, hid = _bits(x, y, w, k, bits[:n], mu[:n])
                beyond, gone = max(beyond, worst), gone + hid
                if b is None:
                    least = min(least, _least(x, w, k))
                lowest = min(lowest, low >> shift)
                if high >= last:
                    ties = ties if high == last else 0.0
                    last, highest = high, high >> shift
                    for i in range(n):
                        if bits[i] == unsigned(high):
                            ties += 1.0 if m is None else mu[i]
                if m is None:  # the hidden ones too, at 0
                    for i in range(n):
                        packed[bits[i] >> key_shift] += ONE + np.int64((bits[i] >> rest_shift) & rest_mask)
                else:
                    for i in range(n):
                        key = bits[i] >> key_shift
                        whole[0, key] += mu[i]
                        whole[1, key] += mu[i] * np.float64((bits[i] >> rest_shift) & rest_mask)
                since += n
                if since >= FLUSH:
                    _flush(packed[lowest : highest + 1], whole[0, lowest:], whole[1, lowest:])
                    since = 0
        if gone > 0:
            packed[0] -= ONE * gone
        floor = highest - WINDOW + 1
        for key in range(lowest, floor):
            mass[g, 0] += whole[0, key] + (packed[key] >> 40)
            packed[key] = whole[0, key] = whole[1, key] = 0
        start = max(lowest, floor)
        j, stop = start - floor, highest + 1
        _take(packed[start:stop], whole[0, start:stop], whole[1, start:stop], mass[g, j:], rest[g, j:])
        if lowest < floor:
            rest[g, 0] = 0.0
        total = mass[g].sum()
        top = real_of(signed(last))  # pyright: ignore[reportCallIssue]
        worst = real_of(signed(beyond))  # pyright: ignore[reportCallIssue]
        _put(stats[g], top, ties, total, least, highest, worst)


@compiled
def points(a, b, m, seen, errors, mass, stats):
    """What `fill` does for groups so small that every point is an atom: their errors and measures, (group, point)."""
    for g in range(a.shape[1]):
        top, ties, total, least, worst, j = 0.0, 0.0, 0.0, 0.0, 0.0, 0
        for o in range(a.shape[0]):
            x, y, w, k = _slab(a, b, m, seen, o, g, 0, a.shape[2])
            _errors_and_measures(x, y, w, k, errors[g, j : j + x.size], mass[g, j : j + x.size])
            if b is None:
                least = min(least, _least(x, w, k))
            j += x.size
        for i in range(j):
            l, w = errors[g, i], mass[g, i]
            total += w
            worst = l if l > worst or l != l else worst
            if w > 0 and l >= top:
                ties = ties + w if l == top else w
                top = l
        _put(stats[g], top, ties, total, least, 0.0, worst)


@compiled
def _errors_and_measures(x, y, m, seen, errors, mass):
    for i in range(x.size):
        e = x[i] if y is None else x[i] - y[i]
        mass[i] = 1
        if seen is not None:
            e = e if seen[i] != 0 else x.dtype.type(0)
            mass[i] = seen[i]
        if m is not None:
            e = e if m[i] >= m.dtype.type(0) else x.dtype.type(0)
            mass[i] = m[i] if m[i] > m.dtype.type(0) else m.dtype.type(0)
        errors[i] = abs(e) if y is None else abs(e * e)


@compiled
def _store(found, top, tilt, note):
    """A tilt and its notes from what `solver.solve` finds."""
    b, y_ref, lam, binds, met, off = found
    scale = top if top > 0 else 1.0
    _put(tilt, b, top + scale * y_ref, scale, lam, np.inf, 0.0)
    note[0], note[1], note[2] = 1.0 if binds else 0.0, 1.0 if met else 0.0, off


@compiled
def solve_bins(mass, rest, stats, bias, counts, kind, number, budget_cap, cap, tilts, notes):
    """`solver.solve` for the bins of every group."""
    for g in range(mass.shape[0]):
        first = np.int64(stats[g, 4]) - WINDOW + 1
        top, ties, total = stats[g, 0], stats[g, 1], stats[g, 2]
        found = 0.0, 0.0, 0.0, False, True, 0.0
        if total > 0:
            y, p, v = _atoms_of_bins(mass[g], rest[g], first, bias, top, ties, counts)
            found = _solve(y, p, v, total, top, kind, number, budget_cap, cap)
        _store(found, top, tilts[g], notes[g])


@compiled
def solve_points(errors, mass, stats, kind, number, budget_cap, cap, tilts, notes):
    """`solver.solve` for the points of every group."""
    for g in range(errors.shape[0]):
        top, total = stats[g, 0], stats[g, 2]
        found = 0.0, 0.0, 0.0, False, True, 0.0
        if total > 0:
            y, p, v = _atoms_of_points(errors[g], mass[g], top, min(budget_cap, cap) < np.inf)
            found = _solve(y, p, v, total, top, kind, number, budget_cap, cap)
        _store(found, top, tilts[g], notes[g])


@compiled
def _weigh_part(x, y, mu, seen, beta, ref, lam, limit, floor, s, out):
    """Σμe and Σμel over few points, in their own precision; writes `out`, and μe into μ."""
    zero = x.dtype.type(0)
    total, value = zero, zero
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if mu is not None:
            d = d if mu[i] > zero else zero
        if seen is not None:
            d = d if seen[i] != 0 else zero
        l = abs(d) if y is None else abs(d * d)
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
        if out is not None:
            out[i] = w if y is None else w * d
    return total, value


@compiled
def _highest(w):
    """Bits of the largest of these numbers, none negative: unlike that of the numbers, their maximum is a vector."""
    highest = bits_of(w[0])  # pyright: ignore[reportCallIssue]
    for i in range(w.size):
        q = bits_of(w[i])  # pyright: ignore[reportCallIssue]
        highest = q if q > highest else highest
    return highest


@compiled
def _above(x, y, mu, seen, beta, ref, lam, limit, s):
    """Σμ of the points whose exponent is positive."""
    zero, one = x.dtype.type(0), x.dtype.type(1)
    above = zero
    for i in range(x.size):
        d = x[i] if y is None else x[i] - y[i]
        if mu is not None:
            d = d if mu[i] > zero else zero
        if seen is not None:
            d = d if seen[i] != 0 else zero
        l = abs(d) if y is None else abs(d * d)
        z = beta * (l * s - ref) - lam
        c = one if z > zero else zero
        c = c if l <= limit else zero
        if seen is not None:
            c = c if seen[i] != 0 else zero
        above += c if mu is None else c * mu[i]
    return above


@compiled
def _real(a, bits):
    """The number of the type of `a` that has these bits."""
    word = np.array([bits])
    return np.float64(word.view(np.float64)[0]) if a.itemsize == 8 else np.float64(word.view(np.float32)[0])


@compiled
def weigh(a, b, m, seen, tilts, caps, out, sums):
    """The exact pass: e = exp(min(0, β (l − ref) − λ)) + floor where l ≤ limit, 0 above.

    Args:
        tilts: (group, 6), see `batch.Tilts`.
        out: μ e (prediction − target), or μ e without b; None where it is not wanted.
        sums: (group, 4), Σμe, Σμel, Σμ of the points for which the exponent is positive, and the largest μe.
    """
    scratch = np.empty(FEW, a.dtype)
    for g in range(a.shape[1]):
        scale, real = tilts[g, 2], a.dtype.type
        # Errors times a power of two near 1/scale are exact, and their differences neither over- nor underflow.
        s = math.ldexp(1.0, min(max(-math.frexp(scale)[1], -126), 126))
        beta, ref, lam = tilts[g, 0] / (scale * s) * PER_LN2, tilts[g, 1] * s, tilts[g, 3] * PER_LN2
        beta, ref, lam, limit, floor, s = (
            real(beta), real(ref), real(lam), real(tilts[g, 4]), real(tilts[g, 5]), real(s),
        )  # fmt: skip
        total, value, above, highest = 0.0, 0.0, 0.0, np.int64(0)
        for o in range(a.shape[0]):
            for start in range(0, a.shape[2], FEW):
                stop = min(start + FEW, a.shape[2])
                x, y, w, k = _slab(a, b, m, seen, o, g, start, stop)
                if m is not None:
                    _measures(w, scratch)
                mu = None if m is None else scratch[: stop - start]
                if caps:
                    above += np.float64(_above(x, y, mu, k, beta, ref, lam, limit, s))
                part = None if out is None else out[o, g, start:stop]
                sums_of_part = _weigh_part(x, y, mu, k, beta, ref, lam, limit, floor, s, part)
                total += sums_of_part[0]
                value += sums_of_part[1]
                if m is not None:
                    highest = max(highest, np.int64(_highest(mu)))
        largest = (1.0 if above > 0 else math.exp(-tilts[g, 3])) + tilts[g, 5]  # where points count alike
        if m is not None:
            largest = _real(a, highest)
        sums[g, 0], sums[g, 1], sums[g, 2], sums[g, 3] = total, value, above, largest


@compiled
def between(a, b, m, seen, g, low, high, errors, mass):
    """The errors of group g in [low, high] and their measures, as far as the arrays reach; how many they are."""
    low, high = a.dtype.type(low), a.dtype.type(high)
    count = 0
    for o in range(a.shape[0]):
        for start in range(0, a.shape[2], FEW):
            x, y, w, k = _slab(a, b, m, seen, o, g, start, min(start + FEW, a.shape[2]))
            if not _any_between(x, y, low, high):
                continue
            count = _gather(x, y, w, k, low, high, errors, mass, count)
    return count


@compiled
def _gather(x, y, m, seen, low, high, errors, mass, count):
    for i in range(x.size):
        e = x[i] if y is None else x[i] - y[i]
        counts = True
        if m is not None:
            counts = m[i] > m.dtype.type(0)
        if seen is not None:
            counts = seen[i] != 0
        l = abs(e) if y is None else abs(e * e)
        if counts and low <= l <= high:
            if count < errors.size:
                errors[count], mass[count] = l, 1.0 if m is None else m[i]
            count += 1
    return count


@compiled
def _any_between(x, y, low, high):
    """Whether an error is in [low, high], or would be if it were hidden: most blocks have none, and vectors tell."""
    zero, one = np.int32(0), np.int32(1)
    found = one if low <= 0 else zero
    for i in range(x.size):
        e = x[i] if y is None else x[i] - y[i]
        l = abs(e) if y is None else abs(e * e)
        found |= (one if l >= low else zero) & (one if l <= high else zero)
    return found > 0
