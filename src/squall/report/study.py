"""The report of a study: tables, figures and one page, from its run folders or its pack."""

from collections.abc import Iterator
from pathlib import Path

from matplotlib.figure import Figure

from squall._process.files import write_text
from squall._process.names import file_name
from squall.report import curves, fields
from squall.report.figures import save
from squall.report.sections import sections
from squall.report.tables import KINDS, grid_tables, markdown, regime_table, status_table
from squall.study.definition import slug
from squall.study.pack import csv_table
from squall.study.results import Results, read_results


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
    table = csv_table(results.labels, results.outcomes)
    files = [write_text(out / "results.csv", table), write_text(out / "tables.md", study_tables(results))]
    pictures = {}
    for name, figure in _figures(results):
        saved = [save(figure, out / f"{file_name(name)}.{suffix}") for suffix in ("png", "pdf")]
        pictures[name] = saved[0]
        files += saved
    return [*files, write_page(results, out / "index.html", pictures)]


def study_tables(results: Results) -> str:
    """The tables of a study in Markdown."""
    study = results.study
    parts = [f"# {study.name}\n", study.about + "\n", "Runs: " + status_table(results).replace("\n", "; ") + ".\n"]
    for name, whole in results.grids.items():
        chosen = whole.chosen
        heading = f"### {chosen.grid.about or name}"
        finished = any(row.finished for row in chosen.rows)
        if "table" in chosen.grid.show:
            tables, note = grid_tables(chosen, study.baseline) if finished else ([], "No run is done.")
            parts += [f"{heading}\n", *map(markdown, tables), f"{note}\n"]
        for section in sections(whole, study):
            if section.tables:
                parts += [f"{heading}: {section.heading}\n", *map(markdown, section.tables), f"{section.note}\n"]
        outcome = chosen.one_step if "one-step" in chosen.grid.show else None
        if outcome and (table := regime_table(outcome)):
            parts.append(f"{heading}: {results.labels[outcome.name].replace(' / ', ', ')}\n\n{markdown(table)}")
    return "\n".join(parts)


def _figures(results: Results) -> Iterator[tuple[str, Figure]]:
    for name, whole in results.grids.items():
        chosen = whole.chosen
        show, one_step = chosen.grid.show, chosen.one_step
        if not any(row.finished for row in chosen.rows):
            continue
        drawn: dict[str, Figure | None] = {}
        if "one-step" in show and one_step:
            drawn = {"regimes": fields.regime_figure(one_step), "one-step": fields.step_error_figure(one_step)}
        if "fields" in show:
            drawn |= {f"fields-{slug(title)}": fields.field_comparison(rows, title) for title, rows in chosen.groups}
        if "sampling" in show:
            for row in chosen.rows:
                label = ", ".join(row.labels)
                drawn[f"sampling-{slug(label)}"] = row.sampled and curves.sampling_figure(row.sampled, label)
        if "temperature" in show:
            drawn |= {
                f"temperature-{checkpoint}": curves.temperature_figure(chosen, checkpoint) for checkpoint in KINDS
            }
        if "training" in show:
            drawn["training"] = curves.training_figure(chosen)
        drawn |= {section.name: section.draw() for section in sections(whole, results.study)}
        yield from ((f"{name}-{key}", figure) for key, figure in drawn.items() if figure is not None)
