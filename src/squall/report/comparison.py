"""Several evaluated runs side by side: those that differ only by seed make one row of the table model."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall._process.messages import counted
from squall.report.tables import MEDIANS, Line, Table, medians, one_step_unit, references
from squall.runs.config import flat
from squall.runs.folder import Kind, RunFolder, RunFolderError
from squall.study.folder import StudyFolder
from squall.study.outcome import Metric, Outcome, metrics, read_outcome, relative_errors
from squall.study.results import Row

NOT_COMPARED = {
    "data.path",
    "training.seed",
    "training.log_every",
    "training.checkpoint_every",
    "device.devices",
    "device.strategy",
    "device.threads",
    "logger",
    "tensorboard",
}
"""Keys that do not tell two rows apart."""

TEST_DATA = ("data", "dt", "steps", "trajectories", "fields", "system", "standardized")
"""What two evaluations must share to stand in one table."""


@dataclass(frozen=True)
class Comparison:
    """Rows of runs on the same test trajectories.

    Attributes:
        rows: the runs that differ only by seed.
        checkpoint: which weights; of a run that has no such checkpoint, those it has.
        metrics: what is compared, by name.
        standardized: whether one-step errors are in units of each field's standard deviation.
    """

    rows: tuple[Row, ...]
    checkpoint: Kind
    metrics: Mapping[str, Metric]
    standardized: bool


def compare(paths: Sequence[Path | str], checkpoint: Kind = "best") -> Comparison:
    """Read evaluated runs and group those that differ only by seed.

    Args:
        paths: run folders, each with an `evaluation.json`; of a packed study also those that are not there any more.
        checkpoint: which weights; a run without a validation has only its last.

    Raises:
        RunFolderError: if a run is not evaluated, or two were evaluated on different data or steps.
    """
    folders = list(dict.fromkeys(Path(path) for path in paths))
    configs: list[dict[str, Any]] = []
    outcomes, test = [], {}
    trials: dict[Any, Path] = {}
    study_of = functools.cache(StudyFolder)  # so that a pack is read once
    for path in folders:
        outcome, config = _read(path, checkpoint, study_of)
        about = {name: outcome.evaluations[""][name] for name in TEST_DATA}
        if test and about != test:
            raise RunFolderError(
                f"{path} was evaluated on other test data than {folders[0]}: compare runs of one data set and one split"
            )
        test = about
        other = trials.setdefault((_compared(config), outcome.seed), path)
        if other is not path:  # one trial counted twice would narrow the interval
            raise RunFolderError(f"{other} and {path} are the same configuration with the same seed: give one")
        configs.append(config)
        outcomes.append(outcome)
    known = metrics(test["fields"]) | relative_errors(test["fields"])
    places = {name: Metric(place, checkpoint) for name, place in known.items()}
    return Comparison(_rows(configs, outcomes), checkpoint, places, test["standardized"])


def _read(path: Path, checkpoint: Kind, study_of: Callable[[Path], StudyFolder]) -> tuple[Outcome, dict[str, Any]]:
    """A run and its flat configuration, with a key more if other weights than asked for are compared."""
    folder = RunFolder(path)
    packed = study_of(path.parent.parent).packed.get(path.name) if path.parent.name == "runs" else None
    if packed and packed.state == "done" and not folder.has("config.yaml"):
        outcome = packed
    else:
        values = folder.read_config()
        outcome = read_outcome(folder, flat(values)["training.seed"], "done", values)
    config, again = flat(dict(outcome.config)), f"run `squall evaluate {path}` first"
    evaluation = outcome.evaluations.get("")
    if evaluation is None:
        raise RunFolderError(f"{path} is not evaluated yet: {again}")
    missing = [name for name in (*TEST_DATA, "checkpoints") if name not in evaluation]
    if missing or not evaluation["checkpoints"]:
        raise RunFolderError(f"the evaluation of {path} lacks '{(*missing, 'a checkpoint')[0]}': {again}")
    last = folder.checkpoint_steps("last")
    if last and last[0] != config["training.steps"] and not config.get("training.patience"):
        raise RunFolderError(f"{path} is not trained to its end (step {last[0]} of {config['training.steps']})")
    kind: Kind = checkpoint if checkpoint in evaluation["checkpoints"] else next(iter(evaluation["checkpoints"]))
    newest = folder.checkpoint_steps(kind)
    if newest and newest[0] != outcome.checkpoint(kind)["step"]:
        raise RunFolderError(f"{path} was trained on since it was evaluated: {again}")
    if checkpoint == "best" and not config["training.validate_every"] * config["data.validation"]:
        config["last weights"] = "no validation"
    return outcome, config


def _compared(config: Mapping[str, Any]) -> tuple[tuple[str, str], ...]:
    """What makes two runs members of one row."""
    return tuple(sorted((key, repr(value)) for key, value in config.items() if key not in NOT_COMPARED))


def _rows(configs: Sequence[dict[str, Any]], outcomes: Sequence[Outcome]) -> tuple[Row, ...]:
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_COMPARED)
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    members: dict[Any, list[Outcome]] = {}
    labels = {}
    for config, outcome in zip(configs, outcomes, strict=True):
        members.setdefault(_compared(config), []).append(outcome)
        labels[_compared(config)] = _label(config, differing)
    return tuple(Row((labels[key],), tuple(runs)) for key, runs in members.items())


def _label(config: Mapping[str, Any], differing: Sequence[str]) -> str:
    """What sets a row apart; the name of the loss always leads."""
    words = [config["loss.name"]]
    for key in differing:
        if key != "loss.name" and config.get(key) is not None:
            words.append(f"{key.rpartition('.')[2].replace('_', ' ')} {config[key]}")
    return ", ".join(words)


def comparison_table(comparison: Comparison) -> Table:
    """One column per row of runs and per prediction without a model, one line per metric."""
    columns = [*comparison.metrics.values()]
    lines = []
    for row, cells in zip(comparison.rows, medians(comparison.rows, columns), strict=True):
        lines.append(Line(f"{row.name} ({counted(len(row.outcomes), 'seed')})", cells))
    lines += references(comparison.rows, columns)
    best = "checkpoint with the smallest rollout error on the validation trajectories"
    title = best if comparison.checkpoint == "best" else "last checkpoint"
    return Table(title, tuple(comparison.metrics), tuple(lines)).transposed()


def comparison_note(comparison: Comparison) -> str:
    """What the numbers are."""
    return f"{MEDIANS}; {one_step_unit(comparison.standardized)}."
