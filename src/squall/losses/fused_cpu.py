"""The passes of the fused loss on the CPU: sums over all points, and the gradient. No compiler is needed.

A pass walks over blocks that stay in the cache of the cores, with plain operators that write into the same
scratch memory again and again. Main memory sees each input read once per pass and the gradient written once;
the eager formula writes and reads back a whole tensor per operator.

Small batches run in NumPy, in the calling thread: its operators take a third of the time to start, and wake
no threads. Densities are powers of two, since `exp2` is the faster of the exponentials here. Where numba is installed,
batches of up to COMPILED points run in `fused_numba` instead.
"""

import functools
import importlib
import math
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from squall.losses.passes import MANY, Passes
from squall.losses.sums import LN2, Moments, Sums

if TYPE_CHECKING:
    from squall.losses.fused_numba import CompiledPasses

__all__ = ["BlockPasses", "Blockwise", "SmallPasses", "block_sums", "cpu_passes"]

COMPILED = 1 << 21
"""Largest batch that runs in the compiled passes, on one thread, where torch has more than a few."""
FEW_THREADS = 4
"""Up to so many threads of torch, operator by operator, are slower than one that is compiled."""
SMALL = 1 << 16
"""Largest batch that runs in the calling thread without them."""
BLOCK = 1 << 17
"""Elements per block and thread: three blocks of float32 take 1.5 MB, the L2 cache of a core."""


class SmallPasses(Passes):
    """A batch that fits the cache: the errors are computed once and kept for every pass.

    Args:
        prediction, target: contiguous, detached, of one shape and type.
    """

    moments = 10, 3

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.shape, self.count = prediction.shape, prediction.numel()
        self.single = prediction.dtype == torch.float32
        with np.errstate(all="ignore"):  # overflow and NaN show in the sums, where they are answered
            self.difference = np.subtract(prediction.numpy(), target.numpy()).reshape(-1)
            self.errors = self.difference * self.difference
        self.kept: tuple[float, float, np.ndarray] | None = None

    @np.errstate(all="ignore")
    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        return float(self.errors.max()), float(self.errors.sum()) / self.count

    @np.errstate(all="ignore")
    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`."""
        z = self.errors * (beta / LN2)
        top, plain = float(z.max()), float(z.sum())
        e = z - top
        np.exp2(e, out=e)
        self.kept = beta, LN2 * top, e
        if moments is None:
            first = float((z * e).sum())  # by no dot product: it loses digits
            return Sums(self.count, LN2 * top, LN2 * plain, float(e.sum()), LN2 * first, float(np.dot(e, e)))
        z *= 2 / (top or 1.0)
        return Sums.of_moments(self.count, LN2 * top, LN2 * plain, self._moments(z, e, LN2 * (top or 1.0), *moments))

    @staticmethod
    def _moments(w: np.ndarray, e: np.ndarray, span: float, once: int, twice: int) -> Moments:
        """By the recurrence of T_k + T_(k − 1), see `Moments.of_pairs`; of w = 2 z/span nothing is left."""
        f = w * e
        before, product = f.copy(), np.empty_like(e)
        of_e, of_squares = [float(e.sum()), float(f.sum())], [float(np.dot(e, e)), float(np.dot(f, e))]
        w -= 1
        w *= 2
        for k in range(2, once):
            np.multiply(w, f, out=product)
            np.subtract(product, before, out=before)
            before, f = f, before
            of_e.append(float(f.sum()))
            if k < twice:
                of_squares.append(float(np.dot(f, e)))
        return Moments.of_pairs(span, of_e, of_squares)

    @np.errstate(all="ignore")
    def gradient(self, beta: float, top: float, scale: float, factor: float = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor."""
        factor *= scale
        if self.kept is not None and self.kept[0] == beta:
            _, kept_top, e = self.kept
            out = self.difference * e
            factor *= math.exp(kept_top - top)
        else:
            shift = float(np.float32(top / LN2))
            factor *= math.exp(LN2 * shift - top)
            out = self.errors * (beta / LN2)
            out -= shift
            np.exp2(out, out=out)
            out *= self.difference
        out *= factor
        return torch.from_numpy(out).view(self.shape)

    def sample(self) -> tuple[Tensor, None]:
        """Errors of all points."""
        return torch.from_numpy(self.errors), None


class Blockwise(Passes):
    """A batch of any size, by blocks, each operator shared by the threads of torch."""

    def __init__(self, prediction: Tensor, target: Tensor) -> None:
        self.prediction, self.target, self.count = prediction, target, prediction.numel()
        self.single = prediction.dtype == torch.float32
        self.moments = 7 if self.count > MANY else 8, 4

    def _blocks(self, *tensors: Tensor) -> list[tuple[Tensor, ...]]:
        size = BLOCK * torch.get_num_threads()
        return list(zip(*(tensor.view(-1).split(size) for tensor in tensors), strict=True))

    def _scratch(self, count: int) -> list[Tensor]:
        size = min(self.count, BLOCK * torch.get_num_threads())
        return [torch.empty(size, dtype=self.prediction.dtype) for _ in range(count)]


class BlockPasses(Blockwise):
    """The passes over such a batch whose points count alike."""

    def __init__(self, prediction: Tensor, target: Tensor, keep: bool = False) -> None:
        super().__init__(prediction, target)
        self.keep = keep
        self.kept: tuple[float, list[float], Tensor] | None = None

    def largest_and_mean(self) -> tuple[float, float]:
        """max l and mean l."""
        (difference,) = self._scratch(1)
        largest, total = [], 0.0
        for p, t in self._blocks(self.prediction, self.target):
            d = torch.sub(p, t, out=difference[: p.numel()])
            largest.append(torch.linalg.vector_norm(d, torch.inf).item() ** 2)
            total += d.mul_(d).sum().item()
        return max(largest) if math.isfinite(total) else math.nan, total / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums over z = β l and e = exp(z − max z), with so many moments of e and e², see `Sums`."""
        difference, errors, density, spare = self._scratch(4)
        nothing = torch.zeros((), dtype=difference.dtype)
        parts: list[Sums] = []
        keep = self.keep and moments is None
        kept = torch.empty_like(self.prediction) if keep else self.prediction
        for p, t, out in self._blocks(self.prediction, self.target, kept):
            size = p.numel()
            d, z, e = difference[:size], errors[:size], density[:size]
            torch.sub(p, t, out=d)
            torch.addcmul(nothing, d, d, value=beta / LN2, out=z)
            top, plain = z.amax().item(), z.sum().item()
            torch.sub(z, top, out=e).exp2_()
            if keep:
                torch.mul(d, e, out=out)
            parts.append(block_sums(z, e, e, (d, spare[:size]), top, plain, moments))
        if keep:
            self.kept = beta, [part.top for part in parts], kept
        return Sums.merged(parts)

    def gradient(self, beta: float, top: float, scale: float, factor: float = 1.0) -> Tensor:
        """scale · factor · (prediction − target) · exp(β l − top), a new tensor."""
        factor *= scale
        if self.kept is not None and self.kept[0] == beta:
            kept, self.kept = self.kept, None
            return self._scaled(kept, top, factor)
        gradient = torch.empty_like(self.prediction)
        if beta == 0:
            return torch.sub(self.prediction, self.target, out=gradient).mul_(factor * math.exp(-top))
        difference, density = self._scratch(2)
        nothing = torch.zeros((), dtype=gradient.dtype)
        shift = torch.tensor(-top / LN2, dtype=gradient.dtype)
        factor *= math.exp(-LN2 * shift.item() - top)  # what rounding the shift took away
        for p, t, out in self._blocks(self.prediction, self.target, gradient):
            d, e = difference[: p.numel()], density[: p.numel()]
            torch.sub(p, t, out=d)
            torch.addcmul(shift, d, d, value=beta / LN2, out=e).exp2_()
            torch.addcmul(nothing, d, e, value=factor, out=out)
        return gradient

    def _scaled(self, kept: tuple[float, list[float], Tensor], top: float, factor: float) -> Tensor:
        """What the sweep left, each block brought to the common scale, in place: it is given away."""
        _, tops, gradient = kept
        for block_top, (block,) in zip(tops, self._blocks(gradient), strict=True):
            block.mul_(factor * math.exp(block_top - top))
        return gradient

    def sample(self) -> tuple[Tensor, None]:
        """Errors of points all over the batch."""
        return sampled(self.prediction, self.target), None


def block_sums(
    z: Tensor,
    e: Tensor,
    weighed: Tensor,
    scratch: tuple[Tensor, Tensor],
    top: float,
    plain: float,
    moments: tuple[int, int] | None,
    *heaviest: float,
) -> Sums:
    """The sums over a block.

    Args:
        z, e: z/log 2 and exp(z − top), (point,); of the first nothing is left.
        weighed: μ e.
        scratch: two of their shape, to be written to.
        top, plain: max z and Σ μ z, over log 2.
        moments: how many of e and e², see `Sums`.
        heaviest: see `Sums`.
    """
    head = len(z), LN2 * top, LN2 * plain
    if moments is None:
        zeroth, squares = weighed.sum().item(), torch.dot(weighed, e).item()
        first = torch.mul(z, weighed, out=scratch[0]).sum().item()  # by no dot product: it loses digits
        return Sums(*head, zeroth, LN2 * first, squares, None, *heaviest)
    return Sums.of_moments(*head, _moments(z, e, weighed, scratch, top or 1.0, *moments), *heaviest)


def _moments(
    z: Tensor, e: Tensor, weighed: Tensor, scratch: tuple[Tensor, Tensor], span: float, once: int, twice: int
) -> Moments:
    """By the recurrence of T_k + T_(k − 1), see `Moments.of_pairs`, from z in place of w = 2 z/span. With the signs
    + + − − a step of it is one operator, in place: T_(k + 1) = T_(k − 1) ± 2 v T_k."""
    scale = 2 / span
    f = before = torch.mul(z, weighed, out=scratch[0])
    v = torch.add(z.new_full((), -1), z, alpha=scale, out=z)
    of_e = [weighed.sum().item(), scale * f.sum().item()]
    of_squares = [torch.dot(weighed, e).item(), scale * torch.dot(f, e).item()]
    for k in range(2, once):
        before, f = f, torch.addcmul(before, v, f, value=2 * (-1) ** (k - 1), out=scratch[1] if k == 2 else before)
        signed = scale if k % 4 < 2 else -scale
        of_e.append(signed * f.sum().item())
        if k < twice:
            of_squares.append(signed * torch.dot(f, e).item())
    return Moments.of_pairs(LN2 * span, of_e, of_squares)


def sampled(prediction: Tensor, target: Tensor) -> Tensor:
    """The squared errors: of all points of a small batch; of a larger one of runs of one cache line."""
    if prediction.numel() > SMALL:
        runs, length, step = runs_over(prediction.numel())
        prediction, target = (x.as_strided((runs, length), (step, 1)) for x in (prediction, target))
    return (prediction - target).square_().view(-1)


def runs_over(count: int) -> tuple[int, int, int]:
    """How many runs of points to look at in a large batch, how long they are, and how far apart they begin."""
    runs, length = 1024, 16
    return runs, length, (count // runs - 1) | 1  # odd: no power of two in the shape is met again and again


@functools.cache
def compiled_tools() -> ModuleType | None:
    """What is compiled by numba, imported when the first batch asks for it; None where numba does not work."""
    try:
        return importlib.import_module("squall.losses.fused_numba")
    except ImportError:  # also where numba does not know the version of NumPy
        return None


def compiled_passes() -> "type[CompiledPasses] | None":
    """The passes in numba, None where it does not work."""
    tools = compiled_tools()
    return None if tools is None else tools.CompiledPasses


def cpu_passes(
    prediction: Tensor, target: Tensor, *, keep: bool = False, ties: bool = False
) -> "SmallPasses | BlockPasses | CompiledPasses":
    """The passes that suit the size of the batch.

    Args:
        prediction, target: contiguous, detached, of one shape and type.
        keep: a gradient will be asked for: where the temperature is known beforehand, the sweep writes it, up to
            its scale, instead of computing every density twice.
        ties: many points have the same error, and the compiled sums are to be exact where they are cancelled.
    """
    alone = prediction.numel() <= COMPILED or torch.get_num_threads() <= FEW_THREADS
    compiled = compiled_passes() if alone else None
    if compiled is not None:
        return compiled(prediction, target, keep, ties)
    small = prediction.numel() <= SMALL
    return SmallPasses(prediction, target) if small else BlockPasses(prediction, target, keep)
