"""A data set simulated from a system, on disk with all that is needed to make it again."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

import squall
import squall.data
from squall._process.extras import explain_missing_extra
from squall._process.files import refuse_existing, write_beside
from squall._types import State
from squall.systems import SYSTEMS, ShallowWater, System
from squall.systems.shallow_water import RADIUS

SIMULATED: Mapping[str, type[System] | type[ShallowWater]] = MappingProxyType(
    {**SYSTEMS, ShallowWater.name: ShallowWater}
)
"""Everything that can be simulated into a file, by name."""


def file_suffix(name: str) -> str:
    """Of the file that a system of this name is simulated into."""
    return ".nc" if name == ShallowWater.name else ".hdf5"


def simulate_to_file(
    system: System,
    path: Path | str,
    *,
    trajectories: int = 100,
    steps: int = 500,
    seed: int | None = None,
    initial_states: State | None = None,
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
    _check(path, trajectories, steps)
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


def simulate_sphere_to_file(
    system: ShallowWater,
    path: Path | str,
    *,
    trajectories: int = 20,
    steps: int = 40,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Simulate storms and write them as NetCDF-4 (float32) with latitude, longitude and `cell_area`, for xarray too.

    Args:
        system: with its grid, dt and start.
        path: the `.nc` file; refused if it exists.
        trajectories: how many, drawn by PyTorch's generator of this seed.
        steps: how many steps of dt; the file holds one state more.
        seed: of the first states.
        progress: called with the number of finished steps, of all trajectories together.

    Returns:
        Relative change of mass, energy and potential enstrophy from the first to the last state, per trajectory.

    Raises:
        FileExistsError: before anything is simulated.
        MissingExtraError: without torch-harmonics or h5netcdf.
    """
    _check(path, trajectories, steps)
    with explain_missing_extra():
        import h5netcdf
    path, parameters = Path(path), system.parameters()
    initial = system.initial_states(trajectories, torch.Generator().manual_seed(seed))
    changes: dict[str, list[float]] = {}
    with write_beside(path) as part, h5netcdf.File(part, "w") as file:
        file.attrs.update({"title": system.name, "system": system.name, "equation": system.equation, "seed": seed})
        file.attrs.update({"squall": squall.__version__, "torch": str(torch.__version__), **parameters})
        _axes(file, system, trajectories, steps)
        dimensions = ("trajectory", "time", "latitude", "longitude")
        for name, unit in zip(system.fields, system.units, strict=True):
            file.create_variable(name, dimensions, np.float32).attrs["units"] = unit
        for i in range(trajectories):
            before = i * steps
            u = system.simulate(
                initial[i : i + 1], steps, None if progress is None else lambda n, k=before: progress(k + n)
            )[0]
            for channel, name in enumerate(system.fields):
                file.variables[name][i] = u[:, channel].float().numpy()
            for name, change in drift(system, u).items():
                changes.setdefault(name, []).append(change)
        if path.exists():
            raise FileExistsError(f"{path} appeared while the storms were simulated, and is not overwritten")
    return changes


def drift(system: ShallowWater, u: Float[Tensor, "time 3 latitude longitude"]) -> dict[str, float]:
    """Relative change of mass, energy and potential enstrophy over a trajectory (time, 3, latitude, longitude)."""
    ends = u[[0, -1]]
    quantities = {
        "mass": system.mass(ends),
        "energy": system.energy(ends),
        "potential enstrophy": system.potential_enstrophy(ends),
    }
    return {name: (last / first - 1).item() for name, (first, last) in quantities.items()}


def _axes(file: Any, system: ShallowWater, trajectories: int, steps: int) -> None:
    """Dimensions, their points in CF's names and units, and the areas of the cells in m²."""
    axes = {
        "trajectory": (np.arange(trajectories), {}),
        "time": (np.arange(steps + 1) * system.dt / 3600, {"units": "hours", "axis": "T"}),
        "latitude": (system.latitude.numpy(), {"units": "degrees_north", "standard_name": "latitude"}),
        "longitude": (system.longitude.numpy(), {"units": "degrees_east", "standard_name": "longitude"}),
    }
    file.dimensions = {name: len(points) for name, (points, _) in axes.items()}
    for name, (points, attributes) in axes.items():
        file.create_variable(name, (name,), data=points).attrs.update(attributes)
    areas = file.create_variable("cell_area", ("latitude", "longitude"), data=system.areas.numpy() * RADIUS**2)
    areas.attrs.update({"units": "m2", "standard_name": "cell_area"})


def _check(path: Path | str, trajectories: int, steps: int) -> None:
    refuse_existing(Path(path))
    if trajectories < 1 or steps < 1:
        raise ValueError(f"trajectories is {trajectories} and steps is {steps}, but both must be at least 1")
