"""Spectra by shells of the wave number, of real fields on a regular periodic grid of one spacing."""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


@lru_cache(maxsize=32)
def shells(space: tuple[int, ...], bins: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Shell of every coefficient of `torch.fft.rfftn`, and how often it counts (2: with its conjugate).

    Shells are centred on whole numbers of waves along the longest side; or they are `bins` equal parts of the range of
    wave numbers, but none narrower than one wave.
    """
    axes = [np.fft.fftfreq(n) for n in space[:-1]] + [np.fft.rfftfreq(space[-1])]
    k = max(space) * np.sqrt(sum(f**2 for f in np.meshgrid(*axes, indexing="ij", sparse=True)))
    shell = np.rint(k)
    if bins is not None:
        count = max(1, min(bins, max(space) // 2))
        shell = np.minimum(np.floor(k * count / max(k.max(), 1.0)), count - 1)
    times = np.full(k.shape, 2.0)
    times[..., 0] = 1
    if space[-1] % 2 == 0:
        times[..., -1] = 1
    return shell.astype(np.int64).ravel(), times.ravel()


def transform(u: Tensor) -> Tensor:
    """Coefficients (batch, channel, coefficient), such that the mean of u² is the sum of |û|² over all of them."""
    return torch.fft.rfftn(u, dim=tuple(range(2, u.dim())), norm="forward").flatten(2)


def by_shell(values: Tensor, shell: np.ndarray, times: np.ndarray) -> Tensor:
    """Sums of real values (..., coefficient) over shells."""
    weighed = values * torch.from_numpy(times).to(values)
    sums = weighed.new_zeros(*values.shape[:-1], int(shell.max()) + 1)
    return sums.index_add(-1, torch.from_numpy(shell).to(values.device), weighed)


def power(coefficients: Tensor) -> Tensor:
    """|û|², differentiable at 0."""
    return (coefficients * coefficients.conj()).real
