"""How long does it take to compute the two data sets of the paper, and how long must it take?

    python benchmarks/simulate.py                      # ours, and the floor
    python benchmarks/simulate.py --reference CLONE    # and the public generator, a few steps of it, scaled

CLONE is a clone of https://github.com/tksmatsubara/discrete-autograd. Each data set has 100 trajectories of 500 steps
on 50 points, in float64. All is measured in one run, alternating, and the median is printed. The floor is what no
Newton iteration can leave out: one factorisation and solution of the stacked band matrix each, by LAPACK alone.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.random import RandomState
from rich.console import Console
from rich.table import Table

from squall.systems import SYSTEMS, System, implicit

TRAJECTORIES, STEPS, REPEATS = 100, 500, 3
REFERENCE_TRAJECTORIES, REFERENCE_STEPS = 2, 40

# The generator imports a module that its repository lacks, and needs another global dtype: hence its own process.
REFERENCE_PROGRAM = """
import json, sys, time, types
import numpy as np

stub = types.ModuleType("utils")
stub.to_pickle = stub.from_pickle = None
sys.modules["utils"] = stub
sys.path.insert(0, sys.argv[1])
import torch
torch.set_default_dtype(torch.float64)
import data

states = np.load(sys.argv[2])
steps = int(sys.argv[3])
seconds, ends = {}, {}
for name, make in {
    "cahn-hilliard": lambda: (data.CahnHilliard1d(ndiv=50, width=1.0, gamma=0.0005), 1e-4),
    "korteweg-de-vries": lambda: (data.KdV1d(ndiv=50, width=10.0, a=-6.0, b=1.0), 1e-3),
}.items():
    system, dt = make()
    seconds[name] = []
    for first in states[name]:
        start = time.perf_counter()
        u = system.dvdmint(first, np.arange(steps + 1) * dt)
        seconds[name].append(time.perf_counter() - start)
        ends.setdefault(name, []).append(u[-1].reshape(-1).tolist())
print("\\n" + json.dumps({"seconds": seconds, "ends": ends}))
"""


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def simulate(system: System) -> torch.Tensor:
    return system.simulate(system.initial_states(TRAJECTORIES, RandomState(system.paper_seed)), STEPS)


def count_iterations(system: System) -> int:
    """How many stacked band matrices one data set factorises."""
    count = 0
    solve = implicit.PeriodicBandedSolver.solve

    def counting(self, bands, right):
        nonlocal count
        count += 1
        return solve(self, bands, right)

    implicit.PeriodicBandedSolver.solve = counting
    try:
        simulate(system)
    finally:
        implicit.PeriodicBandedSolver.solve = solve
    return count


def floor(system: System, iterations: int) -> None:
    """LAPACK's share alone, on a matrix of the same shape."""
    width = implicit.PeriodicBandedSolver.WIDTH
    numbers = TRAJECTORIES * system.points
    generator = RandomState(0)
    matrix = np.asfortranarray(generator.rand(3 * width + 1, numbers))
    matrix[2 * width] += 20
    right = generator.rand(numbers)
    for _ in range(iterations):
        implicit.gbsv(width, width, matrix, right)


def reference(clone: Path, starts: dict[str, torch.Tensor]) -> dict[str, dict[str, list]]:
    """Seconds and last states of the public generator, for some steps from each of the given states."""
    with tempfile.TemporaryDirectory() as folder:
        states = Path(folder, "states.npz")
        np.savez(states, **{name: start.numpy() for name, start in starts.items()})
        command = [sys.executable, "-c", REFERENCE_PROGRAM, clone / "experiment-ch", states, str(REFERENCE_STEPS)]
        one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # on its small arrays, more threads only slow it down
        output = subprocess.run(command, check=True, capture_output=True, text=True, env=one_thread).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, metavar="CLONE", help="also time the public generator in this clone")
    clone = parser.parse_args().reference

    systems = {name: cls() for name, cls in SYSTEMS.items()}
    whole = {name: simulate(system) for name, system in systems.items()}
    iterations = {name: count_iterations(system) for name, system in systems.items()}
    # From the first states and from the middle of trajectories: the work of an iteration differs between them.
    pieces = {name: u[:REFERENCE_TRAJECTORIES, (0, STEPS // 2)].flatten(0, 1) for name, u in whole.items()}
    ours: dict[str, list[float]] = {name: [] for name in systems}
    floors: dict[str, list[float]] = {name: [] for name in systems}
    theirs: dict[str, list[float]] = {name: [] for name in systems}
    differences: dict[str, float] = {}
    for _ in range(REPEATS):
        for name, system in systems.items():
            ours[name].append(seconds(lambda system=system: simulate(system)))
            floors[name].append(seconds(lambda system=system, name=name: floor(system, iterations[name])))
        if clone:
            measured = reference(clone, pieces)
            for name, system in systems.items():
                scale = TRAJECTORIES * STEPS / REFERENCE_STEPS
                theirs[name].append(statistics.mean(measured["seconds"][name]) * scale)
                end = torch.tensor(measured["ends"][name], dtype=torch.float64)
                mine = system.simulate(pieces[name], REFERENCE_STEPS)[:, -1, 0]
                differences[name] = (mine - end).abs().max().item()

    median = {key: {name: statistics.median(times[name]) for name in systems}
              for key, times in {"ours": ours, "floor": floors}.items()}  # fmt: skip
    rows = {
        "squall": [f"{median['ours'][name]:.2f} s" for name in systems],
        "band matrices solved": [str(iterations[name]) for name in systems],
        "floor: LAPACK alone": [f"{median['floor'][name]:.2f} s" for name in systems],
        "squall / floor": [f"{median['ours'][name] / median['floor'][name]:.1f}" for name in systems],
    }
    if clone:
        scaled = {name: statistics.median(theirs[name]) for name in systems}
        rows["reference, scaled up"] = [f"{scaled[name]:.0f} s" for name in systems]
        rows["reference / squall"] = [f"{scaled[name] / median['ours'][name]:.0f}" for name in systems]
        rows["largest difference"] = [f"{differences[name]:.1e}" for name in systems]
    table = Table(title=f"{TRAJECTORIES} trajectories x {STEPS} steps x 50 points, float64, median of {REPEATS}")
    for heading in ("", *systems):
        table.add_column(heading, justify="right" if heading else "left")
    for label, values in rows.items():
        table.add_row(label, *values)
    console = Console()
    console.print(table)
    if clone:
        console.print(
            f"The reference ran {2 * REFERENCE_TRAJECTORIES} pieces of {REFERENCE_STEPS} steps, half from first "
            f"states, half from step {STEPS // 2}, {REPEATS} times; its time is scaled up to the whole data set. "
            "It gets one thread, with which it is fastest. "
            "The difference is that of the states at the end of the pieces."
        )


if __name__ == "__main__":
    main()
