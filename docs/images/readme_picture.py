"""Draw the picture of the README: python docs/images/readme_picture.py (half a minute)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.colors import LogNorm

import squall
from squall.data import InMemory, Transitions

STEPS, HIDDEN = 1500, 64


def main() -> None:
    system = squall.CahnHilliard()
    states = system.simulate(system.initial_states(21, torch.Generator().manual_seed(0)), steps=500)
    training, test = InMemory(states[:20], dt=system.dt), states[20:]
    model = squall.HNN(system.structure, HIDDEN, generator=torch.Generator().manual_seed(0))
    squall.train(model, Transitions(training), squall.TrainingSettings(steps=STEPS), loss=squall.MeanSquaredError())
    with torch.no_grad():
        rate = squall.increment(squall.euler, model, test[0, :-1].float(), system.dt)
    target = (test[0].diff(dim=0) / system.dt).float()
    error = (rate - target).square()[:, 0]
    weight = squall.imbalance_weights(error, squall.KLBudget(0.3)) * error.numel()

    figure, panels = plt.subplots(1, 3, figsize=(11, 2.8), layout="constrained", sharey=True)
    extent = (0, 500 * system.dt, 0, system.width)
    floor = float(error.quantile(0.05))
    shown = [
        ("state u", test[0, :-1, 0].T, {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}),
        ("squared error of one step", error.T, {"cmap": "magma", "norm": LogNorm(floor, float(error.max()))}),
        ("weight / uniform weight", weight.T, {"cmap": "magma", "norm": LogNorm(0.1, float(weight.max()))}),
    ]
    for axes, (title, values, options) in zip(panels, shown, strict=True):
        image = axes.imshow(values, aspect="auto", origin="lower", extent=extent, interpolation="nearest", **options)
        axes.set(title=title, xlabel="time t")
        figure.colorbar(image, ax=axes)
    panels[0].set_ylabel("space x")
    figure.savefig(Path(__file__).parent / "readme.png", dpi=130)
    top = error.flatten().topk(error.numel() // 100).values.sum() / error.sum()
    print(f"the largest 1 % of the errors hold {100 * top:.0f} % of their sum")


if __name__ == "__main__":
    main()
