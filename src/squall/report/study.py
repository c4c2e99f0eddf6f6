"""The report of a study: tables, figures and one page, from its run folders or its pack."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from squall._process.files import write_beside
from squall._process.names import file_name
from squall.report import curves, evidence, fields
from squall.report.figures import save
from squall.report.tables import KINDS, Table, grid_tables, markdown, ratio_tables, regime_table, status_table
from squall.study.definition import slug
from squall.study.pack import csv_table
from squall.study.results import GridResults, Results, read_results


def write_report(path: Path | str) -> list[Path]:
    """Write the report of a study into its `report` folder; it can be made again at any time, however far it is.

    Args:
        path: the folder of the study, with its runs or its pack.

    Returns:
        the files.
    """
    from squall.report.page import write_page  # needs plotly, slow to import

    results = read_results(path)
    out = Path(path) / "report"
    out.mkdir(exist_ok=True)
    table = csv_table(results.labels, results.outcomes)
    files = [_write(out / "results.csv", table), _write(out / "tables.md", study_tables(results))]
    for name, figure in _figures(results):
        files += [save(figure, out / f"{file_name(name)}.{suffix}") for suffix in ("png", "pdf")]
    return [*files, write_page(results, out / "index.html")]


def _write(path: Path, text: str) -> Path:
    with write_beside(path) as part:
        part.write_text(text, encoding="utf-8")
    return path


def study_tables(results: Results) -> str:
    """The tables of a study in Markdown."""
    study = results.study
    parts = [f"# {study.name}\n", study.about + "\n", "Runs: " + status_table(results).replace("\n", "; ") + ".\n"]
    for name, whole in results.grids.items():
        found = whole.chosen
        heading = f"### {found.grid.about or name}"
        finished = any(row.finished for row in found.rows)
        if whole.grid.choose and finished:
            table, note = evidence.choice_table(whole)
            parts.append(f"{heading}: the choice\n\n{markdown(table)}\n{note}\n")
        if "table" in found.grid.show:
            tables, note = grid_tables(found, study.baseline)
            parts += [
                f"{heading}\n",
                *(map(markdown, tables) if finished else []),
                note if finished else "No run is done.",
            ]
            parts[-1] += "\n"
        for what, tables, note in _evidence(found, study.baseline) if finished else ():
            parts += [f"{heading}: {what}\n", *map(markdown, tables), f"{note}\n"]
        outcome = found.one_step if "one-step" in found.grid.show else None
        if outcome and (table := regime_table(outcome)):
            parts.append(f"{heading}: {results.labels[outcome.name].replace(' / ', ', ')}\n\n{markdown(table)}")
    return "\n".join(parts)


def _evidence(found: GridResults, baseline: str | None) -> Iterator[tuple[str, list[Table], str]]:
    """What is shown of a grid beside its table: the heading, tables and the note below."""
    show = found.grid.show
    if "ratios" in show:
        yield ("ratios", *ratio_tables(found, baseline))
    if "ranks" in show and (ranks := evidence.rank_table(found, baseline)):
        yield "ranks", [ranks[0]], ranks[1]
    if "arms" in show:
        yield (f"in relation to {found.grid.axes[-1][0]}", *evidence.arms_tables(found))
    if "steps" in show:
        yield ("steps", *evidence.steps_table(found, baseline))
    if "spectra" in show and (spectra := evidence.spectra_tables(found)):
        yield ("spectra", *spectra)


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    for name, whole in results.grids.items():
        found = whole.chosen
        show, one_step = found.grid.show, found.one_step
        if not any(row.finished for row in found.rows):
            continue
        drawn: dict[str, Figure | None] = {}
        if "one-step" in show and one_step:
            drawn = {"regimes": fields.regime_figure(one_step), "one-step": fields.step_error_figure(one_step)}
        if "fields" in show:
            drawn |= {f"fields-{slug(title)}": fields.field_comparison(rows, title) for title, rows in found.groups}
        if "sampling" in show:
            for row in found.rows:
                label = ", ".join(row.labels)
                drawn[f"sampling-{slug(label)}"] = row.sampled and curves.sampling_figure(row.sampled, label)
        if "temperature" in show:
            drawn |= {f"temperature-{kind}": curves.temperature_figure(found, kind) for kind in KINDS}
        if "training" in show:
            drawn["training"] = curves.training_figure(found)
        drawn |= _evidence_figures(found, results.study.baseline)
        yield from ((f"{name}-{key}", figure) for key, figure in drawn.items() if figure is not None)


def _evidence_figures(found: GridResults, baseline: str | None) -> dict[str, Figure | None]:
    drawn: dict[str, Figure | None] = {}
    show = found.grid.show
    if "ranks" in show:
        drawn["ranks"] = evidence.rank_figure(found, baseline)
    if "trade-off" in show:
        drawn["trade-off"] = evidence.trade_off_figure(found, baseline)
    if "arms" in show:
        drawn["arms"] = evidence.arms_figure(found)
    if "steps" in show:
        drawn["steps"] = evidence.steps_figure(found, baseline)
    if "spectra" in show:
        drawn["spectra"] = evidence.spectra_figure(found)
    return drawn
