"""
Diagnose your data
==================

What ``squall diagnose FILE`` prints and draws: the share of the change that few points carry, where and when, and
what that says about weighting. Here for waves that steepen into fronts (Burgers' equation).
"""

import io

import matplotlib.pyplot as plt
import torch

import squall
from squall.evaluation.diagnosis import change
from squall.report.diagnosis import advice_text, diagnosis_figure
from squall.systems import Burgers

system = Burgers()
states = system.simulate(system.initial_states(10, torch.Generator().manual_seed(0)), steps=100)
source = squall.data.InMemory(states, dt=system.dt, lengths=system.width)

found = change(source)
for field, shares in found.ladder.items():
    for name, share in shares.items():
        print(f"{field}, {name:28} {share:.2f}")
print()
print(advice_text(found))

# %%
# The command writes the picture into ``diagnosis.png``:

picture = io.BytesIO()
diagnosis_figure({"change": found}, source).savefig(picture, dpi=120)
picture.seek(0)
plt.figure(figsize=(9, 3.2), layout="constrained")
plt.imshow(plt.imread(picture))
plt.axis("off")
plt.show()
