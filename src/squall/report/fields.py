"""Fields of the kept rollouts over space and time, and what happens where."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int, Shaped
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from squall.data import Source
from squall.data.description import DEGREES
from squall.report.figures import limits, mesh, scale
from squall.study.outcome import Outcome
from squall.study.results import Row
from squall.systems import CahnHilliard

REGIME_COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#DDDDDD")

FRAMES = 4
"""Number of times at which a field over two space axes is shown."""

NORTHWARD = ("lat", "rlat", "nlat", "grid_lat", "col", "y", "eta", "nj", "j", "south_north")
"""How the names of axes begin that point up on a map."""

MOVING_FRAMES = 60
"""Most times that an animation shows."""

Arrays = Mapping[str, Shaped[np.ndarray, "..."]]
"""What an evaluation keeps of its rollouts, by name."""

LINE = "space x (first axis, in the middle of the others)"
"""How the axis of `plane` is named where there are several."""


def plane(fields: Shaped[np.ndarray, "trajectory time channel *space"]) -> Float[np.ndarray, "trajectory time point"]:
    """The first channel over time and the first axis of space, in the middle of the others."""
    values = fields[:, :, 0].astype(np.float64)
    while values.ndim > 3:
        values = values[..., values.shape[-1] // 2]
    return values


@dataclass(frozen=True)
class Field:
    """One field of one kept rollout.

    Attributes:
        name: of the field, with its unit.
        time: lead times.
        points: of each axis; the middle slice is shown of a field over three.
        axes: names of the axes, with units.
        truth, prediction, error: over time and space; NaN where masked, the prediction also where it diverged. A
            forecast has no truth and no error.
        unit: of time, after a space.
    """

    name: str
    time: np.ndarray
    points: Sequence[np.ndarray]
    axes: Sequence[str]
    truth: np.ndarray | None
    prediction: np.ndarray
    error: np.ndarray | None
    unit: str = ""

    @classmethod
    def of(cls, rollouts: Arrays, trajectory: int, channel: int, about: Mapping[str, Any] | None = None) -> "Field":
        """From the arrays that an evaluation keeps, and what it says about names and units."""
        truth, prediction = (rollouts[key][trajectory, :, channel].astype(float) for key in ("truth", "prediction"))
        about = about or {}
        points = [rollouts[f"axis_{i}"] for i in range(truth.ndim - 1)]
        names = list(about.get("axes", ("x", "y", "z")[: len(points)]))
        fields = about.get("fields", ["u"] * (channel + 1))
        shown = PictureAxes(points, names, about.get("units", {}))
        truth, prediction = shown.turned(truth), shown.turned(prediction)
        error = np.where(np.isfinite(prediction), prediction - truth, np.nan)
        label = shown.label(fields[channel]) + shown.cut
        return cls(label, rollouts["time"], shown.points, shown.labels, truth, prediction, error, shown.time)

    @classmethod
    def forecast(cls, source: Source, trajectory: int, channel: int) -> "Field":
        """From a file of predictions, read at the times that an animation shows."""
        shown = PictureAxes(source.coordinates, source.description.axes, source.description.units)
        frames = moving_frames(source.shape[1])
        states = (source.read([trajectory], i, i + 1)[0, 0, channel].double().numpy() for i in frames.tolist())
        mask = None if source.mask is None else source.mask[channel].numpy()
        values = np.stack([state if mask is None else np.where(mask, state, np.nan) for state in states])
        times, label = source.times[frames], shown.label(source.fields[channel]) + shown.cut
        return cls(label, times, shown.points, shown.labels, None, shown.turned(values), None, shown.time)

    def rows(self) -> list[tuple[str, Float[np.ndarray, "time *axes"], dict[str, Any]]]:
        """Truth and prediction in the same colours, and the error."""
        if self.truth is None or self.error is None:
            return [("prediction", self.prediction, scale(*limits(self.prediction)))]
        shared = scale(*limits(self.truth))
        largest = np.max(np.abs(self.error), initial=0.0, where=np.isfinite(self.error)) or 1.0
        limit = min(float(largest), shared["vmax"] - shared["vmin"])
        error = scale(-limit, limit)
        return [("truth", self.truth, shared), ("prediction", self.prediction, shared), ("error", self.error, error)]


class PictureAxes:
    """One or two axes of a picture, the horizontal one first, from the space axes of a state."""

    def __init__(
        self, points: Sequence[Shaped[np.ndarray, " _points"]], names: Sequence[str], units: Mapping[str, str]
    ) -> None:
        self.units = {name: f"°{unit[8].upper()}" for name, unit in DEGREES.items()} | dict(units)
        self.is_map = len(names) > 1 and names[0].lower().startswith(NORTHWARD)  # its rows lie above each other
        turn = slice(1, None, -1) if self.is_map else slice(2)
        self.points, self.labels = list(points[turn]), [self.label(name) for name in names[turn]]
        cuts = [f"{name} = {place[len(place) // 2]:g}" for name, place in zip(names[2:], points[2:], strict=True)]
        self.cut = f" at {cuts[0]}" if cuts else ""  # which slice is shown
        self.time = f" {self.units['time']}" if "time" in self.units else ""

    def label(self, name: str) -> str:
        """A name with its unit."""
        return f"{name} [{self.units[name]}]" if name in self.units else name

    def turned(self, values: Shaped[np.ndarray, "time *space"]) -> Shaped[np.ndarray, "time *axes"]:
        """Values over the axes of the picture; the middle slice of a field over three."""
        while values.ndim > 3:
            values = values[..., values.shape[-1] // 2]
        return values.swapaxes(1, 2) if self.is_map else values


def moving_frames(times: int) -> Int[np.ndarray, " frame"]:
    return np.unique(np.linspace(0, times - 1, MOVING_FRAMES).round().astype(int))


def kept(evaluation: Mapping[str, Any], rollouts: Arrays) -> Iterator[tuple[str, str, int, int]]:
    """Every kept rollout and field: name and title of its figure, number of the trajectory, channel."""
    for i in range(len(rollouts["truth"])):
        for channel, field in enumerate(evaluation["fields"]):
            name = f"rollout_{field}_{i}" if len(evaluation["fields"]) > 1 else f"rollout_{i}"
            yield name, f"{field}, test trajectory {i}", i, channel


def field_figure(
    rollouts: Arrays, trajectory: int, channel: int, title: str, about: Mapping[str, Any] | None = None
) -> Figure:
    """Truth, prediction and error of one field: over x and t, or over two space axes at a few times.

    Args:
        rollouts: the kept arrays.
        trajectory, channel: which.
        title: of the figure.
        about: names and units of fields and axes, as `evaluation.json` has them.
    """
    field = Field.of(rollouts, trajectory, channel, about)
    return (_space_time if len(field.points) == 1 else _frames)(field, title)


def _space_time(field: Field, title: str) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    images = [
        mesh(panel, field.time, field.points[0], values, name, **colours)
        for panel, (name, values, colours) in zip(panels, field.rows(), strict=True)
    ]
    figure.suptitle(title, fontsize=10)
    figure.supxlabel(f"time t [{field.unit.strip()}]" if field.unit else "time t", fontsize=10)
    panels[0].set_ylabel("space x" if field.axes[0] == "x" else field.axes[0])
    figure.colorbar(images[0], ax=panels[:2], shrink=0.9, label=field.name)
    figure.colorbar(images[2], ax=panels[2], shrink=0.9)
    return figure


def _frames(field: Field, title: str) -> Figure:
    chosen = np.unique(np.linspace(0, len(field.time) - 1, FRAMES).round().astype(int))
    width, height = (float(np.ptp(points)) or 1.0 for points in field.points)
    tall = float(np.clip(3 * height / width, 1.2, 4.5))
    figure = Figure(figsize=(3 * len(chosen) + 1, 3 * tall + 0.9), layout="constrained")
    panels = figure.subplots(3, len(chosen), sharex=True, sharey=True, squeeze=False)
    for row, (name, values, colours) in zip(panels, field.rows(), strict=True):
        titles = [f"{name}, t = {field.time[frame]:g}{field.unit}" for frame in chosen]
        images = [
            mesh(panel, field.points[0], field.points[1], values[frame], heading, **colours)
            for panel, frame, heading in zip(row, chosen, titles, strict=True)
        ]
        for panel in row:
            panel.set_aspect("equal" if 0.2 < height / width < 5 else "auto")
        row[0].set_ylabel(field.axes[1])
        figure.colorbar(
            images[0], ax=row, shrink=0.8, label=f"error of {field.name}" if name == "error" else field.name
        )
    for panel in panels[-1]:
        panel.set_xlabel(field.axes[0])
    figure.suptitle(title)
    return figure


def field_comparison(rows: Sequence[Row], title: str) -> Figure | None:
    """Figures 3 and 4: the prediction and its error for each loss, below the truth, of the first run of a row that
    kept its fields and its first test trajectory; None without kept fields."""
    shown = [(row.name, outcome, outcome.fields() or {}) for row in rows if (outcome := row.shown)]
    if not shown:
        return None
    first = shown[0][2]
    truth, time, x = plane(first["truth"])[0], first["time"], first["axis_0"]
    limit = float(np.nanmax(np.abs(truth)))
    figure = Figure(figsize=(9, 1.75 * (len(shown) + 1)), layout="constrained")
    panels = figure.subplots(len(shown) + 1, 2, sharex=True, sharey=True)
    panels[0, 1].axis("off")
    image = mesh(panels[0, 0], time, x, truth, "truth", limit)
    for (left, right), (name, _, fields) in zip(panels[1:], shown, strict=True):
        prediction = plane(fields["prediction"])[0]
        prediction[~np.isfinite(prediction)] = np.nan
        mesh(left, time, x, prediction, name, limit)
        mesh(right, time, x, prediction - truth, f"error of {name}", limit)
    figure.colorbar(image, ax=panels, shrink=0.4)
    figure.supxlabel("time t")
    figure.supylabel(LINE if "axis_1" in first else "space x")
    seeds = ", ".join(sorted({str(outcome.seed) for _, outcome, _ in shown}))
    figure.suptitle(f"{title}, test trajectory 0, seed {seeds}, last weights")
    return figure


def regime_figure(outcome: Outcome) -> Figure | None:
    """Figure 1: the truth, and what happens where; None where the system has no regimes."""
    fields = outcome.regime_fields()
    if fields is None:
        return None
    figure = Figure(figsize=(11, 2.9 * len(fields["truth"])), layout="constrained")
    panels = figure.subplots(len(fields["truth"]), 2, squeeze=False, sharex=True, sharey=True)
    time, x = fields["time"], fields["axis_0"]
    for (left, right), truth, regime in zip(panels, plane(fields["truth"]), plane(fields["regime"]), strict=True):
        image = mesh(left, time, x, truth, "truth u", float(np.nanmax(np.abs(truth))))
        figure.colorbar(image, ax=left)
        labels = np.where(regime < 0, np.nan, regime)
        mesh(right, time[: len(labels)], x, labels, "regime", cmap=ListedColormap(REGIME_COLOURS), vmin=-0.5, vmax=3.5)
        left.set_ylabel(LINE if "axis_1" in fields else "space x")
    for panel in panels[-1]:
        panel.set_xlabel("time t")
    names = CahnHilliard.regime_names
    handles = [Patch(color=colour, label=name) for colour, name in zip(REGIME_COLOURS, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def step_error_figure(outcome: Outcome) -> Figure:
    """Figure 2: the squared error of one step, of the rate, at every point and time of the kept trajectories."""
    fields = outcome.fields() or {}
    errors = plane(fields["step_error"])
    figure = Figure(figsize=(5.5 * len(errors), 3.4), layout="constrained")
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    top = float(np.nanmax(errors)) or 1.0
    for i, (panel, error) in enumerate(zip(panels, errors, strict=True)):
        title, norm = f"squared error of one step, test trajectory {i}", LogNorm(top * 1e-5, top)
        time = fields["time"][: len(error)]
        image = mesh(panel, time, fields["axis_0"], np.maximum(error, top * 1e-5), title, norm=norm, cmap="magma")
        panel.set(xlabel="time t", ylabel=LINE if "axis_1" in fields else "space x")
        figure.colorbar(image, ax=panel, label="(rate)²")
    return figure
