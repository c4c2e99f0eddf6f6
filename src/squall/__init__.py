"""Imbalance-aware learning for neural models of physical systems."""

import importlib
from typing import TYPE_CHECKING, Any

import squall._process.startup  # noqa: F401
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

if TYPE_CHECKING:  # imported on first use, by `__getattr__`
    from squall import data
    from squall.evaluation import RolloutValidation, evaluate
    from squall.integrators import INTEGRATORS, euler, increment, midpoint, next_state, rk4, rollout, substeps
    from squall.models import HNN, NODE, energy_rate
    from squall.runs.trained import open_run
    from squall.systems import SYSTEMS, CahnHilliard, ConvergenceError, KortewegDeVries, System
    from squall.training import TrainingSettings, train

__version__ = "0.1.0"

__path__.append(f"{__path__[0]}/_moved")  # `squall.sampling` and other import paths of earlier versions

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
    "open_run",
    "rk4",
    "rollout",
    "substeps",
    "train",
    "weight_shares",
]

_HEAVY_ROOMS = {
    "squall.systems": ("SYSTEMS", "CahnHilliard", "ConvergenceError", "KortewegDeVries", "System"),
    "squall.models": ("HNN", "NODE", "energy_rate"),
    "squall.integrators": (
        *("INTEGRATORS", "euler", "increment", "midpoint", "next_state", "rk4", "rollout", "substeps"),
    ),
    "squall.training": ("TrainingSettings", "train"),
    "squall.evaluation": ("RolloutValidation", "evaluate"),
    "squall.runs.trained": ("open_run",),
}


def __getattr__(name: str) -> Any:
    """Import a room on first use: the core needs torch, numpy and jaxtyping alone."""
    if name == "data":
        return importlib.import_module("squall.data")
    for room, names in _HEAVY_ROOMS.items():
        if name in names:
            return getattr(importlib.import_module(room), name)
    raise AttributeError(f"module 'squall' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
