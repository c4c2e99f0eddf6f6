"""Draw the pictures of docs/loss.md: python docs/images/loss_pictures.py (ten seconds)."""

from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.axes import Axes

from squall.losses import ImbalanceAwareLoss, KLBudget

FOLDER = Path(__file__).parent
BLUE, RED, GREY = "#2166ac", "#b2182b", "#777777"


def residuals(n: int, seed: int = 0) -> torch.Tensor:
    """n standard normal residuals."""
    return torch.randn(n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def gradient(e: torch.Tensor, temperature: float, differentiate: bool) -> torch.Tensor:
    """n ∂loss/∂e at every residual."""
    prediction = e.clone().requires_grad_()
    loss = ImbalanceAwareLoss(temperature, differentiate_weights=differentiate)
    loss(prediction, torch.zeros_like(e)).backward()
    assert prediction.grad is not None
    return len(e) * prediction.grad


def why_detached(axes: Axes) -> None:
    """The gradient with differentiated weights over the one with held weights: below 0 it points the wrong way."""
    e, temperature = residuals(20_000).sort().values, 1.3
    ratio = gradient(e, temperature, True) / gradient(e, temperature, False)
    wrong = float((ratio < 0).double().mean())
    size, order = e.abs().sort()
    ratio = ratio[order]
    axes.axhline(0, color=GREY, lw=0.8)
    axes.plot(size, ratio, color=RED, lw=2, label="weights differentiated")
    axes.axhline(1, color=BLUE, lw=2, label="weights held (the default)")
    axes.fill_between(size, ratio, 0, where=(ratio < 0).numpy(), color=RED, alpha=0.2, lw=0)
    axes.set(xlim=(0, 4.2), ylim=(-14, 6), xlabel="|residual|", ylabel="∂loss/∂e over w · 2e")
    axes.set_title(f"Differentiated weights push {100 * wrong:.2f} % of the points\naway from their target")
    axes.legend(frameon=False, loc="upper left")


def why_no_fixed_temperature(axes: Axes) -> None:
    """The share of points that carry the weight, by batch size, in 7 batches each."""
    sizes = [100, 300, 1000, 3000, 10_000, 100_000, 1_000_000]
    rules = [
        (1.3, RED, "T = 1.3 × mean error"),
        (KLBudget(0.3), BLUE, "KL budget 0.3"),
        (KLBudget(0.05), "#67a9cf", "KL budget 0.05"),
    ]
    for rule, color, label in rules:
        fractions = []
        for n in sizes:
            loss, values = ImbalanceAwareLoss(rule), []
            for seed in range(7):
                loss(residuals(n, seed), torch.zeros(n, dtype=torch.float64))
                values.append(loss.report()["effective_fraction"])
            fractions.append(sorted(values))
        axes.loglog(sizes, [f[3] for f in fractions], color=color, lw=2, marker="o", ms=4, label=label)
        axes.fill_between(sizes, [f[0] for f in fractions], [f[-1] for f in fractions], color=color, alpha=0.2, lw=0)
    axes.set(xlabel="points in the batch", ylabel="effective sample fraction")
    axes.set_title("A fixed temperature collapses on single points\nas the batch grows; a budget holds")
    axes.legend(frameon=False, loc="lower left")


def as_training_goes_on(axes: Axes) -> None:
    """The divergence of the weights from uniform while the errors shrink."""
    e, zero = residuals(10_000), torch.zeros(10_000, dtype=torch.float64)
    scales = torch.logspace(0, -3, 31).tolist()
    for rule, color, label in [
        (4.0, RED, "T = 4 (sharp early, plain mean later)"),
        (KLBudget(0.3), BLUE, "KL budget 0.3"),
    ]:
        kls = []
        for scale in scales:
            loss = ImbalanceAwareLoss(rule)
            loss(scale * e, zero)
            kls.append(loss.report()["kl"])
        axes.plot([scale**2 for scale in scales], kls, color=color, lw=2, label=label)
    axes.set(xscale="log", xlabel="mean squared error (training goes to the right)", ylabel="KL(w‖uniform), nats")
    axes.invert_xaxis()
    axes.set_title("A fixed temperature fades out\nas the errors shrink")
    axes.legend(frameon=False)


def main() -> None:
    plt.rcParams.update({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False})
    pictures = {
        "loss_why_detached": why_detached,
        "loss_batch_size": why_no_fixed_temperature,
        "loss_training": as_training_goes_on,
    }
    for name, draw in pictures.items():
        figure, axes = plt.subplots(figsize=(5.6, 4), layout="constrained")
        draw(axes)
        figure.savefig(FOLDER / f"{name}.png", dpi=150)
        plt.close(figure)


if __name__ == "__main__":
    main()
