"""How a model is trained, as plain values; the optimizer and its learning rate follow from them."""

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Shaped
from torch import Tensor

Residual = Literal["rate", "state"]


@dataclass(frozen=True)
class TrainingSettings:
    """How long, how often and how.

    Args:
        steps: number of optimiser steps.
        batch: transitions in a minibatch, over all ranks together.
        learning_rate: of the optimizer; with a schedule, the largest.
        residual: what the loss compares: the mean rate over the step, (u' − u)/dt, or the next state u'. The
            squared error of the rate is 1/dt² times that of the state, and a temperature has its unit.
        seed: draws the initial weights, the minibatches and the noise.
        log_every: steps between two lines of metrics.
        validate_every: steps between two rollouts of the validation trajectories; 0 for none.
        checkpoint_every: steps between two checkpoints.
        unroll: K, steps of the integrator in a training step. The loss sees all lead times at once, (batch, channel,
            lead, *space); of the rate it compares (û_k − u)/dt.
        unroll_gradient: through `all` steps; through each `step` alone; or `pushforward`, through the last step alone,
            the only one that the loss then sees.
        areas: whether the loss counts points by the areas of their cells, where the data have them; else all alike.
        recompute: keep no activations of the unrolled steps; compute them again in the backward pass, which takes about
            a third more time and 1/K of the memory.
        input_noise: standard deviation of the normal noise on the states that a training step starts from, in units of
            the standard deviation of each field. The target stays the state without noise.
        corrupt_share: share of the cells of the training targets that are wrong, to test robustness; 0 for none.
        corrupt_by: how far the next state is off there, up or down, in units of the standard deviation of each field.
        corrupt_seed: draws which cells; they stay the same over steps, losses and seeds of the training.
        optimizer: `adam`, or `adamw` for weight decay.
        weight_decay: of AdamW.
        schedule: of the learning rate: `constant`; `cosine`, to 0 at the last step; `step`, times `decay_factor` every
            `decay_every` steps.
        warmup: steps in which the learning rate first rises linearly.
        decay_every: of the schedule `step`.
        decay_factor: of the schedule `step`.
        clip: largest norm of the gradient, which is scaled down to it; 0 for none.
        average: decay of an exponential moving average of the weights, such as 0.999; 0 for none. Validation, the
            checkpoints and the trained model have the average.
        accumulate: parts that a minibatch is computed in, with the gradient of the whole; less memory, more time.
        patience: validations without a better score after which the training ends; 0 for no early end.
    """

    # These four are the paper's.
    steps: int = 10_000
    batch: int = 200
    learning_rate: float = 1e-3
    residual: Residual = "rate"
    seed: int = 0
    log_every: int = 50
    validate_every: int = 500
    checkpoint_every: int = 500
    unroll: int = 1
    unroll_gradient: Literal["all", "step", "pushforward"] = "all"
    areas: bool = True
    recompute: bool = False
    input_noise: float = 0.0
    corrupt_share: float = 0.0
    corrupt_by: float = 1.0
    corrupt_seed: int = 0
    optimizer: Literal["adam", "adamw"] = "adam"
    weight_decay: float = 0.0
    schedule: Literal["constant", "cosine", "step"] = "constant"
    warmup: int = 0
    decay_every: int = 0
    decay_factor: float = 0.1
    clip: float = 0.0
    average: float = 0.0
    accumulate: int = 1
    patience: int = 0

    @property
    def leads(self) -> int:
        """How many lead times of a window the loss sees."""
        return 1 if self.unroll_gradient == "pushforward" else self.unroll

    def __post_init__(self) -> None:
        self._check_ranges()
        self._check_choices()
        conflicts = {
            f"unroll_gradient is '{self.unroll_gradient}', but unroll is 1: unroll several steps": (
                self.unroll_gradient != "all" and self.unroll == 1
            ),
            "recompute is true, but unroll is 1: it saves the memory of unrolled steps": (
                self.recompute and self.unroll == 1
            ),
            "recompute is true, but unroll_gradient is 'pushforward', which keeps one step's activations anyway": (
                self.recompute and self.unroll_gradient == "pushforward"
            ),
            "weight_decay is set, but optimizer is 'adam': choose 'adamw'": (
                self.weight_decay > 0 and self.optimizer == "adam"
            ),
            "schedule is 'step': set decay_every, the steps between two decays": (
                self.schedule == "step" and self.decay_every == 0
            ),
            f"decay_every is set, but schedule is '{self.schedule}': choose 'step'": (
                self.schedule != "step" and self.decay_every > 0
            ),
            f"warmup is {self.warmup}, but must be less than steps, {self.steps}": self.warmup >= self.steps,
            f"accumulate is {self.accumulate}, but batch is {self.batch}: a part needs a transition": (
                self.accumulate > self.batch
            ),
            "corrupt_by or corrupt_seed is set, but corrupt_share is 0: set the share of the cells that are wrong": (
                self.corrupt_share == 0 and (self.corrupt_by, self.corrupt_seed) != (1.0, 0)
            ),
            "patience is set, but validate_every is 0: there is no score to wait for": (
                self.patience > 0 and self.validate_every == 0
            ),
        }
        for text, there in conflicts.items():
            if there:
                raise ValueError(f"training.{text}")

    def _check_ranges(self) -> None:
        least_one = ("steps", "batch", "log_every", "checkpoint_every", "unroll", "accumulate")
        least_zero = ("validate_every", "seed", "warmup", "decay_every", "patience", "corrupt_seed")
        for name, least in (dict.fromkeys(least_one, 1) | dict.fromkeys(least_zero, 0)).items():
            if getattr(self, name) < least:
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be at least {least}")
        for name in ("seed", "corrupt_seed"):
            if getattr(self, name) >= 2**63:
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be below 2**63")
        for name in ("learning_rate", "decay_factor", "corrupt_by"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be a positive number")
        for name in ("input_noise", "weight_decay", "clip"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be a number that is not negative")
        for name, example in (("average", 0.999), ("corrupt_share", 0.01)):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"training.{name} is {getattr(self, name)}, but must be in [0, 1), such as {example}")

    def _check_choices(self) -> None:
        for name in ("residual", "unroll_gradient", "optimizer", "schedule"):
            allowed = get_args(type(self).__annotations__[name])
            if getattr(self, name) not in allowed:
                raise ValueError(f"training.{name} is {getattr(self, name)!r}, but must be one of {allowed}")


TOGETHER = ("optimizer", "weight_decay", "corrupt_share", "corrupt_by", "corrupt_seed")
"""Of the options after `checkpoint_every`, those that many trainings as one batch have too."""


def alone(settings: TrainingSettings) -> list[str]:
    """The options that are set and that only a training by itself has."""
    fields = dataclasses.fields(settings)
    later = fields[[field.name for field in fields].index("unroll") :]
    changed = [field.name for field in later if getattr(settings, field.name) != field.default]
    return [name for name in changed if name not in TOGETHER]


def learning_rate_at(step: int, settings: TrainingSettings) -> float:
    """The learning rate of a step, from 0 on, divided by the largest: a function of the step alone.

    Example:
        >>> [learning_rate_at(n, TrainingSettings(steps=6, warmup=2, schedule="cosine")) for n in (0, 1, 2, 4)]
        [0.5, 1.0, 1.0, 0.5]
    """
    if step < settings.warmup:
        return (step + 1) / settings.warmup
    since = step - settings.warmup
    if settings.schedule == "cosine":
        return (1 + math.cos(math.pi * since / (settings.steps - settings.warmup))) / 2
    if settings.schedule == "step":
        return settings.decay_factor ** (since // settings.decay_every)
    return 1.0


def adam(
    parameters: Iterable[Shaped[Tensor, "..."]],
    settings: TrainingSettings,
    device: torch.device,
    *,
    replayed: bool = False,
) -> torch.optim.Optimizer:
    """Adam or AdamW, in one pass on a CPU over plain parameters: that pass knows no complex numbers and no strides.

    `replayed`: as part of a CUDA graph, likewise in one pass, which counts its steps on the device.
    """
    parameters = list(parameters)
    if not parameters:
        raise ValueError("the model has no parameters: there is nothing to train")
    if not any(p.requires_grad for p in parameters):
        raise ValueError("all parameters of the model are frozen (requires_grad is False): there is nothing to train")
    plain = all(p.is_floating_point() and p.is_contiguous() for p in parameters)
    fused = (plain and (replayed or device.type == "cpu")) or None
    if settings.optimizer == "adam":
        return torch.optim.Adam(parameters, settings.learning_rate, fused=fused, capturable=replayed)
    decay = settings.weight_decay
    return torch.optim.AdamW(parameters, settings.learning_rate, weight_decay=decay, fused=fused, capturable=replayed)
