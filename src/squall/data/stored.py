"""Trajectories in a file, once it is known which of its arrays is what."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall._types import Trajectories
from squall.data.arrays import Handle, Variable
from squall.data.conditions import Areas, Condition, ConditionValues
from squall.data.description import Description
from squall.data.errors import DataError, damaged
from squall.data.source import Numbers, Source


@dataclass(frozen=True, eq=False)
class Layout:
    """What was understood of a file.

    Attributes:
        format: its name for people.
        handle: gives the arrays.
        states: variables that make the state.
        conditions: the others, known in advance.
        shape: (batch, time, channel, *space).
        description: names and axes.
        measure: relative areas of cells (*space).
        notes: what was assumed, and what was not understood.
        span: the first and the last time, where the file has times.
    """

    format: str
    handle: Handle
    states: tuple[Variable, ...]
    conditions: tuple[Variable, ...]
    shape: tuple[int, ...]
    description: Description
    measure: Areas | None = None
    notes: tuple[str, ...] = ()
    span: tuple[float, float] | None = None


class Stored(Source):
    """Trajectories that stay in a file until they are asked for.

    It can be pickled and used by the workers of a `DataLoader`: every process opens the file for itself.
    """

    path: Path
    layout: Layout

    @property
    def format(self) -> str:
        """What the file was taken for."""
        return self.layout.format

    @property
    def notes(self) -> tuple[str, ...]:
        """What was assumed, and what of the file was not understood."""
        return self.layout.notes

    @property
    def shape(self) -> tuple[int, ...]:
        return self.layout.shape

    @property
    def dtype(self) -> torch.dtype:
        double = any(variable.number == np.float64 for variable in self.layout.states)
        return torch.float64 if double else torch.float32

    @property
    def description(self) -> Description:
        return self.layout.description

    @property
    def measure(self) -> Areas | None:
        return self.layout.measure

    @property
    def conditions(self) -> tuple[Condition, ...]:
        return tuple(v.condition(self.shape, self.description.axes) for v in self.layout.conditions)

    def close(self) -> None:
        """Close the file; it opens again when it is read."""
        self.layout.handle.close()

    def _read(
        self, variable: Variable, trajectories: Numbers, starts: Numbers, length: int
    ) -> Float[Tensor, "window length part *space"]:
        space = dict(zip(self.description.axes, self.space, strict=True))
        try:
            values = variable.read(self.layout.handle.array, trajectories.numpy(), starts.numpy(), length, space)
        except DataError as error:
            raise error if str(self.path) in str(error) else DataError(f"{self.path}: {error}") from None
        except (ArithmeticError, LookupError, OSError, RuntimeError, ValueError) as error:
            raise DataError(damaged(self.path, error, f"'{variable.name}'")) from error
        self.layout.handle.forget(values.nbytes)
        return torch.from_numpy(values)

    def _states(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        """Windows as they stand; what does not vary along an axis is repeated along it."""
        parts = [self._read(variable, trajectories, starts, length).to(self.dtype) for variable in self.layout.states]
        parts = [x if x.shape[3:] == self.space else x.expand(-1, -1, -1, *self.space).contiguous() for x in parts]
        if len(parts) == 1:
            return parts[0]
        # By NumPy: memory that PyTorch aligns leaves holes, for which a process with little memory has no room.
        return torch.from_numpy(np.concatenate([part.numpy() for part in parts], axis=2))

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        variable = next(v for v in self.layout.conditions if v.name == name)
        return self._read(variable, trajectories, starts, length).to(self.dtype)
