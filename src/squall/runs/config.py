"""The configuration of a run: frozen dataclasses of plain values, one YAML file, nothing hidden.

Every key can be set in the file and by a dotted override of the command line. An unknown key is an error.
"""

import dataclasses
import difflib
import functools
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args, get_origin, get_type_hints

from jsonargparse import ArgumentError, ArgumentParser, Namespace

from squall._process.documents import BASE_60
from squall._process.messages import suggestion
from squall.integrators import INTEGRATORS, Implicit
from squall.losses.errors import Over
from squall.losses.rivals import RIVALS
from squall.losses.rivals.table import options_of
from squall.training.settings import TrainingSettings, alone

__all__ = [
    "GROUPS",
    "ConfigError",
    "DataConfig",
    "DeviceConfig",
    "LossConfig",
    "ModelConfig",
    "RunConfig",
    "SamplingConfig",
    "can_run_together",
    "difference",
    "explain",
    "flat",
    "from_dict",
    "refuse_base_60",
    "refuse_file_as_group",
    "refuse_null",
    "to_dict",
    "with_defaults",
]

FULL_PRECISIONS = ("32-true", "64-true")
"""Those in which weights and states have one type, and no scaling is needed."""

STRATEGIES = ("auto", "ddp", "ddp_find_unused_parameters_true", "fsdp")
"""By lightning-fabric's names; any number of processes can read the checkpoints."""

ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")

MOST_THREADS = 4096
"""PyTorch ends without a word where the system refuses it more threads."""

OWN_LOSSES = ("imbalance-aware", "mse")
"""The losses with settings of their own; all others have `loss.options`."""


Tracker = Literal["tensorboard", "mlflow", "wandb", "trackio"]


class ConfigError(ValueError):
    """A configuration that cannot be run, or does not fit the run folder that it is used with."""


@dataclass(frozen=True)
class DataConfig:
    """Which trajectories, and how they are divided.

    Args:
        path: a file or folder that `squall data describe` understands.
        validation: how many trajectories are held out of the training to select the best model: a count, or a
            fraction below 1. They are the last of those that are not for the test. In time: how many states.
        test: how many trajectories, the last of the file, are never trained on: a count or a fraction. A fraction is at
            least one trajectory.
        split: by `trajectory`, by `time` (each trajectory is cut in time) or in the `parts` of the data; `auto` takes
            the parts where there are some, and cuts a single trajectory in time.
        gap: states that are left out between the parts in time; null for `training.unroll`.
        inputs: names of the conditions that the model sees: parameters, static fields and forcings; `all` for each
            one of the file. A run folder records the names.
        history: K, number of past states that the model sees, the present one included.
        normalization: `standard` trains on fields of zero mean and unit variance (statistics of the training
            trajectories), `none` on the fields as they are; `auto` is `none` for the dimensionless systems
            of squall and `standard` for all other data.
        memory_gib: trajectories up to this size are read once, larger ones from the file as they are needed.
    """

    path: str = ""
    validation: int | float = 0.05
    test: int | float = 0.1  # with 100 trajectories the paper's 5 and 10
    normalization: Literal["auto", "none", "standard"] = "auto"
    memory_gib: float = 2.0
    split: Literal["auto", "trajectory", "time", "parts"] = "auto"
    gap: int | None = None
    inputs: list[str] | Literal["all"] = field(default_factory=list)
    history: int = 1

    def __post_init__(self) -> None:
        if self.history < 1:
            raise ValueError(f"data.history is {self.history}, but must be at least 1: the present state counts")
        if self.gap is not None and self.gap < 0:
            raise ValueError(f"data.gap is {self.gap}, but must be a number of states, at least 0")
        names = [] if self.inputs == "all" else self.inputs
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"data.inputs names '{twice[0]}' twice: name every condition once")
        if not (math.isfinite(self.memory_gib) and self.memory_gib >= 0):
            raise ValueError(f"data.memory_gib is {self.memory_gib}, but must be a number that is not negative")


@dataclass(frozen=True)
class ModelConfig:
    """Which model.

    Args:
        name: `node`, `hnn`, `unet`, `fno`, or the import path of a `torch.nn.Module` such as `my_package.MyModel`.
        hidden: width of the hidden layers of `node` and `hnn`.
        structure: the operator G of `hnn`: `laplacian` (dissipative), `central-difference` (conservative), or
            `auto` for that of the system which made the data.
        arguments: keyword arguments for a module given by its path; sizes of `unet` (width, levels) and `fno` (width,
            modes, layers, padding).
        predicts: what the model returns: the `rate` du/dt or the next `state`; `node` and `hnn` return the rate.
        residual: whether a model of the next state returns its difference to the present one.
    """

    name: str = "node"
    hidden: int = 200  # the paper's
    structure: Literal["auto", "laplacian", "central-difference"] = "auto"
    arguments: dict[str, Any] = field(default_factory=dict)
    predicts: Literal["rate", "state"] = "rate"
    residual: bool = False

    def __post_init__(self) -> None:
        if self.residual and self.predicts == "rate":
            raise ValueError("model.residual is true, but model.predicts is 'rate': choose 'state'")


@dataclass(frozen=True)
class LossConfig:
    """Which loss. At most one of the rules for the temperature is set; none means a KL budget of 0.3.

    Args:
        name: `imbalance-aware`, `mse`, a rival such as `top_k` (docs/rivals.md), or the import path of a loss of your
            own such as `my_package.losses.Power`.
        options: of a rival or a loss of your own, such as `{alpha: 0.3}` for `top_k`.
        temperature: a fixed temperature, in units of the squared residual: 0 is the maximum, `inf` the mean.
        kl_budget: the temperature is solved so that KL(weights ‖ uniform) has this value, in nats.
        relative: the temperature is this many times the mean error.
        effective_fraction: the temperature is solved so that the effective sample size is this fraction.
        budget_cap: part of the KL budget: no point may weigh more than this many times the uniform weight.
        error: the error of a point: `squared`, `absolute` or `huber`.
        over: what is normalised over together: `all` points of a minibatch, each `sample`, each `channel`, or each
            `lead` time of an unrolled training.
        cap: no weight above this many times the uniform one, at the temperature found without it.
        mean_share: share of the plain mean that is mixed in.
        trim: fraction of the points, largest errors first, that gets no weight.
        winsorize: fraction of the points that is weighed like the largest of the rest.
        differentiate_weights: let the gradient flow through the weights.
    """

    name: str = "imbalance-aware"
    options: dict[str, Any] | None = None
    temperature: float | Literal["inf"] | None = None
    kl_budget: float | None = None
    relative: float | None = None
    effective_fraction: float | None = None
    budget_cap: float | None = None
    error: Literal["squared", "absolute", "huber"] = "squared"
    over: Over = "all"
    cap: float | None = None
    mean_share: float = 0.0
    trim: float = 0.0
    winsorize: float = 0.0
    differentiate_weights: bool = False

    def __post_init__(self) -> None:
        rules = ("temperature", "kl_budget", "relative", "effective_fraction")
        chosen = [rule for rule in rules if getattr(self, rule) is not None]
        if len(chosen) > 1:
            raise ValueError(f"loss.{' and loss.'.join(chosen)} are both set: choose one rule for the temperature")
        if chosen and self.name != "imbalance-aware":
            raise ValueError(f"loss.{chosen[0]} is set, but loss.name is '{self.name}', which has no temperature")
        if self.budget_cap is not None and chosen and chosen != ["kl_budget"]:
            raise ValueError(f"loss.budget_cap belongs to loss.kl_budget, but loss.{chosen[0]} is set: use loss.cap")
        guards = ("budget_cap", "over", "cap", "mean_share", "trim", "winsorize", "differentiate_weights")
        changed = [name for name in guards if getattr(self, name) != type(self).__dataclass_fields__[name].default]
        if self.name not in OWN_LOSSES and self.error != "squared":
            changed.append("error")
        if changed and self.name != "imbalance-aware":
            raise ValueError(f"loss.{changed[0]} is set, but loss.name is '{self.name}', which does not use it")
        _check_rival(self.name, self.options)
        for rule in chosen:
            value = float(getattr(self, rule))
            if math.isnan(value) or value < 0:
                raise ValueError(f"loss.{rule} is {value}, but must be a number that is not negative")


def _check_rival(name: str, options: dict[str, Any] | None) -> None:
    """Refuse an unknown loss, and an option that a loss does not have; one's own is looked at when it is imported."""
    if name in OWN_LOSSES:
        if options:
            raise ValueError(f"loss.options are for a rival or a loss of your own, but loss.name is '{name}'")
        return
    if name not in RIVALS and not name.rpartition(".")[0]:
        hint = suggestion(name, (*OWN_LOSSES, *RIVALS))
        raise ValueError(f"loss.name is '{name}': {hint}, or an import path such as my_package.losses.Power")
    if name in RIVALS:
        known = options_of(RIVALS[name])
        if unknown := sorted(set(options or {}) - set(known)):
            raise ValueError(
                f"loss.options has '{unknown[0]}', which '{name}' does not know: known are {', '.join(known) or 'none'}"
            )


@dataclass(frozen=True)
class SamplingConfig:
    """Which transitions make a minibatch.

    Args:
        name: `uniform`, or `stiffness-aware` (SANN): a share of every minibatch comes from the stiffest transitions.
        fraction: of the training transitions that are called stiff.
        share: of the minibatch that is drawn from them.
        floor: the size of a state counts at least as this many root mean squares of the training states; 0 for none.
        substeps: how many steps of the integrator cover dt for a stiff transition in the training.
    """

    name: Literal["uniform", "stiffness-aware"] = "uniform"
    fraction: float = 0.2
    share: float = 0.5
    floor: float = 1.0
    substeps: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1:
            raise ValueError(f"sampling.fraction is {self.fraction}, but must be between 0 and 1")
        if not 0 <= self.share <= 1:
            raise ValueError(f"sampling.share is {self.share}, but must be in [0, 1]")
        if not (math.isfinite(self.floor) and self.floor >= 0):
            raise ValueError(f"sampling.floor is {self.floor}, but must be a number that is not negative")
        if self.substeps < 1:
            raise ValueError(f"sampling.substeps is {self.substeps}, but must be at least 1")
        changed = [item.name for item in dataclasses.fields(self) if getattr(self, item.name) != item.default]
        if self.name == "uniform" and changed:
            raise ValueError(f"sampling.{changed[0]} is set, but sampling.name is 'uniform': choose 'stiffness-aware'")


@dataclass(frozen=True)
class DeviceConfig:
    """Where and in what precision, as lightning-fabric names it.

    Args:
        accelerator: `auto`, `cpu`, `cuda`, `mps`.
        devices: how many processes, one device each; torchrun's number where it starts them.
        strategy: `auto`, `ddp`, or `ddp_find_unused_parameters_true` for a model that does not use all its parameters
            in every step; `fsdp` for a large model, of whose parameters, gradients and moments each process keeps a
            share.
        precision: `32-true`, `64-true`, `16-mixed`, `bf16-mixed`.
        threads: threads of the CPU; 0 leaves PyTorch's choice.
    """

    accelerator: str = "auto"
    devices: int = 1
    strategy: str = "auto"
    precision: Literal["32-true", "64-true", "16-mixed", "bf16-mixed"] = "32-true"
    threads: int = 0

    def __post_init__(self) -> None:
        if self.devices < 1:
            raise ValueError(f"device.devices is {self.devices}, but must be at least 1")
        if self.strategy not in STRATEGIES:
            raise ValueError(f"device.strategy is '{self.strategy}', but must be one of {', '.join(STRATEGIES)}")
        if self.strategy == "fsdp" and self.precision == "16-mixed":
            raise ValueError(
                "device.precision is '16-mixed', but device.strategy is 'fsdp', where each "
                "process would scale its gradients by itself: choose 'bf16-mixed' or '32-true'"
            )
        if self.accelerator not in ACCELERATORS:
            allowed = ", ".join(ACCELERATORS)
            raise ValueError(f"device.accelerator is '{self.accelerator}', but must be one of {allowed}")
        if not 0 <= self.threads <= MOST_THREADS:
            raise ValueError(
                f"device.threads is {self.threads}, but must be 0 (PyTorch's choice) or up to {MOST_THREADS}"
            )


@dataclass(frozen=True)
class RunConfig:
    """One training.

    Args:
        data: which trajectories.
        model: which model.
        integrator: that the model is trained and rolled out through: `euler`, `midpoint`, `rk4`, `dopri5`,
            `implicit_midpoint`, or `discrete_gradient` of a model with an energy (`hnn`).
        loss: which loss.
        sampling: which transitions make a minibatch.
        training: how long and how often.
        device: where and in what precision.
        logger: where to log besides metrics.jsonl: `tensorboard`, `mlflow`, `wandb`, `trackio`, or a list of them.
        tensorboard: the earlier name of `logger: tensorboard`.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    integrator: str = "euler"
    loss: LossConfig = field(default_factory=LossConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    device: DeviceConfig = field(default_factory=DeviceConfig)
    logger: Tracker | list[Tracker] | None = None
    tensorboard: bool = False

    @property
    def trackers(self) -> list[str]:
        """The names of `logger` as a list."""
        names = [self.logger] if isinstance(self.logger, str) else self.logger or []
        return [*names, *(["tensorboard"] if self.tensorboard else [])]


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as nested plain values."""
    return dataclasses.asdict(config)


def from_dict(values: dict[str, Any]) -> RunConfig:
    """A configuration from nested plain values; what is left out has its default.

    Raises:
        ConfigError: at an unknown key, naming the nearest known one, or a value that is not allowed.

    >>> from_dict({"training": {"stps": 3}})
    Traceback (most recent call last):
    ...
    squall.runs.config.ConfigError: Group 'training' does not accept option 'stps': did you mean 'training.steps'?
    """
    parser = _parser()
    try:
        refuse_file_as_group(values)
        refuse_base_60(values, [parser])
        parsed = parser.parse_object(values)
        refuse_null(parsed)
        return RunConfig(**vars(parser.instantiate(parsed)))
    except (ArgumentError, ValueError) as error:
        raise ConfigError(explain(str(error), list(flat(to_dict(RunConfig()))))) from error


GROUPS = frozenset(name for name, hint in get_type_hints(RunConfig).items() if dataclasses.is_dataclass(hint))
"""The keys that hold keys."""


def refuse_file_as_group(values: dict[str, Any]) -> None:
    """Refuse text where keys are expected: the parser would read a file of that name.

    Raises:
        ConfigError: with the key.
    """
    for name in GROUPS:
        if isinstance(values.get(name), str):
            raise ConfigError(f"{name} is {values[name]!r}, but must hold keys and values")


def refuse_null(values: Any, dataclass_type: type[Any] = RunConfig, prefix: str = "") -> None:
    """Refuse a null, and a group that holds none of its keys, which the parser lets pass for every type.

    Args:
        values: by the names of the fields of `dataclass_type`, as the parser returns them.
        dataclass_type: a dataclass of the configuration.
        prefix: of the dotted keys.

    Raises:
        ConfigError: with the dotted key.
    """
    for name, hint in get_type_hints(dataclass_type).items():
        if name not in values:  # a file says null, and the command line a key of the group
            raise ConfigError(f"{prefix[:-1]} is null, but must hold keys such as '{prefix}{name}'")
        value = values[name]
        if isinstance(hint, type) and dataclasses.is_dataclass(hint):
            if not isinstance(value, dict | Namespace):
                example = f"{prefix}{name}.{next(iter(get_type_hints(hint)))}"
                raise ConfigError(f"{prefix}{name} is {value!r}, but must hold keys such as '{example}'")
            refuse_null(value, hint, f"{prefix}{name}.")
        elif value is None and type(None) not in get_args(hint):
            raise ConfigError(f"{prefix}{name} is null, but must have a value: leave the key out for its default")


def refuse_base_60(values: dict[str, Any], parsers: Sequence[ArgumentParser]) -> None:
    """Refuse text such as 1:30 where an option takes numbers alone: jsonargparse would read 90, as YAML 1.1 does.

    Args:
        values: as `read_yaml` gives them, by the names of options, nested or dotted.
        parsers: that have these options.

    Raises:
        ConfigError: with the option and the text.
    """
    hints = {action.dest: getattr(action, "_typehint", str) for parser in parsers for action in parser._actions}
    for name, value in flat(values).items():
        hint = hints.get(name, hints.get(name.rpartition(".")[0], str))  # of the option that holds the mapping
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and BASE_60.fullmatch(text) and not _takes_text(hint):
                raise ConfigError(f"{name} is '{text}', but must be a number in decimal digits")


def _takes_text(hint: Any) -> bool:
    if get_origin(hint) is Literal:  # words of its own
        return False
    parts = get_args(hint)[1:] if get_origin(hint) is dict else get_args(hint)
    return any(map(_takes_text, parts)) if parts else hint not in (int, float, bool, type(None))


@functools.cache
def _parser() -> ArgumentParser:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(RunConfig)
    return parser


def explain(message: str, known: list[str]) -> str:
    """The message of a parser, with the known key nearest to the unknown one that it names.

    >>> explain("unrecognized arguments: --model.hiden 3", ["model.hidden", "model.name"])
    "unrecognized arguments: --model.hiden 3: did you mean 'model.hidden'?"
    """
    if not re.search("not accept|unrecognized|not expected", message):
        return message
    group = re.search(r"Group '([\w.]+)'", message)
    option = re.search(r"(?:option|Option) '([\w.]+)'|--([\w.-]+)", message)
    if option is None:
        return message
    name = (option[1] or option[2]).split("=")[0]
    word = f"{group[1]}.{name}" if group and not name.startswith(f"{group[1]}.") else name
    match = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    return f"{message}: did you mean '{match[0]}'?" if match else f"{message}: known are {', '.join(known)}"


def flat(values: dict[str, Any], prefix: str = "", separator: str = ".") -> dict[str, Any]:
    """Nested plain values by dotted key.

    >>> flat({"a": {"b": 1}, "c": 2})
    {'a.b': 1, 'c': 2}
    """
    dotted = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        dotted |= flat(value, key + separator, separator) if isinstance(value, dict) and value else {key: value}
    return dotted


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """The configuration of a run of an earlier version, with the defaults of the keys that came later."""
    complete = to_dict(RunConfig())
    for name, value in values.items():
        group = complete.get(name)
        complete[name] = {**group, **value} if isinstance(group, dict) and isinstance(value, dict) else value
    return complete


def difference(ours: dict[str, Any], theirs: dict[str, Any]) -> list[str]:
    """One line for every key in which two nested configurations differ.

    >>> difference({"a": {"b": 1}}, {"a": {"b": 2}})
    ['a.b: 1 -> 2']
    """
    a, b = flat(ours), flat(theirs)
    return [f"{key}: {a.get(key)} -> {b.get(key)}" for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]


def can_run_together(a: RunConfig, b: RunConfig) -> bool:
    """Whether two configurations differ only by seed, loss and sampling: explicit, without substeps, in full precision.

    A rival has no form for several models at once. The model of each sees the present state alone, and no option is set
    that only a training by itself has.

    >>> can_run_together(RunConfig(), RunConfig(loss=LossConfig(name="mse")))
    True
    >>> can_run_together(RunConfig(), RunConfig(model=ModelConfig(hidden=3)))
    False
    """
    return (
        _shape(a) == _shape(b)
        and all(
            config.sampling.substeps == 1
            and config.device.precision in FULL_PRECISIONS
            and config.loss.over == "all"
            and config.loss.name in OWN_LOSSES
            for config in (a, b)
        )
        and not (alone(a.training) or a.data.inputs or a.data.history > 1)
        and not isinstance(INTEGRATORS.get(a.integrator), Implicit)
    )


def _shape(config: RunConfig) -> dict[str, Any]:
    own = ("training.seed", "loss.", "sampling.", "data.path")
    same_data = {"data": os.path.realpath(config.data.path)}
    return same_data | {key: x for key, x in flat(to_dict(config)).items() if not key.startswith(own)}
