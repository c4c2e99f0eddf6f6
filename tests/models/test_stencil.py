"""Gathering neighbourhoods and scattering them back are adjoint, and gathering is im2col."""

import pytest
import torch
from torch import nn

from squall.models.stencil import neighbourhoods, scatter_neighbourhoods

SHAPES = [(2, 1, 7), (2, 3, 5), (2, 2, 4, 5), (1, 2, 3, 4, 5), (2, 1, 1), (2, 1, 2)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scattering_is_the_adjoint_of_gathering(shape: tuple[int, ...]) -> None:
    """⟨P u, r⟩ = ⟨u, Pᵀ r⟩."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(shape, dtype=torch.float64, generator=generator)
    gathered = neighbourhoods(u)
    r = torch.randn(gathered.shape, dtype=torch.float64, generator=generator)
    expected = (gathered * r).sum()
    torch.testing.assert_close((u * scatter_neighbourhoods(r, u.shape)).sum(), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES[:4], ids=str)
def test_gathered_rows_times_a_kernel_are_a_periodic_convolution(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(shape, dtype=torch.float64, generator=generator)
    conv = [nn.Conv1d, nn.Conv2d, nn.Conv3d][len(shape) - 3]
    layer = conv(shape[1], 4, 3, padding=1, padding_mode="circular", bias=False).double()
    expected = layer(u).movedim(1, -1).reshape(-1, 4)
    torch.testing.assert_close(neighbourhoods(u) @ layer.weight.flatten(1).T, expected, rtol=1e-12, atol=1e-12)
