"""Does training many models as one batched computation pay?

    python benchmarks/ensemble.py [--members 6] [--hidden 64] [--steps 40] [--device cpu]

The paper's step (batch 200 of 50 points, Euler, mean squared error, float32) of several seeds: batched
(`squall.ensemble`, on all cores or the device), and one after the other (on a CPU: two processes of one thread each, as
`squall study` runs them). Printed are member steps per second. The floor is what neither can save: the six (HNN++) or
three (NODE) matrix products of hidden size and the two tanh of every member's step, on one core each of two.
"""

import argparse
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

import torch

from squall.data import InMemory, Transitions
from squall.ensemble import Member, train_together
from squall.losses import MeanSquaredError
from squall.models import HNN, NODE
from squall.sampling import UniformSampler
from squall.systems import CahnHilliard
from squall.training import TrainingSettings, train

BATCH, POINTS = 200, 50
SYSTEM = CahnHilliard()
PRODUCTS = {"HNN++": 6, "NODE": 3}


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


def separate(kind: str, hidden: int, count: int, steps: int) -> float:
    """Member steps per second of two processes."""
    halves = [list(range(count))[i::2] for i in (0, 1)]
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        seconds = list(pool.map(alone, [kind] * 2, [hidden] * 2, halves, [steps] * 2))
    return count * steps / max(seconds)


def batched(kind: str, hidden: int, count: int, steps: int, device: str) -> float:
    data = transitions()
    members = [member(kind, hidden, seed, len(data)) for seed in range(count)]
    train_together([member(kind, hidden, 99, len(data))], data, settings(3), device=device)  # warm up
    start = time.perf_counter()
    train_together(members, data, settings(steps), device=device)
    return count * steps / (time.perf_counter() - start)


def floor(kind: str, hidden: int) -> float:
    """Member steps per second of two cores that compute nothing but the products and the tanh."""
    torch.set_num_threads(1)
    x, out = torch.randn(BATCH * POINTS, hidden), torch.empty(BATCH * POINTS, hidden)
    weight = torch.randn(hidden, hidden)
    start = time.perf_counter()
    for _ in range(20):
        for _ in range(PRODUCTS[kind]):
            torch.mm(x, weight, out=out)
        for _ in range(2):
            torch.tanh(x, out=out)
    return 2 * 20 / (time.perf_counter() - start)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    threads = torch.get_num_threads()
    print(f"{options.members} members, hidden {options.hidden}, {options.steps} steps, {options.device}")
    print(f"{'member steps per second':24s} {'batched':>9s} {'separate':>9s} {'ratio':>7s} {'floor':>9s}")
    for kind in PRODUCTS:
        apart = separate(kind, options.hidden, options.members, options.steps)
        torch.set_num_threads(threads)
        together = batched(kind, options.hidden, options.members, options.steps, options.device)
        print(f"{kind:24s} {together:9.1f} {apart:9.1f} {together / apart:7.2f} {floor(kind, options.hidden):9.1f}")


if __name__ == "__main__":
    main()
