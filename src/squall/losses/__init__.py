"""Losses that weigh every point by how badly it is predicted."""

from squall.losses.accumulate import Accumulation, LaggedAccumulation
from squall.losses.baselines import MeanSquaredError
from squall.losses.errors import Huber, absolute_error, squared_error
from squall.losses.loss import ImbalanceAwareLoss, imbalance_aware_loss
from squall.losses.report import weight_shares
from squall.losses.rules import DEFAULT_TEMPERATURE, EffectiveFraction, Fixed, KLBudget, Relative, Schedule
from squall.losses.sketch import ErrorSketch
from squall.losses.weights import imbalance_weights

__all__ = [
    "DEFAULT_TEMPERATURE",
    "Accumulation",
    "EffectiveFraction",
    "ErrorSketch",
    "Fixed",
    "Huber",
    "ImbalanceAwareLoss",
    "KLBudget",
    "LaggedAccumulation",
    "MeanSquaredError",
    "Relative",
    "Schedule",
    "absolute_error",
    "imbalance_aware_loss",
    "imbalance_weights",
    "squared_error",
    "weight_shares",
]
