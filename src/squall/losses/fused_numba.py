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
from squall.losses.fused_cpu import SMALL, sampled
from squall.losses.sums import BOTH, FAR, LN2, NEAR, Sums

__all__ = ["CompiledPasses"]

BLOCK = 1024
"""Points per block: with 8 lanes and more, each lane adds up at most 128 numbers in float32."""
BLOCK_OF_TIES = 128
"""The same where many points are alike: the roundings of a sum of equal numbers all go one way."""
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
def _merge(known, top, here, sums):
    """Add a block's sums of e to those known, each relative to its own top; returns the common one."""
    common = max(top, here)
    old, new = 2.0 ** (top - common), 2.0 ** (here - common)
    for k in range(len(sums)):
        known[k] = old * known[k] + new * sums[k]
    return common


@compiled
def _sweep_far(p, t, unit, block, once, twice):
    """max z and Σz of z = unit (p − t)². Added to 0s: Σ z^k e up to k = 6, Σ z^k e² up to k = 2, e = 2^(z − max z)."""
    top, plain = -math.inf, 0.0
    zero = p.dtype.type(0)
    for start in range(0, p.size, block):
        a, b = p[start : start + block], t[start : start + block]
        here = unit * _top(a, b)
        if not here < math.inf:
            return math.nan, 0.0
        s, q0, q1, q2 = zero, zero, zero, zero
        e0, e1, e2, e3, e4, e5, e6 = zero, zero, zero, zero, zero, zero, zero
        for i in range(a.size):
            d = a[i] - b[i]
            z = unit * d * d
            e = _exp2(z - here)
            s += z
            e0 += e
            f = z * e
            e1 += f
            q0 += e * e
            q1 += e * f
            q2 += f * f
            f *= z
            e2 += f
            f *= z
            e3 += f
            f *= z
            e4 += f
            f *= z
            e5 += f
            e6 += f * z
        plain += s
        _merge(twice, 2 * top, 2 * here, (q0, q1, q2))
        top = _merge(once, top, here, (e0, e1, e2, e3, e4, e5, e6))
    return top, plain


@compiled
def _sweep_both(p, t, unit, block, once, twice):
    """The same up to k = 5 for Σ z^k e and k = 6 for Σ z^k e²."""
    top, plain = -math.inf, 0.0
    zero = p.dtype.type(0)
    for start in range(0, p.size, block):
        a, b = p[start : start + block], t[start : start + block]
        here = unit * _top(a, b)
        if not here < math.inf:
            return math.nan, 0.0
        s, q0, q1, q2, q3, q4, q5, q6 = zero, zero, zero, zero, zero, zero, zero, zero
        e0, e1, e2, e3, e4, e5 = zero, zero, zero, zero, zero, zero
        for i in range(a.size):
            d = a[i] - b[i]
            z = unit * d * d
            e = _exp2(z - here)
            f = z * e
            g = z * f
            h = z * g
            k = z * h
            s += z
            e0 += e
            e1 += f
            e2 += g
            e3 += h
            e4 += k
            e5 += k * z
            q0 += e * e
            q1 += e * f
            q2 += f * f
            q3 += f * g
            q4 += g * g
            q5 += g * h
            q6 += h * h
        plain += s
        _merge(twice, 2 * top, 2 * here, (q0, q1, q2, q3, q4, q5, q6))
        top = _merge(once, top, here, (e0, e1, e2, e3, e4, e5))
    return top, plain


@compiled
def _sweep_and_keep(p, t, unit, block, out, tops, slope):
    """max z, Σz, Σ z^k e up to k = 2, Σ z^k e² up to k = 1; in `out` (p − t) e of every block relative to its own of
    `tops`. Where `slope` is None, which is another loop to the compiler, the last of either are left 0."""
    top, plain, squares, mixed, zeroth, first, second = -math.inf, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    zero = p.dtype.type(0)
    for k in range(tops.size):
        start = k * block
        a, b, c = p[start : start + block], t[start : start + block], out[start : start + block]
        here = unit * _top(a, b)
        if not here < math.inf:
            return math.nan, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        s, q0, q1, e0, e1, e2 = zero, zero, zero, zero, zero, zero
        for i in range(a.size):
            d = a[i] - b[i]
            z = unit * d * d
            e = _exp2(z - here)
            c[i] = d * e
            s += z
            q0 += e * e
            e0 += e
            e1 += z * e
            if slope is not None:
                e2 += z * z * e
                q1 += z * e * e
        tops[k] = here
        if here > top:
            old, new, top = 2.0 ** (top - here), 1.0, float(here)
        else:
            old, new = 1.0, 2.0 ** (here - top)
        plain += s
        zeroth, first = old * zeroth + new * e0, old * first + new * e1
        squares = old * old * squares + new * new * q0
        if slope is not None:
            second, mixed = old * second + new * e2, old * old * mixed + new * new * q1
    return top, plain, zeroth, first, second, squares, mixed


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


class CompiledPasses:
    """A float32 or float64 batch, in the calling thread.

    Args:
        prediction, target: contiguous, detached, of one shape and type.
        keep, ties: see `fused_cpu.cpu_passes`.
    """

    measure = None

    def __init__(self, prediction: Tensor, target: Tensor, keep: bool = False, ties: bool = False) -> None:
        self.shape, self.count, self.keep = prediction.shape, prediction.numel(), keep
        self.prediction, self.target = prediction.numpy().reshape(-1), target.numpy().reshape(-1)
        self.real, self.block = self.prediction.dtype.type, BLOCK_OF_TIES if ties else BLOCK
        self.kept: tuple[float, np.ndarray, np.ndarray] | None = None

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        largest, total = _largest_and_sum(self.prediction, self.target)
        return largest, total / self.count

    def sweep(self, beta: float, once: int = 1, twice: int = 0) -> Sums:
        """Sums over z = β l and e = exp(z − max z), of e and e² up to these orders in z, see `Sums`."""
        unit = self.real(beta / LN2)
        if once <= NEAR[0] and self.keep:
            out, tops = np.empty_like(self.prediction), np.empty(-(-self.count // self.block))
            arguments = self.prediction, self.target, unit, self.block, out, tops, True if once > 1 else None
            top, plain, *known = _sweep_and_keep(*arguments)
            self.kept = beta, tops, out
            return Sums.of_doublings(self.count, top, plain, known[: once + 1], known[3 : 4 + twice])
        sweep, orders = (_sweep_both, BOTH) if twice > FAR[1] else (_sweep_far, FAR)
        of_e, of_squares = (np.zeros(order + 1) for order in orders)
        top, plain = sweep(self.prediction, self.target, unit, self.block, of_e, of_squares)
        of_e, of_squares = of_e[: once + 1].tolist(), of_squares[: twice + 1].tolist()
        return Sums.of_doublings(self.count, top, plain, of_e, of_squares)

    def gradient(self, beta: float, top: float, factor: float) -> Tensor:
        """factor · (prediction − target) · exp(β l − top), a new tensor."""
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
        if self.count <= SMALL:
            errors = self.prediction - self.target
            return torch.from_numpy(np.multiply(errors, errors, out=errors)), None
        return sampled(torch.from_numpy(self.prediction), torch.from_numpy(self.target)), None
