"""The figures of a study: the paper's Figures 1 to 5 and the course of the trainings."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter

from squall.report.figures import COLOURS
from squall.study.results import GridResults, Outcome, Row, summarize
from squall.systems import CahnHilliard

__all__ = [
    "field_comparison",
    "first_labels",
    "regime_figure",
    "sampling_figure",
    "step_error_figure",
    "temperature_figure",
    "training_figure",
]

FEW_SEEDS = 4
"""Up to so many seeds each has a line of its own."""

REGIME_NAMES = CahnHilliard.regime_names
REGIME_COLOURS = ("#56B4E9", "#D55E00", "#009E73", "#DDDDDD")


def first_labels(found: GridResults) -> list[tuple[str, list[Row]]]:
    """The rows by their first label: one panel, or one figure, each."""
    groups: dict[str, list[Row]] = {}
    for row in found.rows:
        groups.setdefault(row.labels[0], []).append(row)
    return list(groups.items())


def regime_figure(outcome: Outcome) -> Figure | None:
    """Figure 1: the truth, and what happens where; None where the system has no regimes."""
    fields = outcome.fields()
    if fields is None or "regime" not in fields or not (fields["regime"] >= 0).any():
        return None
    figure = Figure(figsize=(11, 2.9 * len(fields["truth"])), layout="constrained")
    panels = figure.subplots(len(fields["truth"]), 2, squeeze=False, sharex=True, sharey=True)
    time, x = fields["time"], fields["axis_0"]
    for (left, right), truth, regime in zip(panels, fields["truth"], fields["regime"], strict=True):
        limit = float(np.abs(truth).max())
        image = left.pcolormesh(time, x, truth[:, 0].T.astype(float), vmin=-limit, vmax=limit, cmap="RdBu_r")
        figure.colorbar(image, ax=left)
        labels = regime[:, 0].T
        for i, colour in enumerate(REGIME_COLOURS):
            shown = np.ma.masked_not_equal(labels, i)
            if shown.count():
                right.pcolormesh(time[: labels.shape[1]], x, shown * 0, cmap=ListedColormap([colour]))
        left.set(ylabel="space x", title="truth u")
        right.set_title("regime")
    for panel in panels[-1]:
        panel.set_xlabel("time t")
    handles = [Patch(color=colour, label=name) for colour, name in zip(REGIME_COLOURS, REGIME_NAMES, strict=True)]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def step_error_figure(outcome: Outcome) -> Figure | None:
    """Figure 2: the squared error of one step, of the rate, at every point and time of the kept trajectories."""
    fields = outcome.fields()
    if fields is None or not fields.get("step_error", np.zeros(0)).size:
        return None
    errors = fields["step_error"][:, :, 0]
    figure = Figure(figsize=(5.5 * len(errors), 3.4), layout="constrained")
    panels = figure.subplots(1, len(errors), squeeze=False)[0]
    top = float(errors.max()) or 1.0
    for i, (panel, error) in enumerate(zip(panels, errors, strict=True)):
        time = fields["time"][: len(error)]
        norm = LogNorm(top * 1e-5, top)
        image = panel.pcolormesh(time, fields["axis_0"], np.maximum(error.T, top * 1e-5), norm=norm, cmap="magma")
        panel.set(xlabel="time t", ylabel="space x", title=f"squared error of one step, test trajectory {i}")
        figure.colorbar(image, ax=panel, label="(rate)²")
    return figure


def field_comparison(rows: Sequence[Row], title: str, trajectory: int = 0, seed: int = 0) -> Figure | None:
    """Figures 3 and 4: the prediction and its error for each loss, below the truth; None without kept fields."""
    found = [(row.name, fields) for row in rows if (fields := _fields_of(row, seed)) is not None]
    if not found:
        return None
    truth = found[0][1]["truth"][trajectory, :, 0].astype(float)
    figure = Figure(figsize=(9, 1.75 * (len(found) + 1)), layout="constrained")
    panels = figure.subplots(len(found) + 1, 2, sharex=True, sharey=True)
    limit = float(np.abs(truth).max())
    time, x = found[0][1]["time"], found[0][1]["axis_0"]
    panels[0, 1].axis("off")
    image = _mesh(panels[0, 0], time, x, truth, limit, "truth")
    for (left, right), (name, fields) in zip(panels[1:], found, strict=True):
        prediction = fields["prediction"][trajectory, :, 0].astype(float)
        prediction[~np.isfinite(prediction)] = np.nan
        _mesh(left, time, x, prediction, limit, name)
        _mesh(right, time, x, prediction - truth, limit, f"error of {name}")
    figure.colorbar(image, ax=panels, shrink=0.4)
    figure.supxlabel("time t")
    figure.supylabel("space x")
    figure.suptitle(f"{title}, test trajectory {trajectory}, seed {seed}, last weights")
    return figure


def _fields_of(row: Row, seed: int) -> dict[str, np.ndarray] | None:
    return next((outcome.fields() for outcome in row.outcomes if outcome.trial.seed == seed), None)


def _mesh(panel: Axes, time: np.ndarray, x: np.ndarray, values: np.ndarray, limit: float, title: str) -> Any:
    panel.set_title(title, fontsize=9)
    panel.set_facecolor("0.75")
    masked = np.ma.masked_invalid(values.T)
    return panel.pcolormesh(time, x, masked, vmin=-limit, vmax=limit, cmap="RdBu_r", rasterized=True)


def sampling_figure(outcome: Outcome, title: str) -> Figure | None:
    """Which transitions SANN calls stiff: the index over trajectories and time, and how many of them over time."""
    found = outcome.stiffness()
    if found is None:
        return None
    index, stiff, dt = found["index"], found["stiff"], float(found["dt"])
    time = dt * np.arange(index.shape[1])
    order = np.argsort(-stiff.sum(1), kind="stable")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    positive = index[index > 0]
    norm = LogNorm(*np.quantile(positive, [0.01, 1.0])) if positive.size else None
    image = left.pcolormesh(time, np.arange(len(index)), index[order], norm=norm, cmap="magma", rasterized=True)
    figure.colorbar(image, ax=left, label="stiffness-aware index, 1/time")
    left.set(xlabel="time t", ylabel="training trajectory, sorted", title="stiffness-aware index")
    chosen = ListedColormap(["#DDDDDD", COLOURS[1]])
    middle.pcolormesh(time, np.arange(len(index)), stiff[order], cmap=chosen, vmin=0, vmax=1, rasterized=True)
    middle.set(xlabel="time t", title=f"called stiff: {100 * stiff.mean():.0f} % of the transitions")
    right.plot(time, stiff.mean(0), color=COLOURS[1])
    right.set(xlabel="time t", ylabel="share of the trajectories", ylim=(0, 1), title="called stiff, over time")
    return figure


def temperature_figure(found: GridResults, kind: Any = "last") -> Figure:
    """Figure 5: the rollout error of the states against the temperature; what has none is a line."""
    groups = first_labels(found)
    figure = Figure(figsize=(5.5 * len(groups), 4.2), layout="constrained")
    for panel, (title, rows) in zip(figure.subplots(1, len(groups), squeeze=False)[0], groups, strict=True):
        _temperature_panel(panel, rows, kind)
        residual = rows[0].outcomes[0].trial.config.training.residual
        panel.set(
            title=f"{title}, {kind} weights",
            xlabel=f"temperature T, ({residual})²",
            ylabel="rollout error of the states",
        )
        panel.legend(fontsize=8)
    return figure


def _temperature_panel(panel: Axes, rows: Sequence[Row], kind: Any) -> None:
    points, zero = [], None
    colours = itertools.cycle(COLOURS[1:])
    for row in rows:
        summary = summarize(list(row.values(("rollout", "states"), kind).values()))
        if summary is None:
            continue
        loss = row.outcomes[0].trial.config.loss
        T = None if loss.temperature is None or loss.differentiate_weights else float(loss.temperature)
        if T is None or math.isinf(T):
            shown = row.name + ("" if math.isfinite(summary.median) else " (diverged)")
            panel.axhline(summary.median if math.isfinite(summary.median) else np.nan, color=next(colours), label=shown)
        elif T == 0:
            zero = summary
        else:
            points.append((T, summary))
    points.sort(key=lambda point: point[0])
    if zero is not None:
        points.insert(0, (points[0][0] / 10 if points else 1.0, zero))
    T = np.array([t for t, _ in points])
    middle = np.array([s.median for _, s in points])
    spread = np.array([[s.median - s.low for _, s in points], [s.high - s.median for _, s in points]])
    unbounded = ~np.isfinite(spread[1])  # some or most of the seeds diverged
    spread[~np.isfinite(spread)] = 0
    middle[~np.isfinite(middle)] = np.nan
    panel.set(xscale="log", yscale="log")
    panel.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    panel.yaxis.set_major_formatter(lambda value, position: f"{value:g}")
    panel.yaxis.set_minor_formatter(NullFormatter())
    if len(points):
        panel.set_xlim(T.min() / 3, T.max() * 3)
        panel.errorbar(T, middle, spread, color=COLOURS[0], marker="o", capsize=3, label="imbalance-aware, T")
        if unbounded.any():
            height = np.full(unbounded.sum(), 0.97)
            marks = panel.plot(T[unbounded], height, "x", color=COLOURS[1], transform=panel.get_xaxis_transform())
            marks[0].set_label("a seed diverged")
    if zero is not None:
        panel.set_xticks([*T], ["0" if i == 0 else f"{t:g}" for i, t in enumerate(T)], fontsize=7)
        panel.minorticks_off()


def training_figure(found: GridResults) -> Figure:
    """Rollout error and growth factor on the validation trajectories against training steps: a line per seed, of more
    than a few the median with the band from the lower to the upper quartile."""
    groups = first_labels(found)
    figure = Figure(figsize=(6 * len(groups), 7), layout="constrained")
    panels = figure.subplots(2, len(groups), squeeze=False, sharex=True)
    quantities = {
        "rollout_states": "validation rollout error of the states",
        "growth_factor": "growth factor of a step",
    }
    for column, (title, rows) in enumerate(groups):
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
    """How a quantity of the validations went on in the trainings of a row; infinite where a rollout diverged."""
    known = [outcome for outcome in row.outcomes if outcome.history]
    courses = [outcome.history for outcome in known]
    if len(courses) <= FEW_SEEDS:
        for course in courses:
            panel.plot([line["step"] for line in course], [_nan(line.get(name)) for line in course], color=colour, lw=1)
        panel.plot([], [], color=colour, lw=1, label=row.name)
        return
    at: dict[int, list[float]] = {}
    for line in itertools.chain(*courses):
        at.setdefault(line["step"], []).append(math.inf if line.get(name) is None else line[name])
    steps = sorted(at)
    for outcome, step in itertools.product(known, steps):
        if outcome.state == "failed" and step > outcome.history[-1]["step"]:
            at[step].append(math.inf)
    low, middle, high = np.array([np.quantile(at[step], (0.25, 0.5, 0.75), method="nearest") for step in steps]).T
    panel.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
    panel.plot(steps, middle, color=colour, lw=1.5, label=row.name)


def _nan(value: float | None) -> float:
    return math.nan if value is None else value
