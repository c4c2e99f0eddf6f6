"""The passes of the fused loss on CUDA devices, in Triton: one kernel sums, one writes the gradient.

Each program walks over one block: it reads prediction and target once and leaves a row of float32 sums, relative to
the largest z = β l of its block, which are merged in float64. The kernels run on the CPU as well, in Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.losses.sums import LN2, MOST, Sums, scattered

__all__ = ["TritonPasses"]

BLOCK = 4096
SAMPLE = 1 << 16
SQUARES = 3 + MOST + 1
FIELDS = SQUARES + MOST + 1
"""A row: top, how many are not finite, Σz; Σ z^k e; from SQUARES on Σ z^k e²."""
_FIELDS, _SQUARES = tl.constexpr(FIELDS), tl.constexpr(SQUARES)


@triton.jit
def _sweep(prediction, target, out, count, beta, once: tl.constexpr, twice: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    p = tl.load(prediction + index, mask=inside, other=0.0)
    t = tl.load(target + index, mask=inside, other=0.0)
    d = p - t
    z = beta * d * d
    top = tl.max(tl.where(inside, z, float("-inf")), 0)
    e = tl.where(inside, tl.exp2(z - top), 0.0)
    row = out + tl.program_id(0) * _FIELDS
    tl.store(row, top)
    tl.store(row + 1, tl.sum(tl.where(d == d, 0.0, 1.0), 0))
    tl.store(row + 2, tl.sum(tl.where(inside, z, 0.0), 0))
    f = e
    for order in tl.static_range(once + 1):
        tl.store(row + 3 + order, tl.sum(f, 0))
        f = f * z
    f = e * e
    for order in tl.static_range(twice + 1):
        tl.store(row + _SQUARES + order, tl.sum(f, 0))
        f = f * z


@triton.jit
def _gradient(prediction, target, out, count, beta, shift, factor, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    d = tl.load(prediction + index, mask=inside, other=0.0) - tl.load(target + index, mask=inside, other=0.0)
    tl.store(out + index, factor * d * tl.exp2(beta * d * d - shift), mask=inside)


class TritonPasses:
    """A float32 batch on a CUDA device (or on the CPU, interpreted).

    Args:
        prediction, target: contiguous, detached, of one shape.
    """

    measure = None

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.prediction, self.target, self.count = prediction, target, prediction.numel()
        self.grid = (-(-self.count // BLOCK),)

    def _sums(self, beta: float, once: int, twice: int) -> Tensor:
        out = torch.zeros(self.grid[0], FIELDS, dtype=torch.float32, device=self.prediction.device)
        arguments = self.prediction, self.target, out, self.count, beta
        _sweep[self.grid](*arguments, once=once, twice=twice, block=BLOCK)  # type: ignore[arg-type]
        return out.double()

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        difference = self.prediction - self.target
        total = torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        largest = torch.linalg.vector_norm(difference, torch.inf).double().square()
        largest, total = torch.stack((largest, total)).tolist()
        return largest, total / self.count

    def sweep(self, beta: float, once: int = 1, twice: int = 0) -> Sums:
        """Sums over z = β l and e = exp(z − max z), of e and e² up to these orders in z, see `Sums`."""
        rows = self._sums(beta / LN2, once, twice)
        top = rows[:, 0].amax()
        shift = (rows[:, :1] - top).exp2()
        of_e, of_squares = rows[:, 3 : 4 + once] * shift, rows[:, SQUARES : SQUARES + 1 + twice] * shift.square()
        found = torch.cat((top.view(1), rows[:, 1:3].sum(0), of_e.sum(0), of_squares.sum(0)))
        highest, invalid, plain, *sums = found.tolist()
        highest = math.nan if invalid else highest
        return Sums.of_doublings(self.count, highest, plain, sums[: once + 1], sums[once + 1 :])

    def gradient(self, beta: float, top: float, factor: float) -> Tensor:
        """factor · (prediction − target) · exp(β l − top), a new tensor."""
        out = torch.empty_like(self.prediction)
        arguments = self.prediction, self.target, out, self.count, beta / LN2, top / LN2, factor
        _gradient[self.grid](*arguments, block=BLOCK)  # type: ignore[arg-type]
        return out

    def sample(self) -> tuple[Tensor, None]:
        """Errors of points all over the batch."""
        places = scattered(self.count, SAMPLE, self.prediction.device)
        return (self.prediction.view(-1)[places] - self.target.view(-1)[places]).square(), None
