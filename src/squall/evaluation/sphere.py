"""A grid of latitudes and longitudes: areas, distances, and transforms into spherical harmonics."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Complex, Float, Shaped
from torch import Tensor

from squall._process.harmonics import import_harmonics
from squall.data import Source
from squall.data.measure import areas

EARTH_RADIUS = 6371.0
"""Mean radius of the Earth, km."""

Degrees = Shaped[np.ndarray, "..."] | float
Field = Float[Tensor, "*batch latitude longitude"]


def is_on_sphere(source: Source) -> bool:
    """Whether the axes of space are latitude and longitude, in this order."""
    return [name.lower()[:3] for name in source.description.axes] == ["lat", "lon"]


@dataclass(frozen=True, eq=False)
class SphereGrid:
    """Latitudes and longitudes in degrees, each in order, on the whole sphere or a part of it.

    Args:
        latitude: from the north or from the south, within ±90.
        longitude: rising, over at most 360 degrees.

    Raises:
        ValueError: for points that are not in order, not finite, or outside their range.

    Example:
        >>> grid = SphereGrid(np.array([60.0, 0.0, -60.0]), np.arange(0.0, 360.0, 90.0))
        >>> grid.closes, grid.areas[:, 0]
        (True, tensor([0.7500, 1.5000, 0.7500], dtype=torch.float64))
    """

    latitude: np.ndarray
    longitude: np.ndarray

    def __post_init__(self) -> None:
        for name in ("latitude", "longitude"):
            points = np.asarray(getattr(self, name), dtype=np.float64)
            object.__setattr__(self, name, points)
            steps = np.diff(points)
            if points.ndim != 1 or len(points) < 2 or not ((steps > 0).all() or (steps < 0).all()):
                shown = np.array2string(points.ravel()[:6], precision=2, separator=", ")
                raise ValueError(f"the {name}s {shown}... are not in order: sort them, and the fields with them")
        if np.abs(self.latitude).max() > 90 + 1e-6:
            raise ValueError(f"a latitude is {np.abs(self.latitude).max():g}; they are degrees within ±90")
        if self.longitude[0] > self.longitude[-1] or np.ptp(self.longitude) > 360:
            raise ValueError(
                f"the longitudes run from {self.longitude[0]:g} to {self.longitude[-1]:g}; they have to rise, over at "
                "most 360 degrees: roll them, and the fields with them"
            )

    @classmethod
    def of(cls, source: Source) -> "SphereGrid":
        """The grid of a source whose two axes are latitude and longitude, in this order, such as a weather file's."""
        if not is_on_sphere(source):
            raise ValueError(
                f"{source.name}: the axes of space are {source.description.axes}; a sphere needs latitude and "
                "longitude, in this order. NetCDF and Zarr files name them; where longitude comes first, write the "
                "file anew by xarray's data.transpose(..., 'latitude', 'longitude')"
            )
        return cls(*source.coordinates)

    @property
    def closes(self) -> bool:
        """Whether the longitudes go around: equally spaced, the last one step before the first."""
        step = np.diff(self.longitude)
        return bool(np.ptp(step) < 1e-3 * step[0] and abs(len(self.longitude) * step.mean() - 360) < 0.1 * step[0])

    @cached_property
    def areas(self) -> Float[Tensor, "latitude longitude"]:
        """Relative areas of the cells, mean 1; of Gaussian latitudes their quadrature weights."""
        if self.closes and self._sorts().get("legendre-gauss"):
            weights = torch.from_numpy(np.polynomial.legendre.leggauss(len(self.latitude))[1].copy())
            return (weights / weights.mean())[:, None].expand(-1, len(self.longitude))
        relative = areas([self.latitude, self.longitude], ["latitude", "longitude"])
        return torch.ones(len(self.latitude), len(self.longitude)).double() if relative is None else relative

    def harmonics(self, field: Field) -> Complex[Tensor, "*batch degree order"]:
        """Coefficients of orthonormal spherical harmonics, order 0 to the truncation.

        Raises:
            ValueError: the longitudes do not close, or the latitudes are neither Gaussian nor equally spaced from pole
                to pole.
            MissingExtraError: torch-harmonics is missing or does not fit.
        """
        if not self.closes:
            raise ValueError(
                f"the longitudes {self.longitude[0]:g} ... {self.longitude[-1]:g} do not close the circle; spectra by "
                "total wavenumber need the whole sphere"
            )
        sort = next((name for name, fits in self._sorts().items() if fits), None)
        if sort is None:
            raise ValueError(
                f"the latitudes {self.latitude[0]:g} ... {self.latitude[-1]:g} are neither Gaussian nor equally spaced "
                "from pole to pole; interpolate to one of these for spectra"
            )
        rows, columns = len(self.latitude), len(self.longitude)
        degrees = min(rows if sort == "legendre-gauss" else (rows + 1) // 2, columns // 2 + 1)  # exact quadrature
        transform = import_harmonics().RealSHT(rows, columns, lmax=degrees, mmax=degrees, grid=sort).double()
        return transform(field.double().flip(-2) if self.latitude[0] < self.latitude[-1] else field.double())

    def _sorts(self) -> dict[str, bool]:
        """Whether the latitudes are of a kind that torch-harmonics has quadratures for."""
        count, points = len(self.latitude), np.sort(self.latitude)
        gauss = np.degrees(np.arcsin(np.polynomial.legendre.leggauss(count)[0]))
        kinds = {"legendre-gauss": gauss, "equiangular": np.linspace(-90, 90, count)}
        return {name: bool(np.allclose(points, expected, atol=1e-3)) for name, expected in kinds.items()}


def great_circle(
    latitude: Degrees, longitude: Degrees, other_latitude: Degrees, other_longitude: Degrees
) -> Float[np.ndarray, "..."]:
    """Distances on the Earth in km, by the haversine formula; the arguments are degrees and broadcast.

    Example:
        >>> quarter = great_circle(0.0, 350.0, 90.0, 20.0)
        >>> bool(np.isclose(quarter, np.pi / 2 * EARTH_RADIUS))
        True
    """
    north, east = np.radians(latitude), np.radians(longitude)
    other_north, other_east = np.radians(other_latitude), np.radians(other_longitude)
    half = np.sin((other_north - north) / 2) ** 2
    half = half + np.cos(north) * np.cos(other_north) * np.sin((other_east - east) / 2) ** 2
    return np.asarray(2 * EARTH_RADIUS * np.arcsin(np.sqrt(np.clip(half, 0, 1))))
