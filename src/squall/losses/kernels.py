"""The passes over the points on a CPU, compiled by numba: each does in one loop what `plain` does operator by operator.

Optional (`pip install squall[fast]`). A batch is an array (outer, group, inner): a group's points are the slabs
`[o, g, :]`. One thread, no memory but the gradient: a block of points stays in the innermost cache while it is used.
A point is hidden by a measure below `hidden`: it counts like an error of 0 that has no measure.
"""

import inspect
import types as python_types
from functools import partial
from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from squall import _compiled
from squall._compiled import bits_of, real_of
from squall.losses import solver
from squall.losses.sketch import REST_BITS, WINDOW
from squall.losses.solver import OCTAVE

__all__ = ["between", "fill", "points", "solve_bins", "solve_points", "weigh"]

BLOCK = 1024
"""Points of a block: its scratch arrays (12 KB in float32) stay in the 32 KB cache of a core."""
FEW = 64
"""Points whose sums stay in their own precision: 8 lanes add up 8 numbers each, which loses 1e-7 at most."""
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
def _load(x, y, m, hidden, d, l, mu):
    """Differences (without y: values), errors and measures of a block of points."""
    for i in range(d.size):
        e = x[i] if y is None else x[i] - y[i]
        if m is not None:
            w = m[i]
            e = e if w >= hidden else x.dtype.type(0)
            mu[i] = w if w > 0 else 0
        d[i] = e
        l[i] = abs(e) if y is None else abs(e * e)


@compiled
def _block(a, b, m, hidden, o, g, start, stop, d, l, mu):
    """`_load` of the points start … stop of a slab; how many they are."""
    n = stop - start
    x = a[o, g, start:stop]
    y = None if b is None else b[o, g, start:stop]
    w = None if m is None else m[o % m.shape[0], g % m.shape[1], start:stop]
    _load(x, y, w, hidden, d[:n], l[:n], mu[:n])
    return n


@compiled
def _look(l, m, mu, bits):
    """Bits of the errors, 0 where they carry no measure: the lowest, the highest; the highest of all."""
    zero = bits.dtype.type(0)
    low, high, worst = bits.dtype.type(bits_of(l[0])), zero, zero  # pyright: ignore[reportCallIssue]
    for i in range(l.size):
        q = bits.dtype.type(bits_of(l[i]))  # pyright: ignore[reportCallIssue]
        worst = q if q > worst else worst
        if m is not None:
            q = q if mu[i] > 0 else zero
        bits[i] = q
        low = q if q < low else low
        high = q if q > high else high
    return low, high, worst


@compiled
def _least(d):
    least = d[0]
    for i in range(d.size):
        least = d[i] if d[i] < least else least
    return least


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
def fill(a, b, m, hidden, counts, shift, bits, signed, packed, whole, mass, rest, stats):
    """The bins of every group, in a window below its largest error.

    Args:
        counts: m says only which points count.
        shift: bits of the mantissa below the key.
        bits: scratch of a block, unsigned integers as wide as the errors.
        signed: the type of signed integers as wide.
        packed, whole: scratch, of zeros: a counter for every key, and two sums.
        mass, rest: what is filled, (group, WINDOW).
        stats: (group, 6): the largest error, Σμ of the points there, Σμ, the least value, the largest key, and the
            largest error of all, measure or not: NaN or ∞ if there is one.
    """
    d, l = np.empty(BLOCK, a.dtype), np.empty(BLOCK, a.dtype)
    mu = np.empty(BLOCK if m is not None else 1, a.dtype)
    # Unsigned, or every index would be asked whether it counts from the end.
    unsigned = bits.dtype.type
    key_shift, rest_shift, rest_mask = unsigned(shift), unsigned(shift - REST_BITS), unsigned(REST)
    for g in range(a.shape[1]):
        lowest, highest, last, beyond, since = np.int64(packed.size - 1), np.int64(-1), np.int64(0), np.int64(0), 0
        ties, least = 0.0, np.inf
        for o in range(a.shape[0]):
            for start in range(0, a.shape[2], BLOCK):
                n = _block(a, b, m, hidden, o, g, start, min(start + BLOCK, a.shape[2]), d, l, mu)
                low, high, worst = _look(l[:n], m, mu, bits[:n])
                beyond = max(beyond, np.int64(worst))
                if b is None:
                    least = min(least, _least(d[:n]))
                lowest = min(lowest, np.int64(low >> key_shift))
                if np.int64(high) >= last:
                    ties = ties if np.int64(high) == last else 0.0
                    last, highest = np.int64(high), np.int64(high >> key_shift)
                    for i in range(n):
                        if bits[i] == high:
                            ties += 1.0 if m is None else mu[i]
                if m is None:
                    for i in range(n):
                        packed[bits[i] >> key_shift] += ONE + np.int64((bits[i] >> rest_shift) & rest_mask)
                elif counts:
                    for i in range(n):
                        one = ONE + np.int64((bits[i] >> rest_shift) & rest_mask)
                        packed[bits[i] >> key_shift] += one if mu[i] > 0 else 0
                else:
                    for i in range(n):
                        key = bits[i] >> key_shift
                        whole[0, key] += mu[i]
                        whole[1, key] += mu[i] * np.float64((bits[i] >> rest_shift) & rest_mask)
                since += n
                if since >= FLUSH:
                    _flush(packed[lowest : highest + 1], whole[0, lowest:], whole[1, lowest:])
                    since = 0
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
def points(a, b, m, hidden, errors, mass, stats):
    """What `fill` does for groups so small that every point is an atom: their errors and measures, (group, point)."""
    for g in range(a.shape[1]):
        d = np.empty(errors.shape[1], a.dtype)
        top, ties, total, least, worst = 0.0, 0.0, 0.0, np.inf, 0.0
        for o in range(a.shape[0]):
            part = slice(o * a.shape[2], (o + 1) * a.shape[2])
            _block(a, b, m, hidden, o, g, 0, a.shape[2], d[part], errors[g, part], mass[g, part])
        for i in range(d.size):
            w = 1.0 if m is None else mass[g, i]
            l = errors[g, i]
            least, total = min(least, d[i]), total + w
            worst = l if l > worst or l != l else worst
            if w > 0 and l >= top:
                ties = ties + w if l == top else w
                top = l
        if m is None:
            mass[g] = 1
        _put(stats[g], top, ties, total, least, 0.0, worst)


@compiled
def solve_bins(mass, rest, stats, bias, counts, kind, number, budget_cap, cap, found):
    """`solver.solve` for the bins of every group."""
    for g in range(mass.shape[0]):
        first = np.int64(stats[g, 4]) - WINDOW + 1
        top, ties, total = stats[g, 0], stats[g, 1], stats[g, 2]
        if total > 0:
            y, p, v = _atoms_of_bins(mass[g], rest[g], first, bias, top, ties, counts)
            b, y_ref, lam, binds, met, off = _solve(y, p, v, total, top, kind, number[g], budget_cap, cap)
            _put(found[g], b, y_ref, lam, binds, met, off)


@compiled
def solve_points(errors, mass, stats, kind, number, budget_cap, cap, found):
    """`solver.solve` for the points of every group."""
    for g in range(errors.shape[0]):
        top, total = stats[g, 0], stats[g, 2]
        if total > 0:
            y, p, v = _atoms_of_points(errors[g], mass[g], top, min(budget_cap, cap) < np.inf)
            b, y_ref, lam, binds, met, off = _solve(y, p, v, total, top, kind, number[g], budget_cap, cap)
            _put(found[g], b, y_ref, lam, binds, met, off)


@compiled
def _weigh_part(l, m, mu, beta, ref, lam, limit, floor, s):
    """Σμe, Σμel and the largest μe of few points, in their own precision; the errors are replaced by μ e."""
    zero = l.dtype.type(0)
    total, value, largest = zero, zero, zero
    for i in range(l.size):
        z = beta * (l[i] * s - ref) - lam
        e = _exp2(z if z < zero else zero) + floor
        e = e if l[i] <= limit else zero
        w = e if m is None else e * mu[i]
        total += w
        value += w * l[i]
        largest = w if w > largest else largest
        l[i] = w
    return total, value, largest


@compiled
def _above(l, m, mu, beta, ref, lam, limit, s):
    zero, one = l.dtype.type(0), l.dtype.type(1)
    above = 0.0
    for i in range(l.size):
        z = beta * (l[i] * s - ref) - lam
        c = one if z > zero else zero
        c = c if l[i] <= limit else zero
        above += np.float64(c if m is None else c * mu[i])
    return above


@compiled
def _gradient(d, w, b, out):
    for i in range(d.size):
        out[i] = w[i] if b is None else w[i] * d[i]


@compiled
def weigh(a, b, m, hidden, tilts, caps, out, sums):
    """The exact pass: e = exp(min(0, β (l − ref) − λ)) + floor where l ≤ limit, 0 above.

    Args:
        tilts: (group, 6) in the type of a: β / ln 2 and ref for s·l, λ / ln 2, limit, floor, s (a power of two).
        out: μ e (prediction − target), or μ e without b; None where it is not wanted.
        sums: (group, 4), Σμe, Σμel, Σμ of the points for which the exponent is positive, and the largest μe.
    """
    d, l = np.empty(BLOCK, a.dtype), np.empty(BLOCK, a.dtype)
    mu = np.empty(BLOCK if m is not None else 1, a.dtype)
    for g in range(a.shape[1]):
        beta, ref, lam, limit, floor, s = (
            tilts[g, 0], tilts[g, 1], tilts[g, 2], tilts[g, 3], tilts[g, 4], tilts[g, 5],
        )  # fmt: skip
        total, value, above, largest = 0.0, 0.0, 0.0, 0.0
        for o in range(a.shape[0]):
            for start in range(0, a.shape[2], BLOCK):
                n = _block(a, b, m, hidden, o, g, start, min(start + BLOCK, a.shape[2]), d, l, mu)
                if caps:
                    above += _above(l[:n], m, mu, beta, ref, lam, limit, s)
                for i in range(0, n, FEW):
                    j = min(i + FEW, n)
                    part = _weigh_part(l[i:j], m, mu[i:j], beta, ref, lam, limit, floor, s)
                    total += part[0]
                    value += part[1]
                    largest = max(largest, np.float64(part[2]))
                if out is not None:
                    _gradient(d[:n], l[:n], b, out[o, g, start : start + n])
        sums[g, 0], sums[g, 1], sums[g, 2], sums[g, 3] = total, value, above, largest


@compiled
def between(a, b, m, hidden, g, low, high, errors, mass):
    """The errors of group g in [low, high] and their measures, as far as the arrays reach; how many they are."""
    d, l, mu = np.empty(BLOCK, a.dtype), np.empty(BLOCK, a.dtype), np.ones(BLOCK, a.dtype)
    count = 0
    for o in range(a.shape[0]):
        for start in range(0, a.shape[2], BLOCK):
            n = _block(a, b, m, hidden, o, g, start, min(start + BLOCK, a.shape[2]), d, l, mu)
            for i in range(n):
                if low <= l[i] <= high and mu[i] > 0:
                    if count < errors.size:
                        errors[count], mass[count] = l[i], mu[i]
                    count += 1
    return count
