"""How far is one training step from the least that it can cost, and from plain PyTorch and the reference?

    python benchmarks/training_step.py [--reference CLONE] [--repetitions 30] [--threads 2]

The step is the paper's: 200 states of 50 points, 200 hidden units, the rate (explicit Euler), mean squared error,
backward pass, Adam. The floor is its matrix products of hidden size alone: six of 10 000 × 200 × 200 for HNN++,
three for NODE. Ours is taken as `squall train` takes it, with its optimiser and its setting of the allocator. "Plain
PyTorch" is the model written with Conv1d and automatic differentiation, and PyTorch's Adam as it comes. CLONE is a
clone of https://github.com/tksmatsubara/discrete-autograd, whose own model takes its own training step, in float64, in
a process of its own, because it sets global flags. "Euler" is that step alone, as ours; "loop" is a pass through its
training loop, which also draws the minibatch and evaluates another one of test data; "discrete gradient" is the step
by its default solver, which evaluates an HNN++ at both ends.

Everything is timed in turn, once per repetition and after an untimed call, so that a busy machine slows all alike and
none pays for another's caches. A ratio is the median over repetitions of the ratio within a repetition, with its
quartiles. Other work on the machine shows in the quartiles and in the least times: then measure again.
"""

import argparse
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import median, quantiles

import torch
from torch import Tensor, nn

from squall._process.threads import keep_freed_memory
from squall.models import HNN, NODE
from squall.training.settings import TrainingSettings, adam

BATCH, POINTS, HIDDEN = 200, 50, 200
DX, DT = 1 / POINTS, 1e-4
ROWS = BATCH * POINTS

Timed = Callable[[], float]


def laplacian(v: Tensor) -> Tensor:
    return (v.roll(1, -1) - 2 * v + v.roll(-1, -1)) / DX**2


class PlainNODE(nn.Sequential):
    def __init__(self, bias: bool = True) -> None:
        super().__init__(
            nn.Conv1d(1, HIDDEN, 3, padding=1, padding_mode="circular"),
            nn.Tanh(),
            nn.Conv1d(HIDDEN, HIDDEN, 1),
            nn.Tanh(),
            nn.Conv1d(HIDDEN, 1, 1, bias=bias),
        )


class PlainHNN(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.density = PlainNODE(bias=False)

    def forward(self, u: Tensor) -> Tensor:
        u = u.requires_grad_()
        (gradient,) = torch.autograd.grad(self.density(u).sum(), u, create_graph=True)
        return laplacian(gradient)


def timed(call: Callable[[], object]) -> Timed:
    def seconds() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return seconds


def matrix_products(dtype: torch.dtype, pairs_of_three: int) -> Timed:
    """The products x Wᵀ, g W and gᵀ x, into memory that is there already."""
    x, g, out = (torch.randn(ROWS, HIDDEN, dtype=dtype) for _ in range(3))
    weight, out_weight = (torch.randn(HIDDEN, HIDDEN, dtype=dtype) for _ in range(2))

    def products() -> None:
        for _ in range(pairs_of_three):
            torch.mm(x, weight.T, out=out)
            torch.mm(g, weight, out=out)
            torch.mm(g.T, x, out=out_weight)

    return timed(products)


def plain_adam(parameters: Iterable[Tensor], settings: TrainingSettings, device: torch.device) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters, settings.learning_rate)


def training_step(
    model: nn.Module, dtype: torch.dtype, loss: nn.Module | None = None, optimizer_of: Callable = adam
) -> Timed:
    model = model.to(dtype)
    loss = loss or nn.MSELoss()
    optimizer = optimizer_of(model.parameters(), TrainingSettings(), torch.device("cpu"))
    u, target = (0.5 * torch.randn(BATCH, 1, POINTS, dtype=dtype) for _ in range(2))

    def step() -> None:
        optimizer.zero_grad()
        loss(model(u), target).backward()
        optimizer.step()

    return timed(step)


REFERENCE = """
import sys, time
import torch
clone, kind, threads, way = sys.argv[1:]
sys.path.insert(0, clone)
torch.set_default_dtype(torch.float64)
torch.set_num_threads(int(threads))
import dgnet
model = dgnet.DGNetPDE1d(1, {hidden}, model=kind, solver="dg", name="ch", dx={dx}, alpha=2)
optimizer = torch.optim.Adam(model.parameters(), 1e-3)
states, targets = (0.5 * torch.randn(45_000, 1, {points}) for _ in range(2))

def batch():
    chosen = torch.randperm(len(states))[:{batch}]
    return states[chosen], targets[chosen]

def step(u, target):
    if way == "discrete gradient":
        rate = model.discrete_time_derivative(u, dt={dt}, x2=u + {dt} * target)
    else:  # what torchdiffeq's Euler evaluates, without needing torchdiffeq
        rate = model.time_derivative(u)
    loss = (rate - target).pow(2).mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()

u, target = batch()
for _ in sys.stdin:
    start = time.perf_counter()
    if way == "loop":
        step(*batch())
        with torch.no_grad():
            test_u, test_target = batch()
            (model.time_derivative(test_u) - test_target).pow(2).mean().item()
    else:
        step(u, target)
    print(time.perf_counter() - start, flush=True)
"""


def reference_step(clone: Path, model: str, threads: int, way: str) -> Timed:
    """The step of the reference: a process that takes one step per line that it is sent."""
    script = REFERENCE.format(hidden=HIDDEN, dx=DX, batch=BATCH, points=POINTS, dt=DT)
    command = [sys.executable, "-W", "ignore", "-c", script, str(clone), model, str(threads), way]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def seconds() -> float:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("\n")
        process.stdin.flush()
        return float(process.stdout.readline())

    return seconds


def rows_to_time(clone: Path | None, threads: int) -> dict[str, Timed]:
    float32, float64 = torch.float32, torch.float64
    rows = {}
    for name, ours, plain, products in [
        ("HNN++", lambda: HNN(laplacian, HIDDEN), PlainHNN, 2),
        ("NODE", lambda: NODE(1, HIDDEN), PlainNODE, 1),
    ]:
        for dtype, bits in [(float32, "float32"), (float64, "float64")]:
            rows[f"{name} {bits} floor"] = matrix_products(dtype, products)
            rows[f"{name} {bits} squall"] = training_step(ours(), dtype)
            rows[f"{name} {bits} plain"] = training_step(plain(), dtype, optimizer_of=plain_adam)
        if clone is not None:
            kind = "hnn" if name == "HNN++" else "node"
            for way in ("Euler", "loop", "discrete gradient")[: 3 if kind == "hnn" else 2]:
                rows[f"{name} float64 reference, {way}"] = reference_step(clone, kind, threads, way)
    for name, loss in imbalance_aware_losses().items():
        rows[f"HNN++ float32 squall, {name}"] = training_step(HNN(laplacian, HIDDEN), float32, loss)
    return rows


def imbalance_aware_losses() -> dict[str, nn.Module]:
    from squall.losses import ImbalanceAwareLoss

    return {"imbalance-aware": ImbalanceAwareLoss(), "imbalance-aware, fixed T": ImbalanceAwareLoss(1.0)}


def quartiles(values: list[float]) -> str:
    low, middle, high = quantiles(values, n=4)
    return f"{middle:6.2f} ({low:.2f} to {high:.2f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="clone of the reference implementation")
    parser.add_argument("--repetitions", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    keep_freed_memory()

    rows = rows_to_time(arguments.reference, arguments.threads)
    times: dict[str, list[float]] = {name: [] for name in rows}
    for repetition in range(arguments.repetitions + 2):
        for name, seconds in rows.items():
            seconds()
            elapsed = seconds()
            if repetition >= 2:  # the first ones warm up
                times[name].append(elapsed)

    print(f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"batch {BATCH} × {POINTS} points, hidden {HIDDEN}, {arguments.repetitions} repetitions\n")
    print(f"{'milliseconds per step':40s} {'median':>8s} {'least':>8s}")
    for name, values in times.items():
        print(f"{name:40s} {1e3 * median(values):8.2f} {1e3 * min(values):8.2f}")

    def ratio(above: str, below: str, target: str = "") -> None:
        if above in times and below in times:
            within = [a / b for a, b in zip(times[above], times[below], strict=True)]
            print(f"{above + ' / ' + below:64s} {quartiles(within)}   {target}")

    print("\nratios, median (quartiles)")
    for name, most, least in [("HNN++", 1.8, 5), ("NODE", 2.0, 4.5)]:
        ratio(f"{name} float32 squall", f"{name} float32 floor", f"at most {most}")
        ratio(f"{name} float32 plain", f"{name} float32 floor")
        ratio(f"{name} float64 squall", f"{name} float64 floor")
        ratio(f"{name} float64 plain", f"{name} float64 floor")
        for way in ("Euler", "loop"):
            ratio(f"{name} float64 reference, {way}", f"{name} float32 squall", f"at least {least}")
            ratio(f"{name} float64 reference, {way}", f"{name} float64 squall", "at least 2" if name == "HNN++" else "")
            ratio(f"{name} float64 reference, {way}", f"{name} float32 floor", "what the floor leaves")
    for name in times:
        if "imbalance-aware" in name:
            ratio(name, "HNN++ float32 squall")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
