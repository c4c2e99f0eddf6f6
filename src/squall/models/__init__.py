"""Neural models that map a state to its rate du/dt."""

from squall.models.base import RateModel
from squall.models.hnn import HNN, energy_rate
from squall.models.node import NODE

__all__ = ["HNN", "NODE", "RateModel", "energy_rate"]
