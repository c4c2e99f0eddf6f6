"""A study's results as one interactive HTML page, which needs neither a network nor a server.

The numbers become plain data; `page.html.j2` lays them out, and its script draws them with plotly.js.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from plotly.offline import get_plotlyjs

from squall.report.page_drawings import drawn, step_regimes_of
from squall.report.page_tables import KINDS, columns_of, note_on_p, tables_of
from squall.report.study_tables import WEIGHED
from squall.report.tables import number
from squall.runs.folder import write_beside
from squall.study.results import GridResults, Outcome, Results

__all__ = ["write_page"]

STATE_NAMES = ("done", "failed", "started", "missing")


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
    outcomes = results.outcomes
    return {
        "study": results.study,
        "counts": _counts(outcomes),
        "total": len(outcomes),
        "grids": [_grid(name, found, results.study.baseline) for name, found in results.grids.items()],
        "trials": [_provenance(outcome) for outcome in outcomes],
        "kinds": KINDS,
        "weighed": list(WEIGHED),
        "number": number,
        "data": _script_json(drawn(results)),
    }


def _script_json(values: Any) -> str:
    """JSON that may stand in a script element: nothing in it can end the element."""
    return json.dumps(values, allow_nan=False, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")


def _counts(outcomes: Sequence[Outcome]) -> dict[str, int]:
    states = [outcome.state for outcome in outcomes]
    return {state: states.count(state) for state in STATE_NAMES if state in states}


def _grid(name: str, found: GridResults, baseline: str | None) -> dict[str, Any]:
    """One section of the page."""
    outcomes = found.outcomes
    has_table = "table" in found.grid.show
    return {
        "name": name,
        "about": found.grid.about,
        "show": found.grid.show,
        "counts": _counts(outcomes),
        "total": len(outcomes),
        "columns": list(columns_of(found)),
        "tables": tables_of(found, baseline) if has_table else [],
        "step_regimes": step_regimes_of(found) if "one-step" in found.grid.show else [],
        "has_published": bool(found.grid.published),
        "notes": {kind: note_on_p(found, baseline, kind) for kind in KINDS} if has_table else {},
    }


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
