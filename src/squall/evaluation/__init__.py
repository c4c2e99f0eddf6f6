"""How well a model predicts: rollouts, one-step errors, regimes, stability of the learned step."""

from squall.evaluation.diagnosis import Unevenness, change, errors
from squall.evaluation.growth import growth_factor, growth_factors
from squall.evaluation.regimes import REGIMES, RegimeThresholds, regime_thresholds
from squall.evaluation.rollouts import Evaluation, Physics, RolloutValidation, evaluate, evaluate_each, persistence
from squall.evaluation.scores import Scoring

__all__ = [
    "REGIMES",
    "Evaluation",
    "Physics",
    "RegimeThresholds",
    "RolloutValidation",
    "Scoring",
    "Unevenness",
    "change",
    "errors",
    "evaluate",
    "evaluate_each",
    "growth_factor",
    "growth_factors",
    "persistence",
    "regime_thresholds",
]
