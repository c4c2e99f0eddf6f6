"""Imbalance-aware learning for neural models of physical systems."""

from squall import data
from squall.evaluation import RolloutValidation, evaluate
from squall.integrators import euler, midpoint, next_state, rk4, rollout, substeps
from squall.losses import (
    EffectiveFraction,
    ImbalanceAwareLoss,
    KLBudget,
    MeanSquaredError,
    Relative,
    Schedule,
    imbalance_aware_loss,
    imbalance_weights,
)
from squall.models import HNN, NODE
from squall.systems import CahnHilliard, KortewegDeVries, System
from squall.training import TrainingSettings, train

__version__ = "0.1.0"

__all__ = [
    "HNN",
    "NODE",
    "CahnHilliard",
    "EffectiveFraction",
    "ImbalanceAwareLoss",
    "KLBudget",
    "KortewegDeVries",
    "MeanSquaredError",
    "Relative",
    "RolloutValidation",
    "Schedule",
    "System",
    "TrainingSettings",
    "data",
    "euler",
    "evaluate",
    "imbalance_aware_loss",
    "imbalance_weights",
    "midpoint",
    "next_state",
    "rk4",
    "rollout",
    "substeps",
    "train",
]
