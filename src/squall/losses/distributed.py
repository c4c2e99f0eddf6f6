"""The batch spread over processes: weights are global, and N processes give the gradient of one.

Every process holds some of the points (not necessarily equally many, possibly none). The sums that the weights
need are completed over all of them in float64; each process then differentiates its own points only, times the
number of processes, because DistributedDataParallel takes the mean of the gradients. The value returned is
that of the whole batch, the same everywhere.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from squall.losses._tracing import is_vmapped

__all__ = [
    "ALONE",
    "Group",
    "RefusedElsewhere",
    "Sharding",
    "globally",
    "globally_each",
    "process_group",
    "sharding_of",
    "together",
]

T = TypeVar("T")

Group = Literal["world"] | distributed.ProcessGroup | None
"""Which processes share a batch: all of them where torch.distributed runs, a group of them, or none."""


Reduce = Callable[[Tensor, str], Tensor]
"""(tensor, "sum" | "max") → the tensor reduced over all ranks that share the groups."""


def here(value: Tensor, _operation: str) -> Tensor:
    """The reduction over this process alone: nothing to do."""
    return value


class RefusedElsewhere(RuntimeError):
    """Another process refused its part of the batch."""


class Sharding(NamedTuple):
    """How sums and maxima are completed where other processes hold other points."""

    within: Reduce = here
    """Over the processes that hold points of the same group."""
    across: Reduce = here
    """Over the processes that hold other groups."""
    world: int = 1
    """Number of processes."""
    rank: int = 0


ALONE = Sharding()


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

    world, rank = distributed.get_world_size(group), distributed.get_rank(group)
    return Sharding(here, reduce, world, rank) if over == "sample" else Sharding(reduce, here, world, rank)


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
        raise RefusedElsewhere("another process refused its part of the batch; its own message says why")
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
