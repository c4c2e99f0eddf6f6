"""What the report shows of a grid beside its main table, for the files and the page alike."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure

from squall.report import evidence
from squall.report.tables import Table, ratio_tables
from squall.study.definition import Study
from squall.study.results import GridResults


@dataclass(frozen=True)
class Section:
    """A part of the report of a grid.

    Attributes:
        name: of its figure's file, after the name of the grid.
        heading: for people.
        tables, note: the tables and the note below them; none where there is only a figure.
        draw: makes its figure; returns None where there is none.
    """

    name: str
    heading: str
    tables: Sequence[Table]
    note: str
    draw: Callable[[], Figure | None] = lambda: None


def sections(whole: GridResults, study: Study) -> Iterator[Section]:
    """What `show` of a grid asks for, of `evidence`; nothing before a run is finished."""
    chosen, baseline = whole.chosen, study.baseline
    if not any(row.finished for row in chosen.rows):
        return
    show = chosen.grid.show
    if whole.grid.choose:
        table, note = evidence.choice_table(whole)
        yield Section("choice", "the choice", [table], note)
    if "ratios" in show:
        yield Section("ratios", "ratios", *ratio_tables(chosen, baseline))
    if "ranks" in show and (ranks := evidence.rank_table(chosen, baseline)):
        yield Section("ranks", "ranks", [ranks[0]], ranks[1], lambda: evidence.rank_figure(chosen, baseline))
    if "trade-off" in show:
        heading = "mean against tail"
        yield Section("trade-off", heading, [], "", lambda: evidence.trade_off_figure(chosen, baseline))
    if "arms" in show:
        heading = f"in relation to {chosen.grid.axes[-1][0]}"
        yield Section("arms", heading, *evidence.arms_tables(chosen), lambda: evidence.arms_figure(chosen))
    if "steps" in show:
        tables, note = evidence.steps_table(chosen, baseline, study.costs)
        yield Section("steps", "steps", tables, note, lambda: evidence.steps_figure(chosen, baseline))
    if "spectra" in show and (spectra := evidence.spectra_tables(chosen)):
        yield Section("spectra", "spectra", *spectra, lambda: evidence.spectra_figure(chosen))
