"""Does training many models as one batched computation pay?

    python benchmarks/ensemble.py [--members 48] [--hidden 64] [--steps 30] [--rounds 3] [--device cpu]

The paper's step (batch 200 of 50 points, Euler, mean squared error, float32) of several seeds, in member steps per
second: apart, as `squall study run` trains them on a CPU (two processes of one thread each, one training after the
other); batched (`squall.training.batched`) in one process on all threads or the device; and batched in two processes
of one thread, half of the members each, as `squall study run --workers 2 --together N` does. Two bounds, by two
processes:
"passes" computes nothing but the forward and backward passes of every member's network, which a batch cannot save;
"floor" nothing but their six (HNN++) or three (NODE) matrix products of hidden size and the two tanh. So passes / apart
is the most that batching can gain with these passes.
Each round takes all in turn; shown are medians over the rounds, and the range of the ratios within a round.

With `--device cuda` (and, say, `--members 60 --hidden 200`): "apart" is one training after the other by `squall.train`,
"one" a batch of one, whose steps are CUDA graphs, "batched" all, and "products" the batched matrix products of hidden
size alone. What happens once in a training, as the recording of the graph, is left out: each time is the difference
between a training three times as long and one.
"""

import argparse
import functools
import multiprocessing
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial

import numpy as np
import torch
from lightning_fabric import Fabric

from squall._process.threads import keep_freed_memory
from squall.data import InMemory, Transitions
from squall.losses import MeanSquaredError
from squall.models import HNN, NODE
from squall.models.fast.density_gradient import fast_density_gradient
from squall.models.fast.point_network import fast_point_network
from squall.systems import CahnHilliard
from squall.training.batched import Member, train_together
from squall.training.loop import TrainingSettings, train
from squall.training.sampling import UniformSampler

BATCH, POINTS = 200, 50
SYSTEM = CahnHilliard()
PRODUCTS = {"HNN++": 6, "NODE": 3}


@functools.cache
def transitions() -> Transitions:
    first = SYSTEM.initial_states(10, torch.Generator().manual_seed(0))
    return Transitions(InMemory(SYSTEM.simulate(first, 100), dt=SYSTEM.dt))


def member(kind: str, hidden: int, seed: int, population: int) -> Member:
    generator = torch.Generator().manual_seed(seed)
    model = HNN(SYSTEM.structure, hidden, generator=generator) if kind == "HNN++" else NODE(1, hidden)
    return Member(model, MeanSquaredError(), UniformSampler(population, BATCH, seed))


def settings(steps: int) -> TrainingSettings:
    return TrainingSettings(steps=steps, batch=BATCH, log_every=steps, validate_every=0, checkpoint_every=steps)


def alone(kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of the trainings of some seeds, one after the other, on one thread."""
    torch.set_num_threads(1)
    data = transitions()
    members = [member(kind, hidden, seed, len(data)) for seed in seeds]
    train(member(kind, hidden, 99, len(data)).model, data, settings(3), loss=MeanSquaredError())  # warm up
    start = time.perf_counter()
    for one in members:
        train(one.model, data, settings(steps), loss=one.loss, sampler=one.sampler)
    return time.perf_counter() - start


def in_two_processes(work: Callable[..., float], kind: str, hidden: int, count: int, steps: int) -> float:
    """Member steps per second of two processes that share the members."""
    halves = [list(range(count))[i::2] for i in (0, 1)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=keep_freed_memory) as pool:
        seconds = list(pool.map(work, [kind] * 2, [hidden] * 2, halves, [steps] * 2))
    return count * steps / max(seconds)


def batched(kind: str, hidden: int, seeds: list[int], steps: int, device: str = "cpu", threads: int = 1) -> float:
    """Seconds of the trainings of some seeds as one."""
    torch.set_num_threads(threads)
    data = transitions()
    members = [member(kind, hidden, seed, len(data)) for seed in seeds]
    train_together([member(kind, hidden, 99, len(data))], data, settings(3), device=device)  # warm up
    start = time.perf_counter()
    train_together(members, data, settings(steps), device=device)
    return time.perf_counter() - start


def passes(kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of as many passes of the network by hand, and nothing else."""
    torch.set_num_threads(1)
    model = member(kind, hidden, 0, BATCH).model
    function = fast_density_gradient if kind == "HNN++" else fast_point_network
    inputs = (torch.randn(BATCH * POINTS, 3), *(w.detach() for w in model.network.weights))
    g = torch.randn_like(function.forward(*inputs)[0])
    needed = (False, *[True] * 5)

    def step() -> None:
        _, *kept = function.forward(*inputs)
        function.backward(g, inputs, tuple(kept), needed)

    return seconds_of(step, len(seeds) * steps)


def floor(kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of as many times the products and the tanh, and nothing else."""
    torch.set_num_threads(1)
    x, out = torch.randn(BATCH * POINTS, hidden), torch.empty(BATCH * POINTS, hidden)
    weight = torch.randn(hidden, hidden)

    def step() -> None:
        for _ in range(PRODUCTS[kind]):
            torch.mm(x, weight, out=out)
        for _ in range(2):
            np.tanh(x.numpy(), out=out.numpy())

    return seconds_of(step, len(seeds) * steps)


def seconds_of(step: Callable[[], None], repetitions: int) -> float:
    for _ in range(3):  # warm up
        step()
    start = time.perf_counter()
    for _ in range(repetitions):
        step()
    return time.perf_counter() - start


def apart_on_cuda(kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of the training of the first seed on the device."""
    data = transitions()
    one = member(kind, hidden, seeds[0], len(data))
    fabric = Fabric(accelerator="cuda", devices=1)
    start = time.perf_counter()
    train(one.model, data, settings(steps), loss=one.loss, sampler=one.sampler, fabric=fabric)
    return time.perf_counter() - start


def products_on_cuda(kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of as many times the products of all members, and nothing else."""
    x = torch.randn(len(seeds), BATCH * POINTS, hidden, device="cuda")
    weight, out = torch.randn(len(seeds), hidden, hidden, device="cuda"), torch.empty_like(x)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(PRODUCTS[kind] * steps):
        torch.bmm(x, weight, out=out)
    torch.cuda.synchronize()
    return time.perf_counter() - start


def per_step(work: Callable[..., float], kind: str, hidden: int, seeds: list[int], steps: int) -> float:
    """Seconds of a step, without what happens once."""
    work(kind, hidden, seeds, 5)  # warm up
    short = work(kind, hidden, seeds, steps)
    return (work(kind, hidden, seeds, 3 * steps) - short) / (2 * steps)


CUDA_NAMES = ("apart", "one", "batched", "products")


def one_round_on_cuda(kind: str, options: argparse.Namespace) -> tuple[float, ...]:
    """Member steps per second of each of the CUDA_NAMES."""
    seeds, together = list(range(options.members)), partial(batched, device="cuda", threads=torch.get_num_threads())
    works = ((apart_on_cuda, seeds[:1]), (together, seeds[:1]), (together, seeds), (products_on_cuda, seeds))
    return tuple(len(chosen) / per_step(work, kind, options.hidden, chosen, options.steps) for work, chosen in works)


NAMES = ("apart", "batched", "by two", "passes", "floor")


def one_round(kind: str, options: argparse.Namespace) -> tuple[float, ...]:
    """Member steps per second of each of the NAMES."""
    sizes = (kind, options.hidden, options.members, options.steps)
    apart = in_two_processes(alone, *sizes)
    threads = torch.get_num_threads()
    seconds = batched(kind, options.hidden, list(range(options.members)), options.steps, "cpu", threads)
    together = options.members * options.steps / seconds
    return apart, together, *(in_two_processes(work, *sizes) for work in (batched, passes, floor))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=48)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    options = parser.parse_args()
    keep_freed_memory()
    on_cuda = options.device == "cuda"
    measure, names = (one_round_on_cuda, CUDA_NAMES) if on_cuda else (one_round, NAMES)
    device = torch.cuda.get_device_name() if on_cuda else "cpu"
    print(f"{options.members} members, hidden {options.hidden}, {options.steps} steps, {device}")
    print(f"{'member steps per second':24s} " + " ".join(f"{name:>16s}" for name in names))
    for kind in PRODUCTS:
        rounds = np.array([measure(kind, options) for _ in range(options.rounds)])
        ratios = rounds / rounds[:, :1]
        print(f"{kind:24s} " + " ".join(f"{rate:16.1f}" for rate in np.median(rounds, axis=0)))
        shown = zip(np.median(ratios, axis=0), ratios.min(axis=0), ratios.max(axis=0), strict=True)
        print(f"{'ratio to apart':24s} " + " ".join(f"{m:.2f} ({low:.2f}-{up:.2f})".rjust(16) for m, low, up in shown))


if __name__ == "__main__":
    main()
