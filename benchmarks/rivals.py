"""What does a step of each rival cost beside `mse_loss`?

    python benchmarks/rivals.py                # one thread; two minutes
    python benchmarks/rivals.py --threads 2

Forward and backward of the loss alone, float32, from a prediction to its gradient; the losses take turns within one
run, and every step has a fresh target. Times are medians of the CPU time of the process, in units of `mse_loss`.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from squall.losses import ImbalanceAwareLoss
from squall.losses.rivals import RIVALS, rival

SHAPES = [(20, 1, 128), (20, 1, 4096), (20, 2, 64, 64), (4, 4, 256, 256)]
OPTIONS = {"term": {"temperature": 8.0}}

Loss = Callable[[Tensor, Tensor], Tensor]


def losses(shape: tuple[int, ...], target: Tensor) -> dict[str, Loss]:
    """Every loss for batches of this shape; those that remember, for twice as many samples."""
    samples = (2 * shape[0], *shape[1:])
    index = torch.arange(shape[0])
    data = {"channel": (shape[1],), "density": (target,), "rba": (samples,), "vrba": (samples,)}

    def indexed(name: str) -> Loss:
        loss = rival(name, *data[name])
        return lambda prediction, target: loss(prediction, target, index=index)

    made: dict[str, Loss] = {"mse_loss": functional.mse_loss, "squall's default": ImbalanceAwareLoss()}
    for name in RIVALS:
        if name != "spherical_amse":  # its cost is that of torch-harmonics
            remembers = name in ("rba", "vrba")
            made[name] = indexed(name) if remembers else rival(name, *data.get(name, ()), **OPTIONS.get(name, {}))
    return made


def medians(shape: tuple[int, ...], seconds: float) -> dict[str, float]:
    """Median CPU seconds of a step of every loss."""
    generator = torch.Generator().manual_seed(0)
    prediction, *targets = (torch.randn(shape, generator=generator) for _ in range(4))
    prediction.requires_grad_()
    made = losses(shape, targets[0])
    times: dict[str, list[float]] = {name: [] for name in made}
    begin, step = time.perf_counter(), 0
    while step < 8 or time.perf_counter() - begin < seconds:
        for name, loss in made.items():
            prediction.grad = None
            start = time.process_time()
            loss(prediction, targets[step % 3]).backward()
            if step >= 3:
                times[name].append(time.process_time() - start)
        step += 1
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=20.0, help="for each shape")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    columns = [medians(shape, arguments.seconds) for shape in SHAPES]
    print(f"PyTorch {torch.__version__}, {arguments.threads} thread(s)\n")
    print("| loss | " + " | ".join(map(str, SHAPES)) + " |")
    print("|---" * (len(SHAPES) + 1) + "|")
    for name in columns[0]:
        cells = (f"{1e3 * c[name]:.3f} ms" if name == "mse_loss" else f"{c[name] / c['mse_loss']:.1f}" for c in columns)
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
