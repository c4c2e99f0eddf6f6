"""
Rivals, side by side
====================

What other losses make of the same errors: the weight that the gradient gives to a point, relative to MSE's, against
the error of the point.
"""

import matplotlib.pyplot as plt
import torch

import squall
from squall.losses.rivals import rival

draw = torch.Generator().manual_seed(0)
target = torch.randn(50, 1, 200, generator=draw)
residual = 0.1 * torch.randn(50, 1, 200, generator=draw) * torch.randn(50, 1, 200, generator=draw).exp()

losses = {
    "KL budget 0.3 (default)": squall.ImbalanceAwareLoss(),
    "KL budget 1, cap 5": squall.ImbalanceAwareLoss(squall.KLBudget(1.0, cap=5)),
    "top-k (CVaR), 10 %": rival("top_k", alpha=0.1),
    "focal": rival("focal"),
    "loss max-pooling": rival("max_pooling"),
    "TERM, T = 1": rival("term", temperature=1.0),
}
error = residual.abs().flatten()
order = error.argsort()
figure, axes = plt.subplots(figsize=(8, 3.8), layout="constrained")
for name, loss in losses.items():
    prediction = (target + residual).requires_grad_()
    loss(prediction, target).backward()
    weight = (prediction.grad / (2 * residual / residual.numel())).flatten()  # MSE's gradient is 2 e / n
    axes.loglog(error[order], weight[order].clamp(min=1e-4), label=name)
axes.axhline(1, color="k", lw=0.8, ls=":")
axes.set(xlabel="|error| of a point", ylabel="weight / weight under MSE", xlim=(1e-3, None), ylim=(1e-2, None))
axes.legend(fontsize="small")
plt.show()
