"""What a run folder says about the data of its training, so that a trained model needs no data file.

data.json   fields, units, axes, time step, boundary, parameters, provenance, conditions
data.npz    coordinates, and where there are some: mask, areas, static fields
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from jaxtyping import Shaped
from torch import Tensor

from squall._process.files import sha256
from squall.data import Description, InMemory, Source, Split
from squall.runs.folder import RunFolder, RunFolderError

DESCRIPTION, ARRAYS = "data.json", "data.npz"

DTYPES = {"float32": torch.float32, "float64": torch.float64}

TEXTS = ("dt", "fields", "spacing", "boundary", "name", "parameters", "provenance", "start", "axes", "units")
"""What data.json has of a description as it is; arrays are in data.npz."""


def write_description(folder: RunFolder, source: Source) -> dict[str, str]:
    """Record the training part of a run's data; return the checksums of both files, for the sealed record."""
    about = source.description
    arrays = {f"axis_{i}": points for i, points in enumerate(about.coordinates)}
    beside = {"mask": source.mask, "measure": source.measure}
    fixed = constants(source)
    beside |= {
        f"condition_{i}": source.condition(c.name, [0], [0], 1)
        for i, c in enumerate(source.conditions)
        if c.name in fixed
    }
    arrays |= {name: value.numpy() for name, value in beside.items() if value is not None}
    folder.write_arrays(ARRAYS, **arrays)
    values = {name: getattr(about, name) for name in TEXTS}
    values |= {"dtype": str(source.dtype).removeprefix("torch.")}
    values["conditions"] = [{"name": c.name, "shape": c.shape} for c in source.conditions]
    folder.write_json(DESCRIPTION, values)
    return {name: sha256(folder.path / name) for name in (DESCRIPTION, ARRAYS)}


def constants(source: Source) -> set[str]:
    """The names of the conditions that are the same for all trajectories and times."""
    return {c.name for c in source.conditions if c.shape[:2] == (1, 1)}


def read_description(folder: RunFolder, checksums: Mapping[str, str], states: int) -> tuple[Split, set[str]]:
    """Data with the recorded description, of which the states are zero: all that a model is built from.

    A trajectory has as many `states` as a training step takes. Returned beside the data are the names of the conditions
    whose values the folder holds.

    Raises:
        RunFolderError: if a file is missing, damaged or was edited.
    """
    for name, checksum in checksums.items():
        if not folder.has(name):
            raise RunFolderError(f"{folder.path} has no {name}: bring the file back, or name the data file by --data")
        if sha256(folder.path / name) != checksum:
            raise RunFolderError(f"{folder.path / name} was edited after the training: its checksum does not match")
    values, arrays = folder.read_json(DESCRIPTION), folder.read_arrays(ARRAYS)
    try:
        return _source(values, arrays, max(2, states))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise RunFolderError(f"{folder.path / DESCRIPTION} is damaged: {error}") from error


def _source(values: dict[str, Any], arrays: dict[str, Shaped[np.ndarray, "..."]], times: int) -> tuple[Split, set[str]]:
    texts: dict[str, Any] = {name: values[name] for name in TEXTS}
    texts |= {name: tuple(texts[name]) for name in ("fields", "spacing", "boundary", "axes")}
    coordinates = tuple(arrays[f"axis_{i}"] for i in range(len(texts["axes"])))
    space = tuple(map(len, coordinates))
    dtype = DTYPES[values["dtype"]]
    conditions = {
        item["name"]: _condition(item["shape"], arrays.get(f"condition_{i}"), times).to(dtype)
        for i, item in enumerate(values["conditions"])
    }
    source = InMemory.described(
        torch.zeros(1, times, len(texts["fields"]), *space, dtype=dtype),
        Description(coordinates=coordinates, **texts),
        mask=arrays.get("mask"),
        measure=arrays.get("measure"),
        conditions=conditions,
    )
    fixed = {item["name"] for i, item in enumerate(values["conditions"]) if f"condition_{i}" in arrays}
    return Split(source, source, source), fixed


def _condition(
    shape: list[int], values: Shaped[np.ndarray, "_batch _time part *_space"] | None, times: int
) -> Shaped[Tensor, "_batch _time part *_space"]:
    if values is not None:
        return torch.from_numpy(values)
    return torch.zeros(1, times if shape[1] > 1 else 1, *shape[2:])
