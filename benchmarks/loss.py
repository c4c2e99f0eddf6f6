"""What does weighing every point cost, and is it exact?

    python benchmarks/loss.py                        # n = 1e4 … 1e8: time, memory, error; needs about 3 GB
    python benchmarks/loss.py --uses --sizes 1e6 1e7 # masks, measures, guards, other errors, groups
    python benchmarks/loss.py --uses --plain         # the same without numba
    python benchmarks/loss.py --compile              # under torch.compile, with the seconds of the first call
    python benchmarks/loss.py --shares               # share of a training step of the paper's models

Forward and backward of one loss, side by side in one run, losses in turn: `mse_loss`, the formula written operator by
operator (`eager`), and ours. Every step has a new batch up to 1e7 (so that the temperature moves), of Gaussian
residuals or, with `--heavy`, of residuals with a log-normal factor exp(0.7 x). Times are medians, of the process (the
CPU time of all its threads) and of the wall, as ratios to `mse_loss`; beyond 1e6 each follows an untimed step of the
same loss. Memory is the growth of the peak resident set in a process of its own. Errors are relative to float64.
"""

import argparse
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from squall.losses import ImbalanceAwareLoss, KLBudget, weights

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


USES: dict[str, Callable[[], Loss]] = {
    "mse_loss": lambda: functional.mse_loss,
    "KL 0.3": lambda: ImbalanceAwareLoss(),
    "mask": lambda: masked(ImbalanceAwareLoss()),
    "measure": lambda: measured(ImbalanceAwareLoss()),
    "8 channels": lambda: shaped(ImbalanceAwareLoss(over="channel"), 5, 8),
    "samples of 5 000": lambda: shaped(ImbalanceAwareLoss(over="sample"), -1, 1, 5000),
    "samples of 50": lambda: shaped(ImbalanceAwareLoss(over="sample"), -1, 1, 50),
    "KL 1, cap 10": lambda: ImbalanceAwareLoss(KLBudget(1.0, cap=10.0)),
    "cap 20": lambda: ImbalanceAwareLoss(cap=20.0),
    "trim 0.001": lambda: ImbalanceAwareLoss(trim=0.001),
    "Huber": lambda: ImbalanceAwareLoss(error="huber"),
    "T": lambda: ImbalanceAwareLoss(TEMPERATURE),
}


def masked(loss: ImbalanceAwareLoss) -> Loss:
    """Four of five points count."""
    masks: dict[int, Tensor] = {}

    def call(prediction: Tensor, target: Tensor) -> Tensor:
        if len(target) not in masks:
            masks[len(target)] = torch.arange(len(target), device=target.device) % 5 > 0
        return loss(prediction, target, mask=masks[len(target)])

    return call


def measured(loss: ImbalanceAwareLoss) -> Loss:
    """Ten fields of 100 latitudes, by the cosine of the latitude."""
    measure = torch.linspace(-89, 89, 100).deg2rad().cos().unsqueeze(1)

    def call(prediction: Tensor, target: Tensor) -> Tensor:
        shape = 10, 1, 100, -1
        return loss(prediction.view(shape), target.view(shape), measure=measure.to(target.device))

    return call


def shaped(loss: ImbalanceAwareLoss, *shape: int) -> Loss:
    """A batch of that shape, the rest of the points in its last axis."""
    shape = shape if shape[0] == -1 else (*shape, -1)
    return lambda prediction, target: loss(prediction.view(shape), target.view(shape))


def compiled(loss: Loss) -> Loss:
    return torch.compile(loss, fullgraph=True)


COMPILED: dict[str, Callable[[], Loss]] = {
    "mse_loss": lambda: functional.mse_loss,
    "mse_loss, compiled": lambda: compiled(lambda p, t: functional.mse_loss(p, t)),
    "KL 0.3, compiled": lambda: compiled(ImbalanceAwareLoss()),
}


HEAVY = 0.7
"""Of the log-normal factor of residuals with heavy tails."""


def batches(n: int, device: str, heavy: bool = False) -> tuple[Tensor, list[Tensor]]:
    """A prediction, and targets of three batches (one where memory is short)."""
    generator = torch.Generator(device).manual_seed(0)
    count = 3 if n <= 10**7 else 1

    def drawn() -> Tensor:
        return torch.randn(n, generator=generator, device=device)

    prediction = drawn()
    targets = [drawn() for _ in range(count)]
    if heavy:
        targets = [prediction + (t - prediction) * drawn().mul_(HEAVY).exp_() for t in targets]
    return prediction.requires_grad_(), targets


def times(
    n: int, device: str, made: dict[str, Callable[[], Loss]], heavy: bool = False
) -> dict[str, tuple[float, float]]:
    """Median seconds of a step of every loss, of the process and of the wall."""
    prediction, targets = batches(n, device, heavy)
    losses = {name: make() for name, make in made.items()}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in losses}
    steps = max(5, min(301, int(2e8 / n)))
    for step in range(-3, steps):
        for name, loss in losses.items():
            if n > 10**6:  # the step before, untimed: else a loss pays for memory that another one gave back
                prediction.grad = None
                loss(prediction, targets[(step - 1) % len(targets)]).backward()
            prediction.grad = None
            target = targets[step % len(targets)]
            _wait(device)
            start, busy = time.perf_counter(), time.process_time()
            loss(prediction, target).backward()
            _wait(device)
            if step >= 0:
                seconds[name].append((time.process_time() - busy, time.perf_counter() - start))
    cpu, wall = 0, 1
    return {
        name: (statistics.median(v[cpu] for v in values), statistics.median(v[wall] for v in values))
        for name, values in seconds.items()
    }


def table(n: int, device: str, made: dict[str, Callable[[], Loss]], heavy: bool) -> None:
    """Print the times of all losses for one size."""
    found = times(n, device, made, heavy)
    cpu, wall = found["mse_loss"]
    for name, (busy, passed) in found.items():
        print(
            f"{n:8.0e}  {'heavy' if heavy else 'Gaussian':8s}  {name:20s} {1e3 * busy:9.3f} ms of CPU "
            f"{busy / cpu:6.2f} ×   {1e3 * passed:9.3f} ms of wall {passed / wall:6.2f} ×",
            flush=True,
        )


def first_calls() -> None:
    """CPU seconds to compile each loss, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    for name in ("mse_loss, compiled", "KL 0.3, compiled"):
        queue = context.Queue()
        process = context.Process(target=first_call, args=(name, queue))
        process.start()
        print(f"{name}: first call {queue.get():.1f} s of CPU", flush=True)
        process.join()


def first_call(name: str, queue: multiprocessing.Queue) -> None:
    torch._inductor.config.force_disable_caches = True
    prediction, targets = batches(10**5, "cpu")
    loss = COMPILED[name]()
    start = sum(os.times()[:4])
    loss(prediction, targets[0]).backward()
    queue.put(sum(os.times()[:4]) - start)


def shares() -> None:
    """The loss as a share of a training step of the paper's models (batch 200 × 50) and of a small FNO."""
    torch.manual_seed(0)
    from squall.models import HNN, NODE
    from squall.systems import CahnHilliard

    u, target = torch.randn(2, 200, 1, 50)
    models: dict[str, torch.nn.Module] = {
        "HNN++ 200": HNN(CahnHilliard().structure, hidden=200),
        "NODE 200": NODE(hidden=200),
    }
    models["FNO 24, 4 layers"] = FNO(24, 4)
    for name, model in models.items():
        optimizer, loss, parts = torch.optim.Adam(model.parameters()), ImbalanceAwareLoss(), []
        for _ in range(30):
            start = time.process_time()
            prediction = model(u)
            middle = time.process_time()
            held = prediction.detach().requires_grad_()
            loss(held, target).backward()
            after = time.process_time()
            prediction.backward(held.grad)
            optimizer.step()
            optimizer.zero_grad()
            parts.append((after - middle) / (time.process_time() - start))
        print(f"{name}: {100 * statistics.median(parts):.2f} % of a training step")


class FNO(torch.nn.Module):
    """A Fourier neural operator in one dimension, to have its cost."""

    def __init__(self, width: int, layers: int, modes: int = 12) -> None:
        super().__init__()
        self.lift, self.project = torch.nn.Conv1d(1, width, 1), torch.nn.Conv1d(width, 1, 1)
        self.local = torch.nn.ModuleList(torch.nn.Conv1d(width, width, 1) for _ in range(layers))
        self.spectral = torch.nn.ParameterList(
            torch.randn(width, width, modes, dtype=torch.cfloat) / width for _ in range(layers)
        )

    def forward(self, u: Tensor) -> Tensor:
        u = self.lift(u)
        for local, spectral in zip(self.local, self.spectral, strict=True):
            spectrum = torch.fft.rfft(u)
            modes = spectral.shape[-1]
            kept = torch.einsum("bim,iom->bom", spectrum[..., :modes], spectral)
            padded = functional.pad(kept, (0, spectrum.shape[-1] - modes))
            u = functional.gelu(local(u) + torch.fft.irfft(padded, u.shape[-1]))
        return self.project(u)


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
    ("CPU ×", ">6"),
    ("wall ×", ">6"),
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
    parser.add_argument("--uses", action="store_true", help="time masks, measures, guards, other errors, groups")
    parser.add_argument("--heavy", action="store_true", help="residuals with heavy tails")
    parser.add_argument("--plain", action="store_true", help="as without numba")
    parser.add_argument("--compile", action="store_true", help="under torch.compile")
    parser.add_argument("--shares", action="store_true", help="share of a training step")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.plain:
        weights.compiled_kernels = lambda: None
    if arguments.shares:
        shares()
    elif arguments.uses or arguments.compile or arguments.plain:
        if arguments.compile:
            first_calls()
        for n in map(int, arguments.sizes):
            table(n, arguments.device, COMPILED if arguments.compile else USES, arguments.heavy)
    else:
        plain_table(arguments.sizes, arguments.device, arguments.heavy)


def plain_table(sizes: list[float], device: str, heavy: bool) -> None:
    """Print time, memory and errors of the plain losses."""
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {device}\n")
    row(*(title for title, _ in COLUMNS))
    for n in map(int, sizes):
        seconds, wrong = times(n, device, LOSSES, heavy), errors(n, device)
        cpu, wall = seconds["mse_loss"]
        for name, (busy, second) in seconds.items():
            off = "value {:.0e}, gradient {:.0e}".format(*wrong[name]) if name in wrong else ""
            memory = peak(n, name) if device == "cpu" else ""
            row(f"{n:.0e}", name, f"{1e3 * second:.3f}", f"{busy / cpu:.2f}", f"{second / wall:.2f}", memory, off)
        if device == "cpu":
            total = torch.softmax(targets_errors(n) / TEMPERATURE, 0).sum(dtype=torch.float64).item()
            print(f"{n:>8.0e}  torch.softmax in float32 sums to 1 {total - 1:+.1e}\n")
        else:
            copy, moved = copy_seconds(torch.randn(n, device="cuda")), 20 * n / seconds["ours, T"][1]
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
