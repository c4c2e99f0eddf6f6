"""What does weighing every point cost, and is it exact?

    python benchmarks/loss.py                     # n = 1e4 … 1e8, two threads; needs about 3 GB
    python benchmarks/loss.py --others --sizes 1e6  # masks, measures, guards, other errors, groups

Forward and backward of one loss, side by side in one run: `mse_loss`, the imbalance-aware loss written operator by
operator (`eager`), and ours with a fixed temperature and with a KL budget (a new batch in every step, so that the
temperature moves; beyond 1e7 one batch). Times are medians of interleaved steps, as ratios to `mse_loss`; beyond 1e6
each follows an untimed one of the same loss. Memory is the growth of the peak resident set in a process of its own.
Errors are relative to float64. Other work on the machine hurts ours more than `mse_loss`, because ours waits for its
threads more often: measure on a quiet one.

The floor: `mse_loss` reads 2n numbers and writes n squares, reads them back, then reads 2n and writes n: 7n. Two
passes and one write are 5n. On top, each new tensor is faulted in page by page: two for `mse_loss`, one for ours.
"""

import argparse
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from squall.losses import ImbalanceAwareLoss, KLBudget

TEMPERATURE = 8.0
"""Four times the mean squared error of two independent standard normal fields."""

Loss = Callable[[Tensor, Tensor], Tensor]


def eager(prediction: Tensor, target: Tensor) -> Tensor:
    """The formula as one would write it."""
    errors = (prediction - target).square()
    weights = torch.softmax(errors.detach() / TEMPERATURE, dim=0)
    return (weights * errors).sum()


LOSSES: dict[str, Callable[[], Loss]] = {
    "mse_loss": lambda: functional.mse_loss,
    "eager": lambda: eager,
    "ours, T": lambda: ImbalanceAwareLoss(TEMPERATURE),
    "ours, KL 0.3": lambda: ImbalanceAwareLoss(KLBudget(0.3)),
    "ours, KL 0.05": lambda: ImbalanceAwareLoss(KLBudget(0.05)),
}


OTHERS: dict[str, Callable[[], Loss]] = {
    "mse_loss": lambda: functional.mse_loss,
    "KL 0.3": lambda: ImbalanceAwareLoss(),
    "KL 0.3, masked": lambda: masked(ImbalanceAwareLoss()),
    "T, masked": lambda: masked(ImbalanceAwareLoss(TEMPERATURE)),
    "KL 0.3, measured": lambda: measured(ImbalanceAwareLoss()),
    "T, measured": lambda: measured(ImbalanceAwareLoss(TEMPERATURE)),
    "KL 0.3, over channels": lambda: in_channels(ImbalanceAwareLoss(over="channel")),
    "KL 0.3, Huber": lambda: ImbalanceAwareLoss(error="huber"),
    "KL 0.3, over samples": lambda: in_samples(ImbalanceAwareLoss(over="sample")),
    "KL 0.3, cap 20": lambda: ImbalanceAwareLoss(cap=20.0),
    "KL 0.3, trim 0.001": lambda: ImbalanceAwareLoss(trim=0.001),
}
"""Beside the plain loss: masks, measures and large groups, which fused passes take, and what goes by the formula,
operator by operator."""


def masked(loss: ImbalanceAwareLoss) -> Loss:
    def call(prediction: Tensor, target: Tensor) -> Tensor:
        return loss(prediction, target, mask=(torch.arange(len(target), device=target.device) % 5 > 0))

    return call


def measured(loss: ImbalanceAwareLoss) -> Loss:
    """By the cosine of 100 latitudes."""
    measure = torch.linspace(-89, 89, 100).deg2rad().cos().unsqueeze(1)

    def call(prediction: Tensor, target: Tensor) -> Tensor:
        return loss(prediction.view(100, -1), target.view(100, -1), measure=measure.to(target.device))

    return call


def in_channels(loss: ImbalanceAwareLoss) -> Loss:
    return lambda prediction, target: loss(prediction.view(10, 5, -1), target.view(10, 5, -1))


def in_samples(loss: ImbalanceAwareLoss) -> Loss:
    return lambda prediction, target: loss(prediction.view(100, 1, -1), target.view(100, 1, -1))


def batches(n: int, device: str) -> tuple[Tensor, list[Tensor]]:
    """A prediction, and targets of three batches (one where memory is short)."""
    generator = torch.Generator(device).manual_seed(0)
    prediction = torch.randn(n, generator=generator, device=device).requires_grad_()
    count = 3 if n <= 10**7 else 1
    return prediction, [torch.randn(n, generator=generator, device=device) for _ in range(count)]


def times(n: int, device: str, made: dict[str, Callable[[], Loss]] = LOSSES) -> dict[str, float]:
    """Median seconds of a step of every loss."""
    prediction, targets = batches(n, device)
    losses = {name: make() for name, make in made.items()}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    steps = max(5, min(301, int(2e8 / n)))
    for step in range(-3, steps):
        for name, loss in losses.items():
            if n > 10**6:  # the step before, untimed: else a loss pays for memory that another one gave back
                prediction.grad = None
                loss(prediction, targets[(step - 1) % len(targets)]).backward()
            prediction.grad = None
            target = targets[step % len(targets)]
            _wait(device)
            start = time.perf_counter()
            loss(prediction, target).backward()
            _wait(device)
            if step >= 0:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def memory(n: int, name: str, queue: multiprocessing.Queue) -> None:
    """Peak resident bytes of one step beyond its inputs, in a process of its own (Linux)."""
    prediction, targets = batches(n, "cpu")
    loss = LOSSES[name]()
    loss(prediction[: n // 8], targets[0][: n // 8]).backward()  # whatever is loaded and started once
    prediction.grad = None
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    loss(prediction, targets[0]).backward()
    queue.put(resident("VmHWM") - before)


def resident(field: str) -> int:
    """A line of this process's memory status, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(line.split()[1] for line in status.splitlines() if line.startswith(field)))


def errors(n: int, device: str) -> dict[str, tuple[float, float]]:
    """Relative error of value and gradient against float64, blockwise so that 1e8 fits."""
    prediction, targets = batches(n, device)
    target, result = targets[0], {}
    for name in ("eager", "ours, T", "ours, KL 0.3"):
        loss = LOSSES[name]()
        prediction.grad = None
        value = loss(prediction, target)
        value.backward()
        beta = 1 / TEMPERATURE if name != "ours, KL 0.3" else 1 / loss.report()["temperature"]  # type: ignore[union-attr]
        result[name] = against_float64(prediction.detach(), target, beta, value.item(), prediction.grad)
    return result


def against_float64(
    prediction: Tensor, target: Tensor, beta: float, value: float, gradient: Tensor | None
) -> tuple[float, float]:
    """|value − exact|/exact, and ‖gradient − exact‖/‖exact‖."""
    assert gradient is not None
    blocks = list(zip(*(x.cpu().split(1 << 20) for x in (prediction, target, gradient)), strict=True))
    top = max(((p - t).double().square().max().item()) for p, t, _ in blocks)
    partition = weighted = 0.0
    for p, t, _ in blocks:
        square = (p.double() - t.double()).square().numpy()
        density = np.exp(beta * (square - top))
        partition, weighted = partition + density.sum(), weighted + density @ square
    distance = size = 0.0
    for p, t, g in blocks:
        difference = (p.double() - t.double()).numpy()
        exact = 2 * difference * np.exp(beta * (difference**2 - top)) / partition
        distance += float(np.square(g.double().numpy() - exact).sum())
        size += float(np.square(exact).sum())
    return abs(value / (weighted / partition) - 1), (distance / size) ** 0.5


COLUMNS = (
    ("n", ">8"),
    ("loss", "<14"),
    ("ms", ">9"),
    ("× mse_loss", ">10"),
    ("peak / n floats", ">15"),
    ("errors", "<24"),
)


def row(*cells: object) -> None:
    """One line of the table."""
    print("  ".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True)), flush=True)


def peak(n: int, name: str) -> str:
    """Peak memory of a loss in units of one tensor, where it is large enough to be seen."""
    if n < 10**6:
        return ""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=memory, args=(n, name, queue))
    process.start()
    growth = queue.get()
    process.join()
    return f"{growth / (4 * n):.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=float, default=[1e4, 1e5, 1e6, 1e7, 1e8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--others", action="store_true", help="time masks, measures, guards, other errors, groups")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    on_cpu = arguments.device == "cpu"
    torch.set_num_threads(arguments.threads)
    if arguments.others:
        for n in map(int, arguments.sizes):
            seconds = times(n, arguments.device, OTHERS)
            for name, second in seconds.items():
                print(f"{n:8.0e}  {name:24s} {1e3 * second:9.3f} ms  {second / seconds['mse_loss']:7.2f} × mse_loss")
        return
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {arguments.device}\n")
    row(*(title for title, _ in COLUMNS))
    for n in map(int, arguments.sizes):
        seconds, wrong = times(n, arguments.device), errors(n, arguments.device)
        for name, second in seconds.items():
            off = "value {:.0e}, gradient {:.0e}".format(*wrong[name]) if name in wrong else ""
            ratio = second / seconds["mse_loss"]
            row(f"{n:.0e}", name, f"{1e3 * second:.3f}", f"{ratio:.2f}", peak(n, name) if on_cpu else "", off)
        if on_cpu:
            total = torch.softmax(targets_errors(n) / TEMPERATURE, 0).sum(dtype=torch.float64).item()
            print(f"{n:>8.0e}  torch.softmax in float32 sums to 1 {total - 1:+.1e}\n")
        else:
            copy, moved = copy_seconds(torch.randn(n, device="cuda")), 20 * n / seconds["ours, T"]
            print(f"{n:>8.0e}  a copy runs at {8e-9 * n / copy:.0f} GB/s, ours, T (5n) at {1e-9 * moved:.0f} GB/s\n")


def targets_errors(n: int) -> Tensor:
    """Squared errors of the benchmark's first batch."""
    prediction, targets = batches(n, "cpu")
    return (prediction.detach() - targets[0]).square_()


def copy_seconds(source: Tensor) -> float:
    """Median seconds to copy a tensor on its device."""
    into, seconds = torch.empty_like(source), []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        into.copy_(source)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


if __name__ == "__main__":
    main()
