"""What a study found, read from its run folders and its pack: one row per combination of labels, a run per seed."""

import dataclasses
import functools
import itertools
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from squall.runs.folder import Kind
from squall.study.definition import Grid, Study
from squall.study.folder import FINISHED, StudyFolder
from squall.study.outcome import Outcome, Place
from squall.study.pack import write_pack
from squall.study.statistics import Summary, summarize

_summary = functools.lru_cache(maxsize=10_000)(summarize)
"""Tables, figures and the page want the same medians, and each draws 10 000 samples."""


@dataclass(frozen=True)
class Row:
    """The runs of one combination of labels, one per seed."""

    labels: tuple[str, ...]
    outcomes: tuple[Outcome, ...]
    chosen: str = ""
    """The label that was chosen for it on validation data."""

    def values(self, place: Place, checkpoint: Kind = "last", integrator: str = "") -> dict[int, float]:
        """A metric by seed, where there is a number."""
        values = {outcome.seed: outcome.value(place, checkpoint, integrator) for outcome in self.outcomes}
        return {seed: value for seed, value in values.items() if value is not None}

    def summary(self, place: Place, checkpoint: Kind = "last", integrator: str = "") -> Summary | None:
        """The median of a metric over seeds, None without a number."""
        return _summary(tuple(self.values(place, checkpoint, integrator).values()))

    def validations(self) -> dict[int, np.ndarray]:
        """By seed, (2, validation): the steps of a training and the score at each, infinite where a rollout or the
        training diverged; of seeds that have validations."""
        courses = {}
        for outcome in self.outcomes:
            steps, scores = outcome.history.get("step", ()), outcome.history.get("score", ())
            if outcome.state in FINISHED and scores:
                known = [math.inf if x is None or outcome.state == "failed" else x for x in scores]
                courses[outcome.seed] = np.array([[step or 0 for step in steps], known], dtype=float)
        return courses

    def validation(self) -> Summary | None:
        """The median over seeds of the best score on the validation trajectories."""
        return _summary(tuple(float(course[1].min()) for course in self.validations().values()))

    @property
    def name(self) -> str:
        """Its labels without the first, which names the group that it stands in."""
        return ", ".join(self.labels[1:] or self.labels)

    @property
    def finished(self) -> int:
        """How many runs are done or failed."""
        return sum(outcome.state in FINISHED for outcome in self.outcomes)

    @property
    def shown(self) -> Outcome | None:
        """The first run that kept its fields."""
        return next((outcome for outcome in self.outcomes if outcome.fields() is not None), None)

    @property
    def sampled(self) -> Outcome | None:
        """The first run that kept the stiffness of its transitions."""
        return next((outcome for outcome in self.outcomes if outcome.stiffness() is not None), None)


@dataclass(frozen=True)
class GridResults:
    """The rows of a grid, in the order of its axes, and the other integrators that it shows: their names by the suffix
    of their files."""

    grid: Grid
    rows: tuple[Row, ...]
    others: Mapping[str, str]

    @property
    def outcomes(self) -> list[Outcome]:
        """Every run once."""
        return _once(row.outcomes for row in self.rows)

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """The rows by their first label, if they have several, and by their data: one table or panel each."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            data = Path(row.outcomes[0].config["data"]["path"]).stem
            groups.setdefault((row.labels[0] if len(row.labels) > 1 else "", data), []).append(row)
        labels = [label for label, _ in groups]
        titles = [f"{label}, {data}" if label and labels.count(label) > 1 else label or data for label, data in groups]
        return list(zip(titles, groups.values(), strict=True))

    @property
    def one_step(self) -> Outcome | None:
        """The first run shown that kept its one-step errors."""
        shown = [outcome for row in self.rows if (outcome := row.shown)]
        return next(
            (outcome for outcome in shown if (outcome.fields() or {}).get("step_error", np.zeros(0)).size), None
        )

    @property
    def options(self) -> dict[tuple[str, ...], list[Row]]:
        """Of a grid that chooses: the rows to choose from, by their other labels."""
        options: dict[tuple[str, ...], list[Row]] = {}
        for row in self.rows:
            options.setdefault(row.labels[:-1], []).append(row)
        return options

    @property
    def chosen(self) -> "GridResults":
        """For every combination of the other labels the row with the smallest median validation score over seeds; the
        grid itself if it has nothing to choose. A row without a validation is chosen only where none has one."""
        if not self.grid.choose:
            return self
        rows = []
        for labels, options in self.options.items():
            best = min(options, key=_validated)
            rows.append(Row(labels, best.outcomes, best.labels[-1]))
        grid = dataclasses.replace(self.grid, axes=self.grid.axes[:-1], choose=())
        return GridResults(grid, tuple(rows), self.others)

    def by_loss(self, baseline: str | None) -> dict[tuple[str, ...], dict[str, Row]]:
        """Rows by the labels of all axes but the one that has the baseline, and by their label on that one."""
        settings: dict[tuple[str, ...], dict[str, Row]] = {}
        for axis, labels in enumerate(self.grid.axes):
            for row in self.rows if baseline in labels else ():
                others = row.labels[:axis] + row.labels[axis + 1 :]
                settings.setdefault(others, {})[row.labels[axis]] = row
        return settings

    def baseline_of(self, row: Row, baseline: str | None) -> Row | None:
        """The row with the label of the baseline in the place where it belongs, and else the same labels."""
        for axis, labels in enumerate(self.grid.axes):
            if baseline in labels:
                wanted = (*row.labels[:axis], baseline, *row.labels[axis + 1 :])
                return next((other for other in self.rows if other.labels == wanted), None)
        return None


@dataclass(frozen=True)
class Results:
    """A study and what was found."""

    study: Study
    grids: Mapping[str, GridResults]

    @property
    def outcomes(self) -> list[Outcome]:
        """Every run once."""
        return _once(grid.outcomes for grid in self.grids.values())

    @property
    def labels(self) -> dict[str, str]:
        """The labels of every run, by its name."""
        return {trial.name: " / ".join(trial.labels) for trial in self.study.trials}


def _validated(row: Row) -> float:
    summary = row.validation()
    return math.inf if summary is None else summary.median


def _once(outcomes: Iterable[Iterable[Outcome]]) -> list[Outcome]:
    return list({outcome.name: outcome for outcome in itertools.chain.from_iterable(outcomes)}.values())


def read_results(path: Path | str) -> Results:
    """Read a study's folder, however far it is: its run folders, and from its pack the runs whose folder is not there.

    Raises:
        RunFolderError: if it is not a study, or a file in it is damaged.
    """
    folder = StudyFolder(path)
    study = folder.read()
    outcomes = {trial.identity: folder.outcome(trial) for trial in study.trials}
    _warn_of_other_data(study, outcomes)
    others = {other.suffix: name for name, other in study.evaluations.items()}
    grids = {}
    for name, grid in study.grids.items():
        members: dict[tuple[str, ...], list[Outcome]] = {}
        for (labels, _), trial in grid.trials.items():
            members.setdefault(labels, []).append(outcomes[trial.identity])
        rows = tuple(Row(labels, tuple(runs)) for labels, runs in members.items())
        grids[name] = GridResults(grid, rows, others if "integrators" in grid.show else {})
    return Results(study, grids)


def _warn_of_other_data(study: Study, outcomes: Mapping[str, Outcome]) -> None:
    seen: dict[str, set[str]] = {}
    for trial in study.trials:
        if data := outcomes[trial.identity].evaluations.get("", {}).get("data"):
            seen.setdefault(trial.system, set()).add(data["sha256"])
    for system, digests in seen.items():
        if len(digests) > 1:
            warnings.warn(
                f"the runs on {system} are on {len(digests)} different data files: machines that share a study should "
                "share its data/ too",
                stacklevel=3,
            )


def pack_study(path: Path | str) -> list[Path]:
    """Write `results.csv` and `results.npz` of a study into its folder, from its run folders and the pack before.

    Returns:
        the two files.

    Raises:
        RunFolderError: if it is not a study, its pack is damaged or of another study, or `results.csv` is of no pack.
    """
    results = read_results(path)
    rows = [row for grid in results.grids.values() for row in grid.rows]
    shown = {outcome.name for row in rows for outcome in (row.shown, row.sampled) if outcome}
    return write_pack(Path(path), results.study.name, results.labels, results.outcomes, shown)


def published(grid: Grid, row: Row) -> tuple[float, float] | None:
    """States and energy that others published for a row, None where they did not."""
    pairs = itertools.product(row.labels, row.labels)
    return next((grid.published[pair] for pair in pairs if pair in grid.published), None)
