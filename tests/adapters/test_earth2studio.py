"""An emulator in Earth2Studio's loop; checked with the real package where it is installed."""

import itertools
from collections import OrderedDict

import numpy as np
import pytest
import torch

import squall
from squall.adapters import earth2studio

HOURS = np.timedelta64(6, "h")


def emulator() -> squall.Emulator:
    about = squall.data.describe((1, 2, 2, 4, 8), dt=1.0, fields=("t2m", "u10m"), lengths=(1.0, 2.0))
    return squall.Emulator(torch.nn.Conv2d(2, 2, 1), squall.euler, about).eval()


def first(model) -> tuple[torch.Tensor, OrderedDict]:
    """Two members, three times."""
    coords = model.input_coords()
    del coords["batch"]
    axes = OrderedDict(ensemble=np.arange(2), time=np.array(["2024-01-01"] * 3, dtype="datetime64[D]"), **coords)
    shape = [len(values) for values in axes.values()]
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)), axes


def test_the_iterator_gives_the_rollout_of_the_emulator():
    ours = emulator()
    x, coords = first(model := earth2studio(ours, HOURS))
    found = list(itertools.islice(model.create_iterator(x, coords), 4))
    expected = ours.rollout(x.reshape(6, 2, 4, 8), 3)
    assert found[0][0] is x
    for step, (state, axes) in enumerate(found):
        assert torch.equal(state.reshape(6, 2, 4, 8), expected[:, step])
        assert list(axes["lead_time"]) == [step * HOURS]
        assert list(axes) == ["ensemble", "time", "lead_time", "variable", "x", "y"]


def test_axes_of_another_model_are_refused():
    model = earth2studio(emulator(), HOURS)
    _, coords = first(model)
    changed = {
        "the values of variable": coords | {"variable": np.array(["u10m", "t2m"])},
        "the values of x": coords | {"x": coords["x"] + 1},
        "takes one state": coords | {"lead_time": np.array([-HOURS, 0 * HOURS])},
        "the last axes are": OrderedDict(reversed(coords.items())),
    }
    for message, axes in changed.items():
        with pytest.raises(ValueError, match=message):
            model.output_coords(OrderedDict(axes))
    with pytest.raises(ValueError, match="must be a positive time"):
        earth2studio(emulator(), HOURS - HOURS)


def test_it_is_a_prognostic_model_of_the_real_package():
    base = pytest.importorskip("earth2studio.models.px.base", exc_type=ImportError)
    assert isinstance(earth2studio(emulator(), HOURS), base.PrognosticModel)
