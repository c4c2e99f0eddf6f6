"""Problems that several test files share: small, seeded, of Cahn-Hilliard."""

import copy
from collections.abc import Callable

import torch
from torch import nn

from squall.data import InMemory
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError
from squall.models import HNN, NODE
from squall.systems import CahnHilliard
from squall.training import Checkpoint, Recorder, Validation

SYSTEM = CahnHilliard()

LOSSES: dict[str, Callable[[], nn.Module]] = {
    "mean": MeanSquaredError,
    "largest": lambda: ImbalanceAwareLoss(0.0),
    "temperature": lambda: ImbalanceAwareLoss(50.0),
    "budget": lambda: ImbalanceAwareLoss(KLBudget(0.3)),
    "differentiated": lambda: ImbalanceAwareLoss(50.0, differentiate_weights=True),
}
"""One loss of each kind, made anew for each use: some keep a state."""


def model(seed: int, kind: str = "hnn", dtype: torch.dtype = torch.float64, hidden: int = 6) -> nn.Module:
    """An `hnn` or a `node` with random weights."""
    generator = torch.Generator().manual_seed(seed)
    network = (
        HNN(SYSTEM.structure, hidden, generator=generator) if kind == "hnn" else NODE(1, hidden, generator=generator)
    )
    return network.to(dtype)


def separating(trajectories: int = 4, steps: int = 100, first: int = 60) -> InMemory:
    """Simulated trajectories from the time index `first` on, when the phases separate."""
    states = SYSTEM.simulate(SYSTEM.initial_states(trajectories, torch.Generator().manual_seed(0)), steps)
    return InMemory(states[:, first:], dt=SYSTEM.dt)


class Stops(Recorder):
    """Stops a training once it has done each of some steps, keeps what is saved, and hands back the last of it."""

    def __init__(self, *steps: int, saved: Checkpoint | None = None) -> None:
        self.stops, self.step = list(steps), 0
        self.saves = [] if saved is None else [saved]
        self.best: Checkpoint | None = None

    def resume(self) -> Checkpoint | None:
        return self.saves[-1] if self.saves else None

    def resume_best(self) -> Checkpoint | None:
        return self.best

    def stopping(self) -> bool:
        return bool(self.stops) and self.step >= self.stops[0] and bool(self.stops.pop(0))

    def stepped(self, step: int) -> None:
        self.step = step

    def saved(self, checkpoint: Checkpoint) -> None:
        self.saves.append(copy.deepcopy(checkpoint))

    def improved(self, checkpoint: Checkpoint, validation: Validation) -> None:
        self.best = copy.deepcopy(checkpoint)
