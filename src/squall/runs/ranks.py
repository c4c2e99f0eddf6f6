"""The processes that train one run together, a device each: started, in agreement, stopped together."""

import atexit
import contextlib
import gc
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from torch import distributed

from squall._process.extras import explain_missing_extra
from squall.runs.config import ConfigError, DeviceConfig, difference
from squall.training.sharded import shard

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.loggers.logger import Logger
else:  # slow to import; whoever trains has it imported
    Fabric = Logger = Any

T = TypeVar("T")


class OtherProcessError(RuntimeError):
    """Another process refused or ended, and this one stops with it; `known` if the first process has said it."""

    def __init__(self, message: str, *, known: bool = False) -> None:
        super().__init__(message)
        self.known = known


@explain_missing_extra()
def joined(device: DeviceConfig, loggers: list[Logger]) -> Fabric:
    """Start the processes, or join those that torchrun has started.

    Raises:
        ConfigError: for settings that cannot be used here.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment
    from lightning_fabric.plugins.precision import DoublePrecision

    here, machines = started() or (device.devices, 1)
    ours = not os.environ.get("LT_CLI_USED")  # `fabric run` has started the processes
    options: Any = {"precision": device.precision}
    if device.precision == "64-true" and device.strategy == "fsdp":  # which its strategy takes as an object only
        options = {"plugins": DoublePrecision()}
    elif ours and here * machines == 1:  # Fabric would count the tasks of a SLURM job, and warn wherever it finds srun
        options["plugins"] = LightningEnvironment()
    try:
        fabric = Fabric(
            accelerator=device.accelerator,
            devices=here,
            num_nodes=machines,
            strategy=_strategy(device.strategy, here * machines),
            **options,
            loggers=loggers,
        )
        if ours:
            fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise ConfigError(f"the settings under 'device' cannot be used here: {error}") from error
    atexit.register(_leave)
    return fabric


def _leave() -> None:
    """End the threads of the group: gloo's can abort Python at its end, and Fabric ends those of NCCL alone."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.destroy_process_group()
        gc.collect()  # a sharded model is part of cycles that hold the group


def _strategy(name: str, processes: int) -> Any:
    """`fsdp` as Fabric's strategy for FSDP2; its own `fsdp` is that of before. One process has nothing to share."""
    if name != "fsdp":
        return name
    if processes == 1:
        return "auto"
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    def in_shares(unrolled: Any, mesh: Any) -> Any:
        shard(unrolled.model, mesh["data_parallel"])
        return unrolled

    return ModelParallelStrategy(in_shares, data_parallel_size=processes, tensor_parallel_size=1)


def started() -> tuple[int, int] | None:
    """How many processes torchrun has started on this machine, and on how many machines; None without it."""
    if not (distributed.is_available() and distributed.is_torchelastic_launched()):
        return None
    return int(os.environ["LOCAL_WORLD_SIZE"]), int(os.environ.get("GROUP_WORLD_SIZE", 1))


def refuse_other_count(device: DeviceConfig) -> None:
    """Refuse a number of devices that is not the number of processes that torchrun has started.

    Raises:
        ConfigError: with both numbers.
    """
    there = started()
    if there and device.devices not in (1, there[0]):
        raise ConfigError(
            f"device.devices is {device.devices}, but torchrun started {there[0]} process(es) on this machine: leave "
            "device.devices out, or torchrun"
        )


def is_first() -> bool:
    """Whether this process is the first of those that torchrun or Fabric has started, or the only one."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0) == 0


def agreed(fabric: Fabric, prepare: Callable[[], tuple[T, dict[str, Any]]]) -> T:
    """What `prepare` returns in this process, once it has succeeded in all and described the same in all.

    `prepare` returns a result and a description, nested plain values that must not differ.

    Raises:
        OtherProcessError: with what another process says, or with the difference.
    """
    if fabric.world_size == 1:
        return prepare()[0]
    result, description, failure = None, {}, None
    try:
        result, description = prepare()
    except Exception as error:  # the others must not wait for this process
        failure = error
    reports: list[Any] = [None] * fabric.world_size
    distributed.all_gather_object(reports, (None if failure is None else str(failure), description))
    if failure is not None and fabric.is_global_zero:
        raise failure
    for rank, (message, theirs) in enumerate(reports):
        if message is not None:
            raise OtherProcessError(f"process {rank} of {len(reports)}: {message}", known=not fabric.is_global_zero)
        if lines := difference(reports[0][1], theirs):
            raise OtherProcessError(
                f"process {rank} of {len(reports)} was started for something else than process 0 (0 -> {rank}):\n  "
                + "\n  ".join(lines)
                + "\nGive all processes the same configuration and data",
                known=not fabric.is_global_zero,
            )
    assert result is not None
    return result


@contextlib.contextmanager
def stopping_together() -> Iterator[None]:
    """Raise OtherProcessError where the connection to another process is lost."""
    try:
        yield
    except RuntimeError as error:
        if not (distributed.is_available() and isinstance(error, distributed.DistError)) and "gloo" not in str(error):
            raise
        raise OtherProcessError(
            "another process of this training ended, so all stop; its own message says why. The same command goes on "
            "from the last checkpoint"
        ) from error
