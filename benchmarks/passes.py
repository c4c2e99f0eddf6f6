"""How many passes over the points does a warm budget take, and is it met?

    python benchmarks/passes.py [--steps 1000] [--hidden 32]

First over batches that are drawn afresh every time: squares of Gaussian residuals, and of such times a log-normal
factor exp(0.7 x), where a few points rule a batch and its temperature jumps. Then in trainings: an HNN on simulations
of either system, the paper's minibatches of 200 states. A pass reads prediction and target once; the least is one a
step, and the backward pass is not counted. The last column is the largest deviation of KL (or of log 1/f) from the
budget, relative to it, by a float64 count over every 20th batch.
"""

import argparse
import math
from collections.abc import Iterable
from unittest import mock

import numpy as np
import torch
from scipy.special import logsumexp
from torch import Tensor, nn

from squall.data import InMemory, Transitions
from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, recipe
from squall.losses.passes import Passes
from squall.losses.temperature import Budget
from squall.models import HNN
from squall.systems import CahnHilliard, KortewegDeVries
from squall.training import TrainingSettings, train

RULES: list[Budget] = [KLBudget(0.05), KLBudget(0.3), KLBudget(1.0), EffectiveFraction(0.5)]
STAGES = (1, 50, 200)
EVERY = 20


class Counted(nn.Module):
    """The loss with a count of the passes of every call, and of how far off its budget it is."""

    def __init__(self, rule: Budget) -> None:
        super().__init__()
        self.loss, self.rule = ImbalanceAwareLoss(rule), rule
        self.passes: list[int] = []
        self.off = 0.0

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        self.passes.append(0)
        made = recipe.passes_for
        with mock.patch.object(recipe, "passes_for", lambda *tensors: self._watched(made(*tensors))):
            value = self.loss(prediction, target)
        if len(self.passes) % EVERY == 0:
            errors = (prediction - target).detach().double().square().numpy().ravel()
            self.off = max(self.off, abs(divergence(self.rule, errors, self.loss.report()["temperature"]) - 1))
        return value

    def _watched(self, passes: Passes | None) -> Passes | None:
        assert passes is not None
        passes.sweep = self._counting(passes.sweep)  # type: ignore[method-assign]
        passes.largest_and_mean = self._counting(passes.largest_and_mean)  # type: ignore[method-assign]
        return passes

    def _counting(self, method):
        def call(*arguments):
            self.passes[-1] += 1
            return method(*arguments)

        return call


def divergence(rule: Budget, errors: np.ndarray, temperature: float) -> float:
    """The divergence of the weights over the budget."""
    z = errors / temperature
    weights = np.exp(z - logsumexp(z))
    if isinstance(rule, KLBudget):
        return float((weights * np.log(np.maximum(weights * len(z), 1e-300))).sum() / rule.budget)
    return math.log(len(z) * float(weights @ weights)) / rule.budget


def fresh(n: int, tail: float, batches: int = 25) -> Iterable[Tensor]:
    for seed in range(batches):
        generator = torch.Generator().manual_seed(seed)
        yield torch.randn(n, generator=generator) * (tail * torch.randn(n, generator=generator)).exp()


def over_fresh_batches() -> None:
    print(f"{'batches':12}{'n':>9}  {'rule':32}of 24 took 1, 2, 3, more   off by")
    for name, tail in (("Gaussian", 0.0), ("log-normal", 0.7)):
        for n in (10_000, 100_000, 1_000_000):
            for rule in RULES:
                counted = Counted(rule)
                for residuals in fresh(n, tail):
                    counted(residuals, torch.zeros(n))
                warm = np.array(counted.passes[1:])
                took = [int((warm == k).sum()) for k in (1, 2, 3)] + [int((warm > 3).sum())]
                print(f"{name:12}{n:9}  {rule!s:32}{', '.join(map(str, took)):25} {counted.off:.0e}")


def in_trainings(steps: int, hidden: int) -> None:
    stages = [f"{a} to {b}" for a, b in zip(STAGES, (*STAGES[1:], steps), strict=True)]
    print(f"\n{'HNN on':20}{'rule':32}passes a step, {', '.join(stages)}   off by")
    for system in (CahnHilliard(), KortewegDeVries()):
        states = system.simulate(system.initial_states(85, np.random.RandomState(system.paper_seed)), 500)
        source = InMemory(states, dt=system.dt, lengths=system.width)
        for rule in RULES:
            counted = Counted(rule)
            model = HNN(system.structure, hidden=hidden, generator=torch.Generator().manual_seed(0))
            train(model, Transitions(source), TrainingSettings(steps=steps, validate_every=0), loss=counted)
            means = [np.mean(counted.passes[a:b]) for a, b in zip(STAGES, (*STAGES[1:], None), strict=True)]
            print(f"{system.name:20}{rule!s:32}{'  '.join(f'{mean:.2f}' for mean in means):36}   {counted.off:.0e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000, help="of each training")
    parser.add_argument("--hidden", type=int, default=32, help="width of its network")
    options = parser.parse_args()
    over_fresh_batches()
    in_trainings(options.steps, options.hidden)


if __name__ == "__main__":
    main()
