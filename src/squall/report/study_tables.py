"""The tables of a study: Markdown for people, CSV with every number for programs."""

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch

from squall.losses import imbalance_weights
from squall.report.comparison import metrics
from squall.report.tables import number
from squall.runs.folder import Kind
from squall.study.results import (
    GridResults,
    Outcome,
    Place,
    Results,
    Row,
    Summary,
    compare_paired,
    corrected,
    least_median,
    published,
    summarize,
)
from squall.systems import CahnHilliard

__all__ = ["WEIGHED", "csv_table", "markdown_table", "regime_table", "status_table", "step_regimes"]

KINDS: tuple[Kind, ...] = ("last", "best")
STATES: Place = ("rollout", "states")
ENERGY: Place = ("rollout", "energy")
Column = tuple[Place, Kind, str | None]
"""Where a number is, of which weights, and by which other integrator they were rolled out."""
COLUMNS: dict[str, Column] = {
    "states": (STATES, "last", None),
    "energy": (ENERGY, "last", None),
    "one step: mean": (("one_step", "mean"), "last", None),
    "top 1 %": (("one_step", "top_1_percent"), "last", None),
    "growth": (("growth", "max"), "last", None),
    "states, best": (STATES, "best", None),
    "energy, best": (ENERGY, "best", None),
}
"""The numbers of the Markdown table: smaller is better."""

WEIGHED: Mapping[str, float] = {"MSE": math.inf, "T = 100": 100.0, "T = 0.1": 0.1}
"""Temperatures of the losses whose weights are shown by regime."""


def markdown_table(found: GridResults, baseline: str | None) -> str:
    """One table per label of the first axis, and per system: medians over seeds with their 95 % bootstrap intervals.

    "best" are the weights that rolled out best on the validation trajectories. p is of the paired test of the
    rollout's states against the baseline, corrected for all comparisons of the grid.
    """
    parts = [f"### {found.grid.about or found.grid.name}\n"]
    if not any(row.finished for row in found.rows):
        return "\n".join([*parts, "None of its trials is done.\n"])
    p_values = _tests(found, baseline)
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in found.rows:
        first = row.labels[0] if len(row.labels) > 1 else ""
        groups.setdefault((first, row.outcomes[0].trial.system), []).append(row)
    for (first, system), rows in groups.items():
        several = sum(other == first for other, _ in groups) > 1 or not first
        title = ", ".join(filter(None, [first, system if several else ""]))
        parts.append("\n".join([*_heading(title, _columns(found)), *_lines(rows, found, p_values), ""]))
    count = max((len(row.outcomes) for row in found.rows), default=0)
    parts.append(_footnote(count, len(p_values)))
    return "\n".join(parts)


def _columns(found: GridResults) -> dict[str, Column]:
    """Those of every table, and the states by the other integrators that this one shows."""
    others: dict[str, Column] = {}
    for name in found.others:
        others |= {f"states, {name}": (STATES, "last", name), f"states, best, {name}": (STATES, "best", name)}
    return COLUMNS | others


def _heading(title: str, columns: Mapping[str, Column]) -> list[str]:
    names = ["", "seeds", "diverged", *columns, "p", "published: states, energy"]
    return [f"**{title}**", "", "| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]


def _lines(rows: Sequence[Row], found: GridResults, p_values: Mapping[tuple[str, ...], float]) -> Iterator[str]:
    columns = _columns(found)
    summaries = {
        name: [summarize(list(row.values(*column).values())) for row in rows] for name, column in columns.items()
    }
    best = {name: least_median(column) for name, column in summaries.items()}
    for i, row in enumerate(rows):
        cells = [_interval(column[i], best[name]) for name, column in summaries.items()]
        p = p_values.get(row.labels)
        print_p = "" if p is None else f"{p:.2g}"
        others = [number(x) for x in published(found.grid, row) or ()]
        label = row.name
        seeds = f"{row.finished}" if row.finished == len(row.outcomes) else f"{row.finished} of {len(row.outcomes)}"
        yield "| " + " | ".join([label, seeds, str(row.diverged), *cells, print_p, ", ".join(others)]) + " |"
    for name, values in _free(rows).items():
        cells = [number(x) if (x := values.get(column)) is not None else "" for column in columns]
        yield "| " + " | ".join([f"*{name}*", "", "", *cells, "", ""]) + " |"


def _interval(summary: Summary | None, best: float) -> str:
    if summary is None:
        return ""
    median = _number(summary.median)
    median = f"**{median}**" if summary.median == best else median
    return median if summary.count == 1 else f"{median} [{_number(summary.low)}, {_number(summary.high)}]"


def _number(value: float) -> str:
    return "diverged" if value == float("inf") else number(value)


def _free(rows: Sequence[Row]) -> dict[str, dict[str, float]]:
    """What predictions that cost nothing reach, from the first evaluation that there is."""
    for outcome in itertools.chain.from_iterable(row.outcomes for row in rows):
        for item in outcome.evaluation.get("checkpoints", {}).values():
            free = dict(item["baselines"])
            return {"first state for ever": free.pop("persistence"), **free}
    return {}


def _tests(found: GridResults, baseline: str | None) -> dict[tuple[str, ...], float]:
    p_values = {}
    for row in found.rows:
        other = found.baseline_of(row, baseline)
        if other is not None and other is not row:
            p = compare_paired(row.values(STATES), other.values(STATES))
            if p is not None:
                p_values[row.labels] = p
    return corrected(p_values)


def _footnote(seeds: int, comparisons: int) -> str:
    text = (
        "Mean squared errors, medians over seeds [95 % bootstrap interval]; the least median in bold. One step: of the "
        "rate (u' − u)/dt."
    )
    if 1 < seeds < 6:
        text += (
            f" With {seeds} seeds the interval is from the least to the largest, which holds the median of all seeds "
            f"{100 * (1 - 2 * 0.5**seeds):.0f} % of the time only."
        )
    least = 0.5 ** (seeds - 1) if seeds else 1.0
    if comparisons and min(1.0, least * comparisons) > 0.05:
        text += (
            f" p: with {seeds} seeds and {comparisons} comparisons the test cannot say less than "
            f"{min(1.0, least * comparisons):.2g}, so nothing here is significant by it."
        )
    return text + "\n"


def csv_table(results: Results) -> str:
    """Every number of every trial: one line per grid, trial, integrator and kind of weights; diverged is `inf`."""
    places = metrics(["u"])
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["grid", "labels", "seed", "state", "weights", "step", "rolled out by", *places])
    for name, found in results.grids.items():
        for row in found.rows:
            for outcome in row.outcomes:
                for by, kind in itertools.product((None, *outcome.others), KINDS):
                    values = [outcome.value(place, kind, by) for place in places.values()]
                    step = _whole(outcome.value(("step",), kind))
                    head = [name, " / ".join(row.labels), outcome.trial.seed, outcome.state, kind, step, by or ""]
                    writer.writerow([*head, *("" if x is None else f"{x:.6g}" for x in values)])
    return text.getvalue()


def _whole(value: float | None) -> str:
    return "" if value is None or math.isinf(value) else str(int(value))


@dataclass(frozen=True)
class StepRegime:
    """One regime of a one-step error map: share of points, mean error, and the share of a loss's weight on it."""

    name: str
    share: float
    error: float
    weight: dict[str, float]


def step_regimes(outcome: Outcome, temperatures: Mapping[str, float]) -> list[StepRegime]:
    """Errors and weights by the system's regimes on the kept trajectories; empty where it has none."""
    fields = outcome.fields()
    if fields is None or "regime" not in fields or not (fields["regime"] >= 0).any():
        return []
    error, label = torch.from_numpy(fields["step_error"]), torch.from_numpy(fields["regime"])
    weights = {name: imbalance_weights(error, T) for name, T in temperatures.items()}
    return [
        StepRegime(
            name,
            (label == i).float().mean().item(),
            error[label == i].mean().item(),
            {loss: w[label == i].sum().item() for loss, w in weights.items()},
        )
        for i, name in enumerate(CahnHilliard.regime_names)
        if (label == i).any()
    ]


def regime_table(outcome: Outcome, temperatures: Mapping[str, float]) -> str:
    """The paper's claim in numbers: where the one-step errors are, and where a loss puts its weight."""
    regimes = step_regimes(outcome, temperatures)
    if not regimes:
        return ""
    names = ["regime", "share of points", "one-step error", *(f"weight, {name}" for name in temperatures)]
    lines = ["| " + " | ".join(names) + " |", "|" + " --- |" * len(names)]
    for regime in regimes:
        cells = [f"{100 * regime.share:.1f} %", number(regime.error)]
        cells += [f"{100 * weight:.1f} %" for weight in regime.weight.values()]
        lines.append("| " + " | ".join([regime.name, *cells]) + " |")
    return "\n".join(lines) + "\n"


def status_table(results: Results) -> str:
    """How far every grid is, in words."""
    lines = []
    for name, found in results.grids.items():
        states = [outcome.state for row in found.rows for outcome in row.outcomes]
        counts = {state: states.count(state) for state in ("done", "failed", "started", "missing") if state in states}
        lines.append(f"{name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)
