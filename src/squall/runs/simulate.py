"""A data set simulated from a system, on disk with all that is needed to make it again."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

import squall
import squall.data
from squall.systems import System

__all__ = ["simulate_to_file"]


def simulate_to_file(
    system: System,
    path: Path | str,
    *,
    trajectories: int = 100,
    steps: int = 500,
    seed: int | None = None,
    initial_states: Tensor | None = None,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Simulate trajectories and write them in The Well's layout, beside and renamed.

    The defaults make the paper's data set, as the public reference generator draws it.

    Args:
        system: with its coefficients, grid and dt.
        path: the HDF5 file; refused if it exists.
        trajectories: how many, drawn by NumPy's `RandomState(seed)`.
        steps: how many steps of dt; the file holds one state more.
        seed: that of the paper's data set if left out.
        initial_states: (trajectory, channel, *space) to start from, instead of drawn ones.
        progress: called with the number of finished steps.

    Raises:
        FileExistsError: before anything is simulated.
        squall.systems.ConvergenceError: if the implicit scheme does not converge.
    """
    if Path(path).exists():
        raise FileExistsError(f"{path} exists and is not overwritten: choose another name, or move it away")
    if trajectories < 1 or steps < 1:
        raise ValueError(f"trajectories is {trajectories} and steps is {steps}, but both must be at least 1")
    seed = system.paper_seed if seed is None else seed
    if initial_states is None:
        origin = {"initial_states": "drawn", "seed": seed}
        initial_states = system.initial_states(trajectories, np.random.RandomState(seed))
    else:
        origin = {"initial_states": "given"}
    provenance = {
        "system": system.name,
        "equation": system.equation,
        "squall": squall.__version__,
        "torch": torch.__version__,
        "numpy": np.__version__,
        **origin,
    }
    shape = (len(initial_states), steps + 1, *system.shape)
    with squall.data.create(  # takes the room on the disk before the time of the simulation
        path,
        shape,
        dt=system.dt,
        fields=system.fields,
        lengths=[system.width] * system.dimensions,
        boundary=system.boundary,
        name=system.name,
        parameters=system.parameters(),
        provenance=provenance,
    ) as writer:
        writer.append(system.simulate(initial_states, steps, progress=progress))
