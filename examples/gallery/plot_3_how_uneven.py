"""
How uneven is a system?
=======================

The Lorenz curve of the squared change from one state to the next: which share of all change happens at which share
of the points. ``squall.ErrorSketch`` keeps the distribution in a few thousand numbers, and sketches of parts add
up, so that the data may be larger than memory.
"""

import matplotlib.pyplot as plt
import torch

import squall

draw = torch.Generator().manual_seed(0)
systems = {"Cahn-Hilliard": squall.CahnHilliard(), "Korteweg-de Vries": squall.KortewegDeVries()}
changes = {"Gaussian noise": torch.randn(100_000, generator=draw).square()}
for name, system in systems.items():
    states = system.simulate(system.initial_states(10, draw), steps=200)
    changes[name] = states.diff(dim=1).square()

figure, axes = plt.subplots(figsize=(4.6, 4.2), layout="constrained")
for name, change in changes.items():
    sketch = squall.ErrorSketch()
    for part in change.split(3):  # piece by piece, as from a file
        sketch.add(part)
    points, share = sketch.lorenz()
    axes.plot(points, share, label=name)
    top, gini = float(sketch.share_of_top(0.01)), float(sketch.gini())
    print(f"{name:18} the top 1 % of the points hold {top:.0%} of the change, Gini coefficient {gini:.2f}")
axes.plot([0, 1], [0, 1], "k:", lw=0.8)
axes.set(xlabel="share of the points, smallest change first", ylabel="share of the squared change")
axes.legend()
plt.show()
