"""Imbalance-aware learning for neural models of physical systems."""

from squall import data
from squall.evaluation import RolloutValidation, evaluate
from squall.integrators import INTEGRATORS, euler, increment, midpoint, next_state, rk4, rollout, substeps
from squall.losses import (
    Accumulation,
    EffectiveFraction,
    ErrorSketch,
    Huber,
    ImbalanceAwareLoss,
    KLBudget,
    LaggedAccumulation,
    MeanSquaredError,
    Relative,
    Schedule,
    imbalance_aware_loss,
    imbalance_weights,
    weight_shares,
)
from squall.models import HNN, NODE, energy_rate
from squall.systems import SYSTEMS, CahnHilliard, ConvergenceError, KortewegDeVries, System
from squall.training import TrainingSettings, train

__version__ = "0.1.0"

__all__ = [
    "HNN",
    "INTEGRATORS",
    "NODE",
    "SYSTEMS",
    "Accumulation",
    "CahnHilliard",
    "ConvergenceError",
    "EffectiveFraction",
    "ErrorSketch",
    "Huber",
    "ImbalanceAwareLoss",
    "KLBudget",
    "KortewegDeVries",
    "LaggedAccumulation",
    "MeanSquaredError",
    "Relative",
    "RolloutValidation",
    "Schedule",
    "System",
    "TrainingSettings",
    "data",
    "energy_rate",
    "euler",
    "evaluate",
    "imbalance_aware_loss",
    "imbalance_weights",
    "increment",
    "midpoint",
    "next_state",
    "rk4",
    "rollout",
    "substeps",
    "train",
    "weight_shares",
]
