"""Candidates for the default that a configuration cannot express, for the study `candidates-small`.

Question: does a budget that grows, that ends before the training does, or that sees smoothed errors, gain what the
plain budget loses? Run from the root of the repository, where the study finds this file:

    squall study run studies/candidates-small/study.yaml
"""

import torch
from torch import Tensor, nn

import squall
from squall import KLBudget, Schedule


class Growing(nn.Module):
    """A KL budget that grows linearly from 0 to rho over the first `steps` calls."""

    def __init__(self, *, rho: float = 1.0, cap: float = 3.0, steps: int = 1000) -> None:
        super().__init__()
        self.loss = squall.ImbalanceAwareLoss(Schedule(KLBudget(rho, cap), steps))

    def forward(self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        return self.loss(prediction, target, mask=mask)


class Ending(nn.Module):
    """A KL budget for the first `steps` calls in training mode, then the mean."""

    steps_taken: Tensor

    def __init__(self, *, rho: float = 0.3, cap: float = float("inf"), steps: int = 700) -> None:
        super().__init__()
        self.loss, self.mean = squall.ImbalanceAwareLoss(KLBudget(rho, cap)), squall.MeanSquaredError()
        self.steps = steps
        self.register_buffer("steps_taken", torch.tensor(0))

    def forward(self, prediction: Tensor, target: Tensor, *, mask: Tensor | None = None) -> Tensor:
        loss = self.loss if self.steps_taken < self.steps else self.mean
        if self.training:
            self.steps_taken += 1
        return loss(prediction, target, mask=mask)


class Smoothed(nn.Module):
    """A KL budget on squared errors averaged over `width` neighbours along the last axis, which is periodic."""

    def __init__(self, *, rho: float = 0.3, cap: float = float("inf"), width: int = 9) -> None:
        super().__init__()
        self.rule, self.width = KLBudget(rho, cap), width

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        errors = (prediction - target).square()
        half = self.width // 2
        padded = torch.cat([errors[..., -half:], errors, errors[..., :half]], dim=-1).detach()
        smooth = padded.unfold(-1, self.width, 1).mean(-1)
        return (squall.imbalance_weights(smooth, self.rule) * errors).sum()
