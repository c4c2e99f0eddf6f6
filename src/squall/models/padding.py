"""Convolutions with a boundary of its own on every axis."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

BOUNDARIES = ("periodic", "wall", "open", "pole")
"""`pole` joins a latitude to the opposite meridian."""


def boundary_per_axis(boundary: str | Sequence[str], dimensions: int) -> tuple[str, ...]:
    """One name per axis of space, from one name for all axes or one for each.

    Raises:
        ValueError: for an unknown name, another number of names than axes, or a pole without a circle of longitude.

    Example:
        >>> boundary_per_axis("wall", 2)
        ('wall', 'wall')
    """
    names = (boundary,) * dimensions if isinstance(boundary, str) else tuple(boundary)
    if len(names) != dimensions:
        raise ValueError(f"boundary has {len(names)} name(s), {names}, for {dimensions} axes of space")
    for name in names:
        if name not in BOUNDARIES:
            raise ValueError(f"unknown boundary {name!r}: the boundaries are {', '.join(BOUNDARIES)}")
    if "pole" in names and (names[-1] != "periodic" or names.index("pole") != dimensions - 2):
        raise ValueError(
            f"boundary is {names}, but the poles end the last axis but one, latitude, and the last one, longitude, has "
            "to be periodic: ('pole', 'periodic')"
        )
    return names


def convolution(inputs: int, outputs: int, boundary: Sequence[str], stride: int = 1) -> nn.Sequential:
    """A convolution of width 3 over as many axes as the boundary has names; n points become ⌈n / stride⌉.

    Beyond the edge of an axis it sees

    - `periodic`: the other end.
    - `wall`: zeros, the default of convolutions in this field. A network can tell them from data, and so can learn what
      the wall does.
    - `open`: the last point again, a gradient of zero across the edge.
    - `pole`: the points on the other side of the pole, half a circle of longitude away. For scalars on the sphere; the
      components of the wind change sign there. The longitudes have to close, and their number should be even.

    Example:
        >>> layer = convolution(2, 4, ("periodic", "wall"), stride=2)
        >>> layer(torch.zeros(1, 2, 8, 7)).shape
        torch.Size([1, 4, 4, 4])
    """
    # The convolution itself pads with zeros at no cost.
    zeros = tuple(int(name == "wall") for name in boundary)
    return nn.Sequential(_Padding(boundary), CONVOLUTIONS[len(zeros)](inputs, outputs, 3, stride=stride, padding=zeros))


CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class _Padding(nn.Module):
    """One point more at both ends of the periodic and the open axes, and over both poles."""

    def __init__(self, boundary: Sequence[str]) -> None:
        super().__init__()
        self.boundary = tuple(boundary)

    def forward(self, u: Float[Tensor, "batch channel *space"]) -> Float[Tensor, "batch channel *_padded"]:
        if "pole" in self.boundary:  # before longitude gets its margins
            across = u.roll(u.shape[-1] // 2, -1)
            u = torch.cat((across.narrow(-2, 0, 1), u, across.narrow(-2, u.shape[-2] - 1, 1)), -2)
        # All periodic axes in one call, because every call copies the whole state.
        if "periodic" in self.boundary:
            u = F.pad(u, [int(name == "periodic") for name in reversed(self.boundary) for _ in range(2)], "circular")
        for axis, name in enumerate(self.boundary, start=2):
            if name == "open":
                # The gradient of F.pad(mode="replicate") is not deterministic on CUDA.
                u = torch.cat((u.narrow(axis, 0, 1), u, u.narrow(axis, u.shape[axis] - 1, 1)), axis)
        return u

    def extra_repr(self) -> str:
        return ", ".join(self.boundary)
