"""PyTorch's `.pt` with tensors by name, as neuraloperator's data sets: pairs `x`, `y`, or a trajectory."""

import pickle
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from squall._process.messages import first_line
from squall.data.arrays import Handle, Joined
from squall.data.errors import DataError
from squall.data.formats.bag import read_bag
from squall.data.formats.layout import Reading
from squall.data.stored import Layout

PAIR = "x, y"
"""Input and output of neuraloperator's data sets."""


def open_tensors(location: Path) -> dict[str, Any]:
    """The tensors by name as arrays; `x` and `y` of equal shape are two states one after the other."""
    loaded = torch.load(location, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(location))
    tensors = {"tensor": loaded} if isinstance(loaded, Tensor) else loaded if isinstance(loaded, dict) else {}
    arrays: dict[str, Any] = {str(name): _as_array(value) for name, value in tensors.items()}
    if {"x", "y"} <= arrays.keys() and arrays["x"].shape == arrays["y"].shape and arrays["x"].ndim >= 2:
        x, y = arrays.pop("x"), arrays.pop("y")
        arrays[PAIR] = Joined([x, y], axis=1, ndim=x.ndim + 1)
    return arrays


def _as_array(value: Any) -> Shaped[np.ndarray, "..."]:
    """A plain tensor; of anything else an array of type object, which is left out with a note."""
    plain = isinstance(value, Tensor) and value.layout == torch.strided and value.device.type == "cpu"
    if not plain or value.is_quantized:
        return np.empty((), dtype=object)
    return (value.float() if value.dtype == torch.bfloat16 else value).detach().numpy()


def read_torch(path: Path, location: Path, options: Reading) -> Layout:
    """The layout of a `.pt` file.

    Raises:
        DataError: where it holds more than tensors, or the options do not fit.
    """
    try:
        arrays = open_tensors(location)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        # PyTorch's own advice is to run what is in the file.
        reason = "it holds more than tensors" if isinstance(error, pickle.UnpicklingError) else first_line(error)
        raise DataError(
            f"{path}: not read as tensors ({reason}); programs in a file are never run: save a dict of tensors"
        ) from None
    handle = Handle(location, open_tensors, path)
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    if PAIR not in arrays:
        return read_bag("PyTorch tensors", handle, shapes, options)
    ndim = arrays[PAIR].ndim
    axes = ("batch", "time", *"xyz"[: ndim - 2]) if ndim < 5 else None  # (sample, channel, x, y), or 3-D: to be asked
    format = "neuraloperator's pairs, each a trajectory of one step from x to y"
    return read_bag(format, handle, shapes, options, axes=axes)
