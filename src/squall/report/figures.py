"""The figures of a run, a comparison and a study, drawn from the files of `evaluate` and `study run`.

Built on Matplotlib's objects, not on pyplot: nothing global is changed.
"""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

import squall.data
from squall._process.names import file_name
from squall.data import Source
from squall.data.description import DEGREES
from squall.report.comparison import Comparison
from squall.runs.folder import Kind, RunFolder, write_beside
from squall.study.outcome import STATES, Outcome
from squall.study.results import GridResults, Row
from squall.study.statistics import Summary
from squall.systems import CahnHilliard

__all__ = [
    "COLOURS",
    "REGIME_COLOURS",
    "animate_forecast",
    "check_animation",
    "comparison_figure",
    "energy_figure",
    "error_figure",
    "field_comparison",
    "field_figure",
    "fixed_temperature",
    "forecast_animations",
    "regime_figure",
    "sampling_figure",
    "save",
    "step_error_figure",
    "temperature_figure",
    "training_figure",
    "write_animations",
    "write_figures",
]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colour-blind-safe palette of Okabe and Ito, Color Universal Design (2008)."""
REGIME_COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#DDDDDD")

FRAMES = 4
"""Number of times at which a field over two space axes is shown."""
NORTHWARD = ("lat", "rlat", "col", "y", "eta", "nj", "j", "south_north")
"""How the names of axes begin that point up on a map."""

MOVING_FRAMES = 60
"""Most times that an animation shows."""

SHOWN_FORECASTS = 2
"""Most trajectories of a forecast that are drawn."""

FEW_SEEDS = 4
"""Up to this many seeds, each has its own line; more are drawn as median and quartiles."""


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure beside and rename it into place, in the format of its suffix: png, pdf, svg."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # the same figure is the same file
    with write_beside(path) as part:
        figure.savefig(part, format=kind, dpi=130, metadata=undated.get(kind))
    return path


def _mesh(
    panel: Axes, time: np.ndarray, space: np.ndarray, values: np.ndarray, title: str, limit: float = 0.0, **options: Any
) -> Any:
    """A map over time and space (or two space axes), diverging around 0 up to a limit; what is not finite is grey."""
    panel.set_title(title, fontsize=9)
    panel.set_facecolor("0.75")
    style = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"} if limit else {}
    values = np.ma.masked_invalid(values.T)
    return panel.pcolormesh(time, space, values, **(style | {"shading": "nearest", "rasterized": True} | options))


def _scale(truth: np.ndarray) -> dict[str, Any]:
    """Colours that truth and prediction share: diverging around zero where the truth has both signs."""
    low, high = (float(end(truth, initial=0.0, where=np.isfinite(truth))) for end in (np.min, np.max))
    if low < 0 < high:
        limit = max(-low, high)
        return {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
    finite = truth[np.isfinite(truth)]
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    return {"vmin": low, "vmax": high if high > low else low + 1.0, "cmap": "viridis"}


def _curve(values: Iterable[float | None]) -> np.ndarray:
    """NaN, which is not drawn, where a number became NaN or infinite."""
    return np.array([np.nan if x is None or not math.isfinite(x) else x for x in values])


# One run


def write_figures(path: Path | str, suffix: str = "") -> list[Path]:
    """Draw the figures of one evaluated run into its folder.

    Args:
        path: the run folder.
        suffix: that of the evaluation's files, for another integrator.

    Returns:
        the PNG files.
    """
    folder = RunFolder(path)
    found = folder.read_json(f"evaluation{suffix}.json")
    rollouts = folder.read_arrays(f"rollouts{suffix}.npz")
    figures = {"error_growth": error_figure(found)}
    if energy := energy_figure(found):
        figures["energy"] = energy
    for key, i, channel in _kept(found, rollouts):
        figures[key] = field_figure(rollouts, i, channel, f"{found['fields'][channel]}, test trajectory {i}", found)
    target = folder.path / "figures"
    target.mkdir(exist_ok=True)
    return [save(figure, target / f"{file_name(name + suffix)}.png") for name, figure in figures.items()]


def _kept(found: Mapping[str, Any], rollouts: Mapping[str, np.ndarray]) -> Iterator[tuple[str, int, int]]:
    """Every kept rollout and field: the name of its picture, its number and its channel."""
    for i in range(len(rollouts["truth"])):
        for channel, name in enumerate(found["fields"]):
            label = name if len(found["fields"]) > 1 else ""
            yield "_".join(filter(None, ["rollout", label, str(i)])), i, channel


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
    def of(
        cls, rollouts: Mapping[str, np.ndarray], trajectory: int, channel: int, about: Mapping[str, Any] | None = None
    ) -> "Field":
        """From the arrays that an evaluation keeps, and what it says about names and units."""
        truth, prediction = (rollouts[key][trajectory, :, channel].astype(float) for key in ("truth", "prediction"))
        about = about or {}
        points = [rollouts[f"axis_{i}"] for i in range(truth.ndim - 1)]
        names = list(about.get("axes", ("x", "y", "z")[: len(points)]))
        fields = about.get("fields", ["u"] * (channel + 1))
        shown = _Axes(points, names, about.get("units", {}))
        truth, prediction = shown.turned(truth), shown.turned(prediction)
        error = np.where(np.isfinite(prediction), prediction - truth, np.nan)
        label = shown.label(fields[channel]) + shown.cut
        return cls(label, rollouts["time"], shown.points, shown.labels, truth, prediction, error, shown.time)

    @classmethod
    def forecast(cls, source: Source, trajectory: int, channel: int) -> "Field":
        """From a file of predictions, read at the times that an animation shows."""
        shown = _Axes(source.coordinates, source.description.axes, source.description.units)
        frames = _frame_numbers(source.shape[1])
        states = (source.read([trajectory], i, i + 1)[0, 0, channel].double().numpy() for i in frames.tolist())
        mask = None if source.mask is None else source.mask[channel].numpy()
        values = np.stack([state if mask is None else np.where(mask, state, np.nan) for state in states])
        times, label = source.times[frames], shown.label(source.fields[channel]) + shown.cut
        return cls(label, times, shown.points, shown.labels, None, shown.turned(values), None, shown.time)

    def rows(self) -> list[tuple[str, np.ndarray, dict[str, Any]]]:
        """Truth and prediction in the same colours, and the error."""
        if self.truth is None or self.error is None:
            return [("prediction", self.prediction, _scale(self.prediction))]
        shared = _scale(self.truth)
        largest = np.max(np.abs(self.error), initial=0.0, where=np.isfinite(self.error)) or 1.0
        limit = min(float(largest), shared["vmax"] - shared["vmin"])
        error = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"}
        return [("truth", self.truth, shared), ("prediction", self.prediction, shared), ("error", self.error, error)]


class _Axes:
    """One or two axes of a picture, the horizontal one first, from the space axes of a state."""

    def __init__(self, points: Sequence[np.ndarray], names: Sequence[str], units: Mapping[str, str]) -> None:
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


def field_figure(
    rollouts: Mapping[str, np.ndarray],
    trajectory: int,
    channel: int,
    title: str,
    about: Mapping[str, Any] | None = None,
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
        _mesh(panel, field.time, field.points[0], values, name, **colours)
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
            _mesh(panel, field.points[0], field.points[1], values[frame], heading, **colours)
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


def write_animations(path: Path | str, suffix: str = "", kind: str = "gif") -> list[Path]:
    """Draw the kept rollouts of an evaluated run as animations of truth, prediction and error.

    Args:
        path: the run folder.
        suffix: that of the evaluation's files, for another integrator.
        kind: `gif`, or `mp4` where ffmpeg is installed.

    Returns:
        the files.

    Raises:
        ValueError: if ffmpeg is wanted and missing.
    """
    folder = RunFolder(path)
    found, rollouts = folder.read_json(f"evaluation{suffix}.json"), folder.read_arrays(f"rollouts{suffix}.npz")
    target = folder.path / "figures"
    target.mkdir(exist_ok=True)
    files = []
    for name, i, channel in _kept(found, rollouts):
        title = f"{found['fields'][channel]}, test trajectory {i}"
        files.append(target / f"{file_name(name + suffix)}.{kind}")
        _animate(Field.of(rollouts, i, channel, found), title, files[-1])
    return files


def check_animation(kind: str) -> None:
    """Raises:
    ValueError: if ffmpeg is wanted and missing.
    """
    from matplotlib.animation import FFMpegWriter

    if kind == "mp4" and not FFMpegWriter.isAvailable():
        raise ValueError("an mp4 needs ffmpeg, which is not installed: install it, or draw a gif")


def forecast_animations(path: Path, kind: str, fields: Sequence[str], trajectories: int) -> list[Path]:
    """The files that `animate_forecast` writes: one for each field of at most two trajectories.

    Raises:
        FileExistsError: if one of them exists.
    """
    names = [f"_{file_name(field)}" * (len(fields) > 1) for field in fields]
    counts = [f"_{i}" * (trajectories > 1) for i in range(min(trajectories, SHOWN_FORECASTS))]
    files = [path.with_name(f"{path.stem}{name}{count}.{kind}") for name in names for count in counts]
    for file in files:
        if file.exists():
            raise FileExistsError(f"{file} exists and is not overwritten: move it away, or choose another --out")
    return files


def animate_forecast(path: Path, kind: str) -> list[Path]:
    """Draw a file of predictions as animations beside it.

    Args:
        path: what `squall predict` wrote.
        kind: `gif`, or `mp4` where ffmpeg is installed.
    """
    source = squall.data.open(path)
    files = forecast_animations(path, kind, source.fields, source.trajectories)
    shown = min(source.trajectories, SHOWN_FORECASTS)
    for file, (channel, i) in zip(files, itertools.product(range(source.channels), range(shown)), strict=True):
        _animate(Field.forecast(source, i, channel), f"{source.fields[channel]}, trajectory {i}", file)
    return files


def _frame_numbers(times: int) -> np.ndarray:
    return np.unique(np.linspace(0, times - 1, MOVING_FRAMES).round().astype(int))


def _animate(field: Field, title: str, path: Path) -> None:
    """Raises:
    ValueError: if ffmpeg is wanted and missing.
    """
    from matplotlib.animation import FFMpegWriter, PillowWriter

    kind = path.suffix.removeprefix(".")
    check_animation(kind)
    writer = (PillowWriter if kind == "gif" else FFMpegWriter)(fps=10)
    with write_beside(path) as part:
        moving = part.with_name(part.name + path.suffix)  # which tells the writers what to write
        try:
            _film(field, title, writer, moving)
            moving.replace(part)
        finally:
            moving.unlink(missing_ok=True)


def _film(field: Field, title: str, writer: Any, path: Path) -> None:
    extent = [float(np.ptp(points)) or 1.0 for points in field.points]
    tall = 0.8 if len(extent) == 1 else float(np.clip(extent[1] / extent[0], 0.2, 1.5))
    rows, images = field.rows(), []
    figure = Figure(figsize=(11 if len(rows) > 1 else 5, 3.4 * tall + 1.6), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, (name, values, colours) in zip(panels, rows, strict=True):
        if len(field.points) == 1:
            panel.set(title=name, xlabel=field.axes[0], ylim=_room(colours))
            images.append(panel.plot(field.points[0], values[0], color=COLOURS[0])[0])
        else:
            images.append(_mesh(panel, field.points[0], field.points[1], values[0], name, **colours))
            panel.set(xlabel=field.axes[0], aspect="equal" if 0.2 < extent[1] / extent[0] < 5 else "auto")
            figure.colorbar(images[-1], ax=panel, location="bottom", shrink=0.8, label=field.name)
    panels[0].set_ylabel(field.name if len(field.points) == 1 else field.axes[1])
    figure.suptitle(title, fontsize=10)
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the panels keep their places, and a frame takes half the time
    with writer.saving(figure, str(path), dpi=80):
        for frame in _frame_numbers(len(field.time)):
            for image, (_, values, _) in zip(images, rows, strict=True):
                if len(field.points) == 1:
                    image.set_ydata(values[frame])
                else:
                    image.set_array(np.ma.masked_invalid(values[frame].T))
            figure.suptitle(f"{title}, t = {field.time[frame]:.4g}{field.unit}", fontsize=10)
            writer.grab_frame()


def _room(colours: Mapping[str, Any]) -> tuple[float, float]:
    """The limits of a scale, and a twentieth more."""
    more = (colours["vmax"] - colours["vmin"]) / 20
    return colours["vmin"] - more, colours["vmax"] + more


def error_figure(found: Mapping[str, Any]) -> Figure:
    """Mean squared error of the states over rollout time, of each checkpoint, with the baselines as lines."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for colour, (kind, item) in zip(COLOURS, found["checkpoints"].items(), strict=False):
        curve = _curve(item["curves"]["states"])
        panel.semilogy(item["curves"]["time"], curve, color=colour, label=f"{kind} (step {item['step']})")
    _baseline_lines(panel, next(iter(found["checkpoints"].values()))["baselines"])
    return figure


def _baseline_lines(panel: Axes, baselines: Mapping[str, Any]) -> None:
    for style, (name, values) in zip(("--", ":"), baselines.items(), strict=False):
        panel.axhline(values["states"], color="0.5", linestyle=style, linewidth=1, label=f"{name} (mean over time)")
    panel.set(xlabel="rollout time t", ylabel="mean squared error of the states", yscale="log")
    panel.legend(fontsize=8)


def energy_figure(found: Mapping[str, Any]) -> Figure | None:
    """Energy of truth and prediction over rollout time; None for data without a system."""
    checkpoints = {kind: item for kind, item in found["checkpoints"].items() if "energy_truth" in item["curves"]}
    if not checkpoints:
        return None
    first = next(iter(checkpoints.values()))["curves"]
    figure = Figure(figsize=(5.5 * len(first["energy_truth"]), 3.8), layout="constrained")
    panels = figure.subplots(1, len(first["energy_truth"]), squeeze=False)[0]
    for i, (panel, truth) in enumerate(zip(panels, first["energy_truth"], strict=True)):
        panel.plot(first["time"], truth, color="black", label="truth")
        for colour, (kind, item) in zip(COLOURS, checkpoints.items(), strict=False):
            curve = _curve(item["curves"]["energy_prediction"][i])
            panel.plot(first["time"], curve, color=colour, linestyle="--", label=kind)
        panel.set(xlabel="rollout time t", ylabel="energy H", title=f"test trajectory {i}")
    panels[0].legend(fontsize=8)
    return figure


# A comparison


def comparison_figure(comparison: Comparison) -> Figure:
    """Error growth of every row, median and range over seeds, and its one-step error by regime."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    growth, regimes = figure.subplots(1, 2)
    kind, rows = comparison.checkpoint, comparison.rows
    for colour, row in zip(itertools.cycle(COLOURS), rows, strict=False):
        curves = [outcome.checkpoint(kind)["curves"] for outcome in row.outcomes]
        errors = np.nan_to_num([_curve(curve["states"]) for curve in curves], nan=np.inf)
        middle, top = np.median(errors, axis=0), errors.max(axis=0)
        growth.plot(curves[0]["time"], _curve(middle), color=colour, label=row.name)
        top = np.where(np.isinf(top), errors[np.isfinite(errors)].max(initial=1), top)
        growth.fill_between(curves[0]["time"], errors.min(axis=0), top, color=colour, alpha=0.2, linewidth=0)
    _baseline_lines(growth, rows[0].outcomes[0].checkpoint(kind)["baselines"])
    growth.set_title("rollout")
    _regime_errors(regimes, rows, kind)
    title = f"{kind.capitalize()} weights. Rollout: median and range over seeds; one step: median and 95 % interval"
    figure.suptitle(title, fontsize=10)
    return figure


def _regime_errors(panel: Axes, rows: Sequence[Row], kind: Kind) -> None:
    """Median and interval over the seeds of the one-step error, by regime."""
    names = ("quiet", "active", "extreme")
    for i, (colour, row) in enumerate(zip(itertools.cycle(COLOURS), rows, strict=False)):
        summaries = [row.summary(("regimes", name, "error"), kind) for name in names]
        places = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * min(0.15, 0.8 / len(rows))
        middle, spread = _with_intervals(summaries)
        panel.errorbar(places, middle, spread, fmt="o", color=colour, capsize=4, label=row.name)
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    xlabel = "regime of the truth: lower half of |du/dt|, the rest, top 1 %"
    panel.set(yscale="log", xlabel=xlabel, ylabel="squared error of the rate", title="one step")
    panel.legend(fontsize=8)


def _with_intervals(summaries: Sequence[Summary | None]) -> tuple[np.ndarray, np.ndarray]:
    """Medians, NaN where they are not finite, and how far their intervals reach below and above, 0 where unbounded."""
    known = [(math.nan,) * 3 if s is None else (s.low, s.median, s.high) for s in summaries]
    low, middle, high = np.where(np.isfinite(known), known, np.nan).T
    return middle, np.nan_to_num([middle - low, high - middle])


# A study: the paper's Figures 1 to 5 and the course of the trainings


def regime_figure(outcome: Outcome) -> Figure | None:
    """Figure 1: the truth, and what happens where; None where the system has no regimes."""
    fields = outcome.fields()
    if fields is None or "regime" not in fields or not (fields["regime"] >= 0).any():
        return None
    figure = Figure(figsize=(11, 2.9 * len(fields["truth"])), layout="constrained")
    panels = figure.subplots(len(fields["truth"]), 2, squeeze=False, sharex=True, sharey=True)
    time, x = fields["time"], fields["axis_0"]
    for (left, right), truth, regime in zip(panels, fields["truth"], fields["regime"], strict=True):
        image = _mesh(left, time, x, truth[:, 0].astype(float), "truth u", float(np.nanmax(np.abs(truth))))
        figure.colorbar(image, ax=left)
        labels = np.where(regime[:, 0] < 0, np.nan, regime[:, 0])
        _mesh(right, time[: len(labels)], x, labels, "regime", cmap=ListedColormap(REGIME_COLOURS), vmin=-0.5, vmax=3.5)
        left.set_ylabel("space x")
    for panel in panels[-1]:
        panel.set_xlabel("time t")
    names = CahnHilliard.regime_names
    handles = [Patch(color=colour, label=name) for colour, name in zip(REGIME_COLOURS, names, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def step_error_figure(outcome: Outcome) -> Figure:
    """Figure 2: the squared error of one step, of the rate, at every point and time of the kept trajectories."""
    fields = outcome.fields() or {}
    errors = fields["step_error"][:, :, 0]
    figure = Figure(figsize=(5.5 * len(errors), 3.4), layout="constrained")
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    top = float(np.nanmax(errors)) or 1.0
    for i, (panel, error) in enumerate(zip(panels, errors, strict=True)):
        title, norm = f"squared error of one step, test trajectory {i}", LogNorm(top * 1e-5, top)
        time = fields["time"][: len(error)]
        image = _mesh(panel, time, fields["axis_0"], np.maximum(error, top * 1e-5), title, norm=norm, cmap="magma")
        panel.set(xlabel="time t", ylabel="space x")
        figure.colorbar(image, ax=panel, label="(rate)²")
    return figure


def field_comparison(rows: Sequence[Row], title: str) -> Figure | None:
    """Figures 3 and 4: the prediction and its error for each loss, below the truth, of the first run of a row that
    kept its fields and its first test trajectory; None without kept fields."""
    shown = [(row.name, outcome, outcome.fields() or {}) for row in rows if (outcome := row.shown)]
    if not shown:
        return None
    first = shown[0][2]
    truth, time, x = first["truth"][0, :, 0].astype(float), first["time"], first["axis_0"]
    limit = float(np.nanmax(np.abs(truth)))
    figure = Figure(figsize=(9, 1.75 * (len(shown) + 1)), layout="constrained")
    panels = figure.subplots(len(shown) + 1, 2, sharex=True, sharey=True)
    panels[0, 1].axis("off")
    image = _mesh(panels[0, 0], time, x, truth, "truth", limit)
    for (left, right), (name, _, fields) in zip(panels[1:], shown, strict=True):
        prediction = fields["prediction"][0, :, 0].astype(float)
        prediction[~np.isfinite(prediction)] = np.nan
        _mesh(left, time, x, prediction, name, limit)
        _mesh(right, time, x, prediction - truth, f"error of {name}", limit)
    figure.colorbar(image, ax=panels, shrink=0.4)
    figure.supxlabel("time t")
    figure.supylabel("space x")
    seeds = ", ".join(sorted({str(outcome.seed) for _, outcome, _ in shown}))
    figure.suptitle(f"{title}, test trajectory 0, seed {seeds}, last weights")
    return figure


def sampling_figure(outcome: Outcome, title: str) -> Figure:
    """Which transitions SANN calls stiff: the index over trajectories and time, and how many of them over time."""
    found = outcome.stiffness() or {}
    index, stiff = found["index"], found["stiff"]
    time = float(found["dt"]) * np.arange(index.shape[1])
    order = np.argsort(-stiff.sum(1), kind="stable")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    positive = index[index > 0]
    norm = LogNorm(*np.quantile(positive, [0.01, 1.0])) if positive.size else None
    rows = np.arange(len(index))
    image = _mesh(left, time, rows, index[order].T, "stiffness-aware index", norm=norm, cmap="magma")
    figure.colorbar(image, ax=left, label="stiffness-aware index, 1/time")
    left.set(xlabel="time t", ylabel="training trajectory, sorted")
    share = f"called stiff: {100 * stiff.mean():.0f} % of the transitions"
    _mesh(middle, time, rows, stiff[order].T, share, cmap=ListedColormap(["#DDDDDD", COLOURS[1]]), vmin=0, vmax=1)
    middle.set(xlabel="time t")
    right.plot(time, stiff.mean(0), color=COLOURS[1])
    right.set(xlabel="time t", ylabel="share of the trajectories", ylim=(0, 1))
    right.set_title("called stiff, over time", fontsize=9)
    return figure


def fixed_temperature(row: Row) -> float | None:
    """The finite temperature that a loss weighs with; None where it has none, or its weights are differentiated."""
    loss = row.outcomes[0].config["loss"]
    T = math.inf if loss["temperature"] is None else float(loss["temperature"])
    return T if math.isfinite(T) and not loss["differentiate_weights"] else None


def temperature_figure(found: GridResults, kind: Kind) -> Figure:
    """Figure 5: the rollout error of the states against the temperature; a row without one is a line."""
    figure = Figure(figsize=(5.5 * len(found.groups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(found.groups), squeeze=False)[0]
    for panel, (title, rows) in zip(panels, found.groups, strict=True):
        _temperature_panel(panel, rows, kind)
        unit = f"({rows[0].outcomes[0].config['training']['residual']})²"
        panel.set(
            title=f"{title}, {kind} weights", xlabel=f"temperature T, {unit}", ylabel="rollout error of the states"
        )
        panel.legend(fontsize=8)
    return figure


def _temperature_panel(panel: Axes, rows: Sequence[Row], kind: Kind) -> None:
    points = []
    colours = itertools.cycle(COLOURS[1:])
    for row in rows:
        summary, T = row.summary(STATES, kind), fixed_temperature(row)
        if summary is not None and T is not None:
            points.append((T, summary))
        elif summary is not None:
            finite = math.isfinite(summary.median)
            label = row.name if finite else f"{row.name} (diverged)"
            panel.axhline(summary.median if finite else math.nan, color=next(colours), label=label)
    panel.set(xscale="log", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    if not points:
        return
    points.sort(key=lambda point: point[0])
    T = np.array([t for t, _ in points])
    names = [f"{t:g}" for t in T]
    if T[0] == 0:  # a logarithmic axis has no place for it: a decade below the smallest
        T[0] = T[1] / 10 if len(T) > 1 else 1.0
        panel.set_xticks(T, names, fontsize=7)
        panel.minorticks_off()
    panel.set_xlim(T.min() / 3, T.max() * 3)
    middle, spread = _with_intervals([summary for _, summary in points])
    panel.errorbar(T, middle, spread, color=COLOURS[0], marker="o", capsize=3, label="imbalance-aware, T")
    unbounded = np.array([math.isinf(summary.high) for _, summary in points])
    if unbounded.any():
        height, transform = np.full(unbounded.sum(), 0.97), panel.get_xaxis_transform()
        panel.plot(T[unbounded], height, "x", color=COLOURS[1], transform=transform, label="a seed diverged")


def training_figure(found: GridResults) -> Figure:
    """Rollout error and growth factor on the validation trajectories against training steps: a line per seed, of more
    than a few the median with the band from the lower to the upper quartile."""
    figure = Figure(figsize=(6 * len(found.groups), 7), layout="constrained")
    panels = figure.subplots(2, len(found.groups), squeeze=False, sharex=True)
    quantities = {
        "rollout_states": "validation rollout error of the states",
        "growth_factor": "growth factor of a step",
    }
    for column, (title, rows) in enumerate(found.groups):
        for panel, (name, label) in zip(panels[:, column], quantities.items(), strict=True):
            for colour, row in zip(itertools.cycle(COLOURS), rows, strict=False):
                _courses(panel, row, name, colour)
            panel.set_ylabel(label)
        panels[0, column].set(title=title, yscale="log")
        panels[1, column].set(xlabel="training step", ylim=(0.95, 2.0))
        panels[1, column].axhline(1, color="0.5", lw=0.8)
    named = {label: h for panel in panels[0] for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8)
    return figure


def _courses(panel: Axes, row: Row, name: str, colour: str) -> None:
    """A quantity of the validations in the trainings of a row; infinite where a rollout diverged."""
    known = [outcome for outcome in row.outcomes if outcome.history]
    if len(known) <= FEW_SEEDS:
        for outcome in known:
            panel.plot(_curve(outcome.history["step"]), _curve(_validations(outcome, name)), color=colour, lw=1)
        panel.plot([], [], color=colour, lw=1, label=row.name)
        return
    at: dict[float, list[float]] = {}
    for outcome in known:
        for step, value in zip(outcome.history["step"], _validations(outcome, name), strict=True):
            at.setdefault(step or 0, []).append(math.inf if value is None else value)
    steps = sorted(at)
    for outcome, step in itertools.product(known, steps):
        if outcome.state == "failed" and step > (outcome.history["step"][-1] or 0):
            at[step].append(math.inf)
    low, middle, high = np.array([np.quantile(at[step], (0.25, 0.5, 0.75), method="nearest") for step in steps]).T
    panel.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    panel.plot(steps, middle, color=colour, lw=1.5, label=row.name)


def _validations(outcome: Outcome, name: str) -> Sequence[float | None]:
    return outcome.history.get(name) or [None] * len(outcome.history["step"])
