"""The passes of the fused loss on CUDA devices, in Triton: one kernel sums, one writes the gradient.

Each program walks over one block: it reads prediction and target once and leaves ten float32 sums, relative to
the largest z = β l of its block, which are merged in float64. The kernels run on the CPU as well, in Triton's
interpreter (TRITON_INTERPRET=1), which is how they are tested without a GPU.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from squall.losses.sums import Sums, scattered

__all__ = ["TritonPasses"]

BLOCK = 4096
SAMPLE = 1 << 16
FIELDS = 10
LN2 = math.log(2)


@triton.jit
def _sweep(prediction, target, out, count, beta, moments: tl.constexpr, block: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = index < count
    p = tl.load(prediction + index, mask=inside, other=0.0)
    t = tl.load(target + index, mask=inside, other=0.0)
    d = p - t
    z = beta * d * d
    top = tl.max(tl.where(inside, z, float("-inf")), 0)
    e = tl.where(inside, tl.exp2(z - top), 0.0)
    f = z * e
    row = out + tl.program_id(0) * 10
    tl.store(row, top)
    tl.store(row + 1, tl.sum(e, 0))
    tl.store(row + 2, tl.sum(f, 0))
    tl.store(row + 5, tl.sum(e * e, 0))
    tl.store(row + 8, tl.sum(tl.where(d == d, 0.0, 1.0), 0))
    tl.store(row + 9, tl.sum(tl.where(inside, z, 0.0), 0))
    if moments > 1:
        tl.store(row + 3, tl.sum(f * z, 0))
        tl.store(row + 4, tl.sum(f * z * z, 0))
        tl.store(row + 6, tl.sum(f * e, 0))
        tl.store(row + 7, tl.sum(f * f, 0))


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

    def _sums(self, beta: float, moments: int) -> Tensor:
        out = torch.zeros(self.grid[0], FIELDS, dtype=torch.float32, device=self.prediction.device)
        _sweep[self.grid](self.prediction, self.target, out, self.count, beta, moments=moments, block=BLOCK)  # type: ignore[arg-type]
        return out.double()

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        difference = self.prediction - self.target
        total = torch.linalg.vector_norm(difference, dtype=torch.float64).square()
        largest = torch.linalg.vector_norm(difference, torch.inf).double().square()
        largest, total = torch.stack((largest, total)).tolist()
        return largest, total / self.count

    def sweep(self, beta: float, moments: int) -> Sums:
        """Sums over z = β l, e = exp(z − max z): with `moments` 1, 3, or 4 (also those of e²), see `Sums`."""
        rows = self._sums(beta / LN2, moments)
        top = rows[:, 0].amax()
        shift = (rows[:, :1] - top).exp2()
        once, twice = (rows[:, 1:5] * shift).sum(0), (rows[:, 5:8] * shift.square()).sum(0)
        last = rows[:, 8:].sum(0)
        highest, zeroth, first, second, third, squares, squares_first, squares_second, invalid, plain = torch.cat(
            (top.view(1), once, twice, last)
        ).tolist()
        return Sums(
            self.count,
            math.nan if invalid else LN2 * highest,
            LN2 * plain,
            squares,
            zeroth,
            LN2 * first,
            LN2**2 * second,
            LN2**3 * third,
            LN2 * squares_first,
            LN2**2 * squares_second,
        )

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
