"""The passes of the fused loss on the CPU: sums over all points, and the gradient. No compiler is needed.

A pass walks over blocks that stay in the cache of the cores, with plain operators that write into the same
scratch memory again and again. Main memory sees each input read once per pass and the gradient written once;
the eager formula writes and reads back a whole tensor per operator.

Small batches run in NumPy, in the calling thread: its operators take a third of the time to start, and wake
no threads. Densities are powers of two, since `exp2` is the faster of the exponentials here.
"""

import math

import numpy as np
import torch
from torch import Tensor

from squall.losses.sums import Sums

__all__ = ["BlockPasses", "SmallPasses", "cpu_passes"]

SMALL = 1 << 17
"""Largest batch that runs in the calling thread."""
BLOCK = 1 << 16
"""Elements per block and thread: three blocks of float32 take 0.8 MB, less than the L2 cache of a core."""
LN2 = math.log(2)


class SmallPasses:
    """A batch that fits the cache: the errors are computed once and kept for every pass.

    Args:
        prediction, target: contiguous, detached, of one shape and type.
    """

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.shape, self.count = prediction.shape, prediction.numel()
        with np.errstate(all="ignore"):  # overflow and NaN show in the sums, where they are answered
            self.difference = np.subtract(prediction.numpy(), target.numpy()).reshape(-1)
            self.errors = self.difference * self.difference
        self.kept: tuple[float, float, np.ndarray] | None = None

    @np.errstate(all="ignore")
    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        return float(self.errors.max()), float(self.errors.sum()) / self.count

    @np.errstate(all="ignore")
    def sweep(self, beta: float, moments: int) -> Sums:
        """Sums over z = β l, e = exp(z − max z): `moments` of e (1 or 3), see `Sums`."""
        z = self.errors * (beta / LN2)
        top = float(z.max())
        e = z - top
        np.exp2(e, out=e)
        self.kept = beta, LN2 * top, e
        zeroth, first = float(e.sum()), LN2 * float(np.dot(z, e))
        if moments == 1:
            return Sums(self.count, LN2 * top, zeroth, first)
        f = z * e
        squares, squares_first, squares_second = (float(np.dot(a, b)) for a, b in ((e, e), (e, f), (f, f)))
        second = LN2**2 * float(np.dot(f, z))
        third = LN2**3 * float(np.dot(f, np.multiply(z, z, out=z)))
        return Sums(
            self.count, LN2 * top, zeroth, first, second, third, squares, LN2 * squares_first, LN2**2 * squares_second
        )

    @np.errstate(all="ignore")
    def gradient(self, beta: float, offset: float, sign: float) -> Tensor:
        """sign · (prediction − target) · exp(β l − offset), a new tensor."""
        if self.kept is not None and self.kept[0] == beta:
            _, top, e = self.kept
            out = self.difference * e
            out *= sign * math.exp(top - offset)
        else:
            out = self.errors * (beta / LN2)
            out -= offset / LN2
            np.exp2(out, out=out)
            out *= self.difference
            if sign < 0:
                np.negative(out, out=out)
        return torch.from_numpy(out).view(self.shape)

    def sample(self) -> Tensor:
        """Errors of all points."""
        return torch.from_numpy(self.errors)


class BlockPasses:
    """A batch of any size, by blocks, each operator shared by the threads of torch."""

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.prediction, self.target = prediction, target
        self.count = prediction.numel()

    def _blocks(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        size = BLOCK * torch.get_num_threads()
        return list(zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True))

    def _scratch(self, count: int) -> list[Tensor]:
        size = min(self.count, BLOCK * torch.get_num_threads())
        return [torch.empty(size, dtype=self.prediction.dtype) for _ in range(count)]

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        (difference,) = self._scratch(1)
        largest, total = [], 0.0
        for p, t in self._blocks(self.prediction, self.target):
            d = torch.sub(p, t, out=difference[: p.numel()])
            largest.append(torch.linalg.vector_norm(d, torch.inf).item() ** 2)
            total += torch.dot(d, d).item()
        return max(largest) if math.isfinite(total) else math.nan, total / self.count

    def sweep(self, beta: float, moments: int) -> Sums:
        """Sums over z = β l, e = exp(z − max z): `moments` of e (1 or 3), see `Sums`."""
        difference, errors, density = self._scratch(3)
        nothing = torch.zeros((), dtype=difference.dtype)
        parts = []
        for p, t in self._blocks(self.prediction, self.target):
            size = p.numel()
            d, z, e = difference[:size], errors[:size], density[:size]
            torch.sub(p, t, out=d)
            torch.addcmul(nothing, d, d, value=beta / LN2, out=z)
            top = z.amax().item()
            torch.sub(z, top, out=e).exp2_()
            zeroth = e.sum().item()
            if moments == 1:
                parts.append(Sums(size, LN2 * top, zeroth, LN2 * torch.dot(z, e).item()))
                continue
            f = torch.mul(z, e, out=d)
            first, second = LN2 * f.sum().item(), LN2**2 * torch.dot(f, z).item()
            squares, squares_first = torch.dot(e, e).item(), LN2 * torch.dot(f, e).item()
            squares_second = LN2**2 * torch.dot(f, f).item()
            third = LN2**3 * torch.dot(f, torch.mul(z, z, out=e)).item()
            parts.append(Sums(size, LN2 * top, zeroth, first, second, third, squares, squares_first, squares_second))
        return Sums.merged(parts)

    def gradient(self, beta: float, offset: float, sign: float) -> Tensor:
        """sign · (prediction − target) · exp(β l − offset), a new tensor."""
        gradient = torch.empty_like(self.prediction)
        prediction, target = (self.prediction, self.target) if sign > 0 else (self.target, self.prediction)
        if beta == 0:
            return torch.sub(prediction, target, out=gradient).mul_(math.exp(-offset))
        difference, density = self._scratch(2)
        constant = torch.tensor(-offset / LN2, dtype=gradient.dtype)
        for p, t, out in self._blocks(prediction, target, gradient):
            d, e = difference[: p.numel()], density[: p.numel()]
            torch.sub(p, t, out=d)
            torch.addcmul(constant, d, d, value=beta / LN2, out=e).exp2_()
            torch.mul(d, e, out=out)
        return gradient

    def sample(self) -> Tensor:
        """Errors of points all over the batch, in runs of one cache line."""
        runs, length = 4096, 16
        step = self.count // runs
        p, t = (x.as_strided((runs, length), (step, 1)) for x in (self.prediction, self.target))
        return (p - t).square().view(-1)


def cpu_passes(prediction: Tensor, target: Tensor) -> SmallPasses | BlockPasses:
    """The passes that suit the size of the batch."""
    return (SmallPasses if prediction.numel() <= SMALL else BlockPasses)(prediction, target)
