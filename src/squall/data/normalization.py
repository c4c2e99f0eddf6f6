"""Mean and standard deviation of each channel, and the affine map they define."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from squall.data.errors import DataError
from squall.data.source import AnyFloats, Source


@dataclass(frozen=True)
class Normalization:
    """The map u ↦ (u − mean)/std, channel by channel.

    Args:
        mean: one number per channel, in the unit of the field.
        std: one positive number per channel, in the unit of the field.

    Raises:
        DataError: where the two do not fit each other or a number is not finite, or a std not positive.

    Example:
        >>> normalization = Normalization(mean=(1.0,), std=(2.0,))
        >>> normalization.apply(torch.tensor([[[1.0, 3.0]]])).tolist()
        [[[0.0, 1.0]]]
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "mean", tuple(float(value) for value in self.mean))
        object.__setattr__(self, "std", tuple(float(value) for value in self.std))
        if len(self.mean) != len(self.std) or not self.mean:
            raise DataError(f"normalization: {len(self.mean)} means and {len(self.std)} stds; one of each per channel")
        if not all(abs(value) < float("inf") for value in self.mean + self.std) or min(self.std) <= 0:
            raise DataError(f"normalization: mean {self.mean}, std {self.std}; both finite, std positive")

    @classmethod
    def fit(cls, source: Source) -> "Normalization":
        """Mean and standard deviation over trajectories, times and points of each channel.

        The source is read once, piece by piece; means and squared deviations are merged in float64 (Chan,
        Golub and LeVeque, 1979), so that a large mean does not swallow a small deviation. The deviation is
        that of the population (divided by the number of values). A channel that is constant to the rounding
        of its type (max − min ≤ 8 eps max|u|) gets std 1: it becomes zero, not noise.

        Masked points and states with a gap do not count. Statistics that the data bring along (`stats.yaml` of a
        folder of The Well) are taken as they are.

        Raises:
            DataError: where there is no trajectory, or the states are not finite.
        """
        if source.statistics is not None:
            return cls(*source.statistics)
        if source.trajectories == 0:
            raise DataError("normalization: there is no trajectory to fit it to; fit it to the training split")
        mask, valid = source.mask, source.valid
        count: torch.Tensor | int = 0
        mean = squares = torch.zeros(source.channels, dtype=torch.float64)
        low, high = torch.full_like(mean, torch.inf), torch.full_like(mean, -torch.inf)
        for chosen, start, stop in source.chunks(8 * 2**20):
            rows = torch.tensor(chosen)
            shape = (len(chosen), stop - start, *source.shape[2:])
            values = source._gather(rows, torch.full_like(rows, start), stop - start)
            values = values.movedim(2, 0).flatten(1).double().cpu()
            if mask is None and valid is None:
                size, piece = values.shape[1], values.mean(1)
                deviations = (values - piece[:, None]).square().sum(1)
                least, most = values.amin(1), values.amax(1)
            else:
                counts = torch.ones(shape, dtype=torch.bool) if mask is None else mask.expand(shape)
                if valid is not None:
                    counts = counts & valid[rows, start:stop].reshape(*shape[:2], *(1,) * (len(shape) - 2))
                counts = counts.movedim(2, 0).flatten(1)
                size = counts.sum(1)
                piece = values.where(counts, 0.0).sum(1) / size.clamp(min=1)
                deviations = (values - piece[:, None]).where(counts, 0.0).square().sum(1)
                least, most = values.where(counts, torch.inf).amin(1), values.where(counts, -torch.inf).amax(1)
            total = count + size
            share = size / total if isinstance(total, int) else size / total.clamp(min=1)
            shift = piece - mean
            squares = squares + deviations + shift**2 * (count * share)
            mean = mean + shift * share
            count = total
            low, high = torch.minimum(low, least), torch.maximum(high, most)
        rounding = 8 * torch.finfo(source.dtype).eps * torch.maximum(low.abs(), high.abs())
        std = torch.where(high - low <= rounding, 1.0, (squares / count).sqrt())
        return cls(tuple(mean.tolist()), tuple(std.tolist()))

    @classmethod
    def identity(cls, channels: int) -> "Normalization":
        """The map that changes nothing."""
        return cls((0.0,) * channels, (1.0,) * channels)

    @property
    def channels(self) -> int:
        """Number of channels."""
        return len(self.mean)

    def apply(self, u: AnyFloats, axis: int = 1) -> AnyFloats:
        """(u − mean)/std in the type of `u`; `axis` is the channel axis: 1 for states, 2 for trajectories."""
        self._check(u, axis)
        return (u - _along(self.mean, u.ndim, axis, u.dtype, u.device)) / _along(
            self.std, u.ndim, axis, u.dtype, u.device
        )

    def invert(self, v: AnyFloats, axis: int = 1) -> AnyFloats:
        """v·std + mean, the inverse of `apply`."""
        return self.scale(v, axis) + _along(self.mean, v.ndim, axis, v.dtype, v.device)

    def scale(self, v: AnyFloats, axis: int = 1) -> AnyFloats:
        """v·std: takes a rate or a difference of normalized states back to the unit of the field."""
        self._check(v, axis)
        return v * _along(self.std, v.ndim, axis, v.dtype, v.device)

    def to_dict(self) -> dict[str, list[float]]:
        """Plain numbers for YAML or JSON."""
        return {"mean": list(self.mean), "std": list(self.std)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Sequence[Any]]) -> "Normalization":
        """What `to_dict` gave.

        Raises:
            DataError: where `mean` or `std` is missing.
        """
        if set(values) != {"mean", "std"}:
            raise DataError(f"normalization: got the keys {sorted(values)}; expected mean and std")
        return cls(tuple(values["mean"]), tuple(values["std"]))

    def _check(self, u: AnyFloats, axis: int) -> None:
        if u.ndim <= axis or u.shape[axis] != self.channels:
            raise DataError(
                f"got shape {tuple(u.shape)}; expected {self.channels} channels on axis {axis}, as normalized"
            )


@functools.lru_cache(maxsize=64)
def _along(values: tuple[float, ...], ndim: int, axis: int, dtype: torch.dtype, device: torch.device) -> AnyFloats:
    """The values as a tensor that broadcasts along one axis; kept, because a copy to a GPU waits for it."""
    # A tensor made in inference mode could not be used in training afterwards.
    with torch.inference_mode(False):
        shape = [1] * ndim
        shape[axis] = len(values)
        return torch.tensor(values, dtype=dtype, device=device).reshape(shape)
