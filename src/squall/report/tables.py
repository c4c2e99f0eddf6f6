"""One table for studies, comparisons and single runs, and its writers: Markdown and the terminal here, HTML in the
page's template. Text from data is written as text by all of them."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import rich.table
import torch
from rich.text import Text

from squall._process.messages import counted
from squall.losses import imbalance_weights
from squall.runs.folder import Kind
from squall.study.outcome import ABSENT, STATES, Metric, Outcome, Place, metrics, scores, value_at
from squall.study.results import GridResults, Results, Row, published
from squall.study.statistics import Ratio, Summary, compare_paired, corrected, least_median, paired_ratio
from squall.systems import CahnHilliard

KINDS: tuple[Kind, ...] = ("last", "best")
"""In the order of the tables: the last weights have seen no validation data."""

STATE_NAMES = {"failed": "failed: the training diverged", "started": "not finished", "missing": "missing"}
SIGNIFICANT = 0.05
"""p below which a comparison is set in bold: the convention."""

MEDIANS = (
    "Mean squared errors, medians over seeds [95 % bootstrap interval]; the smallest median in bold; a diverged run "
    "counts as infinite"
)

WEIGHED = {"MSE": math.inf, "T = 100": 100.0, "T = 0.1": 0.1}
"""Temperatures whose weights are shown by regime: the mean, and the two of the paper."""

SCORED = ("rollout", "scores")
"""Parts of an evaluation that predictions without a model have too."""

ENERGY: Place = ("rollout", "energy")
_SHOWN: dict[str, Place] = {
    "states": STATES,
    "energy": ENERGY,
    "one step: mean": ("one_step", "mean"),
    "top 1 %": ("one_step", "top_1_percent"),
    "growth": ("growth", "max"),
}


RATIOS = {
    "one step: mean": Metric(_SHOWN["one step: mean"]),
    "one step: top 1 %": Metric(_SHOWN["top 1 %"]),
    "rollout": Metric(STATES),
    "rollout, best": Metric(STATES, "best"),
}
"""What is set in relation to the baseline: one-step errors after equal steps, rollouts also with early stopping."""


@dataclass(frozen=True)
class Cell:
    """A cell: its text and a detail below it, the number it is sorted by, its values by seed; strong if the best."""

    text: str = ""
    detail: str = ""
    order: str = ""
    title: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table; a `reference` is a prediction without a model."""

    label: str
    cells: tuple[Cell, ...]
    reference: bool = False


@dataclass(frozen=True)
class Table:
    """A table: heads of its columns after that of the labels, and lines."""

    title: str
    heads: tuple[str, ...]
    lines: tuple[Line, ...]

    def transposed(self) -> "Table":
        """Columns as lines, without those that are empty."""
        columns = zip(self.heads, zip(*(line.cells for line in self.lines), strict=True), strict=True)
        lines = tuple(Line(head, cells) for head, cells in columns if any(cell.text for cell in cells))
        return dataclasses.replace(self, heads=tuple(line.label for line in self.lines), lines=lines)


def number(value: float) -> str:
    """Three digits."""
    rounded = float(f"{value:.3g}")
    return f"{rounded:g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{rounded:.2e}"


def in_words(value: float | None, place: Place = STATES) -> str:
    """A number to three digits; empty if it is missing (None); a word if it is NaN or infinite."""
    if value is None:
        return ""
    return number(value) if math.isfinite(value) else "not found" if place[0] == "growth" else "diverged"


def interval(summary: Summary, place: Place = STATES) -> str:
    """The interval of a median in brackets; nothing where it has no width."""
    if summary.low == summary.high:
        return ""
    return f"[{in_words(summary.low, place)}, {in_words(summary.high, place)}]"


# Tables of rows: labels by metrics, over seeds


def medians(rows: Sequence[Row], columns: Sequence[Metric]) -> list[tuple[Cell, ...]]:
    """For every row and metric the median over seeds with its interval; the smallest of several is strong."""
    summaries = [[row.summary(*metric) for row in rows] for metric in columns]
    best = [least_median(column) for column in summaries]
    return [
        tuple(
            _median(row, metric, column[i], smallest)
            for metric, column, smallest in zip(columns, summaries, best, strict=True)
        )
        for i, row in enumerate(rows)
    ]


def _median(row: Row, metric: Metric, summary: Summary | None, best: float) -> Cell:
    values = (
        (x.seed, STATE_NAMES.get(x.state) or in_words(x.value(*metric), metric.place) or "no number")
        for x in row.outcomes
    )
    title = "\n".join(f"seed {seed}: {value}" for seed, value in values)
    if summary is None:
        return Cell(title=title)
    text, detail = in_words(summary.median, metric.place), interval(summary, metric.place)
    return Cell(text, detail, f"{summary.median:.6g}", title, summary.median == best)


def references(rows: Iterable[Row], columns: Sequence[Metric], before: int = 0, after: int = 0) -> list[Line]:
    """The errors of predictions without a model, from the first evaluation there is, between empty cells."""
    evaluations = (
        o.checkpoint(checkpoint, x) for row in rows for o in row.outcomes for x in o.evaluations for checkpoint in KINDS
    )
    lines = []
    for name, errors in next((item for item in evaluations if item), {}).get("baselines", {}).items():
        numbers = [
            value_at(errors, place[1:], None) if place[0] in SCORED and tuple(rest) == columns[0][1:] else None
            for place, *rest in columns
        ]
        cells = [Cell() if x is None else Cell(number(x), order=f"{x:.6g}") for x in numbers]
        lines.append(Line(name, (*[Cell()] * before, *cells, *[Cell()] * after), reference=True))
    return lines


def grid_tables(results: GridResults, baseline: str | None, kinds: Sequence[Kind] = KINDS) -> tuple[list[Table], str]:
    """The tables of a grid, one per group of its rows, and the note below them.

    Args:
        results: the grid.
        baseline: the label of the rows that the others are tested against.
        kinds: which checkpoints. How many diverged and p are of the first.
    """
    columns: dict[str, Metric] = {}
    for checkpoint in kinds:  # all numbers of the first checkpoint, of a second one the rollout
        mark, places = (
            ("", _SHOWN) if checkpoint == kinds[0] else (f", {checkpoint}", {"states": STATES, "energy": ENERGY})
        )
        columns |= {f"{name}{mark}": Metric(place, checkpoint) for name, place in places.items()}
    for suffix, integrator in results.others.items():
        columns |= {
            f"states{'' if k == kinds[0] else f', {k}'}, {integrator}": Metric(STATES, k, suffix) for k in kinds
        }
    tests, note = _tests(results, baseline, kinds[0])
    theirs = ("published: states, energy",) if results.grid.published else ()
    tables = []
    for title, rows in results.groups:
        lines = []
        for row, cells in zip(rows, medians(rows, [*columns.values()]), strict=True):
            values = published(results.grid, row)
            last = Cell(", ".join(map(number, values)), order=f"{values[0]:.6g}") if values else Cell()
            whole = (_seeds(row), _diverged(row, kinds[0]), *cells, tests.get(row.labels, Cell()))
            lines.append(Line(row.name, (*whole, *[last] * len(theirs))))
        lines += references(rows, [*columns.values()], before=2, after=1 + len(theirs))
        tables.append(Table(title, ("seeds", "diverged", *columns, "p", *theirs), tuple(lines)))
    return tables, f"{_note(results)} {note}"


def ratio_tables(results: GridResults, baseline: str | None) -> tuple[list[Table], str]:
    """Ratios to the baseline, paired by seed: one table per group of rows, and the note below them."""
    tables = []
    for title, rows in results.groups:
        lines = []
        for row in rows:
            other = results.baseline_of(row, baseline)
            if other is None or other is row:
                continue
            ratios = [paired_ratio(row.values(*metric), other.values(*metric)) for metric in RATIOS.values()]
            lines.append(Line(row.name, (_seeds(row), *map(ratio_cell, ratios))))
        tables.append(Table(title, ("seeds", *RATIOS), tuple(lines)))
    note = (
        f"Ratios of squared errors to “{baseline}”, paired by seed, of the last weights; best: those with the best "
        "validation rollouts. Geometric mean [95 % interval by Student's t on the logarithms]; bold where the interval "
        "is on one side of 1. No correction for the number of comparisons."
    )
    return tables, note


def ratio_cell(ratio: Ratio | None) -> Cell:
    """A ratio with its interval, strong where that is on one side of 1."""
    if ratio is None:
        return Cell()
    if math.isinf(ratio.mean):
        return Cell("diverged", order="inf")
    strong = ratio.count > 1 and not ratio.low <= 1 <= ratio.high
    detail = f"[{number(ratio.low)}, {number(ratio.high)}]" if ratio.count > 1 else ""
    return Cell(number(ratio.mean), detail, f"{ratio.mean:.6g}", f"{ratio.count} pairs of seeds", strong)


def _seeds(row: Row) -> Cell:
    text = f"{row.finished}" if row.finished == len(row.outcomes) else f"{row.finished} of {len(row.outcomes)}"
    title = "\n".join(
        f"seed {outcome.seed}: {STATE_NAMES.get(outcome.state, outcome.state)}" for outcome in row.outcomes
    )
    return Cell(text, order=f"{row.finished}", title=title)


def _diverged(row: Row, checkpoint: Kind) -> Cell:
    values = row.values(STATES, checkpoint)
    gone = [outcome for outcome in row.outcomes if math.isinf(values.get(outcome.seed, 0.0))]
    words = [f"seed {o.seed}: the {'training' if o.state == 'failed' else 'rollout'} diverged" for o in gone]
    return Cell(f"{len(gone)}", order=f"{len(gone)}", title="\n".join(words or ["none diverged"]))


def _tests(results: GridResults, baseline: str | None, checkpoint: Kind) -> tuple[dict[tuple[str, ...], Cell], str]:
    """p of the states against the baseline by labels, corrected for all comparisons of the grid, and what it is."""
    raw, sizes = {}, {}
    pairs = [(row, results.baseline_of(row, baseline)) for row in results.rows]
    pairs = [(row, other) for row, other in pairs if other is not None and other is not row]
    if not pairs:
        return {}, "No p: the study names no baseline for these rows."
    for row, other in pairs:
        ours, theirs = row.values(STATES, checkpoint), other.values(STATES, checkpoint)
        p = compare_paired(ours, theirs)
        if p is not None:
            raw[row.labels], sizes[row.labels] = p, len(ours.keys() & theirs.keys())
    if not raw:
        return {}, "No p: no seed has finished both here and for the baseline."
    cells = {}
    for labels, p in corrected(raw).items():
        title = f"{sizes[labels]} pairs of seeds; {raw[labels]:.2g} before the correction"
        cells[labels] = Cell(f"{p:.2g}", order=f"{p:.6g}", title=title, strong=p < SIGNIFICANT)
    most, count = max(sizes.values()), len(raw)
    note = (
        f"p: states against “{baseline}”, Wilcoxon's signed-rank test on pairs of seeds, Holm-corrected for "
        f"{counted(count, 'comparison')}."
    )
    least = min(1.0, count * 0.5 ** (most - 1))  # all differences of one sign: two of the 2^n patterns are as extreme
    if least > SIGNIFICANT:
        needed = math.ceil(1 + math.log2(count / SIGNIFICANT))
        note += (
            f" With {counted(most, 'seed')} it cannot be below {least:.2g}, so nothing here can be "
            f"significant by it; that takes {needed} seeds."
        )
    return cells, note


def _note(results: GridResults) -> str:
    text = (
        f"{MEDIANS}. One step: of the rate (u' − u)/dt. best: the checkpoint with the smallest rollout error on the "
        "validation trajectories."
    )
    seeds = max((len(row.outcomes) for row in results.rows), default=0)
    if 1 < seeds < 6:
        share = f"{100 * (1 - 2 * 0.5**seeds):.0f} %"
        text += f" With {seeds} seeds the interval is the range, which holds the true median {share} of the time only."
    return text


# Other tables


def regime_table(outcome: Outcome | None) -> Table | None:
    """Where the errors of one step are and where a loss puts its weight, by the system's regimes, on the trajectories
    that were kept; None where it has none."""
    fields = outcome.regime_fields() if outcome else None
    if fields is None:
        return None
    error, label = torch.from_numpy(fields["step_error"]), torch.from_numpy(fields["regime"])
    weights = [imbalance_weights(error, T) for T in WEIGHED.values()]
    lines = []
    for i, name in enumerate(CahnHilliard.regime_names):
        if (here := label == i).any():
            shares = [here.float().mean().item(), *(w[here].sum().item() for w in weights)]
            first, *others = [Cell(f"{100 * share:.1f} %") for share in shares]
            lines.append(Line(name, (first, Cell(number(error[here].mean().item())), *others)))
    return Table("", ("share of points", "one-step error", *(f"weight, {name}" for name in WEIGHED)), tuple(lines))


def evaluation_table(evaluation: Mapping[str, Any]) -> rich.table.Table:
    """The contents of `evaluation.json`: one column per checkpoint, then persistence and climatology."""
    items = {f"{checkpoint} (step {item['step']})": item for checkpoint, item in evaluation["checkpoints"].items()}
    first = next(iter(items.values()))
    places = metrics(evaluation["fields"]) | scores(evaluation["fields"], first.get("scores", {}))
    cells = {name: [value_at(item, place) for place in places.values()] for name, item in items.items()}
    cells |= {
        name: [value_at(x, place[1:]) if place[0] in SCORED else ABSENT for place in places.values()]
        for name, x in first["baselines"].items()
    }
    missing, spectra = (first.get("scores", {}).get(key) for key in ("no_spectrum", "spectrum_of"))
    lines = tuple(Line(name, tuple(map(_value, values, places.values()))) for name, values in cells.items())
    return terminal(
        Table(
            f"{first['rollout']['trajectories']} test trajectories, {evaluation['steps']} steps by "
            f"{evaluation['integrator']} to t = {evaluation['dt'] * evaluation['steps']:g}",
            tuple(places),
            lines,
        ).transposed(),
        f"mean squared errors; {one_step_unit(evaluation['standardized'])}; smaller is better unless noted"
        + (f". No spectra: {missing}" if missing else f". Spectra: {spectra}" if spectra else ""),
    )


def _value(value: Any, place: Place) -> Cell:
    return Cell() if value is ABSENT else Cell(in_words(math.inf if value is None else value, place))


def one_step_unit(standardized: bool) -> str:
    unit = ", each field in units of its standard deviation" if standardized else ""
    return f"one step: of the rate (u' − u)/dt{unit}"


def state_counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    states = [outcome.state for outcome in outcomes]
    return {state: states.count(state) for state in ("done", "failed", "started", "missing") if state in states}


def status_table(results: Results) -> str:
    """The progress of every grid."""
    lines = []
    for name, grid in results.grids.items():
        counts = state_counts([outcome for row in grid.rows for outcome in row.outcomes])
        lines.append(f"{name}: " + ", ".join(f"{count} {state}" for state, count in counts.items()))
    return "\n".join(lines)


# Writers


def markdown(table: Table) -> str:
    """A table in Markdown."""
    lines = [["", *map(_escaped, table.heads)], ["---"] * (1 + len(table.heads))]
    for line in table.lines:
        label = _escaped(line.label)
        cells = ((f"**{_escaped(x.text)}**" if x.strong else _escaped(x.text), _escaped(x.detail)) for x in line.cells)
        lines.append([f"*{label}*" if line.reference else label, *(" ".join(cell).strip() for cell in cells)])
    title = [f"**{_escaped(table.title)}**", ""] if table.title else []
    return "\n".join([*title, *("| " + " | ".join(line) + " |" for line in lines), ""])


def _escaped(text: str) -> str:
    """Text without a meaning in Markdown or HTML."""
    text = re.sub(r"([\\|`*_])", r"\\\1", " ".join(text.split()))
    return re.sub(r"\](?=[(\[:])", r"\\]", text.replace("&", "&amp;").replace("<", "&lt;"))


def terminal(table: Table, caption: str = "") -> rich.table.Table:
    """A table for the terminal."""
    shown = rich.table.Table(title=Text(table.title), caption=Text(caption))
    shown.add_column("", no_wrap=True)
    for head in table.heads:
        shown.add_column(Text(head), justify="right", overflow="fold")
    for line in table.lines:
        cells = [
            Text(cell.text, "bold" if cell.strong else "") + Text(f" {cell.detail}".rstrip()) for cell in line.cells
        ]
        shown.add_row(Text(line.label), *cells)
    return shown
