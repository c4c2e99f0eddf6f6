"""`squall simulate`: trajectories of a system into a file."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from jsonargparse import ArgumentParser, Namespace
from rich.console import Console

from squall._process.files import read_array
from squall._process.progress import reporting
from squall._types import State
from squall.cli.options import command_parser, new_parser
from squall.data.apebench import write_scenario
from squall.runs.simulate import simulate_sphere_to_file, simulate_to_file
from squall.systems import SYSTEMS, ShallowWater


def parser() -> ArgumentParser:
    """One sub-command per system, with its parameters."""
    parser = command_parser("simulate")
    systems = parser.add_subcommands(dest="system")
    for name, system in SYSTEMS.items():
        part = new_parser(description=f"{system.equation}, by {system.scheme}.")
        part.add_class_arguments(system)
        part.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; refused if it exists")
        part.add_argument("--trajectories", type=int | None, default=None, help="how many; 100 if left out")
        part.add_argument("--steps", type=int, default=500, help="steps of dt")
        part.add_argument(
            "--seed", type=int | None, default=None, help="of the first states; the usual one if left out"
        )
        part.add_argument(
            "--initial", type=Path | None, default=None, help="a .npy file of states (trajectory, channel, *space)"
        )
        systems.add_subcommand(name, part, help=system.equation)
    sphere = new_parser(description="Storms on a sphere, by torch-harmonics' spectral solver.")
    sphere.add_class_arguments(ShallowWater)
    sphere.add_argument("--out", type=Path, required=True, help="the NetCDF file to write; refused if it exists")
    sphere.add_argument("--trajectories", type=int, default=20, help="how many")
    sphere.add_argument("--steps", type=int, default=40, help="steps of dt")
    sphere.add_argument("--seed", type=int, default=0, help="of the first states")
    systems.add_subcommand(ShallowWater.name, sphere, help=ShallowWater.equation)
    benchmark = new_parser(description="A scenario of APEBench, by the package itself, from its own seeds.")
    benchmark.add_argument("--scenario", type=str, required=True, help="its name there, as diff_kdv")
    benchmark.add_argument("--part", type=str, default="train", help="train or test: which trajectories")
    benchmark.add_argument("--out", type=Path, required=True, help="the HDF5 file to write; kept if it holds the same")
    systems.add_subcommand("apebench", benchmark, help="scenarios of the benchmark APEBench")
    return parser


def run(arguments: Namespace, console: Console) -> int:
    name = arguments.system
    options = dict(vars(arguments[name]))
    if name == ShallowWater.name:
        return _simulate_sphere(options, console)
    if name == "apebench":
        print(write_scenario(options["scenario"], options["part"], options["out"]))
        return 0
    out, steps = options.pop("out"), options.pop("steps")
    count, seed, initial = options.pop("trajectories"), options.pop("seed"), options.pop("initial")
    system = SYSTEMS[name](**options)
    if initial is not None and (count is not None or seed is not None):
        raise ValueError("--initial gives the first states: --trajectories and --seed do not go with it")
    states = None if initial is None else _initial_states(initial, system.shape)
    with reporting(console, f"simulating {name}", steps) as progress:
        simulate_to_file(
            system,
            out,
            trajectories=100 if count is None else count,
            steps=steps,
            seed=seed,
            initial_states=states,
            progress=progress,
        )
    print(out)
    return 0


def _simulate_sphere(options: dict[str, Any], console: Console) -> int:
    out, run_options = options.pop("out"), {name: options.pop(name) for name in ("trajectories", "steps", "seed")}
    system = ShallowWater(**options)
    total = run_options["trajectories"] * run_options["steps"]
    with reporting(console, f"simulating {system.name}", total) as progress:
        changes = simulate_sphere_to_file(system, out, **run_options, progress=progress)
    hours = run_options["steps"] * system.dt / 3600
    for quantity, values in changes.items():
        print(
            f"{quantity} changed by {np.median(values):.1e} (median), {max(values, key=abs):.1e} (most), in {hours:g} h"
        )
    print(out)
    return 0


def _initial_states(path: Path, expected: tuple[int, ...]) -> State:
    """States from a .npy file; one channel may be left out."""
    states = read_array(path, "--initial")
    if expected[0] == 1 and states.ndim == len(expected):
        states = states[:, None]
    if states.shape[1:] != expected:
        raise ValueError(
            f"--initial {path} has shape {states.shape}, but must have (trajectory, {', '.join(map(str, expected))})"
        )
    if not np.isfinite(states).all():
        raise ValueError(f"--initial {path} holds {(~np.isfinite(states)).sum()} numbers that are not finite")
    return torch.from_numpy(states)
