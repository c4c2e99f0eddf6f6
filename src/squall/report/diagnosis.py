"""A diagnosis as tables, text and one picture."""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from squall.data import Source
from squall.evaluation.diagnosis import RULE, Unevenness, advise
from squall.report.fields import PictureAxes
from squall.report.figures import COLOURS, mesh
from squall.report.tables import Cell, Line, Table, number
from squall.runs.diagnose import RunDiagnosis

REGIMES = ("in the quiet half of the change", "in the next 49 % of the change", "in the top 1 % of the change")

WEIGHTS = {
    "temperature": "temperature",
    "effective_fraction": "effective share of the points",
    "kl": "KL(weights ‖ uniform), nats",
    "max_weight": "largest weight",
    "top_share": "weight of the top 1 % of errors",
    "gradient_noise": "share of noise in the squared gradient",
}


def diagnosis_table(unevenness: Unevenness, title: str) -> Table:
    """The ladder of unevenness, a column per field; shares in percent."""
    ladder = unevenness.ladder
    names = next(iter(ladder.values()))
    lines = [Line(name, tuple(_share(shares[name], name) for shares in ladder.values())) for name in names]
    if unevenness.regimes:
        for i, regime in enumerate(REGIMES):
            lines.append(Line(regime, tuple(_share(unevenness.regimes[field][i]) for field in ladder)))
    return Table(title, tuple(ladder), tuple(lines))


def _share(value: float, name: str = "") -> Cell:
    if not math.isfinite(value):
        return Cell("too few")
    return Cell(number(value) if name == "Gini coefficient" else f"{100 * value:.3g} %")


def advice_text(unevenness: Unevenness, predicts: Literal["rate", "state"] | None = None) -> str:
    """Whether to weight, what to begin with, and how often the rule was right; as `advise` takes them."""
    advice = advise(unevenness, predicts)
    heads = {
        "no": "weighting is unlikely to help",
        "perhaps": "weighting may help",
        "try": "weighting is worth a trial",
    }
    lines = {"verdict": f"{heads[advice.verdict]}: {advice.reason}", "begin with": advice.options, "rule": RULE}
    if unevenness.constant:
        lines["constant"] = f"{', '.join(unevenness.constant)}: left out"
    return "\n".join(f"{name:<11} {line}" for name, line in lines.items())


def weights_table(weights: Mapping[str, tuple[float, float, float]]) -> Table:
    """What the weights did over a training."""
    lines = tuple(Line(WEIGHTS[name], tuple(Cell(number(x)) for x in values)) for name, values in weights.items())
    return Table("Weights of the loss over the training", ("first", "median", "last"), lines)


def worst_text(diagnosis: RunDiagnosis) -> str:
    """The places of the largest errors, in the coordinates of the data."""
    lines, source, part = [], diagnosis.source, diagnosis.part
    for worst in diagnosis.errors.worst:
        place = ", ".join(f"{x[i]:.4g}" for x, i in zip(source.coordinates, worst.point, strict=True))
        time = source.times[worst.step]
        lines.append(
            f"worst       {worst.field}, {part} trajectory {worst.trajectory}, t = {time:.4g}, x = ({place}): "
            f"squared error {number(worst.square)}"
        )
    return "\n".join(lines)


def diagnosis_figure(rows: Mapping[str, Unevenness], source: Source) -> Figure:
    """For each named unevenness the Lorenz curve, the course in time, and the mean at every place."""
    figure = Figure(figsize=(12, 3.4 * len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), 3, squeeze=False)
    unit = source.description.units.get("time")
    since = f"time since the first state [{unit}]" if unit else "time since the first state"
    for (name, unevenness), (lorenz, course, place) in zip(rows.items(), panels, strict=True):
        shown = [i for i, field in enumerate(unevenness.fields) if field not in unevenness.constant]
        for colour, i in zip(itertools.cycle(COLOURS), shown, strict=False):
            label = unevenness.fields[i]
            lorenz.plot(*unevenness.sketches[i].lorenz(), color=colour, label=label)
            times = source.dt * np.arange(unevenness.time.shape[1])
            course.plot(times, _relative(unevenness.time[i]), color=colour, label=label)
        lorenz.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="all points alike")
        lorenz.set(xlabel="share of the points, smallest first", ylabel=f"share of {name}", title="Lorenz curve")
        lorenz.legend(fontsize=8)
        course.set(xlabel=since, ylabel="relative to the mean", title=f"{name} over time")
        _places(figure, place, unevenness, shown, source, name)
    return figure


def _places(
    figure: Figure, panel: Axes, unevenness: Unevenness, shown: Sequence[int], source: Source, name: str
) -> None:
    """A line per field over one axis; over more a map of the mean over the fields that a place has, grey without."""
    about = source.description
    axes = PictureAxes(source.coordinates, about.axes, about.units)
    if len(source.space) == 1:
        for colour, i in zip(itertools.cycle(COLOURS), shown, strict=False):
            panel.plot(axes.points[0], _relative(unevenness.place[i]), color=colour)
        label = "space x" if axes.labels[0] == "x" else axes.labels[0]
        panel.set(xlabel=label, ylabel="relative to the mean", title=f"{name} by place")
        return
    mean = np.ma.masked_invalid([_relative(unevenness.place[i]) for i in shown]).mean(0)
    while mean.ndim > 2:
        mean = mean.mean(-1)
    over = ["fields"] * (len(shown) > 1) + list(about.axes[2:])
    image = mesh(panel, axes.points[0], axes.points[1], axes.turned(mean[None])[0], "")
    panel.set(xlabel=axes.labels[0], ylabel=axes.labels[1])
    panel.set_title(f"{name} by place" + (f",\nmean over {' and '.join(over)}" if over else ""))
    width, height = (float(np.ptp(points)) or 1.0 for points in axes.points)
    panel.set_aspect("equal" if 0.2 < height / width < 5 else "auto")
    label = "relative to the mean of each field" if len(shown) > 1 else "relative to the mean"
    figure.colorbar(image, ax=panel, label=label)


def _relative(values: Float[np.ndarray, "*shape"]) -> Float[np.ndarray, "*shape"]:
    mean = np.nanmean(values)
    return values / mean if mean > 0 else values
