"""The batch spread over processes: weights are global, and N processes give the gradient of one.

Every process holds some of the points (not necessarily equally many, possibly none). The sums that the weights
need are completed over all of them in float64; each process then differentiates its own points only, times the
number of processes, because DistributedDataParallel takes the mean of the gradients. The value returned is
that of the whole batch, the same everywhere.
"""

from collections.abc import Callable
from typing import Literal, TypeVar

import torch
from torch import Tensor, distributed

from squall.losses._tracing import is_vmapped
from squall.losses.passes import Passes
from squall.losses.population import ALONE, Number, Sharding, here
from squall.losses.sums import Sums

__all__ = [
    "Group",
    "ShardedPasses",
    "gathered",
    "globally",
    "globally_each",
    "process_group",
    "sharding_of",
    "together",
]

T = TypeVar("T")

Group = Literal["world"] | distributed.ProcessGroup | None
"""Which processes share a batch: all of them where torch.distributed runs, a group of them, or none."""


def process_group(group: Group) -> distributed.ProcessGroup | None:
    """The processes that share the batch; None where this one is alone."""
    if group is None or torch.compiler.is_exporting() or not distributed.is_initialized():
        return None
    chosen = distributed.group.WORLD if isinstance(group, str) else group
    if chosen is None or distributed.get_world_size(chosen) == 1:
        return None
    if is_vmapped():
        raise ValueError("under torch.vmap the weights cannot be shared with other processes: pass group=None")
    return chosen


def sharding_of(over: str, group: distributed.ProcessGroup | None) -> Sharding:
    """How the sums of the groups are completed. Samples are whole, everything else is spread over processes."""
    if group is None:
        return ALONE

    def reduce(value: Tensor, operation: str) -> Tensor:
        result = value.detach().clone()
        operator = distributed.ReduceOp.MAX if operation == "max" else distributed.ReduceOp.SUM
        distributed.all_reduce(result, operator, group=group)
        return result

    world = distributed.get_world_size(group)
    return Sharding(here, reduce, world) if over == "sample" else Sharding(reduce, here, world)


def agreed(able: bool, device: torch.device, group: distributed.ProcessGroup) -> bool:
    """Whether all processes are able."""
    unable = torch.tensor(float(not able), device=device)
    distributed.all_reduce(unable, distributed.ReduceOp.MAX, group=group)
    return unable.item() == 0


def together(prepare: Callable[[], T], device: torch.device, group: distributed.ProcessGroup | None) -> T:
    """What `prepare` returns, once no process has refused its part; a refusal is an error on all of them."""
    if group is None:
        return prepare()
    try:
        result = prepare()
    except Exception:
        agreed(False, device, group)
        raise
    if not agreed(True, device, group):
        raise RuntimeError("another process refused its part of the batch; its own message says why")
    return result


def globally(local: Tensor, sharding: Sharding) -> Tensor:
    """The value of the whole batch, with this process's part of the gradient times the number of processes."""
    if sharding.world == 1:
        return local
    total = sharding.across(sharding.within(local, "sum"), "sum")
    return sharding.world * local + (total - sharding.world * local).detach()


def globally_each(local: Tensor, sharding: Sharding) -> Tensor:
    """This process's part of a map over the whole batch, with its gradient times the number of processes."""
    return local if sharding.world == 1 else sharding.world * local + ((1 - sharding.world) * local).detach()


def gathered(numbers: list[float], group: distributed.ProcessGroup, device: torch.device) -> list[list[float]]:
    """The numbers of every process, in the order of the ranks."""
    mine = torch.tensor(numbers, dtype=torch.float64, device=device)
    everyone = [torch.empty_like(mine) for _ in range(distributed.get_world_size(group))]
    distributed.all_gather(everyone, mine, group=group)
    return [numbers.tolist() for numbers in everyone]


class ShardedPasses(Passes):
    """The fused passes over a batch of which this process holds a part: sums are gathered and merged."""

    def __init__(self, passes: Passes, group: distributed.ProcessGroup, device: torch.device) -> None:
        self.passes, self.group, self.device = passes, group, device
        self.world = distributed.get_world_size(group)
        mine = [float(n) for n in (passes.count, *passes.moments, passes.single)]
        counts, once, twice, single = zip(*self._gathered(mine), strict=True)
        self.count, self.moments, self.single = int(sum(counts)), (int(min(once)), int(min(twice))), any(single)

    @classmethod
    def of(cls, passes: Passes | None, group: distributed.ProcessGroup, device: torch.device) -> "ShardedPasses | None":
        """The passes over all parts; None on all processes where one has none over its part."""
        able = agreed(passes is not None and passes.count > 0, device, group)
        return cls(passes, group, device) if able and passes is not None else None

    def _gathered(self, numbers: list[float]) -> list[list[float]]:
        return gathered(numbers, self.group, self.device)

    def largest_and_mean(self) -> tuple[float, float]:
        largest, mean = self.passes.largest_and_mean()
        parts = self._gathered([largest, mean * self.passes.count])
        return max(part[0] for part in parts), sum(part[1] for part in parts) / self.count

    def sweep(self, beta: float, moments: tuple[int, int] | None = None) -> Sums:
        mine = self.passes.sweep(beta, moments)
        return Sums.merged([Sums.of_numbers(part) for part in self._gathered(mine.numbers())])

    def anticipate(self, beta: float, top: float, scale: float) -> None:
        self.passes.anticipate(beta, top, self.world * scale)

    def gradient(self, beta: float, top: float, scale: float, factor: Number = 1.0) -> Tensor:
        return self.passes.gradient(beta, top, self.world * scale, factor)

    def sample(self) -> tuple[Tensor, Tensor | None]:
        return self.passes.sample()
