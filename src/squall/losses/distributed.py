"""The batch spread over processes: weights are global, and N processes give the gradient of one.

Every process holds some of the points (not necessarily equally many, possibly none). The sums that the weights
need are completed over all of them in float64; each process then differentiates its own points only, times the
number of processes, because DistributedDataParallel takes the mean of the gradients. The value returned is
that of the whole batch, the same everywhere.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed

from squall.losses._tracing import is_vmapped
from squall.losses.checks import check_broadcast
from squall.losses.errors import GROUPS_ALONG

__all__ = [
    "ALONE",
    "Group",
    "RefusedElsewhere",
    "Sharding",
    "Shares",
    "globally",
    "globally_each",
    "own_parts",
    "process_group",
    "sharding_of",
    "together",
]

T = TypeVar("T")


class Shares(NamedTuple):
    """The processes that hold the parts of a DTensor."""

    group: distributed.ProcessGroup
    cut_along: int
    """The axis."""


Group = Literal["world"] | distributed.ProcessGroup | Shares | None
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
    factor: int = 1
    """Of the gradient of a process's own part: the number of processes where their gradients are averaged later."""


ALONE = Sharding()


def process_group(group: Group) -> distributed.ProcessGroup | None:
    """The processes that share the batch; None where this one is alone."""
    if group is None or torch.compiler.is_exporting() or not distributed.is_initialized():
        return None
    chosen = distributed.group.WORLD if isinstance(group, str) else group.group if isinstance(group, Shares) else group
    if chosen is None or distributed.get_world_size(chosen) == 1:
        return None
    if is_vmapped():
        raise ValueError("under torch.vmap the weights cannot be shared with other processes: pass group=None")
    return chosen


def sharding_of(over: str, given: Group) -> Sharding:
    """How the sums of the groups are completed. Where it is not known how the batch is cut, samples are whole."""
    group = process_group(given)
    if group is None:
        return ALONE

    def reduce(value: Tensor, operation: str) -> Tensor:
        result = value.detach().clone()
        operator = distributed.ReduceOp.MAX if operation == "max" else distributed.ReduceOp.SUM
        distributed.all_reduce(result, operator, group=group)
        return result

    world, rank = distributed.get_world_size(group), distributed.get_rank(group)
    cut_along, factor = (given.cut_along, 1) if isinstance(given, Shares) else (0, world)
    whole = GROUPS_ALONG.get(over) == cut_along
    within, across = (here, reduce) if whole else (reduce, here)
    return Sharding(within, across, world, rank, factor)


def own_parts(
    prediction: Any, target: Any, mask: Any, measure: Any, group: Group
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor | None], Shares | None]:
    """This process's parts of DTensors, and who has the others; None where every process has the whole.

    The loss of the parts is that of the whole, and the gradient of the DTensor that of the whole, placed like it. A
    mask or a measure is a DTensor, or whole on every process.

    Raises:
        TypeError: if only one of prediction and target is a DTensor.
        ValueError: for a placement of which the loss would not be exact, or other processes than the group.
    """
    from torch.distributed.tensor import DTensor, Replicate, Shard

    for name, x, other in (("prediction", prediction, "target"), ("target", target, "prediction")):
        if not isinstance(x, DTensor):
            raise TypeError(f"{other} is a DTensor and {name} is not: distribute both alike, by distribute_tensor")
        if any(type(placement) not in (Shard, Replicate) for placement in x.placements):
            raise ValueError(
                f"{name} has the placements {x.placements}, of which a process knows no point: call "
                "redistribute(placements=...) first, with Shard or Replicate"
            )
    mesh, placements = prediction.device_mesh, prediction.placements
    if target.device_mesh != mesh or target.placements != placements:
        raise ValueError(
            f"prediction has the placements {placements} on {mesh}, target {target.placements} on "
            f"{target.device_mesh}: redistribute one like the other"
        )
    cuts = [(dimension, place.dim) for dimension, place in enumerate(placements) if isinstance(place, Shard)]
    if len(cuts) > 1:
        raise ValueError(
            f"prediction has the placements {placements}, cut along two dimensions of the mesh, but the loss adds up "
            "over one: redistribute prediction and target with one Shard"
        )
    processes = process_group(group)
    if processes is not None and distributed.get_world_size(processes) != mesh.size():
        raise ValueError(
            f"prediction is a DTensor on {mesh.size()} processes, but the loss is over a group of "
            f"{distributed.get_world_size(processes)}: pass group=None for the loss of the DTensor by itself"
        )

    def part(name: str, x: Any) -> Tensor | None:
        if x is None:
            return None
        check_broadcast(name, x, prediction)
        if not isinstance(x, DTensor):
            x = DTensor.from_local(x, mesh, [Replicate()] * mesh.ndim, run_check=False)
        spread: Any = x.detach().expand(prediction.shape)
        return spread.redistribute(placements=placements).to_local()

    parts = prediction.to_local(), target.to_local(), part("mask", mask), part("measure", measure)
    return parts, Shares(mesh.get_group(cuts[0][0]), cuts[0][1]) if cuts else None


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
    """The value of the whole batch, with this process's part of the gradient times the factor."""
    if sharding.world == 1:
        return local
    total, factor = sharding.across(sharding.within(local, "sum"), "sum"), sharding.factor
    return factor * local + (total - factor * local).detach()


def globally_each(local: Tensor, sharding: Sharding) -> Tensor:
    """This process's part of a map over the whole batch, with its gradient times the factor."""
    factor = sharding.factor
    return local if factor == 1 else factor * local + ((1 - factor) * local).detach()
