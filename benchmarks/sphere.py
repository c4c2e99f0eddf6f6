"""How much of a training step on the sphere do the loss and its weights take?

    python benchmarks/sphere.py [--repetitions 60]

The step is that of the study storms-small: the U-Net of width 8 on batches of 8 states of 3 fields on 32 × 64 points,
one unrolled step, Adam, one thread. Losses count points by the areas of their cells. Numbers are processor times, the
median over repetitions, every loss in turn; "more than MSE" is in per cent of the step with area-weighted MSE.
"""

import argparse
import time
from statistics import median

import torch

from squall import ShallowWater
from squall.losses import ImbalanceAwareLoss, KLBudget, MeanSquaredError
from squall.models import UNet

LOSSES = {
    "MSE": MeanSquaredError(),
    "budget 0.3": ImbalanceAwareLoss(),
    "budget 1, cap 3": ImbalanceAwareLoss(KLBudget(1.0, cap=3.0)),
    "budget 0.3, by channel": ImbalanceAwareLoss(over="channel"),
    "budget 1, cap 3, by channel": ImbalanceAwareLoss(KLBudget(1.0, cap=3.0), over="channel"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repetitions", type=int, default=60)
    options = parser.parse_args()
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    model = UNet(3, width=8, levels=3, boundary=("pole", "periodic"), generator=generator)
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    areas = ShallowWater(latitudes=32, longitudes=64, step=300.0).areas
    u = torch.randn(8, 3, 32, 64, generator=generator)
    target = u + torch.randn(u.shape, generator=generator) ** 3  # errors with tails
    whole, losses = [], {name: [] for name in LOSSES}
    for i in range(options.repetitions + 5):
        for name, loss in LOSSES.items():
            start = time.process_time()
            optimizer.zero_grad()
            prediction = u + model(u)
            leaf = prediction.detach().requires_grad_()
            before = time.process_time()
            loss(leaf, target, measure=areas).backward()
            after = time.process_time()
            prediction.backward(leaf.grad)
            optimizer.step()
            if i >= 5:  # the first calls compile and allocate
                losses[name].append(after - before)
                if name == "MSE":
                    whole.append(time.process_time() - start)
    step, mse = median(whole), median(losses["MSE"])
    print(f"step with MSE {1e3 * step:.1f} ms, of which the loss takes {100 * mse / step:.1f} %")
    for name, times in losses.items():
        print(f"{name:28} {1e3 * median(times):6.2f} ms, {100 * (median(times) - mse) / step:+5.2f} % more than MSE")


if __name__ == "__main__":
    main()
