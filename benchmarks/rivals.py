"""What does a step of each rival cost beside `mse_loss`?

    python benchmarks/rivals.py                # the loss alone, one thread; two minutes
    python benchmarks/rivals.py --training     # whole training steps
    python benchmarks/rivals.py --threads 2

Forward and backward, float32, of the loss alone from a prediction to its gradient, or of a model with the optimizer's
step. The losses take turns within one run, and every step has a fresh target. Times are of the CPU time of the process:
of the loss alone medians, in units of `mse_loss`; of a training step the median over turns of the ratio to the mean
squared error within the turn, with its quartiles.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from squall.losses import ImbalanceAwareLoss, KLBudget
from squall.losses.rivals import RIVALS, rival
from squall.models import FNO, HNN
from squall.systems import KortewegDeVries
from squall.training.settings import TrainingSettings, adam

SHAPES = [(20, 1, 128), (20, 1, 4096), (20, 2, 64, 64), (4, 4, 256, 256)]
OPTIONS = {"term": {"temperature": 8.0}}
MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "FNO of width 6, (20, 1, 128)": (lambda: FNO(1, dimensions=1, modes=24, width=6, layers=2), (20, 1, 128)),
    "FNO of width 24, (20, 1, 128)": (lambda: FNO(1, dimensions=1, modes=24, width=24, layers=2), (20, 1, 128)),
    "2-D FNO of width 32, (8, 1, 64, 64)": (lambda: FNO(1, dimensions=2, modes=12, width=32), (8, 1, 64, 64)),
    "HNN++ of width 200, (200, 1, 50)": (lambda: HNN(KortewegDeVries().structure, 200), (200, 1, 50)),
}

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(shape: tuple[int, ...], target: Tensor) -> dict[str, Loss]:
    """Every loss for batches of this shape; those that remember, for twice as many samples."""
    samples = (2 * shape[0], *shape[1:])
    index = torch.arange(shape[0])
    data = {"channel": (shape[1],), "density": (target,), "regimes": (target,), "rba": (samples,), "vrba": (samples,)}

    def indexed(name: str) -> Loss:
        loss = rival(name, *data[name])
        return lambda prediction, target: loss(prediction, target, index=index)

    made: dict[str, Loss] = {
        "mse_loss": functional.mse_loss,
        "squall's default": ImbalanceAwareLoss(),
        "budget 1, cap 3": ImbalanceAwareLoss(KLBudget(1.0, cap=3.0)),
    }
    for name in RIVALS:
        if name != "spherical_amse":  # its cost is that of torch-harmonics
            remembers = name in ("rba", "vrba")
            made[name] = indexed(name) if remembers else rival(name, *data.get(name, ()), **OPTIONS.get(name, {}))
    return made


def times(shape: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """CPU seconds of the steps of every loss."""
    generator = torch.Generator().manual_seed(0)
    prediction, *targets = (torch.randn(shape, generator=generator) for _ in range(4))
    prediction.requires_grad_()
    steps = {}
    for name, loss in losses(shape, targets[0]).items():

        def step(target: Tensor, loss: Loss = loss) -> None:
            prediction.grad = None
            loss(members(prediction, loss), members(target, loss)).backward()

        steps[name] = step
    return in_turn(steps, targets, seconds)


def training_times(model: Callable[[], nn.Module], shape: tuple[int, ...], seconds: float) -> dict[str, list[float]]:
    """CPU seconds of the training steps with every loss, each with a model of its own."""
    generator = torch.Generator().manual_seed(0)
    u, *targets = (torch.randn(shape, generator=generator) for _ in range(4))
    steps = {}
    for name, loss in losses(shape, targets[0]).items():
        trained = model()
        optimizer = adam(trained.parameters(), TrainingSettings(), torch.device("cpu"))

        def step(
            target: Tensor,
            loss: Loss = loss,
            trained: nn.Module = trained,
            optimizer: torch.optim.Optimizer = optimizer,
        ) -> None:
            optimizer.zero_grad()
            loss(trained(members(u, loss)), members(target, loss)).backward()
            optimizer.step()

        steps[name] = step
    return in_turn(steps, targets, seconds)


def members(batch: Tensor, loss: Loss) -> Tensor:
    """Every sample as often as a loss of ensembles wants it."""
    return torch.cat([batch] * getattr(loss, "members", 1))


def in_turn(
    steps: Mapping[str, Callable[[Tensor], None]], targets: list[Tensor], seconds: float
) -> dict[str, list[float]]:
    """CPU seconds of the calls that take turns, without the first three."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    begin, turn = time.perf_counter(), 0
    while turn < 8 or time.perf_counter() - begin < seconds:
        for name, step in steps.items():
            start = time.process_time()
            step(targets[turn % 3])
            if turn >= 3:
                times[name].append(time.process_time() - start)
        turn += 1
    return times


def training_ratio(times: Mapping[str, list[float]], name: str) -> str:
    """The cost of a training step in units of one with the mean squared error."""
    low, middle, high = statistics.quantiles(np.divide(times[name], times["mse_loss"]), n=4)
    return f"{middle:.3f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--training", action="store_true", help="whole training steps, not the loss alone")
    parser.add_argument("--seconds", type=float, default=20.0, help="for each column")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"PyTorch {torch.__version__}, {arguments.threads} thread(s)\n")
    if arguments.training:
        found = {name: training_times(*model, arguments.seconds) for name, model in MODELS.items()}
    else:
        found = {str(shape): times(shape, arguments.seconds) for shape in SHAPES}
    print("| loss | " + " | ".join(found) + " |")
    print("|---" * (len(found) + 1) + "|")
    for name in next(iter(found.values())):
        cells = []
        for column in found.values():
            unit = statistics.median(column["mse_loss"])
            if name == "mse_loss":
                cells.append(f"{1e3 * unit:.3f} ms")
            elif arguments.training:
                cells.append(training_ratio(column, name))
            else:
                cells.append(f"{statistics.median(column[name]) / unit:.1f}")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
