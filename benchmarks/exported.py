"""How long does a rollout take by an exported program, against squall's own?

    python benchmarks/exported.py

Each is called in turn; the least processor time of 40 rollouts is taken, on one thread. squall's own rollout is also
taken without the passes written by hand, which a program of PyTorch operations cannot contain. The program rolls out
the whole batch, and parts of 64 states one after another, which stay in the cache.
"""

import time
from collections.abc import Callable

import torch
from torch import Tensor

import squall
from squall.models import UNet, fast
from squall.runs.export import Step

STEPS, ROUNDS, POINTS, PART = 20, 40, 64, 64


def by_program(step: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    states = [u]
    for _ in range(STEPS):
        states.append(step(states[-1]))
    return torch.stack(states, 1)


def in_parts(step: Callable[[Tensor], Tensor], u: Tensor) -> Tensor:
    return torch.cat([by_program(step, part) for part in u.split(PART)])


def plain(emulator: squall.Emulator, u: Tensor) -> Tensor:
    fast.enabled = False
    try:
        return emulator.rollout(u, STEPS)
    finally:
        fast.enabled = True


@torch.no_grad()
def main() -> None:
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    about = squall.data.describe((1, 2, 1, POINTS), dt=1e-4)
    models = {
        "NODE": (squall.NODE(hidden=64, generator=generator), squall.euler),
        "HNN++": (squall.HNN(squall.CahnHilliard().structure, hidden=64, generator=generator), squall.euler),
        "U-Net": (UNet(channels=1, dimensions=1, width=8), squall.next_state),
    }
    for name, (model, integrator) in models.items():
        emulator = squall.Emulator(model, integrator, about).eval()
        sizes = ({0: torch.export.Dim("batch")},)
        program = torch.export.export(Step(emulator), (torch.zeros(2, 1, POINTS),), dynamic_shapes=sizes)
        step = program.module().forward  # as the model card loads it
        for batch in (1, 16, 256):
            u = torch.randn(batch, 1, POINTS, generator=generator)
            calls: list[Callable[[], Tensor]] = [
                lambda e=emulator, u=u: e.rollout(u, STEPS),
                lambda e=emulator, u=u: plain(e, u),
                lambda p=step, u=u: by_program(p, u),
                lambda p=step, u=u: in_parts(p, u),
            ]
            best = [float("inf")] * len(calls)
            for _ in range(ROUNDS):
                for i, call in enumerate(calls):
                    begin = time.process_time()
                    call()
                    best[i] = min(best[i], time.process_time() - begin)
            own, by_torch, exported, parts = best
            print(
                f"{name:6} batch {batch:3}: own {1e3 * own / STEPS:.3f} ms a step; without the passes by hand "
                f"{by_torch / own:.2f} times that, the program {exported / own:.2f} times, in parts {parts / own:.2f}"
            )


if __name__ == "__main__":
    main()
