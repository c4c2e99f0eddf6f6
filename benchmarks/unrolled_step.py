"""What does squall add to an unrolled training step: time beside a plain PyTorch loop, memory, and the loss?

    OMP_NUM_THREADS=1 python benchmarks/unrolled_step.py

Two fields on 64 × 64 points, a U-Net of half a million weights, eight steps of Euler, batch 4. It prints

- the time of a training step over that of the same loop in plain PyTorch with the mean squared error (at most 1.1);
- the memory of a step with `recompute` over that without (at most 0.4), each in a process of its own;
- the time of the imbalance-aware loss of four channels with a mask and areas over that of a step (at most 0.02).

Times are of the process on the CPU, so that other processes disturb little; they alternate, and the least counts.
"""

import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from squall.data import InMemory, Transitions
from squall.losses import ImbalanceAwareLoss, MeanSquaredError
from squall.models import UNet
from squall.training import TrainingSettings, UniformSampler, train

STEPS, BATCH, POINTS, REPEATS = 8, 4, 64, 4


def model() -> UNet:
    """0.5 million weights."""
    return UNet(2, width=14, levels=3, generator=torch.Generator().manual_seed(0))


def data() -> InMemory:
    generator = torch.Generator().manual_seed(0)
    return InMemory(torch.randn(2, STEPS + 4, 2, POINTS, POINTS, generator=generator), dt=0.1)


def of_squall(steps: int, recompute: bool = False) -> Callable[[], object]:
    """A training of some steps."""
    settings = TrainingSettings(steps, BATCH, unroll=STEPS, validate_every=0, recompute=recompute)
    transitions = Transitions(data(), unroll=STEPS)
    return lambda: train(model(), transitions, settings, loss=MeanSquaredError())


def of_pytorch(steps: int) -> Callable[[], object]:
    """The same in plain PyTorch."""
    transitions = Transitions(data(), unroll=STEPS)

    def loop() -> None:
        network = model()
        optimizer = torch.optim.Adam(network.parameters(), 1e-3, fused=True)
        sampler = UniformSampler(len(transitions), BATCH)
        for step in range(steps):
            u, future = transitions.fetch(sampler(step))
            states = []
            for _ in range(STEPS):
                u = u + 0.1 * network(u)
                states.append(u)
            loss = (torch.stack(states, 1) - future).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    return loop


def seconds(run: Callable[[], object]) -> float:
    start = time.process_time()
    run()
    return time.process_time() - start


def per_step(make: Callable[[int], Callable[[], object]]) -> float:
    """Without what happens once: the time of three steps without that of one."""
    return (seconds(make(3)) - seconds(make(1))) / 2


def times() -> tuple[float, float, float]:
    """Of a step of squall, of PyTorch, and of the loss of four channels with a mask and areas."""
    pairs = [(per_step(of_squall), per_step(of_pytorch)) for _ in range(REPEATS)]
    shape = (BATCH, 4, STEPS, POINTS, POINTS)
    generator = torch.Generator().manual_seed(0)
    prediction, target = torch.randn(2, *shape, generator=generator)
    mask = torch.rand(4, 1, POINTS, POINTS, generator=generator) > 0.3
    area = torch.rand(POINTS, POINTS, generator=generator, dtype=torch.float64) + 0.5
    loss, prediction = ImbalanceAwareLoss(), prediction.requires_grad_()

    def once() -> None:
        loss(prediction, target, mask=mask, measure=area).backward()

    once()
    least = min(seconds(once) for _ in range(5 * REPEATS))
    return min(a for a, _ in pairs), min(b for _, b in pairs), least


def memory(recompute: bool) -> float:
    """Of a step, in MiB, in a process of its own: what it needs more than one step that is not unrolled."""
    text = subprocess.run([sys.executable, __file__, str(int(recompute))], capture_output=True, text=True, check=True)
    return float(text.stdout)


def print_memory(recompute: bool) -> None:
    train(model(), Transitions(data()), TrainingSettings(1, 1, validate_every=0), loss=MeanSquaredError())
    before = peak()
    of_squall(1, recompute)()
    print((peak() - before) / 1024)


def peak() -> int:
    """KiB; Linux hands ru_maxrss on from the parent, so it does not do."""
    (found,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print_memory(bool(int(sys.argv[1])))
        sys.exit()
    count = sum(p.numel() for p in model().parameters())
    ours, plain, loss = times()
    print(f"{count} weights, {STEPS} steps, batch {BATCH}, {POINTS} x {POINTS} points")
    print(f"a step: {ours:.3f} s, {ours / plain:.3f} x plain PyTorch ({plain:.3f} s)")
    print(f"the loss of 4 channels with mask and areas: {1000 * loss:.2f} ms, {loss / ours:.4f} of a step")
    kept, again = memory(False), memory(True)
    print(f"memory of a step: {kept:.0f} MiB, with recompute {again:.0f} MiB, {again / kept:.2f}")
