"""The loss that a configuration names."""

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from squall.data import Transitions
from squall.losses import (
    DEFAULT_TEMPERATURE,
    EffectiveFraction,
    ImbalanceAwareLoss,
    KLBudget,
    MeanSquaredError,
    Relative,
)
from squall.losses.rivals import rival
from squall.runs.config import ConfigError, LossConfig
from squall.runs.installed import installed_only, is_installed, working_folder_importable
from squall.training.loop import Pairs
from squall.training.state import Residual

__all__ = ["build_loss"]

TARGETS = 2**22
"""Most numbers of the training targets that a density is taken from."""


def build_loss(config: LossConfig, transitions: Transitions, residual: Residual, scale: Sequence[float]) -> nn.Module:
    """The loss of a configuration.

    Args:
        config: its name and settings.
        transitions: the training pairs, which some rivals must know.
        residual: what the loss compares.
        scale: one number per channel, by which residuals are divided before the loss sees them.

    Raises:
        ConfigError: if the loss cannot be imported or made, or does not fit the training.
    """
    if config.name == "mse":
        return MeanSquaredError(config.error)
    try:
        if config.name == "imbalance-aware":
            return _imbalance_aware(config)
        return _rival(config, transitions, residual, scale)
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the loss '{config.name}' cannot be made: {error}") from error


def _imbalance_aware(config: LossConfig) -> nn.Module:
    rules = {
        "temperature": float,
        "kl_budget": KLBudget,
        "relative": Relative,
        "effective_fraction": EffectiveFraction,
    }
    names = ("error", "over", "cap", "mean_share", "trim", "winsorize", "differentiate_weights")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    chosen = [rule(getattr(config, name)) for name, rule in rules.items() if getattr(config, name) is not None]
    if chosen:
        options["temperature"] = chosen[0]
    if config.budget_cap is not None:
        rho = DEFAULT_TEMPERATURE.rho if config.kl_budget is None else config.kl_budget
        options["temperature"] = KLBudget(rho, config.budget_cap)
    return ImbalanceAwareLoss(**options)


def _rival(config: LossConfig, transitions: Transitions, residual: Residual, scale: Sequence[float]) -> nn.Module:
    pairs = Pairs(transitions, residual, scale)
    data = (KNOWN_OF_THE_DATA[config.name](pairs),) if config.name in KNOWN_OF_THE_DATA else ()
    module = config.name.rpartition(".")[0]
    with installed_only() if not module or is_installed(module) else working_folder_importable():
        loss = rival(config.name, *data, **config.options or {})
    if "index" in inspect.signature(loss.forward if isinstance(loss, nn.Module) else loss).parameters:
        raise ConfigError(
            "it remembers every training sample and takes their numbers (index), which `squall train` does not hand to "
            "a loss. Use it in a loop of your own: loss(prediction, target, index=index)"
        )
    return loss if isinstance(loss, nn.Module) else _Function(loss)


def _targets(pairs: Pairs) -> Tensor:
    """Targets as the loss sees them, of transitions spread evenly over the training."""
    count, numbers = len(pairs.transitions), math.prod(pairs.transitions.source.shape[2:])
    chosen = torch.linspace(0, count - 1, max(1, min(count, TARGETS // numbers))).round().long()
    return pairs.fetch(chosen)[1] / pairs.unit


KNOWN_OF_THE_DATA: Mapping[str, Callable[[Pairs], Any]] = MappingProxyType(
    {
        "channel": lambda pairs: pairs.transitions.source.channels,
        "density": _targets,
        "rba": lambda pairs: (len(pairs.transitions), *pairs.transitions.source.shape[2:]),
        "vrba": lambda pairs: (len(pairs.transitions), *pairs.transitions.source.shape[2:]),
    }
)
"""What a rival must know of the training data."""


class _Function(nn.Module):
    """A loss that is a plain function; the training moves and saves modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return self.function(prediction, target)
