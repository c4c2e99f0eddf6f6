"""The tables of a study's page: cells that can be sorted, pointed at and switched between kinds of weights."""

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from squall.report.tables import number
from squall.runs.folder import Kind
from squall.study.results import (
    GridResults,
    Outcome,
    Place,
    Row,
    Summary,
    compare_paired,
    corrected,
    least_median,
    published,
    summarize,
)

__all__ = [
    "IN_WORDS",
    "KINDS",
    "STATES",
    "Cell",
    "Line",
    "columns_of",
    "in_figures",
    "interval",
    "note_on_p",
    "tables_of",
]

KINDS: tuple[Kind, ...] = ("last", "best")
STATES: Place = ("rollout", "states")
COLUMNS: dict[str, Place] = {
    "rollout: states": STATES,
    "rollout: energy": ("rollout", "energy"),
    "one step: mean": ("one_step", "mean"),
    "one step: top 1 %": ("one_step", "top_1_percent"),
    "growth factor: max": ("growth", "max"),
}
"""The numbers of a table: smaller is better."""

IN_WORDS = {"failed": "failed: the training diverged", "started": "not finished", "missing": "missing"}
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what it shows, and `interval` in small below it.
        order: what it is sorted by; empty sorts last.
        title: what it says when it is pointed at: the values by seed.
        strong: whether it is the best of its column.
    """

    text: str
    interval: str = ""
    order: str = ""
    title: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Line:
    """A row of a table: its label, then `cells` by column and kind of weights; `free` where nothing was trained."""

    label: str
    seeds: Cell
    cells: Mapping[str, Mapping[Kind, Cell]]
    published: Cell
    free: bool = False


def columns_of(found: GridResults) -> dict[str, tuple[Place, str | None]]:
    """The columns of a grid's table: where the number is, and by which other integrator it was rolled out."""
    own: dict[str, tuple[Place, str | None]] = {name: (place, None) for name, place in COLUMNS.items()}
    return own | {f"rollout by {name}: states": (STATES, name) for name in found.others}


def tables_of(found: GridResults, baseline: str | None) -> list[tuple[str, list[Line]]]:
    """The lines of a grid's table by their first label."""
    tests = {kind: _tests(found, baseline, kind) for kind in KINDS}
    columns = columns_of(found)
    groups = []
    for title, rows in found.groups:
        least = {(name, kind): _least(rows, *column, kind) for name, column in columns.items() for kind in KINDS}
        lines = []
        for row in rows:
            cells: dict[str, dict[Kind, Cell]] = {"diverged": {kind: _diverged_cell(row, kind) for kind in KINDS}}
            for name, column in columns.items():
                cells[name] = {kind: _number_cell(row, *column, kind, least[name, kind]) for kind in KINDS}
            cells["p"] = {kind: tests[kind].get(row.labels, Cell("")) for kind in KINDS}
            lines.append(Line(row.name, _seeds_cell(row), cells, _published_cell(published(found.grid, row))))
        groups.append((title, lines + _free(rows, columns)))
    return groups


def _least(rows: Sequence[Row], place: Place, by: str | None, kind: Kind) -> float:
    """The least median of a column."""
    return least_median(summarize(list(row.values(place, kind, by).values())) for row in rows)


def _number_cell(row: Row, place: Place, by: str | None, kind: Kind, least: float) -> Cell:
    summary = summarize(list(row.values(place, kind, by).values()))
    title = "\n".join(f"seed {o.trial.seed}: {_value_in_words(o, place, by, kind)}" for o in row.outcomes)
    if summary is None:
        done = any(outcome.state == "done" for outcome in row.outcomes)
        return Cell("not found" if done else "–", title=title)
    median = in_figures(summary.median)
    return Cell(median, interval(summary), f"{summary.median:.6g}", title, summary.median == least)


def _value_in_words(outcome: Outcome, place: Place, by: str | None, kind: Kind) -> str:
    if outcome.state != "done":
        return IN_WORDS[outcome.state]
    value = outcome.value(place, kind, by)
    return "not found" if value is None else in_figures(value)


def interval(summary: Summary) -> str:
    """The interval in brackets; nothing for one number."""
    return f"[{in_figures(summary.low)}, {in_figures(summary.high)}]" if summary.count > 1 else ""


def in_figures(value: float) -> str:
    return number(value) if math.isfinite(value) else "diverged"


def _seeds_cell(row: Row) -> Cell:
    title = "\n".join(f"seed {o.trial.seed}: {IN_WORDS.get(o.state, o.state)}" for o in row.outcomes)
    return Cell(f"{row.finished} of {len(row.outcomes)}", order=str(row.finished), title=title)


def _diverged_cell(row: Row, kind: Kind) -> Cell:
    values = row.values(STATES, kind)
    gone = [outcome for outcome in row.outcomes if math.isinf(values.get(outcome.trial.seed, 0.0))]
    words = [f"seed {o.trial.seed}: the {'training' if o.state == 'failed' else 'rollout'} diverged" for o in gone]
    title = "\n".join(words or ["none diverged"])
    return Cell(str(len(gone)) if values else "–", order=str(len(gone)) if values else "", title=title)


def _published_cell(theirs: tuple[float, float] | None) -> Cell:
    if theirs is None:
        return Cell("")
    states, energy = map(number, theirs)
    return Cell(states, energy, f"{theirs[0]:.6g}", f"published: states {states}, energy {energy}")


def _free(rows: Sequence[Row], columns: Iterable[str]) -> list[Line]:
    """What predictions that cost nothing reach, from the first evaluation that there is."""
    found = (o.evaluation["checkpoints"] for row in rows for o in row.outcomes if o.evaluation.get("checkpoints"))
    baselines = next(itertools.chain.from_iterable(map(dict.values, found)), {}).get("baselines", {})
    lines = []
    for name, values in baselines.items():
        known = {f"rollout: {key}": x for key, x in values.items() if x is not None}
        texts = {column: Cell(number(x), order=f"{x:.6g}", title="costs nothing") for column, x in known.items()}
        cells = {column: dict.fromkeys(KINDS, texts.get(column, Cell(""))) for column in ("diverged", *columns, "p")}
        label = "first state for ever" if name == "persistence" else name
        lines.append(Line(label, Cell(""), cells, Cell(""), free=True))
    return lines


def _pairs(found: GridResults, baseline: str | None) -> Iterator[tuple[Row, Row]]:
    """The rows that are tested, each with its baseline."""
    for row in found.rows:
        other = found.baseline_of(row, baseline)
        if other is not None and other is not row:
            yield row, other


def _tests(found: GridResults, baseline: str | None, kind: Kind) -> dict[tuple[str, ...], Cell]:
    """p of the rollout's states against the baseline, by labels, corrected for all comparisons of the grid."""
    raw, counts = {}, {}
    for row, other in _pairs(found, baseline):
        ours, theirs = row.values(STATES, kind), other.values(STATES, kind)
        counts[row.labels] = len(ours.keys() & theirs.keys())
        raw[row.labels] = compare_paired(ours, theirs)
    p_values = corrected({labels: p for labels, p in raw.items() if p is not None})
    cells = {labels: Cell("–", title="no seed finished in both") for labels in raw}
    for labels, p in p_values.items():
        title = f"{counts[labels]} pairs of seeds; {raw[labels]:.2g} before the correction"
        cells[labels] = Cell(f"{p:.2g}", order=f"{p:.6g}", title=title, strong=p < SIGNIFICANT)
    return cells


def note_on_p(found: GridResults, baseline: str | None, kind: Kind) -> str:
    """What p is, and how small the number of seeds lets it be."""
    pairs = list(_pairs(found, baseline))
    if not pairs:
        return "No p: the study names no baseline for these rows."
    sizes = [len(a.values(STATES, kind).keys() & b.values(STATES, kind).keys()) for a, b in pairs]
    sizes = [size for size in sizes if size]
    if not sizes:
        return "No p: no seed has finished both here and for the baseline."
    # All n differences of one sign: two of the 2^n patterns are as extreme.
    least = min(1.0, len(sizes) * 0.5 ** (max(sizes) - 1))
    text = (
        f"p: of the rollout's states against “{baseline}”, Wilcoxon's signed-rank test on pairs of seeds, "
        f"Holm-corrected for {len(sizes)} comparison{'s' if len(sizes) > 1 else ''}."
    )
    if least <= SIGNIFICANT:
        return text
    needed = math.ceil(1 + math.log2(len(sizes) / SIGNIFICANT))
    return (
        f"{text} With {max(sizes)} seed{'s' if max(sizes) > 1 else ''} it cannot be below {least:.2g}, so nothing here "
        f"can be significant by it; that takes {needed} seeds."
    )
