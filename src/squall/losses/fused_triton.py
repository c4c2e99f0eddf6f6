"""The passes of the fused loss on CUDA devices, in Triton.

A sweep reads prediction and target once. As many programs as run at a time take tile after tile; every lane keeps
float32 tallies of its own points, relative to their largest z = β l so far, in registers, so that lanes meet once, at
the end, in float64. A second kernel merges the programs. The process waits for the merged tallies alone, and starts
the gradient, one more kernel, at once. (`benchmarks/kernels.py` counts what the kernels take, without a GPU.)

The kernels run on the CPU as well, in Triton's interpreter (TRITON_INTERPRET=1), which is how they are tested without a
GPU.
"""

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.losses.passes import MANY, Passes
from squall.losses.population import Number
from squall.losses.sums import GOLDEN, LN2, Moments, Sums

__all__ = ["TritonPasses"]

ROWS, LANES = 4, 512
"""Points of a tile: each lane keeps its own tallies, in registers, of all rows."""
PER_PROCESSOR = 3
"""Programs that a multiprocessor's registers hold at a time."""
BLOCK, FEW = 4096, 1024
SLACK = 1.1
SAMPLE = 1 << 16
_GOLDEN = tl.constexpr(GOLDEN)


@triton.jit
def _differences(prediction, target, index, inside):
    """prediction − target at these places, 0 at those that are not inside; None: all are."""
    if inside is None:
        p, t = tl.load(prediction + index), tl.load(target + index)
    else:
        p = tl.load(prediction + index, mask=inside, other=0.0)
        t = tl.load(target + index, mask=inside, other=0.0)
    return p - t


@triton.jit
def _tallied(prediction, target, index, inside, beta, slope, top, plain, sums, once: tl.constexpr, twice: tl.constexpr):
    """The tallies of every lane, with one more tile: the largest z, Σz, and the pairs of `Moments.of_pairs` relative to
    that z, `once` of them under e and `twice` under e², with w = slope · z."""
    d = _differences(prediction, target, index, inside)
    z = beta * d * d
    higher = tl.maximum(top, tl.max(z, 0))
    e = tl.exp2(z - higher[None, :])
    if inside is not None:
        e = tl.where(inside, e, 0.0)
    shift = tl.exp2(top - higher)
    shift_twice = shift * shift
    w = slope * z
    before = w * e
    f = before
    under_e = (sums[0] * shift + tl.sum(e, 0),)
    under_square = (sums[once] * shift_twice + tl.sum(e * e, 0),)
    for order in tl.static_range(1, once):
        under_e += (sums[order] * shift + tl.sum(f, 0),)
        if order < twice:
            under_square += (sums[once + order] * shift_twice + tl.sum(f * e, 0),)
        after = 2.0 * (w - 1.0) * f - before
        before = f
        f = after
    return higher, plain + tl.sum(z, 0), under_e + under_square


@triton.jit
def _sweep(
    prediction,
    target,
    out,
    count,
    beta,
    slope,
    once: tl.constexpr,
    twice: tl.constexpr,
    rows: tl.constexpr,
    lanes: tl.constexpr,
):
    """A column of `out` for every program, the tallies of all its tiles: top, Σz, and the pairs."""
    program, programs = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    places = lanes * tl.arange(0, rows)[:, None] + tl.arange(0, lanes)[None, :]
    top = tl.zeros((lanes,), tl.float32)
    plain = top
    sums = (top,) * (once + twice)
    tiles = count // (rows * lanes)
    for tile in range(program, tiles, programs):
        index = tile * (rows * lanes) + places
        top, plain, sums = _tallied(prediction, target, index, None, beta, slope, top, plain, sums, once, twice)
    if program == tiles % programs:  # what is left, less than a tile
        index = tiles * (rows * lanes) + places
        inside = index < count
        top, plain, sums = _tallied(prediction, target, index, inside, beta, slope, top, plain, sums, once, twice)
    highest = tl.max(top, 0)
    shift = tl.exp2(top - highest).to(tl.float64)
    tl.store(out + program, highest.to(tl.float64))
    tl.store(out + programs + program, tl.sum(plain.to(tl.float64), 0))
    for row in tl.static_range(once + twice):
        by = shift if row < once else shift * shift
        tl.store(out + (2 + row) * programs + program, tl.sum(sums[row].to(tl.float64) * by, 0))


@triton.jit
def _merge(tallies, out, programs, once: tl.constexpr, block: tl.constexpr):
    """One row of `tallies` for every program here: its sum over all columns, relative to the largest top."""
    row = tl.program_id(0)
    index = tl.arange(0, block)
    inside = index < programs
    tops = tl.load(tallies + index, mask=inside, other=0.0)
    top = tl.max(tops, 0)
    shift = tl.exp2(tops - top)
    shift = tl.where(row < 2, 1.0, tl.where(row < 2 + once, shift, shift * shift))
    values = tl.load(tallies + row * programs + index, mask=inside, other=0.0)
    tl.store(out + row, tl.where(row == 0, top, tl.sum(values * shift, 0)))


@triton.jit
def _gradient(prediction, target, out, count, beta, shift, scale, block: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * block
    index = start + tl.arange(0, block)
    if start + block <= count:
        d = _differences(prediction, target, index, None)
        tl.store(out + index, scale * d * tl.exp2(beta * d * d - shift))
    else:
        inside = index < count
        d = _differences(prediction, target, index, inside)
        tl.store(out + index, scale * d * tl.exp2(beta * d * d - shift), mask=inside)


@triton.jit
def _multiply(out, factor, count, block: tl.constexpr):
    """In place; nothing is read or written where the factor is 1, as it is for `loss.backward()`."""
    by = tl.load(factor).to(tl.float32)
    if by != 1.0:
        for start in range(tl.program_id(0).to(tl.int64) * block, count, tl.num_programs(0) * block):
            index = start + tl.arange(0, block)
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


@functools.cache
def _most_programs(device: torch.device) -> int:
    """Programs of a sweep that run at a time."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    return PER_PROCESSOR * processors


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
        self.programs = min(_most_programs(prediction.device), -(-self.count // (ROWS * LANES)))
        self.sampled: Tensor | None = None
        self.largest: float | None = None

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        difference = self.prediction - self.target
        total = torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        largest = torch.linalg.vector_norm(difference, torch.inf).double().square()
        largest, total = torch.stack((largest, total)).tolist()
        self.largest = largest
        return largest, total / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`.

        The largest z is not known beforehand: log n + 1 bounds it where a budget of some tenths is met.
        """
        once, twice = moments or (2, 1)
        span = math.log(self.count) + 1 if self.largest is None else SLACK * beta * self.largest or 1.0
        slope = float(np.float32(2 * LN2 / span))
        span = 2 * LN2 / slope
        rows, programs, device = 2 + once + twice, self.programs, self.prediction.device
        tallies = torch.empty(rows, programs, dtype=torch.float64, device=device)
        merged = torch.empty(rows, dtype=torch.float64, device=device)
        shape: dict[str, Any] = {"once": once, "twice": twice, "rows": ROWS, "lanes": LANES}
        _sweep[(programs,)](self.prediction, self.target, tallies, self.count, beta / LN2, slope, **shape)
        shape = {"once": once, "block": triton.next_power_of_2(programs)}
        _merge[(rows,)](tallies, merged, programs, **shape)
        top, plain, *sums = merged.tolist()
        highest = LN2 * top if math.isfinite(plain) else math.nan
        self.largest = highest / beta
        tallied = Sums.of_moments(self.count, highest, LN2 * plain, Moments.of_pairs(span, sums[:once], sums[once:]))
        return tallied if moments is not None and highest <= span else replace(tallied, moments=None)

    def anticipate(self, beta: float, top: float, scale: float) -> None:
        """Start to write the gradient for a factor of 1."""
        if self.keep:
            self.started = (beta, top, scale), self._written(beta, top, scale)

    def _written(self, beta: float, top: float, scale: float) -> Tensor:
        out, shift = torch.empty_like(self.prediction), float(np.float32(top / LN2))
        scale *= math.exp(LN2 * shift - top)  # what rounding the shift took away
        arguments = self.prediction, self.target, out, self.count, beta / LN2, shift, scale
        _gradient[(-(-self.count // BLOCK),)](*arguments, block=BLOCK)  # type: ignore[arg-type]
        return out

    def gradient(self, beta: float, top: float, scale: float, factor: Number = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor."""
        if not isinstance(factor, Tensor):
            return self._written(beta, top, scale * factor)
        if self.started is not None and self.started[0] == (beta, top, scale):
            (_, out), self.started = self.started, None  # given away
        else:
            out = self._written(beta, top, scale)
        _multiply[(self.programs,)](out, factor, self.count, block=BLOCK)  # type: ignore[arg-type]
        return out

    def sample(self) -> tuple[Tensor, None]:
        """Errors of points all over the batch."""
        if self.sampled is None:
            few = min(self.count, SAMPLE)
            self.sampled = torch.empty(few, dtype=torch.float32, device=self.prediction.device)
            arguments = self.prediction, self.target, self.sampled, self.count, SAMPLE
            _sample[(-(-few // FEW),)](*arguments, block=FEW)  # type: ignore[arg-type]
        return self.sampled, None
