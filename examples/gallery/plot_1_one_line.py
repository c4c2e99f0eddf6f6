"""
One line in your loop
=====================

A function that is flat almost everywhere and steep at one front, fitted by a small network in a plain PyTorch loop.
The only change is the line that makes the loss. The network is too small to fit everything: the mean squared error
spends it on the flat parts, the weighted loss on the front too.
"""

import matplotlib.pyplot as plt
import torch

import squall

x = torch.linspace(-1, 1, 1001)[:, None]
y = 0.1 * torch.sin(6 * x) + torch.exp(-((x - 0.3) ** 2) / 2e-4)  # a peak of width 0.014


def fit(loss, seed=0, steps=1000):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(
        torch.nn.Linear(1, 24), torch.nn.Tanh(), torch.nn.Linear(24, 24), torch.nn.Tanh(), torch.nn.Linear(24, 1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(model(x), y).backward()
        optimizer.step()
    return model(x).detach()


losses = {
    "MSE": torch.nn.MSELoss(),
    "KL budget 0.3 (default)": squall.ImbalanceAwareLoss(),
    "KL budget 1, cap 10": squall.ImbalanceAwareLoss(squall.KLBudget(1.0, cap=10)),
}
predictions = {name: fit(loss) for name, loss in losses.items()}

# %%
# The mean squared error of all points, and that of the 1 % with the largest errors:

for name, prediction in predictions.items():
    error = (prediction - y).square().flatten()
    top = error.topk(len(error) // 100).values
    print(f"{name:24} mean {error.mean():.1e}   top 1 % {top.mean():.1e}")

figure, axes = plt.subplots(figsize=(8, 3.2), layout="constrained")
axes.plot(x, y, "k", label="truth")
for name, prediction in predictions.items():
    axes.plot(x, prediction, label=name)
axes.set(xlabel="x", ylabel="u")
axes.legend()
plt.show()
