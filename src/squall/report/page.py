"""A study's results as one interactive HTML page, which needs neither a network nor a server.

Tables are those of the Markdown report, and pictures those that stand beside it; maps, curves and bars become plain
data. `page.html.j2` lays all of it out, and its script draws with plotly.js.
"""

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jinja2
import numpy as np
from jaxtyping import Float, Shaped
from plotly.offline import get_plotlyjs

from squall._process.files import write_text
from squall.evaluation.regimes import REGIMES
from squall.report.curves import fixed_temperature
from squall.report.fields import REGIME_COLOURS, Arrays, plane
from squall.report.figures import COLOURS
from squall.report.sections import sections
from squall.report.tables import KINDS, STATE_NAMES, grid_tables, in_words, interval, regime_table, state_counts
from squall.runs.folder import Kind
from squall.study.definition import Study
from squall.study.outcome import STATES, Outcome, Place
from squall.study.results import GridResults, Results, Row
from squall.systems import CahnHilliard

DECADES = 5
"""Decades below its largest value over which a one-step error is shown."""
CELLS = 6000
"""Largest number of cells of a map, which bounds the size of the page."""
SEEDS_WITH_FIELDS = 5
"""Seeds whose fields are embedded; more would make the page too large."""
CLIPPED = 4.0
"""Errors are kept up to this many times the largest truth, so that a blow-up does not hide what came before it."""
GAP = -128
"""Marks NaN or infinity in a map of signed bytes."""


def write_page(results: Results, path: Path, pictures: Mapping[str, Path] = MappingProxyType({})) -> Path:
    """Write what a study found, however far it is, into one HTML file.

    Args:
        results: the study.
        path: the file.
        pictures: PNG files by the name of a grid, a hyphen and the name of a section, which the page then shows.

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
    outcomes = results.outcomes
    text = environment.get_template("page.html.j2").render(
        study=results.study,
        counts=state_counts(outcomes),
        total=len(outcomes),
        grids=[_grid(name, whole, results.study, pictures) for name, whole in results.grids.items()],
        outcomes=outcomes,
        kinds=KINDS,
        data=_script_json(_drawn(results)),
        plotly=get_plotlyjs(),
    )
    return write_text(path, text)


def _script_json(values: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    return json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _grid(name: str, whole: GridResults, study: Study, pictures: Mapping[str, Path]) -> dict[str, Any]:
    """What the template lays out of a grid; of one that chooses, the chosen rows."""
    chosen, show = whole.chosen, whole.grid.show
    return {
        "name": name,
        "about": chosen.grid.about,
        "show": show,
        "counts": state_counts(whole.outcomes),
        "total": len(whole.outcomes),
        "tables": {checkpoint: grid_tables(chosen, study.baseline, [checkpoint]) for checkpoint in KINDS}
        if "table" in show
        else {},
        "step_regimes": regime_table(chosen.one_step) if "one-step" in show else None,
        "sections": [
            {"section": section, "picture": _embedded(pictures.get(f"{name}-{section.name}"))}
            for section in sections(whole, study)
        ],
    }


def _embedded(picture: Path | None) -> str | None:
    return picture and "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode()


# What the script draws


def _drawn(results: Results) -> dict[str, Any]:
    maps = _Maps()
    grids = {}
    for name, whole in results.grids.items():
        chosen, show = whole.chosen, whole.grid.show
        parts: dict[str, Any] = {"names": list(dict.fromkeys(row.name for row in chosen.rows))}
        if "table" in show or "one-step" in show:
            parts["regimes"] = {
                checkpoint: [_regimes(*group, checkpoint) for group in chosen.groups] for checkpoint in KINDS
            }
        if "temperature" in show:
            parts["temperature"] = {
                checkpoint: [_temperatures(*group, checkpoint) for group in chosen.groups] for checkpoint in KINDS
            }
        if "training" in show:
            parts["training"] = [_panel(*group, _course) for group in chosen.groups]
        if "fields" in show:
            parts["fields"] = [_panel(*group, maps.seed) for group in chosen.groups]
        if "one-step" in show:
            parts["steps"] = _steps(chosen.one_step)
        grids[name] = parts
    regimes = {"regimeNames": CahnHilliard.regime_names, "regimeColours": REGIME_COLOURS}
    return {"colours": COLOURS, **regimes, "grids": grids, "truths": maps.truths, "errors": maps.errors}


def _panel(title: str, rows: Sequence[Row], seed: Any) -> dict[str, Any]:
    """The rows of one panel, each with something of every seed."""
    return {"title": title, "rows": [{"name": row.name, "seeds": list(map(seed, row.outcomes))} for row in rows]}


def _summary(row: Row, place: Place, checkpoint: Kind) -> dict[str, Any]:
    """A median and its interval: null if it is NaN or infinite, with the state as text."""
    summary = row.summary(place, checkpoint)
    if summary is None:
        return {"median": None, "state": "missing"}
    numbers = {name: _finite(getattr(summary, name)) for name in ("median", "low", "high")}
    state = "" if math.isfinite(summary.median) else "diverged"
    return {**numbers, "state": state, "text": f"{in_words(summary.median)} {interval(summary)}".strip()}


def _finite(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _regimes(title: str, rows: Sequence[Row], checkpoint: Kind) -> dict[str, Any]:
    """One-step errors by regime of the truth, and the share of points in each."""
    shares: dict[str, float | None] = {}
    for name in REGIMES.values():
        known = [
            x for row in rows for x in row.values(("regimes", name, "share"), checkpoint).values() if math.isfinite(x)
        ]
        shares[name] = _finite(known[0]) if known else None
    lines = [
        {"name": row.name, "values": {name: _summary(row, ("regimes", name, "error"), checkpoint) for name in shares}}
        for row in rows
    ]
    return {"title": title, "shares": shares, "rows": lines}


def _temperatures(title: str, rows: Sequence[Row], checkpoint: Kind) -> dict[str, Any]:
    """Rollout errors by temperature, and of the rows that have none."""
    items = [{"name": row.name, "T": fixed_temperature(row), **_summary(row, STATES, checkpoint)} for row in rows]
    points = sorted((item for item in items if item["T"] is not None), key=lambda item: item["T"])
    return {"title": title, "points": points, "lines": [item for item in items if item["T"] is None]}


def _course(outcome: Outcome) -> dict[str, Any]:
    """The validations during a training."""
    steps = [int(step or 0) for step in outcome.history.get("step", [])]
    names = {"errors": "rollout_states", "growth": "growth_factor"}
    numbers = {key: list(map(_finite, outcome.history.get(name) or [None] * len(steps))) for key, name in names.items()}
    return {"seed": outcome.seed, "state": outcome.state, "steps": steps, **numbers}


def _steps(outcome: Outcome | None) -> dict[str, Any] | None:
    """The error of one step over space and time, and what happens there; None if no run kept it.

    A byte q stands for the error top · 10^(DECADES · (q/127 − 1)).
    """
    fields = outcome.fields() if outcome else None
    if outcome is None or fields is None:
        return None
    maps = []
    regimes = plane(fields["regime"]) if "regime" in fields else np.full(fields["step_error"].shape, -1)
    for error, regime in zip(plane(fields["step_error"]), regimes, strict=True):
        about, coarse = _axes(fields, error.shape)
        finite = np.where(np.isfinite(error), error, np.nan)
        top = float(np.nanmax(finite, initial=0.0)) or 1.0
        decades = np.log10(np.maximum(finite[coarse] / top, 10.0**-DECADES)) / DECADES
        known = _bytes(regime[coarse] / 127) if (regime >= 0).any() else None
        maps.append({**about, "top": _finite(top), "bytes": _bytes(decades + 1), "regime": known})
    return {"trial": outcome.name, "decades": DECADES, "maps": maps}


class _Maps:
    """Truths and errors over space and time in signed bytes, each truth once.

    The prediction is the truth plus the error. A byte q stands for the error top · (q/127)·|q/127|, which is fine
    where errors are small, and for the truth limit · q/127.
    """

    def __init__(self) -> None:
        self.truths: dict[str, Any] = {}
        self.errors: dict[str, list[dict[str, Any]]] = {}

    def seed(self, outcome: Outcome) -> dict[str, Any]:
        """Which run's fields a seed has, or why it has none."""
        about = {"seed": outcome.seed, "state": STATE_NAMES.get(outcome.state, outcome.state), "trial": None}
        if outcome.seed >= SEEDS_WITH_FIELDS:
            return {**about, "state": "left out to keep the page small"}
        if outcome.name not in self.errors:
            fields = outcome.fields()
            if fields is None:
                return {**about, "state": about["state"] + ("; no fields were kept" if outcome.state == "done" else "")}
            pairs = zip(plane(fields["truth"]), plane(fields["prediction"]), strict=True)
            self.errors[outcome.name] = [self._error(fields, *pair) for pair in pairs]
        return {**about, "trial": outcome.name}

    def _error(
        self, fields: Arrays, truth: Float[np.ndarray, "time point"], prediction: Float[np.ndarray, "time point"]
    ) -> dict[str, Any]:
        """The error of one trajectory, and the key of its truth."""
        limit = float(np.nanmax(np.abs(truth))) or 1.0
        finite = (np.isfinite(prediction) | np.isnan(truth)).all(axis=1)  # masked points are NaN in both
        diverged = None if finite.all() else _finite(float(fields["time"][np.argmin(finite)]))
        about, coarse = _axes(fields, truth.shape)
        error = np.clip((prediction - truth)[coarse], -CLIPPED * limit, CLIPPED * limit)
        top = float(np.nanmax(np.abs(error[np.isfinite(error)]), initial=0.0)) or 1.0
        key = hashlib.sha256(truth.tobytes()).hexdigest()[:12]
        self.truths[key] = {**about, "limit": limit, "bytes": _bytes(truth[coarse] / limit)}
        roots = np.sign(error) * np.sqrt(np.abs(error) / top)
        return {"truth": key, "top": _finite(top), "diverged": diverged, "bytes": _bytes(roots)}


def _axes(fields: Arrays, shape: tuple[int, ...]) -> tuple[dict[str, Any], tuple[slice, ...]]:
    """Time and space of a map, taken so coarsely that it has at most `CELLS` cells, and the slices that do it."""
    every = [1, 1]
    while (size := [-(-n // stride) for n, stride in zip(shape, every, strict=True)]) and size[0] * size[1] > CELLS:
        every[0 if size[0] >= size[1] else 1] += 1
    coarse = tuple(slice(None, None, stride) for stride in every)
    time, space = fields["time"][: shape[0]][coarse[0]], fields.get("axis_0", np.arange(shape[1]))[coarse[1]]
    return {"time": _numbers(time), "space": _numbers(space), "every": every}, coarse


def _numbers(values: Shaped[np.ndarray, " n"]) -> list[float]:
    return [float(f"{x:.5g}") for x in values]


def _bytes(values: Shaped[np.ndarray, "time point"]) -> str:
    """Numbers in [-1, 1] as signed bytes in base64; what is not finite is a gap."""
    scaled = np.where(np.isfinite(values), np.round(127 * np.nan_to_num(values)), GAP)
    return base64.b64encode(scaled.astype(np.int8).tobytes()).decode()
