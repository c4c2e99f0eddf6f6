"""Points as rows: the neighbourhood of every point of a periodic grid, and the adjoint of gathering it."""

import functools
import itertools
import math

import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import State

Rows = Float[Tensor, "row column"]
"""One row per point of every state of the batch."""


def _shifts(dimensions: int) -> list[tuple[int, ...]]:
    """The 3^d rolls that bring the neighbours to their point, in the order of a convolution's kernel."""
    return list(itertools.product((1, 0, -1), repeat=dimensions))


def _roll(u: State, shift: tuple[int, ...]) -> State:
    return torch.roll(u, shift, tuple(range(2, u.dim()))) if any(shift) else u


def neighbourhoods(u: State) -> Rows:
    """The values around every point, wrapped: in one dimension u[m−1], u[m], u[m+1].

    Args:
        u: states, (batch, channel, *space), with d space axes.

    Returns:
        rows of shape (batch · points, channel · 3^d); the columns are ordered as the flattened kernel
        (channel, 3, …, 3) of a convolution of width 3.

    Example:
        >>> neighbourhoods(torch.tensor([[[0.0, 1.0, 2.0, 3.0]]]))
        tensor([[3., 0., 1.],
                [0., 1., 2.],
                [1., 2., 3.],
                [2., 3., 0.]])
    """
    shifted = [_roll(u, shift) for shift in _shifts(u.dim() - 2)]
    return torch.stack(shifted, dim=-1).movedim(1, -2).reshape(-1, u.shape[1] * len(shifted))


def scatter_neighbourhoods(rows: Rows, shape: torch.Size) -> State:
    """The adjoint of `neighbourhoods`: every entry is added to the point that it was gathered from.

    Args:
        rows: (batch · points, channel · 3^d).
        shape: of the states, (batch, channel, *space).

    Example:
        >>> rows = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0]])
        >>> scatter_neighbourhoods(rows, torch.Size([1, 1, 4]))
        tensor([[[2., 1., 0., 0.]]])
    """
    shifts = _shifts(len(shape) - 2)
    entries = points_last(rows, torch.Size([shape[0], shape[1] * len(shifts), *shape[2:]]))
    entries = entries.unflatten(1, (shape[1], len(shifts))).unbind(2)
    rolled = [_roll(x, tuple(-s for s in shift)) for x, shift in zip(entries, shifts, strict=True)]
    return functools.reduce(torch.add, rolled)


def points_last(rows: Rows, shape: torch.Size) -> State:
    """Rows of shape (batch · points, channel) as states of shape (batch, channel, *space)."""
    return rows.reshape(shape[0], *shape[2:], math.prod(rows.shape[1:])).movedim(-1, 1)
