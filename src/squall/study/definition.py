"""A study: grids of runs in one YAML.

A trial is a run configuration made of `base`, one variant of every axis of a grid, and a seed. Trials of the same
configuration are one run, in however many grids they stand.
"""

import dataclasses
import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

from squall._process.documents import DocumentError, load_yaml
from squall._process.messages import suggestion
from squall._process.names import file_name
from squall.runs.build import MODELS, OF_RATES, integrator
from squall.runs.config import ConfigError, RunConfig, flat, from_dict, to_dict
from squall.runs.folder import evaluation_suffix
from squall.runs.simulate import SIMULATED, file_suffix

PRESETS = (
    "paper",
    "paper-small",
    "sweeps-small",
    "rivals",
    "rivals-small",
    "storms-small",
    "storms",
    "default-small",
    "evidence-small",
    "smoke",
)
"""The studies that come with the package."""

KEYS = {"name", "about", "seeds", "base", "variants", "grids", "baseline", "costs", "evaluations", "keep_weights"}
GRID_KEYS = {"axes", "choose", "seeds", "about", "show", "published"}
"""All keys of a study and of one of its grids; others are refused."""

SIZES = ("trajectories", "steps", "seed")
"""Keys of a system beside its parameters."""
SHOWN = (
    "table",
    "ratios",
    "ranks",
    "trade-off",
    "arms",
    "steps",
    "spectra",
    "fields",
    "temperature",
    "one-step",
    "training",
    "sampling",
    "integrators",
)
"""What the report can make of a grid."""
SHOWN_FROM_FIELDS = {"fields", "one-step"}
"""What of it needs the fields of the rollouts."""
NOT_THE_TRIAL = ("data.path", "device.threads")
"""Keys that do not make another trial."""


@dataclass(frozen=True)
class Trial:
    """One run of a study.

    Attributes:
        labels: the names of its variants, one per axis of the grid that asked for it first.
        seed: of the training.
        system: which data set, as `systems` of the study has it, or the path of a file of the user's.
        config: the configuration, with `data.path` absolute or relative to the study's folder.
    """

    labels: tuple[str, ...]
    seed: int
    system: str
    config: RunConfig

    def with_seed(self, seed: int) -> "Trial":
        """The same with another seed."""
        training = dataclasses.replace(self.config.training, seed=seed)
        return dataclasses.replace(self, seed=seed, config=dataclasses.replace(self.config, training=training))

    @property
    def name(self) -> str:
        """The name of its run folder."""
        return file_name("-".join([*(slug(label) for label in self.labels), f"seed-{self.seed}"]))

    @cached_property
    def identity(self) -> str:
        """Equal for two trials that would compute the same."""
        values = {key: value for key, value in flat(to_dict(self.config)).items() if key not in NOT_THE_TRIAL}
        return _digest(values | {"system": self.system})


@dataclass(frozen=True)
class Grid:
    """The trials that one table or figure is made of.

    Attributes:
        name, about: for people.
        axes: the labels along each axis; the last one that of `choose`, if there is one.
        choose: labels, such as learning rates, of which the report shows for every other combination the one with the
            smallest error on the validation trajectories; empty if there is nothing to choose.
        show: what the report makes of it, of `SHOWN`.
        published: what others published for it, (states, energy) by the labels of a row and of a column.
        trials: by their labels, one per axis, and their seed.
    """

    name: str
    about: str
    axes: tuple[tuple[str, ...], ...]
    choose: tuple[str, ...]
    show: tuple[str, ...]
    published: Mapping[tuple[str, str], tuple[float, float]]
    trials: Mapping[tuple[tuple[str, ...], int], Trial] = field(repr=False)

    @cached_property
    def identities(self) -> set[str]:
        """Of all its trials."""
        return {trial.identity for trial in self.trials.values()}


@dataclass(frozen=True)
class OtherIntegrator:
    """Rollouts by another integrator than that of the training, of which `substeps` steps cover one dt of the data."""

    integrator: str
    substeps: int

    @property
    def suffix(self) -> str:
        """What sets the files of its evaluations apart."""
        return evaluation_suffix(self.integrator, self.substeps)


@dataclass(frozen=True)
class Study:
    """A study, as its YAML says it.

    Attributes:
        name, about: for people.
        systems: data sets to simulate, by the name of their file: the system, its parameters, trajectories and steps.
        grids: by name, in the order in which they are run.
        baseline: the label of the trials that the others are tested against.
        evaluations: by name, what the trials of the grids that show `integrators` are rolled out by as well.
        keep_weights: whether the weights stay after a run is evaluated.
        source: the values of the YAML.
        costs: the time of a training step by label, in units of that of the baseline; for the report.
    """

    name: str
    about: str
    systems: Mapping[str, Mapping[str, Any]]
    grids: Mapping[str, Grid]
    baseline: str | None
    evaluations: Mapping[str, OtherIntegrator]
    keep_weights: bool
    source: Mapping[str, Any] = field(repr=False)
    costs: Mapping[str, float] = field(default_factory=dict)

    @cached_property
    def trials(self) -> tuple[Trial, ...]:
        """Every trial once, in the order of the grids and, within one, seed by seed."""
        return tuple({trial.identity: trial for grid in self.grids.values() for trial in grid.trials.values()}.values())

    def trials_of(self, grids: Iterable[str]) -> tuple[Trial, ...]:
        """The trials of these grids, each once, in their order.

        Raises:
            ConfigError: if the study has no such grid.
        """
        wanted = list(grids)
        _known(f"grid of the study '{self.name}'", wanted, self.grids)
        identities = set().union(*(self.grids[name].identities for name in wanted))
        return tuple(trial for trial in self.trials if trial.identity in identities)

    def shown(self, trial: Trial) -> set[str]:
        """What the report makes of the grids that a trial stands in."""
        return {what for grid in self.grids.values() if trial.identity in grid.identities for what in grid.show}


def read_study(path: Path | str) -> Study:
    """A study from a YAML file, or from the preset of that name.

    Raises:
        ConfigError: if the file does not define a study: unknown keys, variants or values, with the known ones.

    >>> study = read_study("smoke")
    >>> len(study.trials) == len({trial.identity for trial in study.trials})
    True
    """
    if str(path) in PRESETS:
        path = str(resources.files("squall.study").joinpath(f"presets/{path}.yaml"))
    elif not Path(path).exists():
        raise ConfigError(f"there is no study {path}: give a YAML file, or one of the presets {', '.join(PRESETS)}")
    try:
        values = load_yaml(path)
    except DocumentError as error:
        raise ConfigError(f"the study cannot be read: {error}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"the study {path} holds {values!r}, but must hold the keys {', '.join(sorted(KEYS))}")
    try:
        return _study(values)
    except ConfigError as error:
        raise ConfigError(f"the study {path}: {error}") from error


def _study(values: Mapping[str, Any]) -> Study:
    _known("key", values, KEYS)
    for key in ("name", "grids"):
        if not values.get(key):
            raise ConfigError(f"'{key}' is missing")
    variants = {
        name: _mapping(f"the variant '{name}'", part)
        for name, part in _mapping("variants", values.get("variants")).items()
    }
    base = _mapping("base", values.get("base"))
    systems: dict[str, dict[str, Any]] = {}
    first: dict[str, Trial] = {}
    grids = {}
    for name, requested in _mapping("grids", values["grids"]).items():
        requested = _mapping(f"the grid '{name}'", requested)
        _known(f"key of the grid '{name}'", requested, GRID_KEYS)
        axis_lists = requested.get("axes")
        lists = isinstance(axis_lists, list) and all(isinstance(axis, list) and axis for axis in axis_lists)
        if not lists or not axis_lists:
            raise ConfigError(f"the grid '{name}' has no axes: give lists of names of variants")
        choose = _choice(name, requested.get("choose"))
        axes = tuple(tuple(str(label) for label in axis) for axis in [*axis_lists, *([choose] if choose else [])])
        seeds = _seeds(requested.get("seeds", values.get("seeds", 1)))
        trials = {}
        made = {labels: _trial(base, variants, labels, systems) for labels in itertools.product(*axes)}
        for seed, labels in itertools.product(seeds, made):
            trial = made[labels].with_seed(seed)
            trials[labels, seed] = first.setdefault(trial.identity, trial)
        show = requested.get("show", ["table"])
        if not isinstance(show, list):
            raise ConfigError(f"'show' of the grid '{name}' is {show!r}, but must be a list of {', '.join(SHOWN)}")
        for what in show:
            _known(f"part of a report in 'show' of the grid '{name}'", [what], SHOWN)
        theirs = _published(name, requested.get("published"), {label for axis in axes for label in axis})
        grids[name] = Grid(name, str(requested.get("about", "")), axes, choose, tuple(show), theirs, trials)
        _refuse_unusable(grids[name])
    baseline = values.get("baseline")
    if baseline is not None:
        _known("variant in 'baseline'", [baseline], variants)
    _refuse_one_name_for_two(first.values())
    about, keep = str(values.get("about", "")), values.get("keep_weights", False)
    if not isinstance(keep, bool):
        raise ConfigError(f"'keep_weights' is {keep!r}, but must be true or false")
    evaluations = {
        str(name): _evaluation(str(name), requested)
        for name, requested in _mapping("evaluations", values.get("evaluations")).items()
    }
    costs = _costs(values.get("costs"), variants)
    return Study(str(values["name"]), about, systems, grids, baseline, evaluations, keep, values, costs)


def _costs(requested: Any, variants: Mapping[str, Any]) -> dict[str, float]:
    costs = _mapping("'costs'", requested)
    _known("variant in 'costs'", costs, variants)
    for label, cost in costs.items():
        if not isinstance(cost, int | float) or isinstance(cost, bool) or not 0 < cost < math.inf:
            raise ConfigError(f"the cost of '{label}' is {cost!r}, but must be a positive number: 1 is the baseline's")
    return {label: float(cost) for label, cost in costs.items()}


def _choice(grid: str, requested: Any) -> tuple[str, ...]:
    """The labels of which one is chosen on validation data."""
    if requested is None:
        return ()
    if not isinstance(requested, list) or len(requested) < 2:
        raise ConfigError(
            f"'choose' of the grid '{grid}' is {requested!r}, but must be a list of at least two names of variants, "
            "such as learning rates"
        )
    return tuple(map(str, requested))


def _refuse_unusable(grid: Grid) -> None:
    """Refuse before training what could not be evaluated or chosen after it."""
    for trial in grid.trials.values():
        if grid.choose and not (trial.config.data.validation and trial.config.training.validate_every):
            raise ConfigError(
                f"the grid '{grid.name}' chooses on validation data, but '{trial.name}' has none: set data.validation "
                "and training.validate_every"
            )
        if trial.config.data.test == 0:
            raise ConfigError(f"'{trial.name}' has data.test = 0: there would be nothing to evaluate on")
        if "integrators" in grid.show and trial.config.model.predicts == "state":
            raise ConfigError(
                f"'{trial.name}' predicts the next state, which no integrator applies to: take 'integrators' out "
                f"of 'show' of the grid '{grid.name}'"
            )


def _published(grid: str, requested: Any, labels: set[str]) -> dict[tuple[str, str], tuple[float, float]]:
    """What others published: a `table` of published_results.toml, its `rows` and `columns` named by our labels."""
    where = f"'published' of the grid '{grid}'"
    about = _mapping(where, requested)
    if not about:
        return {}
    _known(f"key of {where}", about, ("table", "rows", "columns"))
    tables: Any = tomllib.loads(
        resources.files("squall.study").joinpath("presets/published_results.toml").read_text("utf-8")
    )
    known = {f"{group}.{name}": table for group, part in tables.items() for name, table in part.items()}
    _known(f"table in {where}", [about.get("table")], known)
    table = known[about["table"]]
    rows, columns = (_mapping(f"'{key}' of {where}", about.get(key)) for key in ("rows", "columns"))
    _known(f"label of the grid '{grid}' in {where}", [*rows, *columns], labels)
    _known(f"row of {about['table']}", rows.values(), [name for name in table if name != "columns"])
    _known(f"column of {about['table']}", [f"{name}_states" for name in columns.values()], table["columns"])
    numbers_by_cell = {}
    for (row, theirs), (column, name) in itertools.product(rows.items(), columns.items()):
        numbers = dict(zip(table["columns"], table[theirs], strict=True))
        numbers_by_cell[row, column] = (numbers[f"{name}_states"], numbers[f"{name}_energy"])
    return numbers_by_cell


def _evaluation(name: str, requested: Any) -> OtherIntegrator:
    values = {"integrator": None, "substeps": 1} | dict(_mapping(f"the evaluation '{name}'", requested))
    _known(f"key of the evaluation '{name}'", values, ("integrator", "substeps"))
    _known(f"integrator in the evaluation '{name}'", [values["integrator"]], OF_RATES)
    substeps = values["substeps"]
    if not _is_whole(substeps) or substeps < 1:
        raise ConfigError(f"'substeps' of the evaluation '{name}' is {substeps!r}, but must be at least 1")
    return OtherIntegrator(values["integrator"], substeps)


def _known(what: str, names: Any, known: Any) -> None:
    for name in names:
        if name not in list(known):
            raise ConfigError(f"'{name}' is not a known {what}: {suggestion(str(name), sorted(map(str, known)))}")


def _mapping(what: str, values: Any) -> Mapping[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError(f"{what} is {values!r}, but must hold names and values")
    return {str(name): value for name, value in values.items()}  # YAML reads some names as numbers


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _seeds(requested: Any) -> range:
    if not _is_whole(requested) or requested < 1:
        raise ConfigError(f"'seeds' is {requested!r}, but must be how many seeds, at least 1")
    return range(requested)


def _trial(
    base: Mapping[str, Any],
    variants: Mapping[str, Mapping[str, Any]],
    labels: tuple[str, ...],
    systems: dict[str, dict[str, Any]],
) -> Trial:
    """The trial of seed 0, whose system is added to the systems."""
    _known("variant", labels, variants)
    values: dict[str, Any] = {}
    for part in (base, *(variants[label] or {} for label in labels)):
        for key, value in _dotted(part):
            values[key] = value
    system, path = values.pop("system", None), values.get("data.path")
    if (system is None) == (path is None):
        both = "both a system and a file: leave out 'system' or 'data.path'" if path else "no system"
        raise ConfigError(
            f"{', '.join(labels)} names {both}"
            + ("" if path else f": set 'system' to one of {', '.join(SIMULATED)}, or 'data.path' to a file")
        )
    if path is None:
        data, about = _data(system)
        systems.setdefault(data, about)
        path = data_path(data, about)
    else:
        data = path = str(path)
    nested: dict[str, Any] = {}
    for key, value in (values | {"data.path": path, "training.seed": 0}).items():
        *groups, name = key.split(".")
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
            if not isinstance(place, dict):
                raise ConfigError(f"'{group}' is {place!r}, but '{key}' asks for a part of it")
        place[name] = dict(value) if isinstance(value, dict) else value  # a later key may add to it
    config = from_dict(nested)
    integrator(config.integrator)
    if config.device.devices > 1:
        raise ConfigError(
            f"device.devices is {config.device.devices}, but a study trains each run in one process, and several runs "
            "at a time: leave it out, and choose --workers"
        )
    if config.model.name not in MODELS and "." not in config.model.name:
        _known("model, nor the import path of one", [config.model.name], MODELS)
    return Trial(labels, 0, data, config)


def _dotted(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and prefix + name not in ("system", "model.arguments", "loss.options"):
            yield from _dotted(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def _data(system: Any) -> tuple[str, dict[str, Any]]:
    """The name of a data set and what it is simulated with, from the value of the key 'system'."""
    about: dict[str, Any] = {"name": system} if isinstance(system, str) else dict(_mapping("system", system))
    if about.get("name") not in list(SIMULATED):
        raise ConfigError(f"the system '{about.get('name')}' is unknown: known are {', '.join(SIMULATED)}")
    parameters = {key: value for key, value in about.items() if key != "name"}
    for key in SIZES:
        if not _is_whole(parameters.pop(key, 1)):
            raise ConfigError(f"system.{key} is {about[key]!r}, but must be a whole number")
    try:
        SIMULATED[about["name"]](**parameters)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"the system {about} cannot be made: {error}") from error
    if len(about) == 1:
        return about["name"], about
    return f"{about['name']}-{_digest(about)[:8]}", about


def data_path(name: str, about: Mapping[str, Any]) -> str:
    """The file of a data set, seen from the folder of the study."""
    return f"data/{name}{file_suffix(about['name'])}"


def _digest(values: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def _refuse_one_name_for_two(trials: Any) -> None:
    names: dict[str, Trial] = {}
    for trial in trials:
        if trial.name in names:
            raise ConfigError(f"two different trials would both be '{trial.name}': give the variants other names")
        names[trial.name] = trial


def slug(label: str) -> str:
    """A label as part of a file's name.

    >>> slug("T = 1e-3")
    't-1e-3'
    """
    return re.sub("[^a-z0-9.+-]+", "-", label.lower()).strip("-")
