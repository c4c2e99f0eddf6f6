"""The report of a study: tables, figures and one page, from its folder alone."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from squall._process.names import file_name
from squall.report.figures import save
from squall.report.page import write_page
from squall.report.study_figures import (
    field_comparison,
    first_labels,
    regime_figure,
    sampling_figure,
    step_error_figure,
    temperature_figure,
    training_figure,
)
from squall.report.study_tables import WEIGHED, csv_table, markdown_table, regime_table, status_table
from squall.runs.folder import write_beside
from squall.study.definition import slug
from squall.study.results import GridResults, Outcome, Results, read_results

__all__ = ["write_report"]


def write_report(path: Path | str) -> list[Path]:
    """Write the report of a study into its `report` folder; it can be made again at any time, however far it is.

    Args:
        path: the folder of the study.

    Returns:
        the files.
    """
    results = read_results(path)
    out = Path(path) / "report"
    out.mkdir(exist_ok=True)
    files = [_write(out / "results.csv", csv_table(results)), _write(out / "tables.md", _tables(results))]
    for name, figure in _figures(results):
        files += [save(figure, out / f"{file_name(name)}.{kind}") for kind in ("png", "pdf")]
    return [*files, write_page(results, out / "index.html")]


def _write(path: Path, text: str) -> Path:
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def _tables(results: Results) -> str:
    study = results.study
    parts = [f"# {study.name}\n", study.about + "\n", "Trials: " + status_table(results).replace("\n", "; ") + ".\n"]
    for found in results.grids.values():
        if "table" in found.grid.show:
            parts.append(markdown_table(found, study.baseline))
        if "one-step" in found.grid.show:
            for outcome in _done(found):
                if table := regime_table(outcome, WEIGHED):
                    parts.append(f"### {found.grid.about}: {', '.join(outcome.trial.labels)}\n\n{table}")
                    break
    return "\n".join(parts)


def _done(found: GridResults) -> Iterator[Outcome]:
    return (outcome for row in found.rows for outcome in row.outcomes if outcome.state == "done")


def _sampled(found: GridResults) -> dict[str, Outcome]:
    """By the labels of its row, the first trial of each that sampled by stiffness."""
    first: dict[str, Outcome] = {}
    for row in found.rows:
        for outcome in row.outcomes:
            if outcome.stiffness() is not None:
                first.setdefault(", ".join(row.labels), outcome)
    return first


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    for name, found in results.grids.items():
        show = found.grid.show
        first = next(_done(found), None)
        if first is None:
            continue
        if "one-step" in show:
            for kind, figure in (("regimes", regime_figure(first)), ("one-step", step_error_figure(first))):
                if figure is not None:
                    yield f"{name}-{kind}", figure
        if "fields" in show:
            for label, rows in first_labels(found):
                figure = field_comparison(rows, label)
                if figure is not None:
                    yield f"{name}-fields-{slug(label)}", figure
        if "sampling" in show:
            for label, outcome in _sampled(found).items():
                figure = sampling_figure(outcome, label)
                if figure is not None:
                    yield f"{name}-sampling-{slug(label)}", figure
        if "temperature" in show:
            for kind in ("last", "best"):
                yield f"{name}-temperature-{kind}", temperature_figure(found, kind)
        if "training" in show:
            yield f"{name}-training", training_figure(found)
