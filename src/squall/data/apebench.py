"""The data of APEBench's scenarios, made again by the package itself from its own seeds."""

import hashlib
import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from squall._process.extras import explain_missing_extra
from squall._process.messages import suggestion
from squall.data.errors import DataError
from squall.data.reading import TrajectoryFile
from squall.data.writing import write

PARTS = ("train", "test")
"""Of the data of a scenario; it has no trajectories for validation."""


def load_scenario(name: str, **options: Any) -> Any:
    """The scenario of this name, as an object of APEBench with its `perform_tests_on_rollout`.

    Args:
        name: as `diff_kdv`.
        options: of the scenario that are to differ from its own, such as `num_points`.

    Raises:
        MissingExtraError: without APEBench or JAX.
        DataError: for an unknown scenario or option.
    """
    with explain_missing_extra():
        scenario_dict = importlib.import_module("apebench.scenarios").scenario_dict
    if name not in scenario_dict:
        raise DataError(f"scenario is '{name}': {suggestion(name, sorted(scenario_dict))}")
    try:
        return scenario_dict[name](**options)
    except TypeError as error:
        raise DataError(f"scenario '{name}': {error}") from error


def write_scenario(name: str, part: str, path: Path | str, **options: Any) -> Path:
    """Make the training or test trajectories of a scenario and write them in The Well's layout.

    A file that is there is kept if it holds these trajectories, by its provenance and the SHA-256 of its states.

    Args:
        name: of the scenario, as `diff_kdv`.
        part: `train`, 50 trajectories of 51 states in most scenarios, or `test`, 30 of 201; float32, dimensionless,
            one step of the scenario apart.
        path: of the HDF5 file.
        options: as of `load_scenario`.

    Returns:
        The path of the file.

    Raises:
        MissingExtraError: without APEBench or JAX.
        DataError: for an unknown scenario, part or option, or trajectories that are not finite.
        FileExistsError: if `path` holds anything else.

    Reference:
        Koehler et al., APEBench: A Benchmark for Autoregressive Neural Emulators of PDEs, NeurIPS 2024,
        https://arxiv.org/abs/2411.00180.
    """
    if part not in PARTS:
        raise DataError(f"part is '{part}', but must be one of {', '.join(PARTS)}")
    path, scenario = Path(path), load_scenario(name, **options)
    made = {
        "apebench": version("apebench"),
        "exponax": version("exponax"),
        "jax": version("jax"),
        "scenario": name,
        "part": part,
        "seed": int(getattr(scenario, f"{part}_seed")),
        "options": {key: str(value) for key, value in options.items()},
    }
    if path.exists():
        return _kept(path, made)
    states = np.array(getattr(scenario, f"get_{part}_data")())
    return write(
        path, states, dt=1.0, name=scenario.get_scenario_name(), provenance={**made, "sha256": _checksum(states)}
    )


def _kept(path: Path, made: dict[str, Any]) -> Path:
    """The file, if it holds what would be made."""
    with explain_missing_extra(), TrajectoryFile(path) as file:
        there = dict(file.provenance)
        checksum = there.pop("sha256", None)
        differing = sorted(key for key in made.keys() | there.keys() if made.get(key) != there.get(key))
        if differing:
            key = differing[0]
            reason = f"its {key} is {there.get(key, 'not known')}, not {made.get(key, 'known')}"
        elif _checksum(file.read().numpy()) != checksum:
            reason = "its states differ from its checksum"
        else:
            return path
    raise FileExistsError(f"{path} exists, {reason}, and is not overwritten: choose another name, or move it away")


def _checksum(states: Shaped[np.ndarray, "..."]) -> str:
    return hashlib.sha256(np.ascontiguousarray(states).tobytes()).hexdigest()
