"""A training under way: where it stands, and how that is saved and resumed."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Shaped, UInt8
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from squall._process.extras import explain_missing_extra
from squall._types import Score, Validation
from squall.training.sharded import all_finite, gathered, is_sharded, spread, spread_state

if TYPE_CHECKING:
    from lightning_fabric import Fabric
else:  # importing it takes as long as importing torch, and who comes for the loss alone does not need it
    Fabric = Any


EXTRA = "_extra_state"
"""How PyTorch ends the names of what `get_extra_state` returns."""


class TrainingDiverged(RuntimeError):
    """The loss or a weight became NaN or infinite at `step`."""

    def __init__(self, step: int, what: str) -> None:
        self.step, self.what = step, what
        super().__init__(
            f"training diverged at step {step}: {what}. A smaller learning rate, a higher temperature, float64 "
            "or normalised data may help"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return TrainingDiverged, (self.step, self.what)


@dataclass(frozen=True)
class Checkpoint:
    """A training after `step` steps: the weights, and all else that the rest of it depends on.

    `state["extra"]` holds what else the model's state dict has: what `get_extra_state` returns, dictionaries, and
    tensors that safetensors cannot hold. With an average of the weights, `weights` is the average and
    `state["trained"]` the weights that the training goes on from.
    """

    step: int
    weights: dict[str, Tensor]
    state: dict[str, Any]

    @property
    def model_state(self) -> dict[str, Any]:
        """For `load_state_dict` of the model."""
        return {**self.weights, **self.state.get("extra", {})}


class Recorder:
    """Follows a training, and may hand it the checkpoint to go on from. This one does neither."""

    def resume(self) -> Checkpoint | None:
        """The checkpoint to go on from."""
        return None

    def resume_best(self) -> Checkpoint | None:
        """The best checkpoint until then."""
        return None

    def stopping(self) -> bool:
        """Whether to save and stop before the next step."""
        return False

    def stepped(self, step: int) -> None:
        """`step` steps are done."""

    def logged(self, metrics: dict[str, Any]) -> None:
        """A line of metrics."""

    def saved(self, checkpoint: Checkpoint) -> None:
        """The latest checkpoint."""

    def improved(self, checkpoint: Checkpoint, validation: Validation) -> None:
        """The checkpoint that rolls out best so far."""


@dataclass(frozen=True)
class TrainingResult:
    """A trained model.

    `model` holds the last weights, or their average, and `best`, after a validation, those that rolled out best, with
    the step they come from; `history` is every line of metrics. `finished` is false after a requested stop.
    """

    model: nn.Module
    step: int
    finished: bool
    history: list[dict[str, Any]]
    best: Checkpoint | None


@dataclass
class Training:
    """A training under way: what it has, where it stands, and how that is saved and restored."""

    model: nn.Module
    optimizer: Any
    loss: nn.Module
    recorder: Recorder
    fabric: Fabric
    validate: Callable[[nn.Module], Validation] | None = None
    average: AveragedModel | None = None
    step: int = 0
    seconds: float = 0.0
    score: Score | None = None
    unimproved: int = 0
    """Validations since the best one."""
    best: Checkpoint | None = None
    history: list[dict[str, Any]] = field(default_factory=list)
    diverged: TrainingDiverged | None = None
    unbounded: frozenset[str] = frozenset()
    """What the training does not change and was not finite before it, such as a mask of infinities."""

    def __post_init__(self) -> None:
        trained = {name for name, x in self.model.named_parameters(remove_duplicate=False) if x.requires_grad}
        state = self.model.state_dict()
        self.unbounded = frozenset(name for name, x in state.items() if name not in trained and not _is_finite(x))

    def log(self, metrics: dict[str, Any]) -> None:
        line = {"step": self.step, **metrics, "seconds": round(self.seconds, 3)}
        self.history.append(line)
        self.recorder.logged(line)

    def validation(self) -> Validation | None:
        if self.validate is None or self.diverged:
            return None
        self.shown.eval()
        validation = self.validate(self.shown)
        self.shown.train()
        return self.fabric.broadcast(validation)  # one decision, should processes round otherwise

    @property
    def shown(self) -> nn.Module:
        """The model to validate and to keep: the average of the weights, if there is one."""
        return self.model if self.average is None else self.average.module

    def record(self, validation: Validation | None, save: bool) -> None:
        """Log a validation and keep its checkpoint if it is the best; save the last checkpoint."""
        if self.diverged:
            return
        try:
            if validation is not None:
                self._validated(validation)
            if save:
                self.recorder.saved(self._checkpoint())
        except TrainingDiverged as error:
            self.diverged = error

    def _validated(self, validation: Validation) -> None:
        self.log({"validation": dict(validation.metrics)})
        self.unimproved += 1
        if self.score is None or validation.score < self.score:
            self.score, self.unimproved = validation.score, 0
            self.best = self._checkpoint()
            self.recorder.improved(self.best, validation)

    def _checkpoint(self) -> Checkpoint:
        weights, extra = self._finite_state(self.shown)
        state: dict[str, Any] = {
            "optimizer": copy.deepcopy(gathered(self.optimizer.state_dict(), self.fabric.is_global_zero)),
            "loss": copy.deepcopy(self.loss.state_dict()),
            "random": random_state(self.fabric.device),
            "precision": copy.deepcopy(self.fabric.strategy.precision.state_dict()),
            "seconds": self.seconds,
            "score": self.score and (self.score.diverged, self.score.error),
        }
        if self.unimproved:
            state["unimproved"] = self.unimproved
        if self.average is not None:
            trained, more = self._finite_state(self.model)
            state["trained"] = trained | more
        if extra:
            state["extra"] = extra
        return Checkpoint(self.step, weights, state)

    def _finite_state(self, model: nn.Module) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
        state = model.state_dict()
        for name, tensor in state.items():
            if name not in self.unbounded and not _is_finite(tensor):
                raise TrainingDiverged(self.step, f"the weight {name!r} is not finite")
        return split_state(gathered(state, self.fabric.is_global_zero))

    def resume(self) -> None:
        """Go on from the recorder's checkpoint, if it has one."""
        checkpoint = self.recorder.resume()
        self.model.train()
        if checkpoint is None:
            return
        load_state(self.shown, spread_state(checkpoint.model_state, self.shown))
        if self.average is not None:
            trained = checkpoint.state.get("trained", checkpoint.model_state)
            load_state(self.model, spread_state(trained, self.model))
            self.average.n_averaged.fill_(checkpoint.step)
        load_optimizer(self.optimizer, checkpoint.state["optimizer"])
        self.loss.load_state_dict(checkpoint.state["loss"])
        self.fabric.strategy.precision.load_state_dict(checkpoint.state["precision"])
        set_random_state(checkpoint.state["random"], self.fabric.device)
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.score = checkpoint.state["score"] and Score(*checkpoint.state["score"])
        self.unimproved = checkpoint.state.get("unimproved", 0)
        self.best = self.recorder.resume_best()


def averaged(model: nn.Module, decay: float) -> AveragedModel | None:
    """The exponential moving average of the weights, w̄ ← decay · w̄ + (1 − decay) · w, from the first step on."""
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay)) if decay else None


def load_state(model: nn.Module, state: Mapping[str, Any]) -> None:
    """Load a state dict as saved.

    A module whose own `state_dict` adds entries, as the record of its arguments that neuraloperator's models add, takes
    them back only where it is not part of another module. They are left out where they are refused.

    Raises:
        RuntimeError: if names or shapes differ.
    """
    try:
        model.load_state_dict(state)
    except RuntimeError:
        own = model.state_dict()
        taken = {x: y for x, y in state.items() if isinstance(y, Tensor) or x.endswith(EXTRA) or x not in own}
        if len(taken) == len(state):
            raise
        model.load_state_dict(taken)


def split_state(state: Mapping[str, Any]) -> tuple[dict[str, Shaped[Tensor, "..."]], dict[str, Any]]:
    """Copies of a state dict's plain tensors, which safetensors can hold, and of all else that a file can.

    What is neither, such as a function among recorded arguments, is left out, unless a module asks for it back.
    """
    weights: dict[str, Tensor] = {}
    extra: dict[str, Any] = {}
    for name, x in state.items():
        if not isinstance(x, Tensor):
            if name.endswith(EXTRA) or _is_plain(x):
                extra[name] = copy.deepcopy(x)
        elif x.layout == torch.strided and not x.is_quantized and x.dtype != torch.complex128:
            weights[name] = x.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            extra[name] = x.detach().cpu().clone()
    return weights, extra


def _is_plain(x: Any) -> bool:
    if isinstance(x, Mapping):
        return all(map(_is_plain, x)) and all(map(_is_plain, x.values()))
    if isinstance(x, list | tuple):
        return all(map(_is_plain, x))
    return x is None or isinstance(x, bool | int | float | complex | str | Tensor)


def _is_finite(x: Any) -> bool:
    """Of what is no plain tensor nothing is known."""
    if not isinstance(x, Tensor) or is_lazy(x) or x.layout != torch.strided or x.is_quantized:
        return True
    return all_finite(x) if is_sharded(x) else bool(x.isfinite().all())


@explain_missing_extra()
def one_process() -> Fabric:
    from lightning_fabric import Fabric
    from lightning_fabric.plugins.environments.lightning import LightningEnvironment

    # Named, since Fabric otherwise warns wherever it finds srun, and counts the tasks of a SLURM job.
    return Fabric(accelerator="cpu", devices=1, plugins=LightningEnvironment())


def load_optimizer(optimizer: torch.optim.Optimizer, state: Any) -> None:
    """Load what another run of this or an earlier version saved, for how this one computes."""
    bare = getattr(optimizer, "optimizer", optimizer)  # within the one of Fabric
    fused = [group.get("fused") for group in bare.param_groups]
    optimizer.load_state_dict(state)
    for group, ours in zip(bare.param_groups, fused, strict=True):
        if "fused" in group:
            group["fused"] = ours
    for parameter, values in bare.state.items():
        for name, value in values.items():
            if not isinstance(value, Tensor) or value.shape != parameter.shape:
                continue
            if is_sharded(parameter):
                values[name] = spread(value, parameter)
            elif value.stride() != parameter.stride():
                values[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def random_state(device: torch.device) -> dict[str, UInt8[Tensor, " byte"]]:
    state = {"cpu": torch.get_rng_state()}
    return state | {"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else state


def set_random_state(state: Mapping[str, UInt8[Tensor, " byte"]], device: torch.device) -> None:
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def draw_randomness(seed: int, step: int, rank: int, world: int) -> None:
    """What one of several processes draws in a step (dropout): a function of seed, step and rank, as only the random
    state of the first is saved."""
    if world > 1:
        torch.manual_seed(int(np.random.SeedSequence((seed, step, 2, rank)).generate_state(1)[0]))


@contextmanager
def private_randomness(seed: int, device: torch.device) -> Iterator[None]:
    """What a model draws (dropout) follows the seed, and the caller's generators are left as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
