"""The loss that a configuration names."""

import math
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from squall.data import Transitions
from squall.data.measure import lengths
from squall.losses import (
    DEFAULT_TEMPERATURE,
    EffectiveFraction,
    ImbalanceAwareLoss,
    KLBudget,
    MeanSquaredError,
    Relative,
)
from squall.losses.rivals import rival
from squall.models.placement import evaluating
from squall.runs.config import ConfigError, LossConfig
from squall.runs.installed import importable
from squall.training.batches import Batches, beside, refuse_without_leads, takes
from squall.training.settings import TrainingSettings

TARGETS = 2**22
"""Most numbers of the training targets that a density is taken from: the rarest 0.1 % of them are 4 000."""


def build_loss(
    config: LossConfig, transitions: Transitions, settings: TrainingSettings, scale: Sequence[float]
) -> nn.Module:
    """The loss of a configuration; residuals of a channel are divided by its `scale` before the loss sees them.

    Raises:
        ConfigError: if the loss cannot be imported or made, or does not fit the training.
    """
    if config.name == "mse":
        return MeanSquaredError(config.error)
    try:
        if config.name == "imbalance-aware":
            loss = _imbalance_aware(config)
            refuse_without_leads(loss, settings)
            return loss
        return _rival(config, Batches(transitions, settings, scale))
    except (ValueError, TypeError, ImportError) as error:
        raise ConfigError(f"the loss '{config.name}' cannot be made: {error}") from error


def _imbalance_aware(config: LossConfig) -> nn.Module:
    rules = {"temperature": float, "kl_budget": KLBudget, "relative": Relative, "effective_fraction": EffectiveFraction}
    names = ("error", "over", "cap", "mean_share", "trim", "winsorize", "differentiate_weights")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    chosen = [rule(getattr(config, name)) for name, rule in rules.items() if getattr(config, name) is not None]
    if chosen:
        options["temperature"] = chosen[0]
    if config.budget_cap is not None:
        rho = DEFAULT_TEMPERATURE.rho if config.kl_budget is None else config.kl_budget
        options["temperature"] = KLBudget(rho, config.budget_cap)
    return ImbalanceAwareLoss(**options)


def _rival(config: LossConfig, batches: Batches) -> nn.Module:
    data = KNOWN_OF_THE_DATA[config.name](batches) if config.name in KNOWN_OF_THE_DATA else ()
    with importable(config.name.rpartition(".")[0] or "squall"):
        loss = rival(config.name, *data, **config.options or {})
    loss = loss if isinstance(loss, nn.Module) else _Function(loss)
    _try(loss, batches)
    return loss


def _try(loss: nn.Module, batches: Batches) -> None:
    """One call, so that a loss which does not fit the data is reported before anything is written."""
    batch = batches.draw(torch.arange(min(2, len(batches.transitions)))).repeated(getattr(loss, "members", 1))
    target = batch.target / batches.unit
    index = {"index": batch.numbers} if takes(loss, "index") else {}
    with torch.no_grad(), evaluating(loss):
        loss(target, target, **beside(loss, batches, torch.device("cpu")), **index)


def _shape(batches: Batches) -> tuple[int, ...]:
    """Of the training samples as the loss sees them, (sample, channel, *space)."""
    return len(batches.transitions), *batches.draw(torch.tensor([0])).target.shape[1:]


def _targets(batches: Batches) -> Float[Tensor, "batch channel *lead_and_space"]:
    """Targets as the loss sees them, of transitions spread evenly over the training."""
    chosen = batches.transitions.evenly(TARGETS // math.prod(_shape(batches)[1:]))
    return batches.draw(chosen).target / batches.unit


def _cells(batches: Batches) -> list[tuple[Float[Tensor, "..."], bool]]:
    """Lengths of cells along each axis of space, and whether it is periodic."""
    source = batches.transitions.source
    along = lengths(source.coordinates, source.description.axes)
    return [(length, end == "periodic") for length, end in zip(along, source.boundary, strict=True)]


KNOWN_OF_THE_DATA: Mapping[str, Callable[[Batches], tuple[Any, ...]]] = MappingProxyType(
    {
        "channel": lambda batches: (batches.transitions.source.channels,),
        "density": lambda batches: (_targets(batches),),
        "rba": lambda batches: (_shape(batches),),
        "regimes": lambda batches: (_targets(batches), _cells(batches)),
        "vrba": lambda batches: (_shape(batches),),
    }
)
"""What a rival must know of the training data."""


class _Function(nn.Module):
    """A loss that is a plain function, with its arguments; the training moves and saves modules."""

    def __init__(self, function: Callable[..., Tensor]) -> None:
        super().__init__()
        self.forward = function
