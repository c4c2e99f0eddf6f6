"""From errors to weights: what is asked for, and the choice between compiled loops and a program of tensors."""

import functools
import importlib
import importlib.util
import math
import threading
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from squall.losses import program
from squall.losses._tracing import is_traced
from squall.losses.checks import check_any, check_errors, check_finite, check_not_empty, combined_measure, warn_unmet
from squall.losses.distributed import ALONE, Sharding
from squall.losses.errors import GROUPS_ALONG, Over
from squall.losses.report import Account, of_rows
from squall.losses.rules import DEFAULT_TEMPERATURE, SHARPEST, Schedule, Temperature, TemperatureRule, as_rule
from squall.losses.sketch import KEY_SHIFT, SMALL, WINDOW

__all__ = [
    "Compiled",
    "Weighing",
    "compiled_kernels",
    "from_groups",
    "imbalance_weights",
    "is_compiled",
    "to_groups",
    "weigh_compiled",
    "weights_of",
]

LONG = 1024
"""Points of a slab from which on it is worth its own turn: a block of the compiled passes."""
ATOMS_AT_ONCE = 1 << 16
"""Of groups that are sketched, solved and weighed in turn: 1.5 MB, which stay in the cache of a core."""
MOST_ATOMS = 1 << 17
"""Atoms that are kept for a report: 3 MB, of which only what is written to takes memory."""


def to_groups(values: Shaped[Tensor, "..."], over: Over) -> Shaped[Tensor, "group point"]:
    """(batch, channel, *space) → (group, point), a view where the memory allows."""
    if over == "all":
        return values.reshape(1, -1)
    values = values.movedim(GROUPS_ALONG[over], 0)
    return values.reshape(values.shape[0], math.prod(values.shape[1:]))


def from_groups(values: Shaped[Tensor, "group point"], shape: torch.Size, over: Over) -> Shaped[Tensor, "..."]:
    """The inverse of `to_groups`."""
    if over == "all":
        return values.reshape(shape)
    axis = GROUPS_ALONG[over]
    return values.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]).movedim(0, axis)


@dataclass(frozen=True)
class Weighing:
    """How errors become weights; `ImbalanceAwareLoss` documents the fields."""

    rule: TemperatureRule | Schedule
    cap: float = math.inf
    mean_share: float = 0.0
    trim: float = 0.0
    winsorize: float = 0.0
    differentiate: bool = False

    def __post_init__(self) -> None:
        if not self.cap >= 1:
            raise ValueError(f"cap is in units of the uniform weight and must be at least 1, got {self.cap}")
        for name in ("mean_share", "trim", "winsorize"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is a fraction and must be in [0, 1], got {getattr(self, name)}")
        if self.trim == 1:
            raise ValueError("trim=1 drops every point; it must be below 1")
        if self.mean_share == 1 or self.cap == 1:  # both leave the mean alone
            object.__setattr__(self, "rule", as_rule(math.inf))
            object.__setattr__(self, "mean_share", 0.0)
            object.__setattr__(self, "cap", math.inf)

    @property
    def final(self) -> TemperatureRule:
        """The rule, once a schedule has ended."""
        return self.rule.final if isinstance(self.rule, Schedule) else self.rule

    def softness(self, step: Tensor | None) -> Any:
        """How much of the rule applies at a step, in [0, 1]."""
        if not isinstance(self.rule, Schedule):
            return 1.0
        softness = self.rule.softness(torch.zeros((), dtype=torch.int64) if step is None else step)
        return softness if is_traced(softness) or softness.is_cuda else softness.item()


@functools.cache
def compiled_kernels() -> ModuleType | None:
    """The compiled loops, None where numba is not installed or cannot compile."""
    if importlib.util.find_spec("numba") is None:
        return None
    try:
        return importlib.import_module("squall.losses.kernels")
    except ImportError:  # as where numba does not know the version of NumPy
        return None


def is_compiled(values: Tensor, weighing: Weighing, sharding: Sharding) -> bool:
    """Whether compiled loops weigh these values: on the CPU of one process, outside of a trace, with weights held."""
    alone = sharding is ALONE and not weighing.differentiate and values.device.type == "cpu"
    return alone and not is_traced(values) and compiled_kernels() is not None


class Compiled(NamedTuple):
    """What compiled loops found for a batch (outer, group, inner)."""

    arrays: tuple[Any, ...]
    """The first five arguments of `kernels.weigh`."""
    rows: Float[np.ndarray, "group column"]
    """See `kernels.COLUMNS`."""
    value: float
    """Σ w l over everything."""
    out: Tensor | None
    """μe, times the derivative of the error (half of it for a square)."""
    account: Account | None
    """None where the errors are not all numbers ≥ 0."""

    @property
    def partition(self) -> Float[np.ndarray, "group"]:
        """Σμe, or 1 for a group of no measure."""
        return self.rows[:, 6]

    @property
    def factors(self) -> Float[np.ndarray, "group"]:
        """What turns μe into weights that sum to 1 over everything."""
        total = self.rows[:, 8]
        return total / (total.sum() * self.rows[:, 6])

    def again(self, errors: Tensor | None = None) -> Float[Tensor, "outer group inner"]:
        """`out` once more; or μe at the same temperatures where errors are given."""
        a, b, m, seen, delta = self.arrays
        if errors is not None:
            a, b, delta = errors.detach().contiguous().view(a.shape).numpy(), None, True
        out, kernels = torch.empty(a.shape, dtype=KIND[a.dtype.itemsize]), compiled_kernels()
        assert kernels is not None
        kernels.weigh(
            a, b, m, seen, delta, _scratch.of(out.dtype), 0, math.inf, 0.0, True, out.numpy(), self.rows.copy()
        )
        return out

    def weights(self, shape: torch.Size) -> Tensor:
        """w of errors, of their shape."""
        out = self.again() if self.out is None else self.out
        return (out * torch.from_numpy(self.factors).to(out.dtype).unsqueeze(1)).view(shape)


KIND = {4: torch.float32, 8: torch.float64}


class _Scratch(threading.local):
    """Counters of the compiled loops, zero between two calls; of each thread its own."""

    def __init__(self) -> None:
        self.arrays: dict[torch.dtype, tuple[Any, ...]] = {}

    def of(self, dtype: torch.dtype) -> tuple[Any, ...]:
        """See `kernels.weigh`."""
        if dtype not in self.arrays:
            single, shift = dtype == torch.float32, KEY_SHIFT[dtype]
            real, unsigned, signed = (np.float32, np.uint32, np.int32) if single else (np.float64, np.uint64, np.int64)
            keys = 1 << ((31 if single else 63) - shift)
            counters = np.zeros(keys, np.int64), np.zeros((keys, 2))
            self.arrays[dtype] = np.empty(LONG, unsigned), np.empty(1, signed), np.empty(LONG, real), *counters, shift
        return self.arrays[dtype]


_scratch = _Scratch()


def weigh_compiled(
    variables: tuple[Tensor, ...],
    delta: float | None,
    mask: Tensor | None,
    measure: Tensor | None,
    over: Over,
    weighing: Weighing,
    softness: Any,
    wanted: bool,
) -> Compiled:
    """The weights of a prediction and a target, by their squared or Huber's errors, or of errors alone.

    Raises:
        ValueError: where no point is left.
    """
    kernels = compiled_kernels()
    assert kernels is not None
    arrays = _arrays(variables, delta, mask, measure, over)
    dtype, shape = variables[0].dtype, arrays[0].shape
    groups, points = shape[1], shape[0] * shape[2]
    demand = weighing.final.demand(softness)
    caps = float(demand.kind), float(demand.number), demand.cap, weighing.cap
    cap = min(demand.cap, weighing.cap)
    bins, tiny = points > SMALL, torch.finfo(dtype).tiny if points > SMALL else 0.0
    ordered = bool(cap < math.inf or weighing.trim or weighing.winsorize)
    scratch, room = _scratch.of(dtype), (WINDOW + 2 if bins else points)
    many = min(groups, max(1, ATOMS_AT_ONCE // room))
    l, mass, keys = np.empty((many, room)), np.empty((many, room)), np.empty((many, room if bins else 0), np.int64)
    rows, sizes = np.empty((groups, len(kernels.COLUMNS))), np.empty(many, np.int64)
    atoms, kept, step = np.empty((3, min(groups * room, MOST_ATOMS))), 0, -(-groups * room // MOST_ATOMS)
    out = torch.empty(shape if wanted else (1, 1, 0), dtype=dtype)
    to, everything, missed = out.numpy(), 0.0, 0
    for start in range(0, groups, many):
        part, sizes = rows[start : start + many], sizes[: groups - start]
        if not kernels.sketch(*arrays, scratch, start, l, mass, keys, sizes, part):
            return Compiled(arrays, rows, math.nan, None, None)
        if ordered and not bins:
            order = l[: len(part)].argsort(1)
            l[: len(part)], mass[: len(part)] = (np.take_along_axis(x[: len(part)], order, 1) for x in (l, mass))
        if weighing.trim or weighing.winsorize:
            _guard(kernels, arrays, scratch[1], start, weighing, sizes, l, mass, keys, part)
        coarse, unmet, edges = kernels.solve(l, mass, sizes, tiny, arrays[2] is None, caps, part)
        if coarse:
            more = _refine(kernels, arrays, start, caps, part)
            unmet, edges = unmet + more[0], edges + more[1]
        if edges:
            _place_edges(kernels, arrays, scratch[1], start, cap, sizes, l, mass, keys, part)
        everything += kernels.weigh(*arrays, scratch, start, cap, weighing.mean_share, wanted, to, part)
        missed += unmet
        kept = kernels.keep(l, mass, sizes, start, step, atoms, kept)
    if not everything > 0:
        check_any(everything)
    if missed:
        warn_unmet(missed, groups, demand.number)
    value = float(rows[:, 8] / everything @ (rows[:, 7] / rows[:, 6]))
    return Compiled(
        arrays, rows, value, out if wanted else None, Account(value, functools.partial(of_rows, rows, atoms[:, :kept]))
    )


def _guard(kernels: Any, arrays: Any, signed: Any, start: int, weighing: Weighing, sizes, l, mass, keys, rows) -> None:
    """Winsorize and trim the atoms of groups; what is above its limit has no weight."""
    for i, row in enumerate(rows):
        for fraction, keep in ((weighing.winsorize, True), (weighing.trim, False)):
            if fraction and sizes[i]:
                before, need = l[i, sizes[i] - 1], fraction * mass[i, : sizes[i]].sum()
                sizes[i] = kernels.cut(*arrays, signed, start + i, need, keep, sizes[i], l[i], mass[i], keys[i])
                level = l[i, sizes[i] - 1]
                row[kernels.LIMIT] = level if level < before and not keep else math.inf


def _refine(kernels: Any, arrays: Any, start: int, caps: Any, rows) -> tuple[int, int]:
    """Solve for the points where errors lie closer together than the bins tell."""
    missed = edges = 0
    for i, row in enumerate(rows):
        if row[kernels.COARSE]:
            errors, mass = kernels.between(*arrays, start + i, 0.0, math.inf)
            mass[errors > row[kernels.LIMIT]] = 0
            l = np.where(mass > 0, np.minimum(errors, row[kernels.TOP]), 0.0)  # winsorized
            order = np.argsort(l)
            size = np.array([l.size])
            found = kernels.solve(l[order][None], mass[order][None], size, 0.0, True, caps, row[None])
            missed, edges = missed + found[1], edges + found[2]
    return missed, edges


def _place_edges(kernels: Any, arrays: Any, signed: Any, start: int, cap: float, sizes, l, mass, keys, rows) -> None:
    """Where T → 0 and a cap binds, the largest points fill the cap: put the reference at the smallest of them."""
    for i, row in enumerate(rows):
        if row[kernels.BINDS] and row[kernels.B] >= SHARPEST:
            copies, need = (l[i].copy(), mass[i].copy(), keys[i].copy()), row[kernels.TOTAL] / cap * (1 - 2e-9)
            size = kernels.cut(*arrays, signed, start + i, need, False, sizes[i], *copies)
            row[kernels.REFERENCE], row[kernels.LAM] = copies[0][size - 1], 0.0


def _arrays(
    variables: tuple[Tensor, ...], delta: float | None, mask: Tensor | None, measure: Tensor | None, over: Over
) -> tuple[Any, ...]:
    """The first five arguments of `kernels.weigh`: everything is one group of one slab, samples are groups, channels
    are groups with a slab in every sample, lead times with one in every channel of every sample."""
    shape = variables[0].shape
    weights = None
    if mask is not None or measure is not None:
        weights = _as_measure(mask, measure, variables[0].dtype)
        weights = weights.reshape((1,) * (len(shape) - weights.dim()) + weights.shape)
    if over == "all":
        outer = 0 if weights is None else _outer(weights, shape)
        layout = math.prod(shape[:outer]), 1, math.prod(shape[outer:])
        if weights is not None:
            weights = weights.expand(*weights.shape[:outer], *shape[outer:]).reshape(1, 1, layout[2])
    else:
        axis = GROUPS_ALONG[over]
        layout = math.prod(shape[:axis]), shape[axis], math.prod(shape[axis + 1 :])
        if weights is not None:  # not repeated along axes that it does not depend on
            before = weights.shape[:axis] if math.prod(weights.shape[:axis]) == 1 else shape[:axis]
            weights = weights.expand(*before, -1, *shape[axis + 1 :])
            weights = weights.reshape(math.prod(before), weights.shape[axis], layout[2])
    a = variables[0].detach().contiguous().view(layout).numpy()
    b = variables[1].detach().contiguous().view(layout).numpy() if len(variables) > 1 else None
    kind = True if b is None else None if delta is None else a.dtype.type(delta)
    if weights is None:
        return a, b, None, None, kind
    weights = weights.contiguous()
    m, seen = (None, weights.view(torch.int8).numpy()) if weights.dtype == torch.bool else (weights.numpy(), None)
    return a, b, m, seen, kind


def _outer(weights: Tensor, shape: torch.Size) -> int:
    """How many leading axes the measure does not depend on, so that it need not be repeated along them."""
    outer = 0
    while outer < len(shape) and weights.shape[outer] == 1 and math.prod(shape[outer + 1 :]) >= LONG:
        outer += 1
    return outer


def _as_measure(mask: Tensor | None, measure: Tensor | None, dtype: torch.dtype) -> Tensor:
    """One tensor for both: bool, or μ with −1 where the mask is False."""
    if measure is None:
        assert mask is not None
        return mask
    measure = measure.detach().to(dtype)
    return measure if mask is None else torch.where(mask, measure, -1)


def imbalance_weights(
    errors: Tensor,
    temperature: Temperature = DEFAULT_TEMPERATURE,
    *,
    mask: Tensor | None = None,
    measure: Tensor | None = None,
    over: Over = "all",
    cap: float | None = None,
    mean_share: float = 0.0,
    trim: float = 0.0,
    winsorize: float = 0.0,
) -> Tensor:
    """Weights w_i = p_i exp(l_i/T) / Σ_j p_j exp(l_j/T) of pointwise errors; detached.

    Args:
        errors: l ≥ 0, shape (batch, channel, *space) or any other shape for `over="all"`.
        temperature: T in the unit of the errors, or a rule that finds it.
        mask: True where a point counts; broadcastable to the errors.
        measure: μ ≥ 0, such as cell areas; broadcastable to the errors. p = μ/Σμ.
        over: what is normalised over together; every group gets its share of the measure. `"lead"` is the third axis.
        cap: no weight above `cap` times the uniform one.
        mean_share: α of uniform weights mixed in.
        trim: fraction of the measure, largest errors first, that gets no weight.
        winsorize: fraction of the measure whose errors are lowered to the largest of the rest.

    Returns:
        w of the shape of the errors, summing to 1.

    Example:
        >>> imbalance_weights(torch.tensor([0.0, 1.0]), temperature=1.0)
        tensor([0.2689, 0.7311])
        >>> imbalance_weights(torch.tensor([1.0, 3.0, 3.0]), temperature=0)
        tensor([0.0000, 0.5000, 0.5000])
    """
    cap = math.inf if cap is None else cap
    weighing = Weighing(as_rule(temperature), cap, mean_share, trim, winsorize)
    errors = check_errors(errors.detach(), over)
    check_not_empty(errors)
    total = combined_measure(mask, measure, errors)
    if mask is not None:
        errors = torch.where(mask, errors, 0)
    check_finite(errors)
    return weights_of(errors, mask, measure, total, weighing, over, 1.0, ALONE)[0]


def weights_of(
    errors: Tensor,
    mask: Tensor | None,
    measure: Tensor | None,
    total: Tensor | None,
    weighing: Weighing,
    over: Over,
    softness: Any,
    sharding: Sharding,
) -> tuple[Tensor, Account | None]:
    """The weights of checked errors, of their shape, and their account; `total` is mask and measure in one."""
    if is_compiled(errors, weighing, sharding):
        made = weigh_compiled((errors,), None, mask, measure, over, weighing, softness, True)
        return made.weights(errors.shape), made.account
    grouped = None if total is None else to_groups(total, over)
    made = program.weigh(to_groups(errors, over), grouped, weighing, softness, sharding)
    value = (made.weights * to_groups(errors, over)).sum(dtype=torch.float64)
    value = sharding.across(sharding.within(value, "sum"), "sum")
    return from_groups(made.weights, errors.shape, over), Account.of_program(made, value, sharding)
