"""Names become objects, here and nowhere else: a configuration turns into all that training and evaluation take."""

import inspect
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

import squall.data
from squall import grid
from squall._process.messages import suggestion
from squall._types import State
from squall.data import Normalization, Source, Split, Transitions
from squall.data.conditions import known
from squall.evaluation.rollouts import RolloutValidation
from squall.evaluation.sphere import is_on_sphere
from squall.integrators import INTEGRATORS, IntegratorLike, discrete_gradient, next_state, rate_between
from squall.models import FNO, HNN, NODE, UNet
from squall.models.inputs import Inputs, join, read_conditions
from squall.models.normalized import Normalized
from squall.models.placement import evaluating, like_model
from squall.runs.config import ConfigError, DataConfig, ModelConfig, RunConfig
from squall.runs.installed import find_source, imported, is_installed
from squall.runs.loss import build_loss
from squall.systems import SYSTEMS, EnergySystem, System
from squall.training.sampling import Sampler, StiffnessAwareSampler, UniformSampler, stiffness_index

INDEX_BLOCK = 2**13
"""Transitions whose stiffness index is computed at a time: a file may be larger than the memory."""


@dataclass(frozen=True)
class Experiment:
    """What a configuration names, as objects; the model is in the precision of the configuration."""

    config: RunConfig
    split: Split
    system: System | None
    normalization: Normalization
    model: nn.Module
    integrator: IntegratorLike

    @property
    def inputs(self) -> Inputs:
        """History and conditions that the model sees."""
        return inputs_of(self.config.data)

    @cached_property
    def transitions(self) -> Transitions:
        return Transitions(self.split.train, self.config.training.unroll, self.inputs.history)

    @cached_property
    def loss(self) -> nn.Module:
        """Made for a training alone: an evaluation of a run imports no loss of somebody else."""
        config = self.config
        return build_loss(config.loss, self.transitions, config.training, self.normalization.std)

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
        if not source.trajectories:
            return None
        picture = bool(self.config.trackers)
        return RolloutValidation(source, self.integrator, self.normalization.std, inputs=self.inputs, picture=picture)


def build(
    config: RunConfig,
    normalization: Normalization | None = None,
    *,
    split: Split | None = None,
    trusts: Callable[[Path | None], bool] = lambda source: True,
) -> Experiment:
    """Objects from names: open the data, divide it, make the model and the integrator.

    Args:
        config: the configuration.
        normalization: that of a trained run; fitted to the training trajectories if left out.
        split: the data, where they are open already.
        trusts: whether a model may be imported from a file that belongs to no installed package.

    Raises:
        ConfigError: at an unknown name, with the known ones, or a model that is not trusted.
        squall.data.DataError: if the file cannot be used.
    """
    split = split or open_data(config)
    source = split.train
    system = system_of(source)
    normalization = normalization or _normalization(config.data, source, system)
    _refuse_strange_model(config.model.name, trusts)
    with torch.random.fork_rng():
        torch.manual_seed(config.training.seed)  # of modules that draw weights when made, or when first called
        model = _model(config, source, system, normalization)
        if config.device.precision == "64-true":
            model.double()
        _try(model, Transitions(source, 1, config.data.history), inputs_of(config.data))
    chosen = next_state if config.model.predicts == "state" else integrator(config.integrator)
    check_energy(chosen, model)
    return Experiment(config, split, system, normalization, model, chosen)


# Data


def _stiffness(transitions: Transitions, normalization: Normalization, floor: float) -> Float[Tensor, " transition"]:
    """The stiffness-aware index of the first step of every transition, of fields in the units that the model sees."""
    std = torch.tensor(normalization.std, dtype=torch.float64).reshape(-1, *[1] * len(transitions.source.space))
    blocks = torch.arange(len(transitions)).split(INDEX_BLOCK)

    def pairs() -> Iterator[tuple[State, State]]:
        for block in blocks:
            states = transitions.windows(block).double() / std
            yield states[:, transitions.history - 1], states[:, transitions.history]

    rms = math.sqrt(sum(u.square().flatten(1).mean(1).sum().item() for u, _ in pairs()) / len(transitions))
    return torch.cat([stiffness_index(u, u_next, transitions.dt, floor * rms) for u, u_next in pairs()])


def open_data(run: RunConfig) -> Split:
    """The data of a run, in memory if they are small, and divided as its configuration says.

    Raises:
        ConfigError: without a path.
        squall.data.DataError: if the file cannot be used.
    """
    config = run.data
    if not config.path:
        raise ConfigError(
            "data.path is not set: name a file of trajectories, such as one that "
            "`squall simulate cahn-hilliard --out ch.hdf5` writes"
        )
    file = squall.data.open(config.path)
    for name in config.inputs:
        known(name, file.conditions)
    _warn_of_what_is_left_out(file, config.inputs)
    source = squall.data.load(file, limit_bytes=int(config.memory_gib * 2**30))
    split = squall.data.split(
        source,
        validation=config.validation,
        test=config.test,
        gap=run.training.unroll if config.gap is None else config.gap,
        by=None if config.split == "auto" else config.split,
    )
    _refuse_short_parts(run, split)
    return split


def with_inputs_named(run: RunConfig) -> RunConfig:
    """The configuration with the names that `data.inputs: all` stands for.

    Raises:
        squall.data.DataError: if the file cannot be used.
    """
    if run.data.inputs != "all" or not run.data.path:
        return run
    names = [condition.name for condition in squall.data.open(run.data.path).conditions]
    if not names:
        raise ConfigError(f"data.inputs is 'all', but {run.data.path} has no parameters, static fields or forcings")
    return replace(run, data=replace(run.data, inputs=names))


def inputs_of(config: DataConfig) -> Inputs:
    """History and conditions that the model sees."""
    return Inputs(config.history, tuple(config.inputs))


def _refuse_short_parts(config: RunConfig, split: Split) -> None:
    """A rollout starts after the history, and a training step needs the states that it is compared with."""
    history, unroll = config.data.history, config.training.unroll
    for name, part in split._asdict().items():
        needed = history + (unroll if name == "train" else 1)
        if part.trajectories and part.shape[1] < needed:
            later = f"training.unroll is {unroll}" if name == "train" else "a rollout takes a step"
            raise ConfigError(
                f"data.history is {history} and {later}, which takes {needed} states, but a trajectory of the part "
                f"'{name}' has {part.shape[1]}: choose fewer, or make that part longer"
            )
    if config.training.patience and not split.validation.trajectories:
        raise ConfigError("training.patience is set, but data.validation is 0: there is no score to wait for")


def _warn_of_what_is_left_out(source: Source, inputs: Sequence[str]) -> None:
    """Forcings and coefficients that the model does not see may decide what it can learn."""
    unseen = [c for c in source.conditions if c.name not in inputs]
    parts = {
        "fields that are constant in time": [c.name for c in unseen if c.kind == "static"],
        "fields that are forcings": [c.name for c in unseen if c.kind == "forcing" and max(c.shape[3:]) > 1],
        "scalars that vary in time or between trajectories": [
            c.name for c in unseen if max(c.shape[3:]) == 1 and max(c.shape[:2]) > 1
        ],
    }
    listed = [f"the {what}: {', '.join(names)}" for what, names in parts.items() if names]
    if listed:
        warnings.warn(
            f"{getattr(source, 'path', source.name)}: the model sees none of {'; '.join(listed)}; data.inputs names "
            "those that it sees",
            stacklevel=2,
        )


def system_of(source: Source) -> System | None:
    """The system that a file of squall was simulated from; None for all other data."""
    name = str(source.provenance.get("system"))
    return SYSTEMS[name].from_parameters(source.parameters) if name in SYSTEMS else None


def _is_standardized(config: DataConfig, system: System | None) -> bool:
    return config.normalization == "standard" or (config.normalization == "auto" and system is None)


def _normalization(config: DataConfig, training: Source, system: System | None) -> Normalization:
    if _is_standardized(config, system):
        return Normalization.fit(training)
    return Normalization.identity(training.channels)


def condition_channels(source: Source, names: Sequence[str]) -> int:
    """How many channels some conditions have together."""
    return sum(known(name, source.conditions).shape[2] for name in names)


def condition_statistics(source: Source, names: Sequence[str]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of the channels of some conditions; 1 for the deviation of a constant."""
    means, stds = [], []
    for condition in (known(name, source.conditions) for name in names):
        rows = range(condition.shape[0])
        pieces = [source.condition(condition.name, [row], [0], source.shape[1]).double() for row in rows]
        flat = [piece.transpose(1, 2).flatten(2)[0] for piece in pieces]  # (condition, number)
        each = torch.stack([x.mean(1) for x in flat])
        variance = torch.stack([x.var(1, correction=0) for x in flat]).mean(0) + each.var(0, correction=0)
        scale = each.abs().amax(0) * 8 * torch.finfo(source.dtype).eps  # below it, a deviation is rounding
        std = variance.sqrt()
        means += each.mean(0).tolist()
        stds += torch.where(std <= scale, 1.0, std).tolist()
    return means, stds


# Model, integrator, loss


def _node(config: RunConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    return NODE(source.channels, config.model.hidden, dimensions=len(source.space), generator=generator)


def _hnn(config: RunConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    if source.channels != 1:
        raise ConfigError(
            f"model.name is 'hnn', which takes one scalar field, but the data have {source.channels}: "
            f"{', '.join(source.fields)}. Use 'node' or a module of your own"
        )
    return HNN(_structure(config.model, source, system), config.model.hidden, len(source.space), generator=generator)


def _unet(config: RunConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    halvings = int(math.log2(max(2, min(source.space) / 4)))  # four points are left of the shortest axis
    sizes: dict[str, Any] = {"levels": min(3, halvings)}
    if _covers_the_sphere(source):
        sizes["boundary"] = ("pole", "periodic")
    elif is_on_sphere(source) and "pole" in config.model.arguments.get("boundary", ()):
        (south, north), (west, east) = ((min(axis), max(axis)) for axis in source.coordinates)
        raise ConfigError(
            f"model.arguments.boundary has a 'pole', but the data are a part of the sphere, latitudes {south:g} to "
            f"{north:g} and longitudes {west:g} to {east:g}: leave the boundary out"
        )
    return _on_grid(UNet, sizes, config, source, generator)


def _covers_the_sphere(source: Source) -> bool:
    """Whether the axes are latitude, to within a step of both poles, and the whole circle of longitude."""
    if not is_on_sphere(source) or source.boundary[1] != "periodic":
        return False
    latitude = np.sort(source.coordinates[0])
    return bool(max(90 + latitude[0], 90 - latitude[-1]) < np.diff(latitude).max())


def _fno(config: RunConfig, source: Source, system: System | None, generator: torch.Generator) -> nn.Module:
    modes = [min(16, points) for points in source.space]  # 16 as Li et al. (2021) on Burgers' equation
    return _on_grid(FNO, {"modes": modes}, config, source, generator)


FROM_DATA = {"channels", "dimensions", "conditions", "history", "out_channels", "film", "generator"}
"""Arguments of the networks on a grid that the data and the configuration decide."""


def _on_grid(
    network: type[nn.Module], sizes: Mapping[str, Any], config: RunConfig, source: Source, generator: torch.Generator
) -> nn.Module:
    """A U-Net or FNO with the channels, axes and boundaries of the data."""
    name, given = config.model.name, config.model.arguments
    allowed = [key for key in inspect.signature(network).parameters if key not in FROM_DATA]
    if unknown := [key for key in given if key not in allowed]:
        hint = suggestion(unknown[0], allowed)
        raise ConfigError(f"model.arguments.{unknown[0]} is unknown to '{name}': {hint}")
    boundary = ["wall" if name == "mixed" else name for name in source.boundary]
    options = {"boundary": boundary, **sizes, **given, "generator": generator, "dimensions": len(source.space)}
    seen = {"conditions": condition_channels(source, config.data.inputs), "history": config.data.history}
    try:
        return network(source.channels, **seen, **options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.arguments do not fit '{name}': {error}") from error


def _structure(config: ModelConfig, source: Source, system: System | None) -> Callable[[Tensor], Tensor]:
    if config.structure == "auto":
        if isinstance(system, EnergySystem):
            return system.structure
        raise ConfigError(
            "model.structure is 'auto', but the data name no system with a structure: choose 'laplacian' (dissipative) "
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


MODELS: Mapping[str, Callable[[RunConfig, Source, System | None, torch.Generator], nn.Module]] = MappingProxyType(
    {"node": _node, "hnn": _hnn, "unet": _unet, "fno": _fno}
)
"""Models by name; any other name is the import path of a module."""

MISFITS = (RuntimeError, TypeError, ValueError, IndexError)
"""What models raise for an input of a shape that they cannot take."""

OF_RATES = tuple(name for name in INTEGRATORS if name != next_state.name)
"""The names of the integrators of a rate."""

PRESENT_RATE = ("node", "hnn")
"""Those that map the present state alone, to its rate."""


def _model(config: RunConfig, source: Source, system: System | None, normalization: Normalization) -> nn.Module:
    generator, name = torch.Generator().manual_seed(config.training.seed), config.model.name
    if name != "hnn" and config.model.structure != "auto":
        raise ConfigError(f"model.structure is set, but only 'hnn' has one, not '{name}'")
    if name in PRESENT_RATE:
        _refuse_what_it_cannot(config)
    _warn_of_edges(name, source)
    model = MODELS[name](config, source, system, generator) if name in MODELS else _imported(config.model)
    return _in_units(model, config, source, normalization, _is_standardized(config.data, system))


def _refuse_what_it_cannot(config: RunConfig) -> None:
    """NODE and HNN++ map the present state to its rate."""
    name = config.model.name
    if config.model.predicts != "rate":
        raise ConfigError(f"model.predicts is 'state', but '{name}' predicts the rate")
    if config.model.arguments:
        raise ConfigError(f"model.arguments are for a module of your own, 'unet' and 'fno', not for '{name}'")
    key = "history" if config.data.history > 1 else "inputs" if config.data.inputs else None
    if key is not None:
        raise ConfigError(
            f"data.{key} is set, but '{name}' sees the present state alone: use 'unet', 'fno' or a module of your own"
        )


def _in_units(
    model: nn.Module, config: RunConfig, source: Source, normalization: Normalization, standardized: bool
) -> nn.Module:
    """The model in the units of the data."""
    data, residual, mask = config.data, config.model.residual, source.mask
    conditions = condition_statistics(source, data.inputs) if standardized and data.inputs else ([], [])
    if normalization == Normalization.identity(source.channels) and mask is None and not residual and not conditions[0]:
        return model
    if data.inputs and not conditions[0]:  # as they are
        channels = condition_channels(source, data.inputs)
        conditions = [0.0] * channels, [1.0] * channels
    return Normalized(
        model,
        normalization.mean,
        normalization.std,
        predicts=config.model.predicts,
        residual=residual,
        history=data.history,
        condition_mean=conditions[0],
        condition_std=conditions[1],
        mask=mask,
    )


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
    if not config.name.rpartition(".")[0]:
        raise ConfigError(
            f"model.name is '{config.name}', but must be one of {', '.join(MODELS)} or the import path of a "
            "torch.nn.Module, such as my_package.MyModel"
        )
    try:
        model_class = imported(config.name)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
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
    """The models of squall see equally spaced points, and NODE and HNN++ every axis as a ring."""
    if name == "unet" and _covers_the_sphere(source):  # Gaussian latitudes are equally spaced but for a few per cent
        return
    for axis, (boundary, spacing) in enumerate(zip(source.boundary, source.spacing, strict=True)):
        ring = boundary == "periodic" or name not in PRESENT_RATE
        if name in MODELS and (spacing is None or not ring):
            what = "has unequally spaced points" if ring else f"is '{boundary}'"
            shape = "equally spaced ring" if name in PRESENT_RATE else "axis of equally spaced points"
            warnings.warn(f"space axis {axis} {what}, but '{name}' treats it as an {shape}", stacklevel=2)


def _try(model: nn.Module, transitions: Transitions, inputs: Inputs) -> None:
    """One pass over two states, so that an incompatible model is reported before anything is written."""
    both = torch.tensor([0, len(transitions) - 1])
    window = transitions.windows(both)[:, : inputs.history]
    trajectories, starts = transitions.locate(both)
    conditions = read_conditions(transitions.source, inputs.conditions, trajectories, starts + inputs.history - 1, 1)
    u, x = window[:, -1], join(window, None if conditions is None else conditions[:, 0])
    try:
        shape = output_shape(model, x)
    except MISFITS as error:
        raise ConfigError(f"the model cannot take states of shape {tuple(x.shape)}: {error}") from error
    if shape != tuple(u.shape):
        raise ConfigError(
            f"the model maps states of shape {tuple(x.shape)} to {shape}, but must return {tuple(u.shape)}, "
            "(batch, channel, *space)"
        )


def output_shape(model: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Of what a model makes of an input; raises one of `MISFITS` where it cannot take it."""
    with torch.no_grad(), evaluating(model):
        return tuple(model(like_model(model, x)).shape)


def integrator(name: str) -> IntegratorLike:
    """An integrator by its name.

    Raises:
        ConfigError: with the known names.
    """
    if name not in OF_RATES:
        raise ConfigError(f"integrator is '{name}', but must be one of: {', '.join(OF_RATES)}")
    return INTEGRATORS[name]


def check_energy(chosen: IntegratorLike, model: nn.Module) -> None:
    """Refuse a discrete gradient of a model without an energy.

    Raises:
        ConfigError: naming the models that have one.
    """
    try:
        if chosen is discrete_gradient:
            rate_between(model.model if isinstance(model, Normalized) else model)
    except TypeError as error:
        raise ConfigError(f"integrator: {error}") from None
