"""The loss as a pure function, and which way computes it: fused passes where they can, else the formula."""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, cast

import torch
from torch import Tensor

from squall.losses._tracing import is_traced, is_transformed
from squall.losses.account import SAMPLE, Account, FusedAccount, GroupedAccount, account_of
from squall.losses.checks import check_finite, check_pair, combined_measure
from squall.losses.distributed import (
    Group,
    ShardedPasses,
    globally,
    globally_each,
    process_group,
    sharding_of,
    together,
)
from squall.losses.errors import PointwiseError, squared_error
from squall.losses.fused import FusedLoss, masked_passes, passes_for, solve
from squall.losses.fused_measure import measured_passes
from squall.losses.passes import Passes
from squall.losses.weights import Over, Weighed, Weighing, from_groups, to_groups

__all__ = ["Evaluated", "Points", "Recipe", "Reduction"]

Reduction = Literal["mean", "none"]

LARGE_GROUP = 1 << 12
"""Points from which a group is worth fused passes of its own."""


class Evaluated(NamedTuple):
    """A loss, and what may be asked about it or is a start for the next one."""

    value: Tensor
    account: Account | None
    log_inverse_temperature: Tensor | float
    """log β, a scalar or one per channel; NaN where there is no finite temperature to start from."""


class Points(NamedTuple):
    """The errors and their measure, each (group, point)."""

    errors: Tensor
    measure: Tensor | None


@dataclass(frozen=True)
class Recipe:
    """The loss as a pure function; `ImbalanceAwareLoss` documents the fields."""

    weighing: Weighing
    error: PointwiseError = squared_error
    over: Over = "all"
    group: Group = "world"
    reduction: Reduction = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in ("mean", "none"):
            raise ValueError(f"reduction must be 'mean' or 'none', got {self.reduction!r}")
        if isinstance(self.group, str) and self.group != "world":
            raise ValueError(f"group must be 'world', a process group or None, got {self.group!r}")

    def evaluate(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None = None,
        measure: Tensor | None = None,
        step: Tensor | None = None,
        log_inverse_temperature: Tensor | None = None,
    ) -> Evaluated:
        """The loss; `step` and `log_inverse_temperature` are what remains of the calls before."""
        group = process_group(self.group)
        prediction, target = together(
            partial(check_pair, prediction, target, self.over, may_be_empty=group is not None),
            prediction.device,
            group,
        )
        if self._plain:
            fused = self._by_passes(prediction, target, mask, measure, step, log_inverse_temperature)
            if fused is not None:
                return fused
        points = together(partial(self.points, prediction, target, mask, measure), prediction.device, group)
        evaluated, _ = self.weigh(points, step, log_inverse_temperature)
        if self.reduction == "mean":
            return evaluated
        return evaluated._replace(value=from_groups(evaluated.value, prediction.shape, self.over))

    @property
    def _plain(self) -> bool:
        """Whether the fused passes know this loss."""
        return self.reduction == "mean" and self.weighing.plain

    @property
    def _starts_by_channel(self) -> bool:
        """Whether the next step's channels start where this one's ended; a sample is another one each time."""
        return self.over == "channel" and not is_transformed() and not torch.compiler.is_compiling()

    def _by_passes(
        self,
        prediction: Tensor,
        target: Tensor,
        mask: Tensor | None,
        measure: Tensor | None,
        step: Tensor | None,
        log_inverse_temperature: Tensor | None,
    ) -> Evaluated | None:
        """The loss by the fused passes, None where they decline."""
        if is_traced(prediction):
            return None
        group = process_group(self.group)
        if self.error is not squared_error:
            points = together(partial(self.points, prediction, target, mask, measure), prediction.device, group)
            errors = from_groups(points.errors, prediction.shape, self.over)
            roots = errors.clamp(min=torch.finfo(errors.dtype).tiny).sqrt()  # where it is 0, the slope is infinite
            squared, rest = replace(self, error=squared_error), (step, log_inverse_temperature)
            return squared._by_passes(roots, torch.zeros_like(roots), mask, measure, *rest)
        if self.over != "all":
            if group is not None or mask is not None or measure is not None:
                return None
            parts = self._fused_groups(prediction, target, step, log_inverse_temperature)
            return None if parts is None else self._mean_of(parts)
        shown, aim, passes = self._passes(prediction, target, mask, measure, alone=group is None)
        if group is not None:  # a mask may be there on some of the processes only
            passes = ShardedPasses.of(passes, group, prediction.device)
        return None if passes is None else self._fused(passes, shown, aim, step, log_inverse_temperature)

    @staticmethod
    def _passes(
        prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None, *, alone: bool
    ) -> tuple[Tensor, Tensor, Passes | None]:
        """The fused passes, None where there are none, and what they are over."""
        if measure is not None:
            if not alone:
                return prediction, target, None
            total = combined_measure(mask, measure, prediction)
            assert total is not None
            if mask is not None:
                prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
            return measured_passes(prediction, target, total) or (prediction, target, None)
        if mask is not None:
            return masked_passes(prediction, target, mask) or (prediction, target, None)
        return prediction, target, passes_for(prediction, target)

    def _fused(
        self,
        passes: Passes,
        prediction: Tensor,
        target: Tensor,
        step: Tensor | None,
        log_inverse_temperature: Tensor | None,
    ) -> Evaluated | None:
        """By the fused passes, None where they decline."""
        rule, softness = self.weighing.at(step)
        warm = math.nan if log_inverse_temperature is None else math.exp(log_inverse_temperature.item())
        solution = solve(passes, rule, float(softness), warm)
        if solution is None:
            return None
        value = cast(Tensor, FusedLoss.apply(prediction, target, passes, solution))
        log_beta = math.log(solution.beta) if solution.beta else math.nan
        return Evaluated(value, FusedAccount(solution, *passes.sample()), log_beta)

    def of_each_group(self, prediction: Tensor, target: Tensor, step: Tensor | None = None) -> Tensor:
        """The loss of every group by itself, (group,), without an account; on one process."""
        prediction, target = check_pair(prediction, target, self.over)
        fusable = self._plain and self.error is squared_error
        parts = self._fused_groups(prediction, target, step) if fusable else None
        if parts is not None:
            return torch.stack([part.value for part in parts])
        points = self.points(prediction, target, None, None)
        weights = self.weighing.weigh(*points, step=step).weights
        return (weights * points.errors).sum(1, dtype=torch.float64).to(points.errors.dtype) * len(weights)

    def _fused_groups(
        self, prediction: Tensor, target: Tensor, step: Tensor | None, log_inverse_temperature: Tensor | None = None
    ) -> list[Evaluated] | None:
        """Every group by the fused passes, None where they decline."""
        if is_traced(prediction) or prediction.is_cuda:  # where many groups are one small kernel's work
            return None
        predictions, targets = to_groups(prediction, self.over), to_groups(target, self.over)
        if predictions.shape[1] < LARGE_GROUP:
            return None
        starts: list[Tensor | None] = [None] * len(predictions)
        if log_inverse_temperature is not None and log_inverse_temperature.shape == (len(starts),):
            starts = list(log_inverse_temperature)
        parts = []
        for one, aim, start in zip(predictions, targets, starts, strict=True):
            passes = passes_for(one, aim)
            part = None if passes is None else self._fused(passes, one, aim, step, start)
            if part is None:
                return None
            parts.append(part)
        return parts

    def _mean_of(self, parts: list[Evaluated]) -> Evaluated:
        """The loss over groups of equally many points: their mean."""
        values, accounts, log_betas = zip(*parts, strict=True)
        accounts = tuple(account.thinned(SAMPLE // len(parts)) for account in accounts)
        start = torch.tensor(log_betas, dtype=torch.float64) if self._starts_by_channel else math.nan
        return Evaluated(torch.stack(values).mean(), GroupedAccount(accounts), start)

    def agreed_points(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None = None, measure: Tensor | None = None
    ) -> Points:
        """The points, checked: what one process refuses is an error on all."""
        group = process_group(self.group)
        prepare = partial(self._checked_points, prediction, target, mask, measure, group is not None)
        return together(prepare, prediction.device, group)

    def _checked_points(
        self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None, may_be_empty: bool
    ) -> Points:
        prediction, target = check_pair(prediction, target, self.over, may_be_empty=may_be_empty)
        return self.points(prediction, target, mask, measure)

    def points(self, prediction: Tensor, target: Tensor, mask: Tensor | None, measure: Tensor | None) -> Points:
        """The pointwise errors in groups, with their measure."""
        total = combined_measure(mask, measure, prediction)
        if mask is not None:  # replaced before the error, or 0 · NaN would be the gradient
            prediction, target = torch.where(mask, prediction, 0), torch.where(mask, target, 0)
        errors = self.error(prediction, target)
        if errors.shape != prediction.shape:
            raise ValueError(
                f"error must keep the shape {tuple(prediction.shape)}, it returned {tuple(errors.shape)}; "
                f"leave the mean to the loss (reduction='none')"
            )
        check_finite(errors, prediction, target)
        return Points(to_groups(errors, self.over), None if total is None else to_groups(total, self.over))

    def weigh(
        self, points: Points, step: Tensor | None, log_inverse_temperature: Tensor | None
    ) -> tuple[Evaluated, Weighed]:
        """The loss by the formula, operator by operator (the reference, and what every transform can trace), with
        the weights that it used."""
        errors = points.errors
        sharding = sharding_of(self.over, process_group(self.group))
        if self.weighing.differentiate and sharding.world > 1:
            raise ValueError("differentiate_weights needs the whole batch on one process: pass group=None")
        weighed = self.weighing.weigh(
            errors,
            points.measure,
            sharding=sharding,
            log_inverse_temperature=log_inverse_temperature,
            step=step,
        )
        account = None if is_transformed() or torch.compiler.is_exporting() else account_of(weighed, errors)
        inverse = (weighed.sharpness / weighed.population.scale).log()
        log_beta = inverse if self._starts_by_channel else inverse.squeeze(0) if len(inverse) == 1 else math.nan
        weighted = weighed.weights * errors
        if self.reduction == "mean":
            weighted = globally(weighted.sum(dtype=torch.float64), sharding).to(errors.dtype)
        else:
            weighted = globally_each(weighted, sharding)
        return Evaluated(weighted, account, log_beta), weighed
