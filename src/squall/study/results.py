"""What a study found, read from its run folders: one row per combination of labels, its seeds summarised."""

import itertools
import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from squall.runs.folder import SAMPLING, Kind, RunFolder, evaluation_suffix
from squall.study.definition import Grid, Study, Trial
from squall.study.folder import StudyFolder

__all__ = [
    "ABSENT",
    "GridResults",
    "Outcome",
    "Place",
    "Results",
    "Row",
    "Summary",
    "compare_paired",
    "corrected",
    "published",
    "read_results",
    "summarize",
    "value_at",
]

Place = tuple[str, ...]
"""Where `evaluation.json` has a number: the names on the way to it."""

ABSENT = object()
"""What `value_at` answers, if asked to, where there is no number."""

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Outcome:
    """One trial, as far as it is.

    Attributes:
        trial: what was asked for.
        state: `done`, `failed`, `started` or `missing`.
        folder: its run folder.
        evaluation: what `evaluation.json` holds; empty unless done.
        others: what the evaluations by other integrators hold, by their name in the study, where they were made.
    """

    trial: Trial
    state: str
    folder: RunFolder = field(repr=False)
    evaluation: Mapping[str, Any] = field(repr=False)
    others: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)

    def value(self, place: Place, kind: Kind, by: str | None = None) -> float | None:
        """A number of the evaluation of the best or the last weights; infinite where it is not finite or the training
        diverged, None where it does not apply or is not there yet.

        Args:
            place: where the number is in an evaluation.
            kind: of the weights.
            by: the name of an evaluation by another integrator; by that of the training if left out.
        """
        if self.state == "failed":
            return math.inf
        evaluation = self.evaluation if by is None else self.others.get(by, {})
        checkpoints = evaluation.get("checkpoints", {})
        if not checkpoints:
            return None
        # Weights that are both the best and the last are evaluated once.
        found = value_at(checkpoints.get(kind) or next(iter(checkpoints.values())), place, ABSENT)
        if found is ABSENT:
            return None
        return math.inf if found is None else found

    @cached_property
    def history(self) -> list[dict[str, Any]]:
        """The validations during the training: `step` and the numbers found."""
        return [
            {"step": line["step"], **line["validation"]} for line in self.folder.read_metrics() if "validation" in line
        ]

    @cached_property
    def environment(self) -> dict[str, Any]:
        """Versions, commit and machine of the run; empty if it has not started."""
        return self.folder.read_json("environment.json") if self.folder.has("environment.json") else {}

    def stiffness(self) -> dict[str, np.ndarray] | None:
        """The stiffness-aware index of the training transitions, if the trial sampled by it."""
        return self.folder.read_arrays(SAMPLING) if self.folder.has(SAMPLING) else None

    def fields(self) -> dict[str, np.ndarray] | None:
        """Truth, prediction and one-step errors of some test trajectories, if they were kept."""
        return self.folder.read_arrays("rollouts.npz") if self.folder.has("rollouts.npz") else None


@dataclass(frozen=True)
class Row:
    """The trials of one combination of labels, one per seed."""

    labels: tuple[str, ...]
    outcomes: tuple[Outcome, ...]

    def values(self, place: Place, kind: Kind = "last", by: str | None = None) -> dict[int, float]:
        """The numbers that there are, by seed."""
        found = {outcome.trial.seed: outcome.value(place, kind, by) for outcome in self.outcomes}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def name(self) -> str:
        """Its labels without the first, which names the group that it stands in."""
        return ", ".join(self.labels[1:] or self.labels)

    @property
    def diverged(self) -> int:
        """How many trials diverged, in the training or in a rollout of the last weights."""
        return sum(math.isinf(x) for x in self.values(("rollout", "states")).values())

    @property
    def finished(self) -> int:
        """How many trials are done or failed."""
        return sum(outcome.state in ("done", "failed") for outcome in self.outcomes)


@dataclass(frozen=True)
class GridResults:
    """The rows of a grid, in the order of its axes, and the names of the evaluations by other integrators it shows."""

    grid: Grid
    rows: tuple[Row, ...]
    others: tuple[str, ...] = ()

    @property
    def outcomes(self) -> list[Outcome]:
        """Every trial once."""
        return list({one.folder.path: one for row in self.rows for one in row.outcomes}.values())

    @property
    def groups(self) -> list[tuple[str, list[Row]]]:
        """The rows by their first label; where that is their only one they are one group without a name."""
        grouped = itertools.groupby(self.rows, key=lambda row: row.labels[0] if len(row.labels) > 1 else "")
        return [(title, list(rows)) for title, rows in grouped]

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
        """Every trial once."""
        return list({one.folder.path: one for found in self.grids.values() for one in found.outcomes}.values())


def read_results(path: Path | str) -> Results:
    """Read a study's folder, however far it is.

    Raises:
        RunFolderError: if it is no study, or a file in it is damaged.
    """
    folder = StudyFolder(path)
    study = folder.read()
    outcomes: dict[str, Outcome] = {}
    for trial in study.trials:
        state, run = folder.state(trial), folder.run(trial)
        done = state == "done"
        evaluation = run.read_json("evaluation.json") if done else {}
        files = {
            name: f"evaluation{evaluation_suffix(other.integrator, other.substeps)}.json"
            for name, other in study.evaluations.items()
        }
        others = {name: run.read_json(file) for name, file in files.items() if done and run.has(file)}
        outcomes[trial.identity] = Outcome(trial, state, run, evaluation, others)
    _warn_of_other_data(outcomes.values())
    grids = {}
    for name, grid in study.grids.items():
        labels = dict.fromkeys(labels for labels, _ in grid.trials)
        rows = tuple(
            Row(these, tuple(outcomes[t.identity] for (ls, _), t in grid.trials.items() if ls == these))
            for these in labels
        )
        grids[name] = GridResults(grid, rows, tuple(study.evaluations) if "integrators" in grid.show else ())
    return Results(study, grids)


def _warn_of_other_data(outcomes: Iterable[Outcome]) -> None:
    seen: dict[str, set[str]] = {}
    for outcome in outcomes:
        if data := outcome.evaluation.get("data"):
            seen.setdefault(outcome.trial.system, set()).add(data["sha256"])
    for system, digests in seen.items():
        if len(digests) > 1:
            warnings.warn(
                f"the runs on {system} are on {len(digests)} different data files: machines that share a study should "
                "share its data/ too",
                stacklevel=3,
            )


@dataclass(frozen=True)
class Summary:
    """The median of several numbers and a bootstrap interval of it; infinite where that many diverged."""

    median: float
    low: float
    high: float
    count: int


def least_median(summaries: Iterable[Summary | None]) -> float:
    """The least finite median; NaN where fewer than two have one, since there is nothing to compare."""
    medians = [s.median for s in summaries if s is not None and math.isfinite(s.median)]
    return min(medians) if len(medians) > 1 else math.nan


def summarize(values: Sequence[float]) -> Summary | None:
    """The median with its 95 % percentile bootstrap interval; None of nothing. Of one number, the number alone.

    >>> summarize([3.0, 1.0, 2.0])
    Summary(median=2.0, low=1.0, high=3.0, count=3)
    """
    if not values:
        return None
    numbers = np.sort(np.asarray(values, dtype=np.float64))
    drawn = np.random.default_rng(0).integers(len(numbers), size=(RESAMPLES, len(numbers)))
    medians = np.sort(_medians(numbers[drawn]))
    low, high = (medians[round(q * (RESAMPLES - 1))] for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
    return Summary(float(_medians(numbers[None])[0]), float(low), float(high), len(numbers))


def _medians(rows: np.ndarray) -> np.ndarray:
    """Medians that know infinity: of two middle ones the mean, infinite if one is."""
    rows = np.sort(rows, axis=1)
    middle = rows.shape[1] // 2
    return rows[:, middle] if rows.shape[1] % 2 else rows[:, middle - 1 : middle + 1].mean(1)


def compare_paired(ours: Mapping[int, float], theirs: Mapping[int, float]) -> float | None:
    """p of Wilcoxon's signed-rank test, two-sided, exact where it can be, on the logarithms of positive numbers that
    are paired by seed. None without a pair. Two that both diverged are a tie, and are left out.

    >>> round(compare_paired({0: 1.0, 1: 1.0, 2: 1.0}, {0: 2.0, 1: 3.0, 2: 4.0}), 3)
    0.25
    """
    from scipy import stats  # slow to import, and most who read results compare nothing

    pairs = [(ours[seed], theirs[seed]) for seed in ours.keys() & theirs.keys()]
    if not pairs:
        return None
    differences = np.array([0.0 if a == b else math.log(a) - math.log(b) for a, b in pairs])
    differences = np.nan_to_num(differences[differences != 0], posinf=1e300, neginf=-1e300)
    found: Any = stats.wilcoxon(differences) if len(differences) else None
    return 1.0 if found is None else float(found.pvalue)


def corrected(p_values: Mapping[Any, float]) -> dict[Any, float]:
    """Holm's correction for the number of comparisons.

    >>> corrected({"a": 0.01, "b": 0.04, "c": 0.03})
    {'a': 0.03, 'b': 0.06, 'c': 0.06}
    """
    found, largest = {}, 0.0
    for rank, (name, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p))
        found[name] = largest
    return {name: found[name] for name in p_values}


def published(grid: Grid, row: Row) -> tuple[float, float] | None:
    """States and energy that others published for a row, None where they did not."""
    pairs = itertools.product(row.labels, row.labels)
    return next((grid.published[pair] for pair in pairs if pair in grid.published), None)


def value_at(values: Any, place: Place, missing: Any = None) -> Any:
    """What an evaluation has at a place."""
    found: Any = values
    for name in place:
        if not isinstance(found, dict) or name not in found:
            return missing
        found = found[name]
    return found
