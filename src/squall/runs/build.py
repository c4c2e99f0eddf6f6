"""Names become objects, here and nowhere else: a configuration turns into all that training and evaluation take."""

import importlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import squall.data
from squall import grid
from squall._types import State
from squall.data import Normalization, Source, Split, Transitions
from squall.evaluation.rollouts import RolloutValidation
from squall.integrators import INTEGRATORS, IntegratorLike, next_state
from squall.losses import (
    DEFAULT_TEMPERATURE,
    EffectiveFraction,
    ImbalanceAwareLoss,
    KLBudget,
    MeanSquaredError,
    Relative,
)
from squall.models import HNN, NODE
from squall.models.normalized import Normalized
from squall.models.placement import evaluating, like_model
from squall.runs.config import ConfigError, DataConfig, LossConfig, ModelConfig, RunConfig
from squall.runs.installed import find_source, installed_only, is_installed, working_folder_importable
from squall.systems import SYSTEMS, System
from squall.training.sampling import Sampler, StiffnessAwareSampler, UniformSampler, stiffness_index

__all__ = ["Experiment", "build", "integrator", "model_source", "system_of"]

INDEX_BLOCK = 2**13
"""Transitions whose stiffness index is computed at a time."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration names, as objects; the model is in the precision of the configuration."""

    config: RunConfig
    split: Split
    system: System | None
    normalization: Normalization
    model: nn.Module
    integrator: IntegratorLike
    loss: nn.Module

    @cached_property
    def transitions(self) -> Transitions:
        return Transitions(self.split.train)

    @cached_property
    def sampler(self) -> Sampler:
        config, training = self.config.sampling, self.config.training
        if config.name == "uniform":
            return UniformSampler(len(self.transitions), training.batch, training.seed)
        index = _stiffness(self.transitions, self.normalization, config.floor)
        return StiffnessAwareSampler(index, training.batch, config.fraction, config.share, training.seed)

    @property
    def substeps(self) -> Int[Tensor, " transition"] | None:
        """How many steps cover dt, for every transition; None if one does."""
        if not isinstance(self.sampler, StiffnessAwareSampler):
            return None
        return 1 + self.sampler.is_stiff * (self.config.sampling.substeps - 1)

    @property
    def validation(self) -> RolloutValidation | None:
        source = self.split.validation
        return RolloutValidation(source, self.integrator, self.normalization.std) if source.trajectories else None


def build(
    config: RunConfig,
    normalization: Normalization | None = None,
    *,
    split: Split | None = None,
    trusts: Callable[[Path | None], bool] = lambda source: True,
) -> Experiment:
    """Objects from names: open the data, divide it, make the model, the integrator and the loss.

    Args:
        config: the configuration.
        normalization: that of a trained run; fitted to the training trajectories if left out.
        split: the data, where they are open already.
        trusts: whether a model may be imported from a file that belongs to no installed package.

    Raises:
        ConfigError: at an unknown name, with the known ones, or a model that is not trusted.
        squall.data.DataError: if the file cannot be used.
    """
    split = split or _open(config.data)
    source = split.train
    _warn_of_equal_points(source)
    system = system_of(source)
    normalization = normalization or _normalization(config.data, source, system)
    _refuse_strange_model(config.model.name, trusts)
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)  # of modules that draw weights when made, or when first called
        model = _model(config, source, system, normalization)
        if config.device.precision == "64-true":
            model.double()
        _try(model, source)
    chosen = next_state if config.model.predicts == "state" else integrator(config.integrator)
    return Experiment(config, split, system, normalization, model, chosen, _loss(config.loss))


# Data


def _stiffness(transitions: Transitions, normalization: Normalization, floor: float) -> Float[Tensor, " transition"]:
    """The stiffness-aware index of every transition, of fields in the units that the model sees."""
    std = torch.tensor(normalization.std, dtype=torch.float64).reshape(-1, *[1] * len(transitions.source.space))
    blocks = torch.arange(len(transitions)).split(INDEX_BLOCK)

    def pairs() -> Iterator[tuple[State, State]]:
        for block in blocks:
            u, u_next = transitions.fetch(block)
            yield u.double() / std, u_next.double() / std

    rms = math.sqrt(sum(u.square().flatten(1).mean(1).sum().item() for u, _ in pairs()) / len(transitions))
    return torch.cat([stiffness_index(u, u_next, transitions.dt, floor * rms) for u, u_next in pairs()])


def _open(config: DataConfig) -> Split:
    if not config.path:
        raise ConfigError(
            "data.path is not set: name an HDF5 file in The Well's layout, such as one that "
            "`squall simulate cahn-hilliard --out ch.hdf5` writes"
        )
    file = squall.data.open(config.path)
    _warn_of_what_is_left_out(file)
    source = squall.data.load(file, limit_bytes=int(config.memory_gib * 2**30))
    return squall.data.split(source, validation=config.validation, test=config.test)


def _warn_of_what_is_left_out(source: Source) -> None:
    """Forcings and coefficients that the model does not see may decide what it can learn."""
    parts = {
        "fields that are constant in time": [c.name for c in source.conditions if c.kind == "static"],
        "fields that are forcings": [c.name for c in source.conditions if c.kind == "forcing" and max(c.shape[3:]) > 1],
        "scalars that vary in time or between trajectories": [
            c.name for c in source.conditions if max(c.shape[3:]) == 1 and max(c.shape[:2]) > 1
        ],
    }
    listed = [f"the {what}: {', '.join(names)}" for what, names in parts.items() if names]
    if listed:
        warnings.warn(
            f"{getattr(source, 'path', source.name)}: the model sees none of {'; '.join(listed)}", stacklevel=2
        )


def _warn_of_equal_points(source: Source) -> None:
    """Masks and areas are known of the data, but neither the loss nor the errors of a run use them yet."""
    parts = {
        "masked points count like all others, with the mean of their field": source.mask is not None,
        "cells count alike, whatever their area": source.measure is not None,
    }
    listed = [text for text, there in parts.items() if there]
    if listed:
        warnings.warn(f"{source.name}: in the loss and in the errors, {' and '.join(listed)}", stacklevel=3)


def system_of(source: Source) -> System | None:
    """The system that a file of squall was simulated from; None for all other data."""
    name = str(source.provenance.get("system"))
    return SYSTEMS[name].from_parameters(source.parameters) if name in SYSTEMS else None


def _normalization(config: DataConfig, training: Source, system: System | None) -> Normalization:
    if config.normalization == "none" or (config.normalization == "auto" and system is not None):
        return Normalization.identity(training.channels)
    return Normalization.fit(training)


# Model, integrator, loss


def _node(config: ModelConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    return NODE(source.channels, config.hidden, dimensions=len(source.space), generator=generator)


def _hnn(config: ModelConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    if source.channels != 1:
        raise ConfigError(
            f"model.name is 'hnn', which takes one scalar field, but the data have {source.channels}: "
            f"{', '.join(source.fields)}. Use 'node' or a module of your own"
        )
    return HNN(_structure(config, source, system), config.hidden, len(source.space), generator=generator)


def _structure(config: ModelConfig, source: Source, system: System | None) -> Callable[[Tensor], Tensor]:
    if config.structure == "auto":
        if system is not None:
            return system.structure
        raise ConfigError(
            "model.structure is 'auto', but the data name no system of squall: choose 'laplacian' (dissipative) "
            "or 'central-difference' (conservative)"
        )
    if len(source.space) != 1:
        raise ConfigError(
            f"model.structure is '{config.structure}', which takes one space axis, got {len(source.space)}"
        )
    dx = source.spacing[0]
    if dx is None:
        raise ConfigError(f"model.structure is '{config.structure}', which takes equally spaced points")
    operator = {"laplacian": grid.laplacian, "central-difference": grid.central_difference}[config.structure]
    return lambda v: operator(v, dx)


MODELS: Mapping[str, Callable[[ModelConfig, Source, System | None, torch.Generator], nn.Module]] = MappingProxyType(
    {"node": _node, "hnn": _hnn}
)
"""Models by name; any other name is the import path of a module."""


def _model(config: RunConfig, source: Source, system: System | None, normalization: Normalization) -> nn.Module:
    generator = torch.Generator().manual_seed(config.training.seed)
    if config.model.name != "hnn" and config.model.structure != "auto":
        raise ConfigError(f"model.structure is set, but only 'hnn' has one, not '{config.model.name}'")
    if config.model.name in MODELS:
        if config.model.predicts != "rate":
            raise ConfigError(f"model.predicts is 'state', but '{config.model.name}' predicts the rate")
        if config.model.arguments:
            raise ConfigError(f"model.arguments are for a module of your own, not for '{config.model.name}'")
        _warn_of_edges(config.model.name, source)
        model = MODELS[config.model.name](config.model, source, system, generator)
    else:
        model = _imported(config.model)
    if normalization == Normalization.identity(source.channels):
        return model
    return Normalized(model, normalization.mean, normalization.std, predicts=config.model.predicts)


def model_source(name: str) -> Path | None:
    """The file of a model that is in no installed package; None for all other models."""
    module = name.rpartition(".")[0]
    return None if name in MODELS or not module or is_installed(module) else find_source(module)


def _refuse_strange_model(name: str, trusts: Callable[[Path | None], bool]) -> None:
    """Before anything is imported: what a run folder names may be any code of this machine."""
    module = name.rpartition(".")[0]
    if name in MODELS or not module or is_installed(module):
        return
    source = find_source(module)
    if not trusts(source):
        where = f"comes from {source}, not from an installed package" if source else "is in no installed package"
        raise ConfigError(
            f"the model '{name}' {where}, and nothing shows that you trained this run on this machine with that file. "
            "Its code would run: if you trust it, say so by --trust (in Python, open_run(..., trust=True) or "
            "load(..., trust=True))"
        )


def _imported(config: ModelConfig) -> nn.Module:
    """A module by its import path, of an installed package or of the user's own."""
    module, _, name = config.name.rpartition(".")
    if not module:
        raise ConfigError(
            f"model.name is '{config.name}', but must be one of {', '.join(MODELS)} or the import path of a "
            "torch.nn.Module, such as my_package.MyModel"
        )
    try:
        if is_installed(module):
            with installed_only():
                model_class = getattr(importlib.import_module(module), name)
        else:
            with working_folder_importable():
                model_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:  # the last two: a name such as '..x'
        raise ConfigError(f"model.name is '{config.name}', which cannot be imported: {error}") from error
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise ConfigError(f"model.name is '{config.name}', which is not a class of torch.nn.Module")
    try:
        model = model_class(**config.arguments)
    except TypeError as error:
        raise ConfigError(f"model.arguments do not fit {config.name}: {error}") from error
    if not isinstance(model, nn.Module):
        raise ConfigError(f"model.name is '{config.name}', which makes a {type(model).__name__}, not a torch.nn.Module")
    return model


def _warn_of_edges(name: str, source: Source) -> None:
    """The models of squall see every axis as a ring of equally spaced points."""
    for axis, (boundary, spacing) in enumerate(zip(source.boundary, source.spacing, strict=True)):
        if boundary != "periodic" or spacing is None:
            what = f"is '{boundary}'" if boundary != "periodic" else "has unequally spaced points"
            warnings.warn(f"space axis {axis} {what}, but '{name}' treats it as an equally spaced ring", stacklevel=2)


def _try(model: nn.Module, source: Source) -> None:
    """One pass over two states, so that an incompatible model is reported before anything is written."""
    u = source.windows([0, 0], [0, source.steps], 1)[:, 0]
    try:
        with torch.no_grad(), evaluating(model):
            shape = tuple(model(like_model(model, u)).shape)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise ConfigError(f"the model cannot take states of shape {tuple(u.shape)}: {error}") from error
    if shape != tuple(u.shape):
        raise ConfigError(
            f"the model maps states of shape {tuple(u.shape)} to {shape}, but must keep the shape "
            "(batch, channel, *space)"
        )


def integrator(name: str) -> IntegratorLike:
    """An integrator by its name.

    Raises:
        ConfigError: with the known names.
    """
    known = [known for known in INTEGRATORS if known != next_state.name]
    if name not in known:
        raise ConfigError(f"integrator is '{name}', but must be one of: {', '.join(known)}")
    return INTEGRATORS[name]


def _loss(config: LossConfig) -> nn.Module:
    if config.name == "mse":
        return MeanSquaredError(config.error)
    rules = {
        "temperature": float,
        "kl_budget": KLBudget,
        "relative": Relative,
        "effective_fraction": EffectiveFraction,
    }
    names = ("error", "over", "cap", "mean_share", "trim", "winsorize", "differentiate_weights")
    options: dict[str, Any] = {name: getattr(config, name) for name in names}
    try:
        chosen = [rule(getattr(config, name)) for name, rule in rules.items() if getattr(config, name) is not None]
        if chosen:
            options["temperature"] = chosen[0]
        if config.budget_cap is not None:
            rho = DEFAULT_TEMPERATURE.rho if config.kl_budget is None else config.kl_budget
            options["temperature"] = KLBudget(rho, config.budget_cap)
        return ImbalanceAwareLoss(**options)
    except ValueError as error:
        raise ConfigError(f"the loss cannot be made: {error}") from error
