"""The passes of the fused loss on the CPU where points carry a measure, such as the areas of the cells of a sphere.

Blocks that stay in the cache, as in `fused_cpu`, with one more array to read. The measure is scaled to a mean of 1, so
that every sum over points is one over as many points of measure 1.
"""

import math

import torch
from torch import Tensor

from squall.losses._tracing import is_traced
from squall.losses.fused_cpu import Blockwise, block_sums
from squall.losses.sums import LN2, Sums, scattered

__all__ = ["MeasuredPasses", "measured_passes"]

SAMPLE = 1 << 14


class MeasuredPasses(Blockwise):
    """A batch whose points count by their measure.

    Args:
        prediction, target: contiguous, detached, of one shape and type; equal where the measure is 0.
        measure: μ ≥ 0 of mean 1, contiguous, of this shape and type.
    """

    def __init__(self, prediction: Tensor, target: Tensor, measure: Tensor) -> None:
        super().__init__(prediction, target)
        self.measure = self.mu = measure

    def largest_and_mean(self) -> tuple[float, float]:
        """max l, and the mean Σ μ l / n."""
        (difference,) = self._scratch(1)
        largest, total = [], 0.0
        for p, t, m in self._blocks(self.prediction, self.target, self.mu):
            d = torch.sub(p, t, out=difference[: p.numel()])
            largest.append(torch.linalg.vector_norm(d, torch.inf).item() ** 2)
            total += d.mul_(d).mul_(m).sum().item()
        return max(largest) if math.isfinite(total) else math.nan, total / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        """Sums of μ times what `Sums` says, over z = β l and e = exp(z − max z), with so many moments."""
        scratch = self._scratch(5)
        nothing = torch.zeros((), dtype=self.prediction.dtype)
        parts = []
        for p, t, m in self._blocks(self.prediction, self.target, self.mu):
            d, z, e, g, spare = (x[: p.numel()] for x in scratch)
            torch.sub(p, t, out=d)
            torch.addcmul(nothing, d, d, value=beta / LN2, out=z)
            top = z.amax().item()
            plain = torch.mul(z, m, out=d).sum().item()
            torch.mul(torch.sub(z, top, out=e).exp2_(), m, out=g)
            place = int(g.argmax())
            heaviest = g[place].item(), LN2 * (top - z[place].item())
            parts.append(block_sums(z, e, g, (d, spare), top, plain, moments, *heaviest))
        return Sums.merged(parts)

    def gradient(self, beta: float, top: float, scale: float, factor: float = 1.0) -> Tensor:
        """scale · factor · μ (prediction − target) · exp(β l − top), a new tensor."""
        factor *= scale
        gradient = torch.empty_like(self.prediction)
        difference, density = self._scratch(2)
        nothing = torch.zeros((), dtype=gradient.dtype)
        shift = torch.tensor(-top / LN2, dtype=gradient.dtype)
        factor *= math.exp(-LN2 * shift.item() - top)  # what rounding the shift took away
        for p, t, m, out in self._blocks(self.prediction, self.target, self.mu, gradient):
            d, e = difference[: p.numel()], density[: p.numel()]
            torch.sub(p, t, out=d)
            torch.addcmul(shift, d, d, value=beta / LN2, out=e).exp2_().mul_(m)
            torch.addcmul(nothing, d, e, value=factor, out=out)
        return gradient

    def sample(self) -> tuple[Tensor, Tensor]:
        """Errors of points all over the batch, and their measure."""
        places = scattered(self.count, SAMPLE, self.prediction.device)
        prediction, target, measure = (x.view(-1)[places] for x in (self.prediction, self.target, self.mu))
        return (prediction - target).square(), measure


def measured_passes(
    prediction: Tensor, target: Tensor, measure: Tensor
) -> tuple[Tensor, Tensor, MeasuredPasses] | None:
    """Prediction and target, alike where the measure is 0, and the passes over them; None where the eager formula has
    to do, and where it has to say what is wrong.

    Args:
        prediction, target: of one shape, with what is masked replaced by 0.
        measure: μ ≥ 0, of this shape.
    """
    on_cpu = prediction.device.type == target.device.type == measure.device.type == "cpu"
    if not on_cpu or is_traced(prediction) or prediction.numel() == 0:
        return None
    total = measure.sum(dtype=torch.float64).item()
    if not 0 < total < math.inf:
        return None
    if not bool(measure.all()):  # an error that does not count must not be the largest
        if not bool((prediction - target).detach().isfinite().all()):
            return None
        counts = measure > 0
        prediction, target = torch.where(counts, prediction, 0), torch.where(counts, target, 0)
    prediction, target = prediction.contiguous(), target.contiguous()
    scaled = (measure * (measure.numel() / total)).contiguous()
    return prediction, target, MeasuredPasses(prediction.detach(), target.detach(), scaled)
