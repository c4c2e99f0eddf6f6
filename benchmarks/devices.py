"""What does a second process on a second core gain, and what does the loss send?

    python benchmarks/devices.py [--processes 2] [--steps 20] [--repetitions 3]

Trains a U-Net on fields of 64 x 64 points, by `squall.training.train` over gloo: with one process,
with several by DDP, and with several by FSDP2. The minibatch is the same, shared by the processes. Per step it prints

- the least wall time, and the gain: that of one process divided by that of several. It needs an idle core a process;
- the CPU time of the busiest process, and the gain in it: what an idle machine gives if nothing waits. Waiting for
  another process, or for a core that somebody else has, takes no CPU time;
- the bytes that a process gives to the loss's all-reduces (gradients are not in it).
"""

import argparse
import json
import subprocess
import sys
import time

import torch
from torch import distributed

from squall.data import InMemory, Transitions
from squall.losses import ImbalanceAwareLoss
from squall.models import UNet
from squall.runs.config import DeviceConfig
from squall.runs.ranks import joined
from squall.training import Recorder, TrainingSettings, train

POINTS, BATCH, WARM_UP = 64, 16, 3


class Clock(Recorder):
    """Wall and CPU time after every step."""

    def __init__(self) -> None:
        self.wall, self.cpu = [], []

    def stepped(self, step: int) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())


def measure(steps: int, strategy: str) -> None:
    """One training in this process, of however many torchrun has started; the first prints its numbers."""
    torch.set_num_threads(1)
    fabric = joined(DeviceConfig(accelerator="cpu", strategy=strategy), [])
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(4, 20, 1, POINTS, POINTS, generator=generator)
    sent, all_reduce = [], distributed.all_reduce

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.numel() * tensor.element_size())
        return all_reduce(tensor, *args, **kwargs)

    distributed.all_reduce = counted
    model = UNet(1, dimensions=2, generator=generator)
    settings = TrainingSettings(steps, BATCH, validate_every=0, log_every=steps, checkpoint_every=steps)
    clock = Clock()
    train(
        model, Transitions(InMemory(states, dt=0.1)), settings, loss=ImbalanceAwareLoss(), recorder=clock, fabric=fabric
    )
    differences = torch.tensor([clock.wall, clock.cpu], dtype=torch.float64).diff()[:, WARM_UP:]
    wall, cpu = differences[0].min(), differences[1].median()
    if fabric.world_size > 1:
        all_reduce(cpu, distributed.ReduceOp.MAX)
    if fabric.is_global_zero:
        print(json.dumps({"wall": wall.item(), "cpu": cpu.item(), "bytes": sum(sent) / steps}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure(options.steps, options.measure)
        return
    alone = (1, "auto")
    best: dict[tuple[int, str], dict[str, float]] = {}
    for _ in range(options.repetitions):
        for count, strategy in (alone, (options.processes, "ddp"), (options.processes, "fsdp")):
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
            command = [sys.executable, *launcher, __file__, "--measure", strategy, "--steps", str(options.steps)]
            found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            before = best.get((count, strategy), found)
            best[count, strategy] = {name: min(x, before[name]) for name, x in found.items()}
    for (count, strategy), numbers in best.items():
        gains = {name: best[alone][name] / numbers[name] for name in ("wall", "cpu")}
        print(
            f"{count} process(es), {strategy}: wall {numbers['wall'] * 1e3:.1f} ms a step ({gains['wall']:.2f} x), "
            f"CPU {numbers['cpu'] * 1e3:.1f} ms ({gains['cpu']:.2f} x), loss {numbers['bytes']:.0f} bytes"
        )


if __name__ == "__main__":
    main()
