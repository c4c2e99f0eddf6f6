"""Imbalance-aware learning for neural models of physical systems."""

import importlib
from typing import TYPE_CHECKING, Any

import squall._process.startup  # noqa: F401
from squall._process.extras import explain_missing_extra

if TYPE_CHECKING:  # imported on first use, by `__getattr__`
    from squall import data
    from squall.evaluation import RolloutValidation, evaluate
    from squall.integrators import (
        INTEGRATORS,
        discrete_gradient,
        dopri5,
        euler,
        implicit_midpoint,
        increment,
        midpoint,
        next_state,
        rk4,
        rollout,
        substeps,
    )
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
    from squall.runs.emulator import Emulator, load
    from squall.runs.export import export_run
    from squall.runs.trained import open_run
    from squall.systems import SYSTEMS, CahnHilliard, ConvergenceError, KortewegDeVries, ShallowWater, System
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
    "Emulator",
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
    "ShallowWater",
    "System",
    "TrainingSettings",
    "data",
    "discrete_gradient",
    "dopri5",
    "energy_rate",
    "euler",
    "evaluate",
    "export_run",
    "imbalance_aware_loss",
    "imbalance_weights",
    "implicit_midpoint",
    "increment",
    "load",
    "midpoint",
    "next_state",
    "open_run",
    "rk4",
    "rollout",
    "substeps",
    "train",
    "weight_shares",
]

_ROOMS = {
    "data": "",
    "losses": "Accumulation EffectiveFraction ErrorSketch Huber ImbalanceAwareLoss KLBudget LaggedAccumulation "
    "MeanSquaredError Relative Schedule imbalance_aware_loss imbalance_weights weight_shares",
    "systems": "SYSTEMS CahnHilliard ConvergenceError KortewegDeVries ShallowWater System",
    "models": "HNN NODE energy_rate",
    "integrators": "INTEGRATORS discrete_gradient dopri5 euler implicit_midpoint increment midpoint next_state rk4 "
    "rollout substeps",
    "training": "TrainingSettings train",
    "evaluation": "RolloutValidation evaluate",
    "runs": "Emulator export_run load open_run",
}
_ROOM_OF = {name: room for room, names in _ROOMS.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    """Import a room on first use: `squall --help` needs no PyTorch, and the loss needs no extra."""
    with explain_missing_extra():
        if name in _ROOMS:
            return importlib.import_module(f"squall.{name}")
        if name in _ROOM_OF:
            return getattr(importlib.import_module(f"squall.{_ROOM_OF[name]}"), name)
    raise AttributeError(f"module 'squall' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_ROOMS, *__all__})
