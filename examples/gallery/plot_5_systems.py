"""
Systems that simulate themselves
================================

Phase separation and solitons, by implicit schemes that keep what the equations keep: Cahn-Hilliard never gains
energy, Korteweg-de Vries keeps it, and both keep their mass.
"""

import matplotlib.pyplot as plt
import torch

import squall

figure, panels = plt.subplots(2, 2, figsize=(9, 5), layout="constrained")
for row, system in zip(panels, (squall.CahnHilliard(), squall.KortewegDeVries()), strict=True):
    states = system.simulate(system.initial_states(1, torch.Generator().manual_seed(3)), steps=500)
    time = system.dt * torch.arange(501)
    extent = (0, float(time[-1]), 0, system.width)
    image = row[0].imshow(states[0, :, 0].T.numpy(), aspect="auto", origin="lower", extent=extent, cmap="viridis")
    row[0].set(title=f"{type(system).__name__}: u(x, t)", xlabel="time t", ylabel="space x")
    figure.colorbar(image, ax=row[0])
    energy, mass = system.energy(states[0]), system.mass(states[0]).flatten()
    row[1].plot(time, energy - energy[0], label="energy − initial energy")
    row[1].plot(time, mass - mass[0], label="mass − initial mass")
    row[1].set(xlabel="time t")
    row[1].legend()
    drift, gained = float(energy[-1] - energy[0]), float((mass - mass[0]).abs().max())
    print(f"{system.name}: energy changes by {drift:.1e}, mass by {gained:.0e}")
plt.show()
