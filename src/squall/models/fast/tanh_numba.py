"""tanh on processors without AVX-512, where NumPy's and PyTorch's take several times as long.

tanh x = t / (t + 2) with t = exp(2x) − 1. Writing 2x = w log 2 + r with a whole w and |r| ≤ log(2)/2,

    t = (2^w − 1) + 2^w (exp(r) − 1),

whose last factor is Taylor's series: no digit is cancelled, for small x neither; the result is right to about 2 ulp.
"""

import math

import numpy as np
from jaxtyping import Float

from squall._process.compiled import compiled, real_of


def _log2(bits: int) -> tuple[float, float]:
    """log 2 in two parts, the first of so many bits that its product with a small integer is exact."""
    high = math.floor(math.log(2) * 2**bits) / 2**bits
    return high, float(np.log(np.longdouble(2)) - np.longdouble(high))


def _series(real: type[np.floating], terms: int) -> list[np.floating]:
    """1/2!, 1/3!, …: exp(r) − 1 = r + r² (1/2! + r/3! + …)."""
    return [real(1 / math.factorial(n + 2)) for n in range(terms)]


PER_LOG2 = 1 / math.log(2)
HIGH, LOW = _log2(40)
"""So that exp(y) = 2^w exp(r) with r = y − w log 2 exact: Cody and Waite's reduction."""

A1, A2, A3, A4, A5, A6, A7, A8, A9, A10, A11, A12 = _series(np.float64, 12)
PER_LOG2_SINGLE = np.float32(PER_LOG2)
HIGH_SINGLE, LOW_SINGLE = map(np.float32, _log2(12))
B1, B2, B3, B4, B5, B6 = _series(np.float32, 6)
ONE, TWO, HALF, FLAT = map(np.float32, (1, 2, 0.5, 20))


@compiled
def _single(z):
    for i in range(z.size):
        y = TWO * abs(z[i])
        y = FLAT if y > FLAT else y  # beyond, the result is 1; NaN stays
        w = np.int32(y * PER_LOG2_SINGLE + HALF)
        r = (y - np.float32(w) * HIGH_SINGLE) - np.float32(w) * LOW_SINGLE
        s = r + r * r * (B1 + r * (B2 + r * (B3 + r * (B4 + r * (B5 + r * B6)))))
        power = real_of(np.int32((w + 127) << 23))  # pyright: ignore[reportCallIssue]
        t = (power - ONE) + power * s
        z[i] = math.copysign(t / (t + TWO), z[i])


@compiled
def _double(z):
    for i in range(z.size):
        y = 2.0 * abs(z[i])
        y = 40.0 if y > 40.0 else y
        w = np.int32(y * PER_LOG2 + 0.5)
        r = (y - w * HIGH) - w * LOW
        higher = A5 + r * (A6 + r * (A7 + r * (A8 + r * (A9 + r * (A10 + r * (A11 + r * A12))))))
        s = r + r * r * (A1 + r * (A2 + r * (A3 + r * (A4 + r * higher))))
        power = real_of((np.int64(w) + 1023) << 52)  # pyright: ignore[reportCallIssue]
        t = (power - 1.0) + power * s
        z[i] = math.copysign(t / (t + 2.0), z[i])


def tanh_of(z: Float[np.ndarray, "*shape"]) -> None:
    """tanh z in place, for contiguous float32 or float64 of any shape, on the calling thread."""
    (_single if z.dtype == np.float32 else _double)(z.reshape(-1))
