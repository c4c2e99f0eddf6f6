"""Neural models that map a state to its rate du/dt or to the next state."""

from squall.models.base import RateModel
from squall.models.fno import FNO
from squall.models.hnn import HNN, energy_rate
from squall.models.node import NODE
from squall.models.unet import UNet

__all__ = ["FNO", "HNN", "NODE", "RateModel", "UNet", "energy_rate"]
