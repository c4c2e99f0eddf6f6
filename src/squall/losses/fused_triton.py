"""The passes of the fused loss on CUDA devices, in Triton.

A sweep reads prediction and target once: each program takes a block of points, and leaves float32 sums relative to the
largest z = β l of its block; a second kernel merges these in float64. The process waits for these sums alone, and
starts the gradient, one more kernel, at once.

The kernels run on the CPU as well, in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a
GPU.
"""

import math

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.losses.passes import MANY, Passes
from squall.losses.population import Number
from squall.losses.sums import GOLDEN, LN2, Moments, Sums

__all__ = ["TritonPasses"]

BLOCK, MERGED = 4096, 1024
WARPS = 8
"""Of a sweep, whose numbers for one point take many registers."""
SLACK = 1.1
SAMPLE = 1 << 16
_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit
def _sweep(prediction, target, out, count, beta, span, once: tl.constexpr, twice: tl.constexpr, block: tl.constexpr):
    """A column of `out` for every block: top, how many are not finite, Σz, Σze, then the pairs of `Moments.of_pairs`,
    `once` of them under e and `twice` under e²."""
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    p = tl.load(prediction + index, mask=inside, other=0.0)
    t = tl.load(target + index, mask=inside, other=0.0)
    d = p - t
    z = beta * d * d
    top = tl.max(tl.where(inside, z, float("-inf")), 0)
    e = tl.where(inside, tl.exp2(z - top), 0.0)
    column, columns = out + tl.program_id(0), tl.num_programs(0)
    tl.store(column, top)
    tl.store(column + columns, tl.sum(tl.where(d == d, 0.0, 1.0), 0))
    tl.store(column + 2 * columns, tl.sum(tl.where(inside, z, 0.0), 0))
    tl.store(column + 3 * columns, tl.sum(z * e, 0))
    tl.store(column + 4 * columns, tl.sum(e, 0))
    tl.store(column + (4 + once) * columns, tl.sum(e * e, 0))
    w = 2.0 * z / span
    before = w * e
    f = before
    for order in tl.static_range(1, once):
        tl.store(column + (4 + order) * columns, tl.sum(f, 0))
        if order < twice:
            tl.store(column + (4 + once + order) * columns, tl.sum(f * e, 0))
        after = 2.0 * (w - 1.0) * f - before
        before = f
        f = after


@triton.jit
def _merge(blocks, out, columns, once: tl.constexpr, block: tl.constexpr):
    """One row of `blocks` for every program: its sum over all blocks, relative to the largest top."""
    row = tl.program_id(0)
    tops = tl.full((block,), float("-inf"), tl.float32)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        tops = tl.maximum(tops, tl.load(blocks + index, mask=index < columns, other=float("-inf")))
    top = tl.max(tops, 0)
    total = tl.zeros((block,), tl.float64)
    for start in range(0, columns, block):
        index = start + tl.arange(0, block)
        shift = tl.exp2(tl.load(blocks + index, mask=index < columns, other=float("-inf")) - top)
        shift = tl.where(row < 3, 1.0, tl.where(row < 4 + once, shift, shift * shift))
        value = tl.load(blocks + row * columns + index, mask=index < columns, other=0.0)
        total += value.to(tl.float64) * shift.to(tl.float64)
    tl.store(out + row, tl.where(row == 0, top.to(tl.float64), tl.sum(total, 0)))


@triton.jit
def _gradient(prediction, target, out, count, beta, shift, scale, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    d = tl.load(prediction + index, mask=inside, other=0.0) - tl.load(target + index, mask=inside, other=0.0)
    tl.store(out + index, scale * d * tl.exp2(beta * d * d - shift), mask=inside)


@triton.jit
def _multiply(out, factor, count, block: tl.constexpr):
    """In place; nothing is read or written where the factor is 1, as it is for `loss.backward()`."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
        inside = index < count
        tl.store(out + index, by * tl.load(out + index, mask=inside, other=0.0), mask=inside)


@triton.jit
def _sample(prediction, target, out, count, most, block: tl.constexpr):
    """The errors at the places that `scattered` names."""
    index = tl.program_id(0) * block + tl.arange(0, block)
    turns = index.to(tl.float64) * _GOLDEN
    place = ((turns - tl.floor(turns)) * count).to(tl.int64)
    place = tl.where(count <= most, index.to(tl.int64), place)
    inside = index < tl.minimum(count, most)
    d = tl.load(prediction + place, mask=inside, other=0.0) - tl.load(target + place, mask=inside, other=0.0)
    tl.store(out + index, d * d, mask=inside)


class TritonPasses(Passes):
    """A float32 batch on a CUDA device (or on the CPU, interpreted).

    Args:
        prediction, target: contiguous, detached, of one shape.
        keep: a gradient will be asked for: it is started as soon as the temperature is known, and written while the
            process is on its way from the loss to its backward pass.
    """

    single = True

    def __init__(self, prediction: Tensor, target: Tensor, *, keep: bool = False) -> None:
        self.keep = keep
        self.started: tuple[tuple[float, float, float], Tensor] | None = None
        self.prediction, self.target, self.count = prediction, target, prediction.numel()
        self.moments = (7, 3) if self.count > MANY else (10, 4)
        self.grid = (-(-self.count // BLOCK),)
        self.sampled: Tensor | None = None
        self.largest: float | None = None

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        difference = self.prediction - self.target
        total = torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        largest = torch.linalg.vector_norm(difference, torch.inf).double().square()
        largest, total = torch.stack((largest, total)).tolist()
        return largest, total / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`.

        The largest z is not known beforehand: log n + 1 bounds it where a budget of some tenths is met.
        """
        once, twice = moments or (1, 1)
        span = math.log(self.count) + 1 if self.largest is None else SLACK * beta * self.largest or 1.0
        rows, (columns,) = 4 + once + twice, self.grid
        blocks = torch.empty(rows, columns, dtype=torch.float32, device=self.prediction.device)
        merged = torch.empty(rows, dtype=torch.float64, device=self.prediction.device)
        arguments = self.prediction, self.target, blocks, self.count, beta / LN2, span / LN2
        _sweep[self.grid](*arguments, once=once, twice=twice, block=BLOCK, num_warps=WARPS)  # type: ignore[arg-type]
        _merge[(rows,)](blocks, merged, columns, once=once, block=MERGED)  # type: ignore[arg-type]
        self.sample()
        highest, invalid, plain, first, *sums = merged.tolist()
        highest = math.nan if invalid else LN2 * highest
        self.largest = highest / beta
        known = None
        if moments is not None and highest <= span:
            known = Moments.of_pairs(span, sums[:once], sums[once:])
        return Sums(self.count, highest, LN2 * plain, sums[0], LN2 * first, sums[once], known)

    def anticipate(self, beta: float, top: float, scale: float) -> None:
        """Start to write the gradient for a factor of 1."""
        if self.keep:
            self.started = (beta, top, scale), self._written(beta, top, scale)

    def _written(self, beta: float, top: float, scale: float) -> Tensor:
        out, shift = torch.empty_like(self.prediction), float(np.float32(top / LN2))
        scale *= math.exp(LN2 * shift - top)  # what rounding the shift took away
        arguments = self.prediction, self.target, out, self.count, beta / LN2, shift, scale
        _gradient[self.grid](*arguments, block=BLOCK)  # type: ignore[arg-type]
        return out

    def gradient(self, beta: float, top: float, scale: float, factor: Number = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor."""
        if not isinstance(factor, Tensor):
            return self._written(beta, top, scale * factor)
        if self.started is not None and self.started[0] == (beta, top, scale):
            (_, out), self.started = self.started, None  # given away
        else:
            out = self._written(beta, top, scale)
        _multiply[self.grid](out, factor, self.count, block=BLOCK)  # type: ignore[arg-type]
        return out

    def sample(self) -> tuple[Tensor, None]:
        """Errors of points all over the batch."""
        if self.sampled is None:
            few = min(self.count, SAMPLE)
            self.sampled = torch.empty(few, dtype=torch.float32, device=self.prediction.device)
            arguments = self.prediction, self.target, self.sampled, self.count, SAMPLE
            _sample[(-(-few // MERGED),)](*arguments, block=MERGED)  # type: ignore[arg-type]
        return self.sampled, None
