"""Problems that several test files share: small, seeded, of Cahn-Hilliard."""

from collections.abc import Callable

import torch
from torch import nn

from squall.data import InMemory
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError
from squall.models import HNN, NODE
from squall.systems import CahnHilliard

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
