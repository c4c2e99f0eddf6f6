"""Relative areas of cells: widths on an axis, exact spherical cells on latitude and longitude, curvilinear grids."""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from squall.data.conditions import Areas, as_measure


def edges(points: Float[np.ndarray, " points"]) -> Float[np.ndarray, " ends"]:
    """The ends (N + 1) of cells around N points: halfway to the neighbours, the same beyond the last."""
    if len(points) == 1:
        return np.array([points[0] - 0.5, points[0] + 0.5])
    middle = (points[1:] + points[:-1]) / 2
    return np.concatenate([[2 * points[0] - middle[0]], middle, [2 * points[-1] - middle[-1]]])


def areas(coordinates: Sequence[Shaped[np.ndarray, " _"]], roles: Sequence[str]) -> Areas | None:
    """Relative areas of cells (*space), mean 1; `None` where all are equal.

    A cell between latitudes φ₁ and φ₂ has the area (sin φ₂ − sin φ₁)·Δλ, exactly; cells end at the poles.
    With unequally spaced points, other axes count by the width of their cells.

    Args:
        coordinates: the points of each axis.
        roles: "latitude" (degrees), "colatitude" (radians) or anything else, one per axis.

    Example:
        >>> latitude, longitude = np.array([-60.0, 0.0, 60.0]), np.arange(0.0, 360.0, 90.0)
        >>> areas([latitude, longitude], ["latitude", "longitude"])[:, 0]
        tensor([0.7500, 1.5000, 0.7500], dtype=torch.float64)
    """
    total = np.ones(())
    for points, role in zip(coordinates, roles, strict=True):
        ends = edges(np.asarray(points, dtype=np.float64))
        if role == "latitude":
            ends = np.sin(np.radians(np.clip(ends, -90, 90)))
        elif role == "colatitude":
            ends = np.cos(np.clip(ends, 0, np.pi))
        total = total[..., None] * np.abs(np.diff(ends))
    return as_measure(torch.from_numpy(total), total.shape)


def lengths(coordinates: Sequence[Shaped[np.ndarray, " _"]], axes: Sequence[str]) -> list[Float[Tensor, "*_space"]]:
    """Lengths of cells along each axis, broadcastable to (*space): of latitude and longitude on the unit sphere.

    Args:
        coordinates: the points of each axis; a cell of the only point has length 1.
        axes: their names. Degrees of latitude and longitude are those that start with "lat" and "lon".

    Example:
        >>> north, east = lengths([np.array([0.0, 60.0]), np.array([0.0, 90.0])], ["latitude", "longitude"])
        >>> east / torch.pi
        tensor([[0.5000, 0.5000],
                [0.2500, 0.2500]], dtype=torch.float64)
    """
    widths, parallel = [], np.ones(())
    names = [name.lower()[:3] for name in axes]
    for axis, (name, points) in enumerate(zip(names, coordinates, strict=True)):
        shape = (-1, *[1] * (len(names) - axis - 1))
        length = np.abs(np.gradient(np.asarray(points, dtype=np.float64))) if len(points) > 1 else np.ones(1)
        widths.append((np.radians(length) if name in ("lat", "lon") else length).reshape(shape))
        if name == "lat":  # a pole, where nothing changes along a parallel, would divide rounding by zero
            parallel = np.maximum(np.cos(np.radians(points)), 1e-3).reshape(shape)
    return [
        torch.from_numpy(length * parallel if name == "lon" else length)
        for name, length in zip(names, widths, strict=True)
    ]


def on_sphere(
    latitude: Float[np.ndarray, "row column"], longitude: Float[np.ndarray, "row column"]
) -> Float[np.ndarray, "3 row column"]:
    """Unit vectors of points given in degrees."""
    north, east = np.radians(latitude), np.radians(longitude)
    return np.stack([np.cos(north) * np.cos(east), np.cos(north) * np.sin(east), np.sin(north)])


def curvilinear_areas(points: Float[np.ndarray, "3 row column"]) -> Float[np.ndarray, "row column"]:
    """Areas |∂r/∂i × ∂r/∂j| of cells around points r on the unit sphere, by central differences.

    Example:
        >>> latitude, longitude = np.meshgrid([-1.0, 0.0, 1.0], [0.0, 1.0, 2.0], indexing="ij")
        >>> (curvilinear_areas(on_sphere(latitude, longitude)) / np.radians(1) ** 2).round(3)[1]
        array([1., 1., 1.])
    """
    along, across = (np.gradient(points, axis=axis) for axis in (1, 2))
    return np.linalg.norm(np.cross(along, across, axis=0), axis=0)


def closes(points: Float[np.ndarray, "3 row column"], axis: int) -> bool:
    """Whether the last points along an axis (0 or 1) are next to the first ones, as on a circle of longitude."""
    lines = np.moveaxis(points, axis + 1, 0)
    steps = np.median(np.linalg.norm(np.diff(lines, axis=0), axis=1))
    return len(lines) > 2 and bool(np.median(np.linalg.norm(lines[-1] - lines[0], axis=0)) < 1.5 * steps)
