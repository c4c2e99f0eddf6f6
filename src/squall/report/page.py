"""A study's results as one interactive HTML page, which needs neither a network nor a server.

Here the numbers become plain data; `page.html.j2` lays them out, and its script draws them with plotly.js.
"""

import base64
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import numpy as np
from plotly.offline import get_plotlyjs

from squall.report.comparison import Place
from squall.report.figures import COLOURS
from squall.report.results import (
    GridResults,
    Outcome,
    Results,
    Row,
    Summary,
    compare_paired,
    corrected,
    published,
    summarize,
)
from squall.report.study_figures import REGIME_COLOURS, REGIME_NAMES
from squall.report.study_tables import WEIGHED, StepRegime, step_regimes
from squall.report.tables import number
from squall.run_folder import Kind, write_beside

__all__ = ["write_page"]

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

REGIMES = ("quiet", "active", "extreme")
STATE_NAMES = ("done", "failed", "started", "missing")
IN_WORDS = {"failed": "failed: the training diverged", "started": "not finished", "missing": "missing"}
SIGNIFICANT = 0.05

DECADES = 5
"""How far below its largest value a one-step error is shown."""

FIELD_BYTES = 2_500_000
"""How much all fields of a page may take before base64, which adds a third."""
MOST_CELLS, LEAST_CELLS = 8000, 2000
"""Between how many cells a map of one trajectory has; where that is too much, only the first seeds are shown."""
CLIPPED = 4.0
"""Errors are kept up to this many times the largest truth, so that a blow-up does not hide what came before it."""
GAP = -128
"""What stands for a number that is not finite in a map of signed bytes."""


def write_page(results: Results, path: Path) -> Path:
    """Write what a study found, however far it is, into one HTML file.

    Args:
        results: as `read_results` has them.
        path: the file.

    Returns:
        the file.
    """
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("squall.report", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    text = environment.get_template("page.html.j2").render(_context(results), plotly=get_plotlyjs())
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _context(results: Results) -> dict[str, Any]:
    """What the template is given: texts and tables for the page, and `data` for its script."""
    outcomes = _outcomes(results.grids.values())
    return {
        "study": results.study,
        "counts": _counts(outcomes),
        "total": len(outcomes),
        "grids": [_grid(name, found, results.study.baseline) for name, found in results.grids.items()],
        "trials": [_provenance(outcome) for outcome in outcomes],
        "kinds": KINDS,
        "columns": list(COLUMNS),
        "weighed": list(WEIGHED),
        "number": number,
        "data": _script_json(_drawn(results)),
    }


def _script_json(values: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    return json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _outcomes(grids: Iterable[GridResults]) -> list[Outcome]:
    """Every trial of some grids once."""
    found = (outcome for grid in grids for row in grid.rows for outcome in row.outcomes)
    return list({outcome.folder.path: outcome for outcome in found}.values())


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    states = [outcome.state for outcome in outcomes]
    return {state: states.count(state) for state in STATE_NAMES if state in states}


def _groups(found: GridResults) -> list[tuple[str, list[Row]]]:
    """The rows by their first label; where that is their only one they are one group without a name."""
    grouped = itertools.groupby(found.rows, key=lambda row: row.labels[0] if len(row.labels) > 1 else "")
    return [(title, list(rows)) for title, rows in grouped]


def _name(row: Row) -> str:
    return ", ".join(row.labels[1:] or row.labels)


# Tables


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


def _grid(name: str, found: GridResults, baseline: str | None) -> dict[str, Any]:
    """One section of the page."""
    outcomes = _outcomes([found])
    has_table = "table" in found.grid.show
    return {
        "name": name,
        "about": found.grid.about,
        "show": found.grid.show,
        "counts": _counts(outcomes),
        "total": len(outcomes),
        "tables": _tables(found, baseline) if has_table else [],
        "step_regimes": _step_regimes(found) if "one-step" in found.grid.show else [],
        "has_published": bool(found.grid.published),
        "notes": {kind: _test_note(found, baseline, kind) for kind in KINDS} if has_table else {},
    }


def _tables(found: GridResults, baseline: str | None) -> list[tuple[str, list[Line]]]:
    """The lines of a grid's table by their first label."""
    tests = {kind: _tests(found, baseline, kind) for kind in KINDS}
    theirs = published(found.grid)
    groups = []
    for title, rows in _groups(found):
        least = {(name, kind): _least(rows, place, kind) for name, place in COLUMNS.items() for kind in KINDS}
        lines = []
        for row in rows:
            cells: dict[str, dict[Kind, Cell]] = {"diverged": {kind: _diverged_cell(row, kind) for kind in KINDS}}
            for name, place in COLUMNS.items():
                cells[name] = {kind: _number_cell(row, place, kind, least[name, kind]) for kind in KINDS}
            cells["p"] = {kind: tests[kind].get(row.labels, Cell("")) for kind in KINDS}
            known = _published_cell(theirs(row, "states"), theirs(row, "energy"))
            lines.append(Line(_name(row), _seeds_cell(row), cells, known))
        groups.append((title, lines + _free(rows)))
    return groups


def _least(rows: Sequence[Row], place: Place, kind: Kind) -> float:
    """The least finite median of a column."""
    summaries = [summarize(list(row.values(place, kind).values())) for row in rows]
    return min((s.median for s in summaries if s and math.isfinite(s.median)), default=math.nan)


def _number_cell(row: Row, place: Place, kind: Kind, least: float) -> Cell:
    summary = summarize(list(row.values(place, kind).values()))
    title = "\n".join(f"seed {o.trial.seed}: {_value_in_words(o, place, kind)}" for o in row.outcomes)
    if summary is None:
        done = any(outcome.state == "done" for outcome in row.outcomes)
        return Cell("not found" if done else "–", title=title)
    median = _number(summary.median)
    return Cell(median, _interval(summary), f"{summary.median:.6g}", title, summary.median == least)


def _value_in_words(outcome: Outcome, place: Place, kind: Kind) -> str:
    if outcome.state != "done":
        return IN_WORDS[outcome.state]
    value = outcome.value(place, kind)
    return "not found" if value is None else _number(value)


def _interval(summary: Summary) -> str:
    """The interval in brackets; nothing for one number."""
    return f"[{_number(summary.low)}, {_number(summary.high)}]" if summary.count > 1 else ""


def _number(value: float) -> str:
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


def _published_cell(states: float | None, energy: float | None) -> Cell:
    if states is None:
        return Cell("")
    title = f"published: states {number(states)}, energy {number(energy, 'unknown')}"
    return Cell(number(states), number(energy, "unknown"), f"{states:.6g}", title)


def _free(rows: Sequence[Row]) -> list[Line]:
    """What predictions that cost nothing reach, from the first evaluation that there is."""
    found = (o.evaluation["checkpoints"] for row in rows for o in row.outcomes if o.evaluation.get("checkpoints"))
    baselines = next(itertools.chain.from_iterable(map(dict.values, found)), {}).get("baselines", {})
    lines = []
    for name, values in baselines.items():
        known = {f"rollout: {key}": x for key, x in values.items() if x is not None}
        texts = {column: Cell(number(x), order=f"{x:.6g}", title="costs nothing") for column, x in known.items()}
        cells = {column: dict.fromkeys(KINDS, texts.get(column, Cell(""))) for column in ("diverged", *COLUMNS, "p")}
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


def _test_note(found: GridResults, baseline: str | None, kind: Kind) -> str:
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


# What the script draws


def _drawn(results: Results) -> dict[str, Any]:
    maps = _Maps(results)
    grids = {}
    for name, found in results.grids.items():
        show = found.grid.show
        parts: dict[str, Any] = {"names": list(dict.fromkeys(_name(row) for row in found.rows))}
        if "table" in show or "one-step" in show:
            parts["regimes"] = {kind: [_regimes(*group, kind) for group in _groups(found)] for kind in KINDS}
        if "temperature" in show:
            parts["temperature"] = {kind: [_temperatures(*group, kind) for group in _groups(found)] for kind in KINDS}
        if "training" in show:
            parts["training"] = [_courses(*group) for group in _groups(found)]
        if "fields" in show:
            parts["fields"] = [maps.panel(*group) for group in _groups(found)]
        if "one-step" in show:
            parts["steps"] = _steps(found)
        grids[name] = parts
    regimes = {"regimeNames": REGIME_NAMES, "regimeColours": REGIME_COLOURS}
    return {"colours": COLOURS, **regimes, "grids": grids, "truths": maps.truths, "errors": maps.errors}


def _summary(row: Row, place: Place, kind: Kind) -> dict[str, Any]:
    """A median and its interval for the script: null where it is not finite, with the state in words."""
    summary = summarize(list(row.values(place, kind).values()))
    if summary is None:
        return {"median": None, "state": "missing"}
    state = "" if math.isfinite(summary.median) else "diverged"
    numbers = {name: _finite(getattr(summary, name)) for name in ("median", "low", "high")}
    return {**numbers, "state": state, "text": f"{_number(summary.median)} {_interval(summary)}".strip()}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _regimes(title: str, rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """One-step errors by regime of the truth, and the share of points in each."""
    shares = {}
    for name in REGIMES:
        known = [x for row in rows for x in row.values(("regimes", name, "share"), kind).values() if math.isfinite(x)]
        shares[name] = _finite(known[0]) if known else None
    lines = [
        {"name": _name(row), "values": {name: _summary(row, ("regimes", name, "error"), kind) for name in REGIMES}}
        for row in rows
    ]
    return {"title": title, "shares": shares, "rows": lines}


def _temperatures(title: str, rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """Rollout errors by temperature, and of the rows that have none."""
    points, lines = [], []
    for row in rows:
        item = {"name": _name(row), **_summary(row, STATES, kind)}
        loss = row.outcomes[0].trial.config.loss
        plain = loss.temperature is not None and not loss.differentiate_weights
        if plain and math.isfinite(float(loss.temperature or 0)):
            points.append({**item, "T": float(loss.temperature or 0)})
        else:
            lines.append(item)
    return {"title": title, "points": sorted(points, key=lambda point: point["T"]), "lines": lines}


def _courses(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Validations against training steps, one course per seed."""
    return {"title": title, "rows": [{"name": _name(row), "seeds": list(map(_course, row.outcomes))} for row in rows]}


def _course(outcome: Outcome) -> dict[str, Any]:
    history = outcome.history
    return {
        "seed": outcome.trial.seed,
        "state": outcome.state,
        "steps": [line["step"] for line in history],
        "errors": [_finite(line.get("rollout_states")) for line in history],
        "growth": [_finite(line.get("growth_factor")) for line in history],
    }


def _first_with_steps(found: GridResults) -> tuple[Outcome, dict[str, np.ndarray]] | None:
    """The first trial that kept its one-step errors."""
    for outcome in _outcomes([found]):
        fields = outcome.fields()
        if fields is not None and fields.get("step_error", np.zeros(0)).size:
            return outcome, fields
    return None


def _step_regimes(found: GridResults) -> list[StepRegime]:
    """One-step errors and weights by the system's own regimes, of the trial whose maps are shown."""
    first = _first_with_steps(found)
    return step_regimes(first[0], WEIGHED) if first else []


def _steps(found: GridResults) -> dict[str, Any] | None:
    """The error of one step over space and time, and what happens there; None if no trial kept it.

    A byte q stands for the error top · 10^(DECADES · (q/127 − 1)).
    """
    first = _first_with_steps(found)
    if first is None:
        return None
    outcome, fields = first
    errors = _planes(fields["step_error"])
    regimes = _planes(fields["regime"]) if "regime" in fields else [None] * len(errors)
    maps = [_step(fields, error, regime) for error, regime in zip(errors, regimes, strict=True)]
    return {"trial": outcome.folder.path.name, "decades": DECADES, "maps": maps}


def _step(fields: Mapping[str, np.ndarray], error: np.ndarray, regime: np.ndarray | None) -> dict[str, Any]:
    every = _strides(error.shape, MOST_CELLS)
    coarse = tuple(slice(None, None, stride) for stride in every)
    finite = np.where(np.isfinite(error), error, np.nan)
    top = float(np.nanmax(finite, initial=0.0)) or 1.0
    known = regime is not None and bool((regime >= 0).any())
    return {
        "time": _axis(fields["time"][: len(error)], every[0]),
        "space": _axis(fields.get("axis_0", np.arange(error.shape[1])), every[1]),
        "every": every,
        "top": _finite(top),
        "bytes": _bytes(np.log10(np.maximum(finite[coarse] / top, 10.0**-DECADES)) / DECADES + 1),
        "regime": _bytes(regime[coarse] / 127) if regime is not None and known else None,
    }


class _Maps:
    """Truths and errors over space and time in signed bytes, each truth once.

    The prediction is the truth plus the error. A byte q stands for the error top · (q/127)·|q/127|, which is fine
    where errors are small, and for the truth limit · q/127.
    """

    def __init__(self, results: Results) -> None:
        self.truths: dict[str, Any] = {}
        self.errors: dict[str, list[dict[str, Any]]] = {}
        rows = [row for found in results.grids.values() if "fields" in found.grid.show for row in found.rows]
        seeds = sorted({outcome.trial.seed for row in rows for outcome in row.outcomes})
        kept = [outcome for row in rows for outcome in row.outcomes if outcome.folder.has("rollouts.npz")]
        maps = {n: 2 * sum(o.trial.seed in seeds[:n] for o in kept) for n in range(1, len(seeds) + 1)}
        fitting = [n for n, count in maps.items() if count * LEAST_CELLS <= FIELD_BYTES]
        self.seeds = max(fitting, default=1)
        self._shown = set(seeds[: self.seeds])
        self._cells = min(MOST_CELLS, FIELD_BYTES // max(1, maps.get(self.seeds, 1)))

    def panel(self, title: str, rows: Sequence[Row]) -> dict[str, Any]:
        """The rows and seeds of one panel, and the trial whose fields each has."""
        lines = [{"name": _name(row), "seeds": [self._seed(outcome) for outcome in row.outcomes]} for row in rows]
        return {"title": title, "rows": lines}

    def _seed(self, outcome: Outcome) -> dict[str, Any]:
        name = outcome.folder.path.name
        about = {"seed": outcome.trial.seed, "state": IN_WORDS.get(outcome.state, outcome.state), "trial": None}
        if outcome.trial.seed not in self._shown:
            return {**about, "state": "left out to keep the page small"}
        if name not in self.errors:
            fields = outcome.fields()
            if fields is None:
                return {**about, "state": about["state"] + ("; no fields were kept" if outcome.state == "done" else "")}
            self.errors[name] = [
                self._error(fields, truth, prediction)
                for truth, prediction in zip(_planes(fields["truth"]), _planes(fields["prediction"]), strict=True)
            ]
        return {**about, "trial": name}

    def _error(self, fields: Mapping[str, np.ndarray], truth: np.ndarray, prediction: np.ndarray) -> dict[str, Any]:
        """The error of one trajectory, and the key of its truth."""
        limit = float(np.abs(truth).max()) or 1.0
        finite = np.isfinite(prediction).all(axis=1)
        diverged = None if finite.all() else _finite(float(fields["time"][np.argmin(finite)]))
        every = _strides(truth.shape, self._cells)
        coarse = tuple(slice(None, None, stride) for stride in every)
        error = np.clip((prediction - truth)[coarse], -CLIPPED * limit, CLIPPED * limit)
        top = float(np.nanmax(np.abs(error[np.isfinite(error)]), initial=0.0)) or 1.0
        key = hashlib.sha256(truth.tobytes()).hexdigest()[:12]
        self.truths[key] = {
            "time": _axis(fields["time"], every[0]),
            "space": _axis(fields.get("axis_0", np.arange(truth.shape[1])), every[1]),
            "limit": limit,
            "every": every,
            "bytes": _bytes(truth[coarse] / limit),
        }
        roots = np.sign(error) * np.sqrt(np.abs(error) / top)
        return {"truth": key, "top": _finite(top), "diverged": diverged, "bytes": _bytes(roots)}


def _planes(fields: np.ndarray) -> np.ndarray:
    """The first channel over time and the first space axis, in the middle of the others: (trajectory, time, point)."""
    plane = fields[:, :, 0].astype(np.float64)
    while plane.ndim > 3:
        plane = plane[..., plane.shape[-1] // 2]
    return plane


def _strides(shape: tuple[int, ...], cells: int) -> tuple[int, int]:
    """How coarsely time and space are taken so that a map has at most so many cells.

    >>> _strides((501, 50), 8000)
    (4, 1)
    """
    every = [1, 1]
    while (size := [-(-n // stride) for n, stride in zip(shape, every, strict=True)]) and size[0] * size[1] > cells:
        every[0 if size[0] >= size[1] else 1] += 1
    return every[0], every[1]


def _axis(values: np.ndarray, every: int) -> list[float]:
    return [float(f"{x:.5g}") for x in values[::every]]


def _bytes(values: np.ndarray) -> str:
    """Numbers in [-1, 1] as signed bytes in base64; what is not finite is a gap."""
    scaled = np.where(np.isfinite(values), np.round(127 * np.nan_to_num(values)), GAP)
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode()


# Provenance


def _provenance(outcome: Outcome) -> dict[str, Any]:
    """What a trial came from, in words."""
    about = outcome.environment
    failed = outcome.folder.read_json("failed.json") if outcome.state == "failed" else {}
    return {
        "folder": outcome.folder.path.name,
        "state": outcome.state,
        "seed": outcome.trial.seed,
        "message": failed.get("message", ""),
        "commit": about.get("commit") or "",
        "versions": ", ".join(f"{name} {version}" for name, version in about.get("versions", {}).items()),
        "device": about.get("device", ""),
        "started": about.get("started", ""),
        "data": about.get("data", {}).get("sha256", ""),
    }
