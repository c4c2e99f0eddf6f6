"""How long the trainings of a study take, measured before they begin."""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from squall._process.messages import counted
from squall.runs.config import OWN_LOSSES, ConfigError, flat, to_dict
from squall.runs.train import run_together
from squall.study.worker import Task
from squall.training.loop import Recorder

STEPS = 20
"""Steps that a measurement takes; the first quarter is left out, in which functions are compiled."""


def refuse_too_long(batches: Sequence[Sequence[Task]], workers: int, hours: float) -> None:
    """Refuse trainings that need more time than there is.

    A few steps of every kind of batch are timed, in a folder that is removed. The estimate is of the steps alone,
    without validation and evaluation, as if all cores were free.

    Args:
        batches: trials that are trained as one, in the order in which they begin.
        workers: how many batches are trained at a time.
        hours: the time there is.

    Raises:
        ConfigError: with the estimate.
    """
    costs: dict[str, float] = {}
    seconds = 0.0
    for batch in batches:
        kind = _kind(batch)
        if kind not in costs:
            costs[kind] = _seconds_per_step(batch)
        seconds += costs[kind] * batch[0].config.training.steps
    needed = seconds / 3600 / max(1, min(workers, len(batches)))
    if needed > hours:
        raise ConfigError(
            f"the {counted(sum(map(len, batches)), 'trial')} that are not done need about {needed:.2g} hours of "
            f"training with {counted(workers, 'worker')} (from {STEPS} steps of each kind; validation and "
            f"evaluation come on top), but --hours is {hours:g}: take fewer --grids, seeds or training.steps, take "
            "more --workers, or leave --hours out"
        )


def _kind(batch: Sequence[Task]) -> str:
    """The same for batches whose steps cost the same."""
    config = batch[0].config
    free = ("training.seed", "training.steps", "training.learning_rate", "sampling.", "loss.")
    values = {key: value for key, value in flat(to_dict(config)).items() if not key.startswith(free)}
    loss = "" if config.loss.name in OWN_LOSSES else config.loss.name
    return repr((sorted(values.items()), loss, len(batch)))


class _Clock(Recorder):
    """Notes when steps end, and stops the training after a few."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def stepped(self, step: int) -> None:
        self.ends.append(time.perf_counter())

    def stopping(self) -> bool:
        return len(self.ends) >= STEPS


def _seconds_per_step(batch: Sequence[Task]) -> float:
    clock = _Clock()
    with tempfile.TemporaryDirectory() as folder:
        requested = [(task.config, Path(folder) / str(i)) for i, task in enumerate(batch)]
        run_together(requested, clock, stiffness=lambda config: False)
    ends = clock.ends[len(clock.ends) // 4 :]
    return (ends[-1] - ends[0]) / (len(ends) - 1) if len(ends) > 1 else 0.0
