"""MATLAB v7.3 files, as those of the FNO paper: `a` the first state, `u` what follows, axes reversed."""

from pathlib import Path
from typing import Any

import h5py
import numpy as np

from squall.data.arrays import Handle, Joined
from squall.data.formats.bag import read_bag
from squall.data.formats.layout import Reading
from squall.data.hdf5 import dataset_of, members, open_hdf5
from squall.data.stored import Layout

STATES = "a, u"
"""The pair of the neural-operator benchmarks: a is the first state, u the later ones."""


OTHER = np.empty((), dtype=object)
"""In place of what is not read, so that a note reports it."""

NO_NUMBERS = (b"char", b"function_handle", b"cell", b"struct")
"""MATLAB's classes of arrays that stand for something else."""


class MatlabArrays(dict[str, Any]):
    """The arrays of a MATLAB file; `a` and `u` are joined in time where `u` goes on from `a`."""

    def __init__(self, location: Path) -> None:
        self.file: Any = open_hdf5(location).file
        items = members(self.file).items()
        arrays = {name: dataset_of(self.file, name, name) if _holds_numbers(item) else OTHER for name, item in items}
        if {"a", "u"} <= arrays.keys() and (joined := _joined(arrays)) is not None:
            arrays = {STATES: joined, **{name: v for name, v in arrays.items() if name not in ("a", "u")}}
            if "t" in arrays:
                times = np.asarray(arrays["t"][()]).reshape(-1)
                arrays["t"] = np.append(2 * times[0] - times[1], times) if len(times) == joined.shape[0] - 1 else times
        super().__init__(arrays)

    def close(self) -> None:
        self.file.close()


def read_matlab(path: Path, location: Path, options: Reading) -> Layout:
    """The layout of a MATLAB v7.3 file: a MATLAB array (sample, x, y, t) lies in HDF5 as (t, y, x, sample)."""
    handle = Handle(location, MatlabArrays, path)
    arrays = MatlabArrays(location)
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    known = STATES in arrays or {"a", "u"} <= arrays.keys()
    name = STATES if STATES in arrays else "u"
    arrays.close()
    if not known:
        return read_bag("MATLAB v7.3 (axes are reversed in the file)", handle, shapes, options)
    ndim = len(shapes[name][0])
    space = tuple("xyz"[: ndim - 2])
    axes = ("time", *reversed(space), "batch")
    return read_bag(
        "MATLAB v7.3, a and u (sample, *space, time)",
        handle,
        shapes,
        options,
        axes=axes,
        space=None if options.get("axes") else space,
    )


def _holds_numbers(item: Any) -> bool:
    """Not text, nor the handle of a function, which MATLAB keeps as whole numbers, nor an array without numbers."""
    matlab_class = np.bytes_(item.attrs.get("MATLAB_class", b"double"))
    return isinstance(item, h5py.Dataset) and matlab_class not in NO_NUMBERS and not item.attrs.get("MATLAB_empty", 0)


def _joined(arrays: dict[str, Any]) -> Joined | None:
    """`a` before `u`: a pair where both have the same axes; the state one step earlier where the times say so."""
    a, u = arrays["a"], arrays["u"]
    if a.shape == u.shape and a.ndim >= 2:
        return Joined([a, u], axis=0, ndim=a.ndim + 1)
    if u.shape[1:] != a.shape or "t" not in arrays:
        return None
    times = np.ravel(arrays["t"][()])
    before = len(times) == u.shape[0] >= 2 and np.isclose(times[0], times[1] - times[0], rtol=1e-3)
    return Joined([a, u], axis=0, ndim=u.ndim) if before else None
