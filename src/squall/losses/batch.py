"""The points of one batch on a CPU as arrays (outer, group, inner), and the passes over them: compiled where numba is
installed, in plain PyTorch otherwise.

The points of a group are the slabs [o, g, :]. Everything is one group of one slab, samples are groups, channels are
groups with a slab in every sample: no order of the axes has to be copied into another.
"""

import functools
import importlib
import importlib.util
import math
import threading
from collections.abc import Iterator
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from squall.losses import traced
from squall.losses.errors import Over
from squall.losses.sketch import KEY_SHIFT, WINDOW

__all__ = ["Batch", "CompiledBatch", "PlainBatch", "Stats", "Tilts", "batch_of", "compiled_kernels"]

LONG = 1024
"""Points of a slab from which on it is worth its own turn: a block of the compiled passes."""
BLOCK = 1 << 16
"""Points of a block in plain PyTorch: its temporaries (256 KB in float32) come from the heap and stay in the cache."""


class Stats:
    """Columns of what a sketch knows of each group beside its bins."""

    TOP, TIES, TOTAL, LEAST, KEY, WORST = range(6)
    """The largest error, Σμ there, Σμ, the least value, the key of the largest error, and the largest error of all
    points, measure or not: NaN or ∞ where one is."""


class Tilts:
    """Columns of what gives each group its weights, in proportion to μ (exp(min(0, b (l − ref)/scale − λ)) + floor)
    where l ≤ limit; in the order of `traced.Tilt`."""

    B, REFERENCE, SCALE, LAM, LIMIT, FLOOR = range(6)


class Sketch(NamedTuple):
    """The bins of each group, or the points of groups that are small."""

    stats: np.ndarray
    mass: np.ndarray
    rest: np.ndarray
    """Σμ and Σμr of the bins (group, WINDOW); μ and l of the points (group, point)."""
    bins: bool


class Batch:
    """Points (outer, group, inner) of errors l = (a − b)², or l = a without b.

    Args:
        a, b: contiguous, detached, float32 or float64, of one shape.
        measure: (outer or 1, group or 1, inner): bool where it only says which points count, else μ, −1 where a point
            is hidden.
    """

    def __init__(self, a: Tensor, b: Tensor | None, measure: Tensor | None) -> None:
        self.a, self.b, self.measure = a, b, measure
        self.groups, self.points = a.shape[1], a.shape[0] * a.shape[2]
        self.dtype = a.dtype
        self.counts = measure is None or measure.dtype == torch.bool

    def sketch(self, bins: bool) -> Sketch:
        """The bins of all groups, or their points."""
        raise NotImplementedError

    def between(self, group: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        """The errors of a group in [low, high], and their measures."""
        raise NotImplementedError

    def weigh(self, tilts: np.ndarray, caps: bool, wanted: bool) -> tuple[np.ndarray, Tensor | None]:
        """Σμe, Σμel, Σμ of the points at the cap and the largest μe, (group, 4); and μ e (a − b), without b μ e, of the
        shape of a."""
        raise NotImplementedError


class PlainBatch(Batch):
    """Operator by operator, block by block."""

    def _blocks(self) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor | None]]:
        """Where a block is (outer, inner); differences (values), errors and measures of its points, (group, point)."""
        size = max(1, BLOCK // self.groups)
        outer, _, inner = self.a.shape
        many = max(1, size // max(inner, 1))
        for o in range(0, outer, many):
            for start in range(0, inner, size):
                where = slice(o, o + many), slice(start, start + size)
                yield (*where, *self._block(*where))

    def _block(self, outer: slice, inner: slice) -> tuple[Tensor, Tensor, Tensor | None]:
        d = self.a[outer, :, inner]
        d = d if self.b is None else d - self.b[outer, :, inner]
        mu = None
        if self.measure is not None:
            mu = self.measure[outer if len(self.measure) > 1 else slice(None), :, inner].expand(d.shape)
            d = torch.where(mu if mu.dtype == torch.bool else mu >= 0, d, 0)
            mu = mu.to(d.dtype).clamp(min=0).movedim(1, 0).reshape(self.groups, -1)
        d = d.movedim(1, 0).reshape(self.groups, -1)
        return d, d.abs() if self.b is None else d.square(), mu

    def sketch(self, bins: bool) -> Sketch:
        stats = np.zeros((self.groups, 6))
        stats[:, Stats.LEAST] = 0
        for _, _, d, l, mu in self._blocks():
            if not l.shape[1]:
                continue
            worst = l.amax(1).double().numpy()
            top = worst if mu is None else torch.where(mu > 0, l, 0).amax(1).double().numpy()
            np.maximum(stats[:, Stats.WORST], worst, out=stats[:, Stats.WORST])
            np.maximum(stats[:, Stats.TOP], top, out=stats[:, Stats.TOP])
            if self.b is None:
                np.minimum(stats[:, Stats.LEAST], d.amin(1).double().numpy(), out=stats[:, Stats.LEAST])
        if not np.isfinite(stats[:, Stats.WORST]).all():
            return Sketch(stats, np.zeros((self.groups, 0)), np.zeros((self.groups, 0)), bins)
        top = torch.from_numpy(stats[:, Stats.TOP].copy())
        parts = []
        mass, rest = torch.zeros(2, self.groups, WINDOW, dtype=torch.float64)
        for _, _, _, l, mu in self._blocks():
            ties = l == top.to(l.dtype).unsqueeze(1)
            weighed = ties if mu is None else torch.where(ties, mu, 0)
            stats[:, Stats.TIES] += weighed.sum(1, dtype=torch.float64).numpy()
            stats[:, Stats.TOTAL] += l.shape[1] if mu is None else mu.sum(1, dtype=torch.float64).numpy()
            if bins:
                effective = l if mu is None else torch.where(mu > 0, l, 0)
                of_block = traced.fill(effective, mu, top)
                mass += of_block[0]
                rest += of_block[1]
            else:
                parts.append((torch.ones_like(l) if mu is None else mu, l))
        if not bins:
            mass, rest = (torch.cat(x, 1) for x in zip(*parts, strict=True)) if parts else (mass[:, :0], rest[:, :0])
        stats[:, Stats.KEY] = traced.keys_and_rests(top.to(self.dtype))[0].numpy()
        return Sketch(stats, mass.numpy(), rest.numpy(), bins)

    def between(self, group: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        errors, masses = [], []
        for _, _, _, l, mu in self._blocks():
            inside = (l[group] >= low) & (l[group] <= high)
            inside = inside if mu is None else inside & (mu[group] > 0)
            errors.append(l[group][inside].numpy())
            masses.append(np.ones(len(errors[-1])) if mu is None else mu[group][inside].numpy())
        return np.concatenate(errors), np.concatenate(masses).astype(np.float64)

    def weigh(self, tilts: np.ndarray, caps: bool, wanted: bool) -> tuple[np.ndarray, Tensor | None]:
        out = torch.empty_like(self.a) if wanted else None
        sums = np.zeros((self.groups, 4))
        tilt = traced.Tilt(*torch.from_numpy(tilts.T.copy()))
        for outer, inner, d, l, mu in self._blocks():
            e = tilt.density(l)
            if tilts[:, Tilts.FLOOR].any():
                inside = l <= tilt.limit.to(l.dtype).unsqueeze(1)
                e = torch.where(inside, e + tilt.floor.to(l.dtype).unsqueeze(1), 0)
            w = e if mu is None else e * mu
            sums[:, 0] += w.sum(1, dtype=torch.float64).numpy()
            sums[:, 1] += (w * l).sum(1, dtype=torch.float64).numpy()
            if w.shape[1]:
                sums[:, 3] = np.maximum(sums[:, 3], w.amax(1).double().numpy())
            if caps:
                above = tilt.above(l).to(l.dtype)
                sums[:, 2] += (above if mu is None else above * mu).sum(1, dtype=torch.float64).numpy()
            if out is not None:
                part = out[outer, :, inner]
                part.copy_((w if self.b is None else w * d).reshape(self.groups, len(part), -1).movedim(0, 1))
        return sums, out


class _Scratch(threading.local):
    """Counters of the compiled passes, zero between two calls; of each thread its own."""

    def __init__(self) -> None:
        self.arrays: dict[torch.dtype, tuple[Any, ...]] = {}

    def of(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """Bits of a block, their signed type, packed counters, and two sums."""
        if dtype not in self.arrays:
            bits, unsigned, signed = {
                torch.float32: (31, np.uint32, np.int32),
                torch.float64: (63, np.uint64, np.int64),
            }[dtype]
            keys = 1 << (bits - KEY_SHIFT[dtype])
            self.arrays[dtype] = np.empty(LONG, unsigned), signed, np.zeros(keys, np.int64), np.zeros((2, keys))
        return self.arrays[dtype]


_scratch = _Scratch()


class CompiledBatch(Batch):
    """In one compiled loop a pass, on the calling thread."""

    def __init__(self, a: Tensor, b: Tensor | None, measure: Tensor | None) -> None:
        super().__init__(a, b, measure)
        kernels = compiled_kernels()
        assert kernels is not None
        self.kernels = kernels
        counts = measure is not None and self.counts
        seen = measure.view(torch.int8).numpy() if measure is not None and counts else None
        m = None if measure is None or counts else measure.numpy()
        self.arrays = a.numpy(), None if b is None else b.numpy(), m, seen

    def sketch(self, bins: bool) -> Sketch:
        stats = np.empty((self.groups, 6))
        if bins:
            mass, rest = np.zeros((2, self.groups, WINDOW))
            scratch, shift = _scratch.of(self.dtype), KEY_SHIFT[self.dtype]
            self.kernels.fill(*self.arrays, shift, *scratch, mass, rest, stats)
        else:
            mass, rest = np.empty((2, self.groups, self.points), self.arrays[0].dtype)
            self.kernels.points(*self.arrays, rest, mass, stats)
        return Sketch(stats, mass, rest, bins)

    def between(self, group: int, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
        real = self.arrays[0].dtype
        # Most bins have less; a second look is made where one has more.
        errors, masses = np.empty(max(LONG, self.points // 64), real), np.empty(max(LONG, self.points // 64))
        size = self.kernels.between(*self.arrays, group, low, high, errors, masses)
        if size > len(errors):
            errors, masses = np.empty(size, real), np.empty(size)
            self.kernels.between(*self.arrays, group, low, high, errors, masses)
        return errors[:size], masses[:size]

    def weigh(self, tilts: np.ndarray, caps: bool, wanted: bool) -> tuple[np.ndarray, Tensor | None]:
        out = torch.empty_like(self.a) if wanted else None
        sums = np.empty((self.groups, 4))
        self.kernels.weigh(*self.arrays, tilts, caps, None if out is None else out.numpy(), sums)
        return sums, out


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """The compiled passes, None where numba is not installed or cannot compile."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("squall.losses.kernels")
    except ImportError:  # as where numba does not know the version of NumPy
        return None


def batch_of(a: Tensor, b: Tensor | None, mask: Tensor | None, measure: Tensor | None, over: Over) -> Batch:
    """The batch of a prediction and a target, or of errors, in their groups."""
    shape = a.shape
    if mask is not None or measure is not None:
        measure = _as_measure(mask, measure, a.dtype)
        measure = measure.reshape((1,) * (len(shape) - measure.dim()) + measure.shape)
    if over == "all":
        outer = 0
        while measure is not None and outer < len(shape) and measure.shape[outer] == 1:
            if math.prod(shape[outer + 1 :]) < LONG:
                break
            outer += 1
        layout = math.prod(shape[:outer]), 1, math.prod(shape[outer:])
        if measure is not None:
            measure = measure.expand(*measure.shape[:outer], *shape[outer:]).reshape(1, 1, layout[2])
    elif over == "sample":
        layout = 1, shape[0], math.prod(shape[1:])
        if measure is not None:
            measure = measure.expand(-1, *shape[1:]).reshape(1, len(measure), layout[2])
    else:
        layout = shape[0], shape[1], math.prod(shape[2:])
        if measure is not None:
            measure = measure.expand(-1, -1, *shape[2:]).reshape(*measure.shape[:2], layout[2])
    a = a.detach().contiguous().view(layout)
    b = None if b is None else b.detach().contiguous().view(layout)
    kind = PlainBatch if compiled_kernels() is None else CompiledBatch
    return kind(a, b, None if measure is None else measure.contiguous())


def _as_measure(mask: Tensor | None, measure: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One tensor for both: bool, or μ with −1 where the mask is False."""
    if measure is None:
        assert mask is not None
        return mask
    measure = measure.detach().to(dtype)
    return measure if mask is None else torch.where(mask, measure, -1)
