"""The passes of the fused loss on the CPU for batches of up to a few million points, compiled by numba.

One thread, and no memory but the gradient: where a batch is small, starting an operator, waking a thread and faulting
in a scratch tensor each cost more than the arithmetic. A block of points stays in the innermost cache while its largest
error is found and then its sums are taken; sums run in the precision of the data within a block, in float64 across.

Optional (`pip install squall[fast]`): without numba, `fused_cpu` does the same.
"""

import math
from functools import partial

import numpy as np
import torch
from numba import types
from numba.extending import overload
from torch import Tensor

from squall import _compiled
from squall._compiled import bits_of, real_of
from squall.losses.fused_cpu import SMALL, runs_over
from squall.losses.passes import Passes
from squall.losses.sums import LN2, Moments, Sums

__all__ = ["CompiledPasses", "tilted"]

BLOCK = 1024
"""Points per block: with 8 lanes and more, each lane adds up at most 128 numbers in float32."""
BLOCK_OF_TIES = 128
"""The same where many points are alike: the roundings of a sum of equal numbers all go one way."""
SLACK = 1.1
"""The span of the Chebyshev polynomials over the largest z so far."""
FAST = frozenset({"contract", "reassoc", "nsz"})
"""Sums may be reordered, which is what makes vectors of them. NaN and infinity keep their meaning."""
C1, C2, C3, C4, C5, C6 = (
    np.float32(c)
    for c in np.polynomial.chebyshev.Chebyshev.interpolate(
        lambda x: np.where(x == 0, LN2, np.expm1(LN2 * x) / np.where(x == 0, 1, x)), 5, domain=[-0.5, 0.5]
    )
    .convert(kind=np.polynomial.Polynomial)
    .coef
)
"""2^x = 1 + x (C1 + C2 x + …) for |x| ≤ 1/2, to 1e-8."""


compiled = partial(_compiled.compiled, fastmath=FAST)


@compiled
def _exp2_single(x):
    x = x if x > np.float32(-126) else np.float32(-126)
    whole = np.int32(x - np.float32(0.5))
    f = x - np.float32(whole)
    series = C1 + f * (C2 + f * (C3 + f * (C4 + f * (C5 + f * C6))))
    return (np.float32(1) + f * series) * real_of(np.int32((whole + 127) << 23))  # pyright: ignore[reportCallIssue]


def _exp2(x):
    """2^x for x ≤ 0, to the rounding of x; in float32 never below 2^-126."""
    raise NotImplementedError("compiled only")


@overload(_exp2, jit_options={"fastmath": set(FAST)})
def _overloaded_exp2(x):
    return (lambda x: _exp2_single(x)) if x == types.float32 else (lambda x: math.exp(LN2 * x))


@compiled
def _largest_and_sum(p, t):
    highest, total = bits_of(p.dtype.type(0)), 0.0  # pyright: ignore[reportCallIssue]
    for start in range(0, p.size, BLOCK):
        a, b = p[start : start + BLOCK], t[start : start + BLOCK]
        part = p.dtype.type(0)
        for i in range(a.size):
            d = a[i] - b[i]
            highest = max(highest, bits_of(abs(d * d)))  # pyright: ignore[reportCallIssue]
            part += d * d
        total += part
    return real_of(highest), total  # pyright: ignore[reportCallIssue]


@compiled
def _top(a, b):
    """max (a − b)², NaN where one is NaN."""
    highest = bits_of(a.dtype.type(0))  # pyright: ignore[reportCallIssue]
    for i in range(a.size):
        d = a[i] - b[i]
        highest = max(highest, bits_of(abs(d * d)))  # pyright: ignore[reportCallIssue]
    return real_of(highest)  # pyright: ignore[reportCallIssue]


@compiled
def _above(z, p):
    """A reference of the type of p: so near z that what is left of it keeps its digits, so far that few are above."""
    return p.dtype.type(min(SLACK * z, z + 1))


@compiled
def _block(a, b, unit, reference, span, first, doubled):
    """The largest z = unit (a − b)², Σz, and the pairs of `Moments.of_pairs` under e² and e = 2^(z − reference).

    In two loops, an eighth faster than one with all these sums: `first` and `doubled` take w e and 2 v from one to the
    other.
    """
    zero, two = a.dtype.type(0), a.dtype.type(2)
    scale = a.dtype.type(2 / span if span > 0 else 0.0)
    highest = bits_of(zero)  # pyright: ignore[reportCallIssue]
    s, q0, q1, q2, c0, c1, c2 = zero, zero, zero, zero, zero, zero, zero
    for i in range(a.size):
        d = a[i] - b[i]
        z = unit * d * d
        highest = max(highest, bits_of(abs(z)))  # pyright: ignore[reportCallIssue]
        e = _exp2(z - reference)
        w = scale * z
        v = two * w - two
        b1 = w * e
        b2 = v * b1 - b1
        first[i] = b1
        doubled[i] = v
        s += z
        q0 += e * e
        q1 += b1 * e
        q2 += b2 * e
        c0 += e
        c1 += b1
        c2 += b2
    c3, c4, c5, c6, c7, c8 = zero, zero, zero, zero, zero, zero
    c9, c10, c11, c12, c13 = zero, zero, zero, zero, zero
    for i in range(a.size):
        v, b1 = doubled[i], first[i]
        b2 = v * b1 - b1
        b3 = v * b2 - b1
        b4 = v * b3 - b2
        b5 = v * b4 - b3
        b6 = v * b5 - b4
        b7 = v * b6 - b5
        b8 = v * b7 - b6
        b9 = v * b8 - b7
        b10 = v * b9 - b8
        b11 = v * b10 - b9
        b12 = v * b11 - b10
        b13 = v * b12 - b11
        c3 += b3
        c4 += b4
        c5 += b5
        c6 += b6
        c7 += b7
        c8 += b8
        c9 += b9
        c10 += b10
        c11 += b11
        c12 += b12
        c13 += b13
    sums = c0, c1, c2, c3, c4, c5, c6, c7, c8, c9, c10, c11, c12, c13
    return real_of(highest), s, (q0, q1, q2), sums  # pyright: ignore[reportCallIssue]


@compiled
def _sweep(p, t, unit, block, once, twice):
    """max z, Σz and the span of z = unit (p − t)². Added to 0s: Σ T_k(v) e and Σ T_k(v) e², e = 2^(z − max z) and
    v = 2 z/span − 1.

    Blocks are summed with e = 2^(z − reference) for a reference and a span somewhat above the largest z of the blocks
    before, and those in which one is larger are summed again.
    """
    top = unit * _top(p[:block], t[:block])
    reference, span, plain = _above(top, p), SLACK * top, 0.0
    scratch = np.empty(block, p.dtype), np.empty(block, p.dtype)
    for start in range(0, p.size, block):
        a, b = p[start : start + block], t[start : start + block]
        highest, s, squares, sums = _block(a, b, unit, reference, span, *scratch)
        if not highest < math.inf:
            return math.nan, 0.0, 1.0
        if highest > reference:
            higher, longer = _above(highest, p), max(span, SLACK * highest)
            _move(once, span / longer, 2.0 ** (reference - higher))
            _move(twice, span / longer, 4.0 ** (reference - higher))
            reference, span = higher, longer
            _, s, squares, sums = _block(a, b, unit, reference, span, *scratch)
        top = max(top, highest)
        plain += s
        _add(once, sums)
        _add(twice, squares)
    _move(once, 1.0, 2.0 ** (reference - top))
    _move(twice, 1.0, 4.0 ** (reference - top))
    return top, plain, span


@compiled
def _move(moments, ratio, factor):
    """Moments over [0, s] made those over [0, s/ratio], times a factor, in place."""
    if 0 < ratio < 1:  # at 0 all z are 0, and every T_k(v) is that of −1
        _stretch(moments, ratio)
    for k in range(moments.size):
        moments[k] *= factor


@compiled
def _stretch(moments, ratio):
    """Chebyshev moments over [0, s] made those over [0, s/ratio], in place: those of masses at the zeros v_j of T_K."""
    count = moments.size
    masses = np.empty(count)
    for j in range(count):
        v = math.cos(math.pi * (j + 0.5) / count)
        mass, before, here = moments[0], 1.0, v
        for k in range(1, count):
            mass += 2 * moments[k] * here
            before, here = here, 2 * v * here - before
        masses[j] = mass / count
    moments[:] = 0
    for j in range(count):
        v = ratio * (math.cos(math.pi * (j + 0.5) / count) + 1) - 1
        before, here = v, 1.0
        for k in range(count):
            moments[k] += masses[j] * here
            before, here = here, 2 * v * here - before


@compiled
def _add(moments, pairs):
    """Add the moments of which the pairs are given."""
    moment = 0.0
    for k in range(len(pairs)):
        moment = pairs[k] - moment
        moments[k] += moment


@compiled
def _sweep_and_keep(p, t, unit, block, out, tops):
    """max z, Σz, Σe, Σze and Σe²; in `out` (p − t) e of every block relative to its own of `tops`, see `_sweep`."""
    plain, squares, zeroth, first = 0.0, 0.0, 0.0, 0.0
    top = unit * _top(p[:block], t[:block])
    reference = _above(top, p)
    for k in range(tops.size):
        start = k * block
        a, b, c = p[start : start + block], t[start : start + block], out[start : start + block]
        highest, s, e0, e1, q = _block_and_keep(a, b, unit, reference, c)
        if not highest < math.inf:
            return math.nan, 0.0, 0.0, 0.0, 0.0
        if highest > reference:
            higher = _above(highest, p)
            factor, reference = 2.0 ** (reference - higher), higher
            zeroth, first, squares = factor * zeroth, factor * first, factor * factor * squares
            _, s, e0, e1, q = _block_and_keep(a, b, unit, reference, c)
        tops[k] = reference
        top = max(top, highest)
        plain, zeroth, first, squares = plain + s, zeroth + e0, first + e1, squares + q
    factor = 2.0 ** (reference - top)
    return top, plain, factor * zeroth, factor * first, factor * factor * squares


@compiled
def _block_and_keep(a, b, unit, reference, out):
    """The largest z = unit (a − b)², Σz, Σe, Σze and Σe² with e = 2^(z − reference); (a − b) e in `out`."""
    zero = a.dtype.type(0)
    highest = bits_of(zero)  # pyright: ignore[reportCallIssue]
    s, e0, e1, q = zero, zero, zero, zero
    for i in range(a.size):
        d = a[i] - b[i]
        z = unit * d * d
        highest = max(highest, bits_of(abs(z)))
        e = _exp2(z - reference)
        out[i] = d * e
        s += z
        q += e * e
        e0 += e
        e1 += z * e
    return real_of(highest), s, e0, e1, q


@compiled
def _scale(out, block, tops, top, factor):
    """Every block of `out` brought from its own top to the common one, in place."""
    for k in range(tops.size):
        c = out[k * block : (k + 1) * block]
        by = out.dtype.type(factor * 2.0 ** (tops[k] - top))
        for i in range(c.size):
            c[i] *= by


@compiled
def _gradient(p, t, unit, shift, factor, out):
    """factor (p − t) 2^(unit (p − t)² − shift)."""
    for i in range(p.size):
        d = p[i] - t[i]
        out[i] = factor * d * _exp2(unit * d * d - shift)


@compiled
def _sample(p, t, length, step, out):
    """(p − t)² of runs of so many points that begin so far apart."""
    for i in range(out.size // length):
        a, b, c = p[i * step :], t[i * step :], out[i * length : (i + 1) * length]
        for j in range(length):
            d = a[j] - b[j]
            c[j] = d * d


@compiled
def tilted(masses, powers, stretch):
    """Σ W exp(s y), and with y and y² in it, for masses W and powers 1, y, y², (3, node)."""
    total, mean, square = 0.0, 0.0, 0.0
    for j in range(masses.size):
        y = powers[1, j]
        w = masses[j] * math.exp(stretch * y)
        total += w
        mean += w * y
        square += w * y * y
    return total, mean, square


class CompiledPasses(Passes):
    """A float32 or float64 batch, in the calling thread.

    Args:
        prediction, target: contiguous, detached, of one shape and type.
        keep, ties: see `fused_cpu.cpu_passes`.
    """

    moments = 14, 3

    def __init__(self, prediction: Tensor, target: Tensor, keep: bool = False, ties: bool = False) -> None:
        self.shape, self.count, self.keep = prediction.shape, prediction.numel(), keep
        self.prediction, self.target = prediction.numpy().reshape(-1), target.numpy().reshape(-1)
        self.single = prediction.dtype == torch.float32
        self.real, self.block = self.prediction.dtype.type, BLOCK_OF_TIES if ties else BLOCK
        self.kept: tuple[float, np.ndarray, np.ndarray] | None = None

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        largest, total = _largest_and_sum(self.prediction, self.target)
        return largest, total / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`."""
        unit = self.real(beta / LN2)
        if moments is None and self.keep:
            out, tops = np.empty_like(self.prediction), np.empty(-(-self.count // self.block))
            arguments = self.prediction, self.target, unit, self.block, out, tops
            top, plain, zeroth, first, squares = _sweep_and_keep(*arguments)
            self.kept = beta, tops, out
            return Sums(self.count, LN2 * top, LN2 * plain, zeroth, LN2 * first, squares)
        of_e, of_squares = map(np.zeros, self.moments)
        top, plain, span = _sweep(self.prediction, self.target, unit, self.block, of_e, of_squares)
        once, twice = moments or self.moments
        known = Moments(LN2 * (span or 1.0), of_e[:once], of_squares[:twice])
        return Sums.of_moments(self.count, LN2 * top, LN2 * plain, known)

    def gradient(self, beta: float, top: float, scale: float, factor: float = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor."""
        factor *= scale
        if self.kept is not None and self.kept[0] == beta:
            (_, tops, out), self.kept = self.kept, None  # given away
            _scale(out, self.block, tops, top / LN2, factor)
        else:
            out, shift = np.empty_like(self.prediction), self.real(top / LN2)
            factor *= math.exp(LN2 * float(shift) - top)  # what rounding the shift took away
            _gradient(self.prediction, self.target, self.real(beta / LN2), shift, self.real(factor), out)
        return torch.from_numpy(out.reshape(self.shape))

    def sample(self) -> tuple[Tensor, None]:
        """Errors of all points of a small batch, of points all over a larger one."""
        runs, length, step = (1, self.count, 0) if self.count <= SMALL else runs_over(self.count)
        errors = np.empty(runs * length, self.prediction.dtype)
        _sample(self.prediction, self.target, length, step, errors)
        return torch.from_numpy(errors), None
