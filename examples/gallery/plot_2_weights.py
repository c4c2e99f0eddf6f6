"""
What a budget does to the weights
=================================

The weight of a point against its error, for errors with a heavy tail. A KL budget lets weights grow exponentially
with the error; a cap on top of it stops that; with a large budget and a cap *c*, the weights are those of the worst
1/*c* of the points (CVaR, top-k).
"""

import matplotlib.pyplot as plt
import torch

from squall import EffectiveFraction, KLBudget, imbalance_weights

error = torch.randn(20_000, generator=torch.Generator().manual_seed(0)).exp().square()  # log-normal
rules = {
    "KL budget 0.1": KLBudget(0.1),
    "KL budget 0.3 (default)": KLBudget(0.3),
    "KL budget 1": KLBudget(1.0),
    "KL budget 1, cap 5": KLBudget(1.0, cap=5),
    "KL budget 3, cap 5 (worst 20 %)": KLBudget(3.0, cap=5),
    "effective sample size 50 %": EffectiveFraction(0.5),
}
order = error.argsort()
figure, axes = plt.subplots(figsize=(8, 3.6), layout="constrained")
for name, rule in rules.items():
    weight = imbalance_weights(error, rule) * len(error)
    axes.loglog(error[order], weight[order], label=name)
axes.axhline(1, color="k", lw=0.8, ls=":")
axes.set(xlabel="error l of a point", ylabel="weight / uniform weight", xlim=(0.1, None), ylim=(1e-2, None))
axes.legend(fontsize="small")
plt.show()

# %%
# The same in numbers: how many points the weights amount to (effective sample size, Kish), and the largest weight.

for name, rule in rules.items():
    weight = imbalance_weights(error, rule)
    size = 1 / weight.square().sum() / len(error)
    print(f"{name:32} effective sample size {size:5.1%}   largest weight {weight.max() * len(error):8.1f}")
