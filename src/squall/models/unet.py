"""U-Net: convolutions on ever coarser grids and back."""

import math
from collections.abc import Sequence
from typing import final

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from squall._types import State
from squall.models.grid_network import AnyFloats, GridNetwork, Output
from squall.models.padding import CONVOLUTIONS, convolution


@final
class UNet(GridNetwork):
    r"""A U-Net of residual blocks, on a grid of one to three dimensions with a boundary of its own on every axis.

    .. math:: x \mapsto S x + C_2\, g(s \odot N_2(C_1\, g(N_1 x)) + t)

    is a block: C are convolutions of width 3, g is GELU, N group normalization, S the identity or a convolution
    of width 1, and (s, t) come from the scalars (FiLM; s = 1 and t = 0 without). The way down is a block and a
    convolution with stride 2 that doubles the channels, `levels` times. One block works on the coarsest grid. The
    way up is nearest-neighbour interpolation and a block that also sees the state of that grid on the way down.

    The last convolution has no normalization before it: the amplitude of u reaches the output through the identities.
    Any grid size will do: n points become ⌈n/2⌉. Shifting u along a periodic axis by a multiple of 2^levels
    points shifts the output alike where 2^levels divides the number of points.

    Args:
        channels: number of fields.
        dimensions: of space, 1 to 3.
        width: channels on the finest grid.
        levels: how many times the grid is halved.
        boundary: `periodic`, `wall` (zeros beyond the edge), `open` (the last value, copied) for all axes of space, or
            one name per axis; `("pole", "periodic")` for latitude and longitude of the whole sphere.
        conditions: number of further input channels, such as forcings or static fields.
        film: number of scalars that modulate every block, such as parameters of the equation or the time step.
        out_channels: channels of the output; `channels` if left out.
        history: number of states in the input.
        noise: number of further input channels of standard normal numbers, which every call draws anew from PyTorch's
            default generator, as dropout does: each call is a member of an ensemble.
        generator: draws the weights, the same in float32 and float64; PyTorch's default one if left out.

    The call takes states (batch, history · channel, \*space), conditions (batch, condition, \*space) and scalars
    (batch, film), all dimensionless or normalized, and returns (batch, out channel, \*space).
    States and conditions may come as one tensor, (batch, history · channel + condition, \*space).

    Raises:
        ValueError: for a size outside its range; in a call, for an input that is missing or of another shape.
        TypeError: in a call, for a state of another dtype than the weights.

    Reference:
        Ronneberger, Fischer and Brox, U-Net, MICCAI 2015, https://arxiv.org/abs/1505.04597; blocks and FiLM as in
        Gupta and Brandstetter, Towards multi-spatiotemporal-scale generalized PDE modeling, TMLR 2023,
        https://arxiv.org/abs/2209.15616.

    Example:
        >>> model = UNet(2, boundary=("periodic", "wall"), conditions=1, film=1)
        >>> model(torch.zeros(5, 2, 32, 21), torch.zeros(5, 1, 32, 21), torch.zeros(5, 1)).shape
        torch.Size([5, 2, 32, 21])
    """

    def __init__(
        self,
        channels: int,
        *,
        dimensions: int = 2,
        width: int = 16,
        levels: int = 3,
        boundary: str | Sequence[str] = "periodic",
        conditions: int = 0,
        film: int = 0,
        out_channels: int | None = None,
        history: int = 1,
        noise: int = 0,
        generator: torch.Generator | None = None,
    ) -> None:
        sizes = {"width": width, "levels": levels, "noise": noise}
        super().__init__(channels, dimensions, boundary, conditions, out_channels, history, film, **sizes)
        self.noise = noise
        widths, edges, features = [width * 2**level for level in range(levels)], self.boundary, 4 * width if film else 0
        with self._drawn_from(generator):
            self.embedding = nn.Sequential(nn.Linear(film, features), nn.GELU()) if film else None
            self.first = convolution(self.in_channels + noise, width, edges)
            self.down = nn.ModuleList(_Block(w, w, edges, features) for w in widths)
            self.halve = nn.ModuleList(convolution(w, 2 * w, edges, stride=2) for w in widths)
            self.middle = _Block(2 * widths[-1], 2 * widths[-1], edges, features)
            self.up = nn.ModuleList(_Block(3 * w, w, edges, features) for w in reversed(widths))
            self.last = convolution(width, self.out_channels, edges)

    def forward(self, u: State, conditions: AnyFloats | None = None, scalars: AnyFloats | None = None) -> Output:
        x, skips = self._input(u, conditions), []
        if self.noise:
            x = torch.cat((x, torch.randn(len(x), self.noise, *x.shape[2:], dtype=x.dtype, device=x.device)), 1)
        x = self.first(x)
        self._check(scalars, "scalars", self.film, (u.shape[0], self.film))
        features = None if self.embedding is None else self.embedding(scalars)
        for block, halve in zip(self.down, self.halve, strict=True):
            skips.append(block(x, features))
            x = halve(skips[-1])
        x = self.middle(x, features)
        for block in self.up:
            skip = skips.pop()
            x = block(torch.cat((F.interpolate(x, skip.shape[2:]), skip), 1), features)
        return self.last(F.gelu(x))


class _Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, boundary: Sequence[str], features: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.GroupNorm(math.gcd(4, count), count) for count in (inputs, outputs))
        self.first = convolution(inputs, outputs, boundary)
        self.second = convolution(outputs, outputs, boundary)
        self.modulation = nn.Linear(features, 2 * outputs) if features else None
        self.shortcut = nn.Identity() if inputs == outputs else CONVOLUTIONS[len(boundary)](inputs, outputs, 1)

    def forward(
        self, x: Float[Tensor, "batch _in *space"], features: Float[Tensor, "batch feature"] | None
    ) -> Float[Tensor, "batch _out *space"]:
        y = self.norm2(self.first(F.gelu(self.norm1(x))))
        if self.modulation is not None:
            film = self.modulation(features)
            scale, shift = film.unflatten(1, (2, -1, *(1 for _ in x.shape[2:]))).unbind(1)
            y = y * (1 + scale) + shift
        return self.shortcut(x) + self.second(F.gelu(y))
