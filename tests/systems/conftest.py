"""The start of the data sets of the reference."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

FILE = Path(__file__).parent.parent / "data" / "reference_trajectories.npz"


@pytest.fixture(scope="session")
def reference() -> Callable[[str], torch.Tensor]:
    """Two trajectories of 100 steps from the public generator: ch_u, ch_dudt, ch_energy, and the same for kdv."""
    with np.load(FILE) as data:
        arrays = {name: torch.from_numpy(data[name]) for name in data}
    return arrays.__getitem__
