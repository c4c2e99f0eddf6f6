"""Curves and points: errors, energies, trainings and temperatures, with their spread over seeds."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter

from squall.evaluation.regimes import REGIMES
from squall.report.comparison import Comparison
from squall.report.figures import COLOURS, legend_below, mesh, with_intervals
from squall.runs.folder import Kind
from squall.study.outcome import STATES, Outcome
from squall.study.results import GridResults, Row

FEW_SEEDS = 4
"""Up to this many seeds, each has its own line; more are drawn as median and quartiles."""


def _curve(values: Iterable[float | None]) -> Float[np.ndarray, " n"]:
    """NaN, which is not drawn, where a number became NaN or infinite."""
    return np.array([np.nan if x is None or not math.isfinite(x) else x for x in values], np.float64)


def _line(panel: Axes, x: Iterable[float | None], y: Iterable[float | None], **style: Any) -> None:
    """A line, with a dot for a number without neighbours, of which a line shows nothing."""
    values = np.array([*y], np.float64)  # None is NaN
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    panel.plot(_curve(x), values, marker="o", ms=4, markevery=alone, **style)


def error_figure(evaluation: Mapping[str, Any]) -> Figure:
    """Mean squared error of the states over rollout time, of each checkpoint, with the baselines as lines."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for colour, (checkpoint, item) in zip(COLOURS, evaluation["checkpoints"].items(), strict=False):
        curve = _curve(item["curves"]["states"])
        _line(panel, item["curves"]["time"], curve, color=colour, label=f"{checkpoint} (step {item['step']})")
    _baseline_lines(panel, next(iter(evaluation["checkpoints"].values()))["baselines"])
    return figure


def energy_figure(evaluation: Mapping[str, Any]) -> Figure | None:
    """Energy of truth and prediction over rollout time; None for data without a system."""
    checkpoints = {
        checkpoint: item for checkpoint, item in evaluation["checkpoints"].items() if "energy_truth" in item["curves"]
    }
    if not checkpoints:
        return None
    first = next(iter(checkpoints.values()))["curves"]
    figure = Figure(figsize=(5.5 * len(first["energy_truth"]), 3.8), layout="constrained")
    panels = figure.subplots(1, len(first["energy_truth"]), squeeze=False)[0]
    for i, (panel, truth) in enumerate(zip(panels, first["energy_truth"], strict=True)):
        _line(panel, first["time"], truth, color="black", label="truth")
        for colour, (checkpoint, item) in zip(COLOURS, checkpoints.items(), strict=False):
            curve = _curve(item["curves"]["energy_prediction"][i])
            _line(panel, first["time"], curve, color=colour, linestyle="--", label=checkpoint)
        panel.set(xlabel="rollout time t", ylabel="energy H", title=f"test trajectory {i}")
    panels[0].legend(fontsize=8)
    return figure


def _baseline_lines(panel: Axes, baselines: Mapping[str, Any]) -> None:
    for style, (name, values) in zip(("--", ":"), baselines.items(), strict=False):
        panel.axhline(values["states"], color="0.5", linestyle=style, linewidth=1, label=f"{name} (mean over time)")
    panel.set(xlabel="rollout time t", ylabel="mean squared error of the states", yscale="log")
    panel.legend(fontsize=8)


def comparison_figure(comparison: Comparison) -> Figure:
    """Error growth of every row, median and range over seeds, and its one-step error by regime."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    growth, regimes = figure.subplots(1, 2)
    checkpoint, rows = comparison.checkpoint, comparison.rows
    for colour, row in zip(itertools.cycle(COLOURS), rows, strict=False):
        curves = [outcome.checkpoint(checkpoint)["curves"] for outcome in row.outcomes]
        errors = np.nan_to_num([_curve(curve["states"]) for curve in curves], nan=np.inf)
        middle, top = np.median(errors, axis=0), errors.max(axis=0)
        _line(growth, curves[0]["time"], middle, color=colour, label=row.name)
        top = np.where(np.isinf(top), errors[np.isfinite(errors)].max(initial=1), top)
        growth.fill_between(curves[0]["time"], errors.min(axis=0), top, color=colour, alpha=0.2, linewidth=0)
    _baseline_lines(growth, rows[0].outcomes[0].checkpoint(checkpoint)["baselines"])
    growth.set_title("rollout")
    _regime_errors(regimes, rows, checkpoint)
    title = (
        f"{checkpoint.capitalize()} weights. Rollout: median and range over seeds; one step: median and 95 % interval"
    )
    figure.suptitle(title, fontsize=10)
    return figure


def _regime_errors(panel: Axes, rows: Sequence[Row], checkpoint: Kind) -> None:
    """Median and interval over the seeds of the one-step error, by regime."""
    names = list(REGIMES.values())
    for i, (colour, row) in enumerate(zip(itertools.cycle(COLOURS), rows, strict=False)):
        summaries = [row.summary(("regimes", name, "error"), checkpoint) for name in names]
        places = np.arange(len(names)) + (i - (len(rows) - 1) / 2) * min(0.15, 0.8 / len(rows))
        middle, spread = with_intervals(summaries)
        panel.errorbar(places, middle, spread, fmt="o", color=colour, capsize=4, label=row.name)
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    xlabel = "regime of the truth: lower half of |du/dt|, the rest, top 1 %"
    panel.set(yscale="log", xlabel=xlabel, ylabel="squared error of the rate", title="one step")
    panel.legend(fontsize=8)


def sampling_figure(outcome: Outcome, title: str) -> Figure:
    """Which transitions SANN calls stiff: the index over trajectories and time, and how many of them over time."""
    arrays = outcome.stiffness() or {}
    index, stiff = arrays["index"], arrays["stiff"]
    time = float(arrays["dt"]) * np.arange(index.shape[1])
    order = np.argsort(-stiff.sum(1), kind="stable")
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    figure.suptitle(title)
    left, middle, right = figure.subplots(1, 3)
    positive = index[index > 0]
    norm = LogNorm(*np.quantile(positive, [0.01, 1.0])) if positive.size else None
    rows = np.arange(len(index))
    image = mesh(left, time, rows, index[order].T, "stiffness-aware index", norm=norm, cmap="magma")
    figure.colorbar(image, ax=left, label="stiffness-aware index, 1/time")
    left.set(xlabel="time t", ylabel="training trajectory, sorted")
    share = f"called stiff: {100 * stiff.mean():.0f} % of the transitions"
    mesh(middle, time, rows, stiff[order].T, share, cmap=ListedColormap(["#DDDDDD", COLOURS[1]]), vmin=0, vmax=1)
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


def temperature_figure(results: GridResults, checkpoint: Kind) -> Figure:
    """Figure 5: the rollout error of the states against the temperature; a row without one is a line."""
    figure = Figure(figsize=(5.5 * len(results.groups), 4.2), layout="constrained")
    panels = figure.subplots(1, len(results.groups), squeeze=False)[0]
    for panel, (title, rows) in zip(panels, results.groups, strict=True):
        _temperature_panel(panel, rows, checkpoint)
        unit = f"({rows[0].outcomes[0].config['training']['residual']})²"
        panel.set(
            title=f"{title}, {checkpoint} weights",
            xlabel=f"temperature T, {unit}",
            ylabel="rollout error of the states",
        )
        panel.legend(fontsize=8)
    return figure


def _temperature_panel(panel: Axes, rows: Sequence[Row], checkpoint: Kind) -> None:
    points = []
    colours = itertools.cycle(COLOURS[1:])
    for row in rows:
        summary, T = row.summary(STATES, checkpoint), fixed_temperature(row)
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
    middle, spread = with_intervals([summary for _, summary in points])
    panel.errorbar(T, middle, spread, color=COLOURS[0], marker="o", capsize=3, label="imbalance-aware, T")
    unbounded = np.array([math.isinf(summary.high) for _, summary in points])
    if unbounded.any():
        height, transform = np.full(unbounded.sum(), 0.97), panel.get_xaxis_transform()
        panel.plot(T[unbounded], height, "x", color=COLOURS[1], transform=transform, label="a seed diverged")


COURSES = {
    "rollout_states": "validation rollout error of the states",
    "growth_factor": "growth factor of a step",
    "effective_fraction": "effective share of the points",
    "gradient_noise": "share of noise in the squared gradient",
}
"""What is drawn of a training, by its key in the history."""

SHARES = ("effective_fraction", "gradient_noise")
"""Those of them that are shares, which some trainings do not log."""


def training_figure(results: GridResults) -> Figure:
    """The validations, and what the weights and the gradient did, against training steps: a line per seed, of more
    than a few the median with the band from the lower to the upper quartile."""
    outcomes = [outcome for _, rows in results.groups for row in rows for outcome in row.outcomes]
    names = [name for name in COURSES if name not in SHARES or any(name in o.history for o in outcomes)]
    figure = Figure(figsize=(6 * len(results.groups), 3.5 * len(names)), layout="constrained")
    panels = figure.subplots(len(names), len(results.groups), squeeze=False, sharex=True)
    for column, (title, rows) in enumerate(results.groups):
        for panel, name in zip(panels[:, column], names, strict=True):
            for colour, row in zip(itertools.cycle(COLOURS), rows, strict=False):
                _courses(panel, row, name, colour)
            panel.set_ylabel(COURSES[name])
            if name in SHARES:
                panel.set_ylim(0, 1.05)
        panels[0, column].set(title=title, yscale="log")
        panels[1, column].set_ylim(min(0.95, panels[1, column].dataLim.y0 - 0.02), 2.0)
        panels[1, column].axhline(1, color="0.5", lw=0.8)
        panels[-1, column].set_xlabel("training step")
    legend_below(figure, panels[0])
    return figure


def _courses(panel: Axes, row: Row, name: str, colour: str) -> None:
    """A quantity of the validations in the trainings of a row; infinite where a rollout diverged."""
    known = [outcome for outcome in row.outcomes if outcome.history]
    if len(known) <= FEW_SEEDS:
        for outcome in known:
            _line(panel, outcome.history["step"], _validations(outcome, name), color=colour, lw=1)
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
    _line(panel, steps, middle, color=colour, lw=1.5, label=row.name)


def _validations(outcome: Outcome, name: str) -> Sequence[float | None]:
    return outcome.history.get(name) or [None] * len(outcome.history["step"])
