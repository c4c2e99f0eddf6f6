"""Earth2Studio: an emulator as a prognostic model."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import TYPE_CHECKING, final

import numpy as np
import torch
from torch import Tensor, nn

from squall.models.placement import like_model

if TYPE_CHECKING:
    from squall.runs.emulator import Emulator

Coordinates = OrderedDict[str, np.ndarray]
"""Values along every axis of a tensor by name, in the order of its axes."""

NAMES = {"latitude": "lat", "longitude": "lon"}
"""Earth2Studio's names of the axes."""


def earth2studio(emulator: "Emulator", step: np.timedelta64) -> "Prognostic":
    """An emulator in the form of Earth2Studio's `PrognosticModel`, for its workflows. Needs no package of it.

    Args:
        emulator: as `squall.load` returns it.
        step: the time that one step of the emulator takes; the data's dt has no calendar unit.

    Example:
        >>> import squall
        >>> about = squall.data.describe((1, 2, 1, 4), dt=1.0, fields="t2m")
        >>> model = earth2studio(squall.Emulator(nn.Identity(), squall.next_state, about), np.timedelta64(6, "h"))
        >>> list(model.output_coords(model.input_coords())["lead_time"])
        [np.timedelta64(6,'h')]
    """
    return Prognostic(emulator, step)


@final
class Prognostic(nn.Module):
    """`earth2studio` says what it is."""

    def __init__(self, emulator: "Emulator", step: np.timedelta64) -> None:
        super().__init__()
        if not isinstance(step, np.timedelta64) or not step > np.timedelta64(0):
            raise ValueError(f"step is {step!r}, but must be a positive time such as numpy.timedelta64(6, 'h')")
        if emulator.inputs.history > 1 or emulator.inputs.conditions:
            raise ValueError(
                "the model sees a history or conditions, but Earth2Studio gives one state: roll it out by "
                "emulator.rollout"
            )
        self.emulator, self.step = emulator, step

    def __str__(self) -> str:
        return "squall"

    def input_coords(self) -> Coordinates:
        """The axes of a state: batch, lead time (one), variable, space."""
        about = self.emulator.description
        space = {NAMES.get(axis, axis): points for axis, points in zip(about.axes, about.coordinates, strict=True)}
        zero = self.step - self.step
        return OrderedDict(batch=np.empty(0), lead_time=np.array([zero]), variable=np.array(about.fields), **space)

    def output_coords(self, input_coords: Coordinates) -> Coordinates:
        """The axes after one step.

        Raises:
            ValueError: if the axes of the input are not lead time, variable and space of this model, after any others.
        """
        own = list(self.input_coords().items())[1:]
        given = list(input_coords.items())[-len(own) :]
        names, expected = [name for name, _ in given], [name for name, _ in own]
        if names != expected:
            raise ValueError(f"the last axes are {', '.join(names)}, but must be {', '.join(expected)}")
        if len(input_coords["lead_time"]) != 1:
            raise ValueError(f"lead_time has {len(input_coords['lead_time'])} values, but the model takes one state")
        for name, values in own[1:]:
            there = np.asarray(input_coords[name])
            same = there.shape == values.shape and (
                np.array_equal(there, values) if name == "variable" else np.allclose(there, values)
            )
            if not same:
                raise ValueError(f"the values of {name} are not those of the model: use input_coords()")
        return OrderedDict(input_coords, lead_time=input_coords["lead_time"] + self.step)

    @torch.no_grad()
    def forward(self, x: Tensor, coords: Coordinates) -> tuple[Tensor, Coordinates]:
        """The state one step later, with its axes."""
        coords = self.output_coords(coords)
        states = x.reshape(-1, *self.emulator.state_shape)
        return self.emulator(like_model(self.emulator, states)).reshape(x.shape).to(x), coords

    def create_iterator(self, x: Tensor, coords: Coordinates) -> Iterator[tuple[Tensor, Coordinates]]:
        """The initial state, and the states after one step, two steps, ... without an end."""
        self.output_coords(coords)
        while True:
            yield x, coords
            x, coords = self(x, coords)
