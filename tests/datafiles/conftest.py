"""Trajectories of every kind that a file may hold, and tools that damage files."""

from pathlib import Path

import numpy as np
import pytest

import squall


def trajectories(*shape: int, dtype=np.float64, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@pytest.fixture
def states() -> np.ndarray:
    """Five trajectories of twelve times, two fields on seven points."""
    return trajectories(5, 12, 2, 7)


@pytest.fixture
def path(tmp_path: Path, states: np.ndarray) -> Path:
    return squall.data.write(tmp_path / "waves.hdf5", states, dt=0.1, fields=("u", "v"), lengths=7.0)
