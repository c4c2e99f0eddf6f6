"""Reads HDF5 files in the layout of The Well, a few states at a time."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from squall._types import Trajectories
from squall.data.conditions import Condition, ConditionValues, Mask, Valid
from squall.data.errors import DAMAGE, GAPS, DataError, NonFinite, check_exists, damaged
from squall.data.hdf5 import open_file
from squall.data.missing import Screened, refuse_unexpected, whole_only
from squall.data.source import Numbers
from squall.data.stored import Stored
from squall.data.structure import read_structure


class TrajectoryFile(Stored):
    """A file of trajectories in the layout of The Well; `open` makes it.

    Opening reads the structure. Vector and matrix fields become one channel per component (`velocity_x`,
    `velocity_y`); what does not vary along an axis is repeated along it.
    Fields that do not change in time are no part of the state: `constant_fields` names them.

    Args:
        path: of the HDF5 file.
        fields: names of those that make the state; the others are then forcings.
        initial: dt of a file that may have one time only.

    Raises:
        DataError: as `open`.
    """

    def __init__(
        self, path: str | os.PathLike[str], fields: Sequence[str] | None = None, initial: float | None = None
    ) -> None:
        self.path, location = Path(path), Path(os.path.abspath(path))  # a worker may have another working folder
        check_exists(self.path, location)
        try:
            with open_file(self.path, location) as file:
                self._structure = read_structure(self.path, location, file, fields, initial)
        except DataError as error:
            prefix = f"{self.path}: "
            raise DataError(prefix + str(error).removeprefix(prefix)) from None
        except DAMAGE as error:
            raise DataError(damaged(self.path, error)) from error
        self.layout = self._structure.layout

    @property
    def attributes(self) -> dict[str, Any]:
        """The attributes of the file as they stand there."""
        return self._structure.attributes

    @property
    def constant_fields(self) -> tuple[str, ...]:
        """Names of the fields that do not change in time and are left out."""
        return self._structure.constant_fields

    @property
    def mask(self) -> Mask | None:
        return self._structure.mask

    @property
    def valid(self) -> Valid | None:
        return self._structure.valid

    @property
    def conditions(self) -> tuple[Condition, ...]:
        read = super().conditions
        names = [condition.name for condition in read]
        numbers = [n for n, value in self.parameters.items() if not isinstance(value, str) and n not in names]
        return (*read, *(Condition(name, "parameter", (1, 1, 1, *(1,) * len(self.space))) for name in numbers))

    def _condition(self, name: str, trajectories: Numbers, starts: Numbers, length: int) -> ConditionValues:
        if any(variable.name == name for variable in self.layout.conditions):
            return super()._condition(name, trajectories, starts, length)
        return torch.full((1, 1, 1, *(1,) * len(self.space)), float(self.parameters[name]), dtype=self.dtype)

    def check(self) -> None:
        """Read the whole file once, piece by piece.

        Raises:
            DataError: where the file is damaged, or values are NaN or infinite: how many, where the first is.
        """
        errors = NonFinite(self.fields)
        for chosen, start, stop in self.chunks():
            trajectories = torch.tensor(chosen)
            starts = torch.full_like(trajectories, start)
            states = whole_only(self._states(trajectories, starts, stop - start), self.valid, trajectories, starts)
            errors.look(states, chosen, [start] * len(chosen))
        errors.refuse(str(self.path), GAPS.format("squall.data.open(path, gaps=True)"))

    def __enter__(self) -> "TrajectoryFile":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _gather(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        states = self._states(trajectories, starts, length)
        refuse_unexpected(self, states, self.valid, trajectories, starts)
        return states


class ScreenedTrajectoryFile(Screened, TrajectoryFile):
    """A file in The Well's layout whose NaN stand for missing values."""

    def _raw(self, trajectories: Numbers, starts: Numbers, length: int) -> Trajectories:
        return self._states(trajectories, starts, length)
