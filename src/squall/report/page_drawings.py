"""What the script of a study's page draws, as plain data: maps in bytes, curves, and bars."""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from squall.report.figures import COLOURS
from squall.report.page_tables import IN_WORDS, KINDS, STATES, in_figures, interval
from squall.report.study_figures import REGIME_COLOURS, REGIME_NAMES
from squall.report.study_tables import WEIGHED, StepRegime, step_regimes
from squall.runs.folder import Kind
from squall.study.results import GridResults, Outcome, Place, Results, Row, summarize

__all__ = ["drawn", "step_regimes_of"]

REGIMES = ("quiet", "active", "extreme")

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


def drawn(results: Results) -> dict[str, Any]:
    maps = _Maps(results)
    grids = {}
    for name, found in results.grids.items():
        show = found.grid.show
        parts: dict[str, Any] = {"names": list(dict.fromkeys(row.name for row in found.rows))}
        if "table" in show or "one-step" in show:
            parts["regimes"] = {kind: [_regimes(*group, kind) for group in found.groups] for kind in KINDS}
        if "temperature" in show:
            parts["temperature"] = {kind: [_temperatures(*group, kind) for group in found.groups] for kind in KINDS}
        if "training" in show:
            parts["training"] = [_courses(*group) for group in found.groups]
        if "fields" in show:
            parts["fields"] = [maps.panel(*group) for group in found.groups]
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
    return {**numbers, "state": state, "text": f"{in_figures(summary.median)} {interval(summary)}".strip()}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _regimes(title: str, rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """One-step errors by regime of the truth, and the share of points in each."""
    shares = {}
    for name in REGIMES:
        known = [x for row in rows for x in row.values(("regimes", name, "share"), kind).values() if math.isfinite(x)]
        shares[name] = _finite(known[0]) if known else None
    lines = [
        {"name": row.name, "values": {name: _summary(row, ("regimes", name, "error"), kind) for name in REGIMES}}
        for row in rows
    ]
    return {"title": title, "shares": shares, "rows": lines}


def _temperatures(title: str, rows: Sequence[Row], kind: Kind) -> dict[str, Any]:
    """Rollout errors by temperature, and of the rows that have none."""
    points, lines = [], []
    for row in rows:
        item = {"name": row.name, **_summary(row, STATES, kind)}
        loss = row.outcomes[0].trial.config.loss
        plain = loss.temperature is not None and not loss.differentiate_weights
        if plain and math.isfinite(float(loss.temperature or 0)):
            points.append({**item, "T": float(loss.temperature or 0)})
        else:
            lines.append(item)
    return {"title": title, "points": sorted(points, key=lambda point: point["T"]), "lines": lines}


def _courses(title: str, rows: Sequence[Row]) -> dict[str, Any]:
    """Validations against training steps, one course per seed."""
    return {"title": title, "rows": [{"name": row.name, "seeds": list(map(_course, row.outcomes))} for row in rows]}


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
    for outcome in found.outcomes:
        fields = outcome.fields()
        if fields is not None and fields.get("step_error", np.zeros(0)).size:
            return outcome, fields
    return None


def step_regimes_of(found: GridResults) -> list[StepRegime]:
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
        lines = [{"name": row.name, "seeds": [self._seed(outcome) for outcome in row.outcomes]} for row in rows]
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
