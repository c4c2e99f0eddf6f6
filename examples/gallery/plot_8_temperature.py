"""
Why not a fixed temperature?
============================

As a training shrinks the errors, a fixed temperature turns from a maximum over a few points into a plain mean. A
budget holds the effective sample size where it is: the temperature follows the errors.
"""

import matplotlib.pyplot as plt
import torch

import squall

draw = torch.Generator().manual_seed(0)
shape = torch.randn(100, 1, 50, generator=draw) * torch.randn(100, 1, 50, generator=draw).exp()
scales = torch.logspace(1, -3, 25)  # a training, as seen by its errors

rules = {"T = 0.1": 0.1, "T = 0.001": 0.001, "KL budget 0.3": squall.KLBudget(0.3)}
figure, axes = plt.subplots(figsize=(7, 3.4), layout="constrained")
for name, rule in rules.items():
    fractions = []
    for scale in scales:
        weight = squall.imbalance_weights((scale * shape).square(), rule)
        fractions.append(float(1 / weight.square().sum() / weight.numel()))
    axes.loglog(scales, fractions, label=name)
axes.invert_xaxis()
axes.set(xlabel="root mean squared error, falling as a training goes on", ylabel="effective sample size / n")
axes.legend()
plt.show()
