"""Figures of a run and of a comparison, drawn from what `evaluate` left in the run folders.

Built on Matplotlib's objects, not on pyplot: nothing global is changed.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from squall._process.names import file_name
from squall.report.comparison import Comparison, Group, Spread
from squall.runs.folder import RunFolder, write_beside

__all__ = ["comparison_figure", "energy_figure", "error_figure", "field_figure", "write_figures"]

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, which the colour-blind can tell apart."""

FRAMES = 4
"""At how many times a field over two space axes is shown."""


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
    for i in range(len(rollouts["truth"])):
        for channel, name in enumerate(found["fields"]):
            label = name if len(found["fields"]) > 1 else ""
            key = "_".join(filter(None, ["rollout", label, str(i)]))
            figures[key] = field_figure(rollouts, i, channel, f"{name}, test trajectory {i}")
    target = folder.path / "figures"
    target.mkdir(exist_ok=True)
    return [save(figure, target / f"{file_name(name + suffix)}.png") for name, figure in figures.items()]


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure beside and rename it into place, in the format of its suffix: png, pdf, svg."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # the same figure is the same file
    with write_beside(path) as part:
        figure.savefig(part, format=kind, dpi=130, metadata=undated.get(kind))
    return path


def field_figure(rollouts: dict[str, np.ndarray], trajectory: int, channel: int, title: str) -> Figure:
    """Truth, prediction and error of one field: over x and t, or over x and y at a few times."""
    truth = rollouts["truth"][trajectory, :, channel]
    prediction = rollouts["prediction"][trajectory, :, channel]
    axes = [rollouts[f"axis_{i}"] for i in range(truth.ndim - 1)]
    if len(axes) == 1:
        return _space_time(rollouts["time"], axes[0], truth, prediction, title)
    while truth.ndim > 3:  # the middle slice of a field over three space axes
        middle = truth.shape[-1] // 2
        truth, prediction = truth[..., middle], prediction[..., middle]
    return _frames(rollouts["time"], axes[:2], truth, prediction, title)


def _space_time(time: np.ndarray, x: np.ndarray, truth: np.ndarray, prediction: np.ndarray, title: str) -> Figure:
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3, sharex=True, sharey=True)
    images = [
        _image(panel, (time, x), values.T, limit, f"{title}: {name}" if name == "truth" else name)
        for panel, (name, values, limit) in zip(panels, _three(truth, prediction), strict=True)
    ]
    for panel in panels:
        panel.set_xlabel("time t")
    panels[0].set_ylabel("space x")
    figure.colorbar(images[0], ax=panels[:2], shrink=0.9)
    figure.colorbar(images[2], ax=panels[2], shrink=0.9)
    return figure


def _frames(time: np.ndarray, axes: list[np.ndarray], truth: np.ndarray, prediction: np.ndarray, title: str) -> Figure:
    chosen = np.unique(np.linspace(0, len(time) - 1, FRAMES).round().astype(int))
    figure = Figure(figsize=(3 * len(chosen), 8), layout="constrained")
    panels = figure.subplots(3, len(chosen), sharex=True, sharey=True, squeeze=False)
    for row, (name, values, limit) in zip(panels, _three(truth, prediction), strict=True):
        images = [
            _image(panel, (axes[0], axes[1]), values[frame].T, limit, f"{name}, t = {time[frame]:g}")
            for panel, frame in zip(row, chosen, strict=True)
        ]
        for panel in row:
            panel.set_aspect("equal")
        figure.colorbar(images[0], ax=row, shrink=0.8)
    figure.suptitle(title)
    return figure


def _three(truth: np.ndarray, prediction: np.ndarray) -> list[tuple[str, np.ndarray, float]]:
    """Truth and prediction on one colour scale, the error on its own; what is not finite stays blank."""
    error = np.where(np.isfinite(prediction), prediction - truth, np.nan)
    limit = float(np.abs(truth).max()) or 1.0
    error_limit = float(np.nanmax(np.abs(error))) if np.isfinite(error).any() else 1.0
    error_limit = min(error_limit or 1.0, 2 * limit)
    return [("truth", truth, limit), ("prediction", prediction, limit), ("error", error, error_limit)]


def _image(panel: Axes, axes: tuple[np.ndarray, np.ndarray], values: np.ndarray, limit: float, title: str) -> Any:
    panel.set_title(title, fontsize=10)
    panel.set_facecolor("0.75")
    values = np.ma.masked_invalid(values)
    return panel.pcolormesh(*axes, values, vmin=-limit, vmax=limit, cmap="RdBu_r", shading="nearest", rasterized=True)


def error_figure(found: dict[str, Any]) -> Figure:
    """Mean squared error of the states over rollout time, of each checkpoint, with the baselines as lines."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    panel = figure.subplots()
    for colour, (kind, item) in zip(COLOURS, found["checkpoints"].items(), strict=False):
        curve = _curve(item["curves"]["states"])
        panel.semilogy(item["curves"]["time"], curve, color=colour, label=f"{kind} (step {item['step']})")
    _baseline_lines(panel, next(iter(found["checkpoints"].values()))["baselines"])
    panel.set(xlabel="rollout time t", ylabel="mean squared error of the states")
    panel.legend(fontsize=8)
    return figure


def _curve(values: Sequence[float | None]) -> np.ndarray:
    return np.array([np.nan if x is None else x for x in values])


def _baseline_lines(panel: Axes, baselines: dict[str, Any]) -> None:
    for style, (name, values) in zip(("--", ":"), baselines.items(), strict=False):
        panel.axhline(values["states"], color="0.5", linestyle=style, linewidth=1, label=f"{name} (mean over time)")


def energy_figure(found: dict[str, Any]) -> Figure | None:
    """Energy of truth and prediction over rollout time; None for data without a system."""
    checkpoints = {kind: item for kind, item in found["checkpoints"].items() if "energy_truth" in item["curves"]}
    if not checkpoints:
        return None
    first = next(iter(checkpoints.values()))
    truths = first["curves"]["energy_truth"]
    figure = Figure(figsize=(5.5 * len(truths), 3.8), layout="constrained")
    panels = figure.subplots(1, len(truths), squeeze=False)[0]
    for i, (panel, truth) in enumerate(zip(panels, truths, strict=True)):
        time = first["curves"]["time"]
        panel.plot(time, truth, color="black", label="truth")
        for colour, (kind, item) in zip(COLOURS, checkpoints.items(), strict=False):
            panel.plot(time, _curve(item["curves"]["energy_prediction"][i]), color=colour, linestyle="--", label=kind)
        panel.set(xlabel="rollout time t", ylabel="energy H", title=f"test trajectory {i}")
    panels[0].legend(fontsize=8)
    return figure


def comparison_figure(comparison: Comparison) -> Figure:
    """Error growth of every group, median and range over seeds, and its one-step error by regime."""
    figure = Figure(figsize=(12, 4.2), layout="constrained")
    growth, regimes = figure.subplots(1, 2)
    for colour, group in zip(COLOURS, comparison.groups, strict=False):
        _growth_band(growth, group, colour)
    _baseline_lines(growth, comparison.baselines)
    growth.set(xlabel="rollout time t", ylabel="mean squared error of the states", title="rollout", yscale="log")
    growth.legend(fontsize=8)
    _regime_ranges(regimes, comparison.groups)
    figure.suptitle(f"{comparison.checkpoint} weights, median and range over seeds", fontsize=10)
    return figure


def _growth_band(panel: Axes, group: Group, colour: str) -> None:
    curves = np.array([_curve(values) for values in group.curves("states")])
    curves = np.where(np.isnan(curves), np.inf, curves)
    time = group.evaluations[0]["curves"]["time"]
    middle = np.median(curves, axis=0)
    panel.plot(time, np.where(np.isinf(middle), np.nan, middle), color=colour, label=group.label)
    top = np.where(np.isinf(curves.max(axis=0)), np.nanmax(curves[np.isfinite(curves)], initial=1), curves.max(axis=0))
    panel.fill_between(time, curves.min(axis=0), top, color=colour, alpha=0.2, linewidth=0)


def _regime_ranges(panel: Axes, groups: Sequence[Group]) -> None:
    """Median and range over the seeds of the one-step error, by regime."""
    names = ("quiet", "active", "extreme")
    for i, (colour, group) in enumerate(zip(COLOURS, groups, strict=False)):
        spreads = [group.spread(f"one step: {name}") or Spread(()) for name in names]
        middle = _curve([spread.median for spread in spreads])
        low, high = _curve([spread.range[0] for spread in spreads]), _curve([spread.range[1] for spread in spreads])
        places = np.arange(len(names)) + (i - (len(groups) - 1) / 2) * 0.15
        panel.errorbar(
            places, middle, [middle - low, high - middle], fmt="o", color=colour, capsize=4, label=group.label
        )
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    panel.set(
        yscale="log",
        xlabel="regime of the truth: lower half of |du/dt|, the rest, top 1 %",
        ylabel="squared error of the rate",
        title="one step",
    )
    panel.legend(fontsize=8)
