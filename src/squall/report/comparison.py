"""Several evaluated runs side by side: those that differ only by seed make one group."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.runs.config import flat
from squall.runs.folder import Kind, RunFolder, RunFolderError
from squall.study.results import ABSENT, Place, value_at

__all__ = ["Comparison", "Group", "Spread", "compare", "metrics"]

_ROLLOUT: dict[str, Place] = {
    "rollout: states": ("rollout", "states"),
    "rollout: energy": ("rollout", "energy"),
    "rollout: mass": ("rollout", "mass"),
    "rollout: diverged": ("rollout", "diverged"),
}
_ONE_STEP: dict[str, Place] = {
    "one step: mean": ("one_step", "mean"),
    "one step: top 1 %": ("one_step", "top_1_percent"),
    "one step: max": ("one_step", "max"),
    "one step: quiet": ("regimes", "quiet", "error"),
    "one step: active": ("regimes", "active", "error"),
    "one step: extreme": ("regimes", "extreme", "error"),
    "growth factor: median": ("growth", "median"),
    "growth factor: max": ("growth", "max"),
}


def metrics(fields: Sequence[str]) -> dict[str, Place]:
    """Every number that is compared. Of each, smaller is better."""
    vrmse: dict[str, Place] = {f"rollout: VRMSE of {name}": ("rollout", "vrmse", name) for name in fields}
    return _ROLLOUT | vrmse | _ONE_STEP


NOT_COMPARED = (
    "data.path",
    "training.seed",
    "training.log_every",
    "training.checkpoint_every",
    "device.threads",
    "tensorboard",
)
"""Keys that do not tell two groups apart."""


@dataclass(frozen=True)
class Spread:
    """One number over the seeds. A run that has none (diverged) counts as infinite."""

    values: tuple[float | None, ...]

    @property
    def median(self) -> float | None:
        """The median, None if half of the runs or more have no number."""
        middle = statistics.median([float("inf") if x is None else x for x in self.values])
        return None if middle == float("inf") else middle

    @property
    def range(self) -> tuple[float | None, float | None]:
        """The smallest and the largest; a largest of None is a run that has no number."""
        known = [x for x in self.values if x is not None]
        smallest = min(known) if known else None
        return smallest, max(known) if len(known) == len(self.values) else None


@dataclass(frozen=True)
class Group:
    """Runs that differ only by seed."""

    label: str
    seeds: tuple[int, ...]
    evaluations: tuple[dict[str, Any], ...]
    places: dict[str, Place]

    def spread(self, metric: str) -> Spread | None:
        """A metric over the seeds; None if it does not apply, such as the energy of data without a system."""
        found = [value_at(evaluation, self.places[metric], ABSENT) for evaluation in self.evaluations]
        present = [value for value in found if value is not ABSENT]
        return Spread(tuple(present)) if present else None

    def curves(self, name: str) -> list[list[float | None]]:
        """An error over rollout time, one list per run."""
        return [evaluation["curves"][name] for evaluation in self.evaluations if name in evaluation["curves"]]


@dataclass(frozen=True)
class Comparison:
    """Groups of runs on the same test trajectories, and what costs nothing on them."""

    groups: tuple[Group, ...]
    baselines: dict[str, dict[str, float]]
    checkpoint: Kind
    places: dict[str, Place]
    standardized: bool


def compare(paths: Sequence[Path | str], checkpoint: Kind = "best") -> Comparison:
    """Read evaluated runs and group those that differ only by seed.

    Args:
        paths: run folders, each with an `evaluation.json`.
        checkpoint: which weights; a run without a validation has only its last.

    Raises:
        RunFolderError: if a run is not evaluated, or two were evaluated on different data or steps.
    """
    configs, evaluations, about = [], [], {}
    paths = list(dict.fromkeys(Path(path) for path in paths))
    for path in paths:
        config, evaluation, test = _read(RunFolder(path), checkpoint)
        if about and about != test:
            raise RunFolderError(
                f"{path} was evaluated on other test data than {paths[0]}: compare runs of one data set and one split"
            )
        about = test
        configs.append(config)
        evaluations.append(evaluation)
    _refuse_repeated(configs, paths)
    places = metrics(about["fields"])
    groups = _grouped(configs, evaluations, places)
    return Comparison(groups, evaluations[0]["baselines"], checkpoint, places, about["standardized"])


def _read(folder: RunFolder, checkpoint: Kind) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The configuration of a run, the evaluation of its checkpoint, and what it was evaluated on."""
    config = flat(folder.read_config())
    again = f"run `squall evaluate {folder.path}` first"
    if not folder.has("evaluation.json"):
        raise RunFolderError(f"{folder.path} is not evaluated yet: {again}")
    found = folder.read_json("evaluation.json")
    try:
        test = {
            name: found[name] for name in ("data", "dt", "steps", "trajectories", "fields", "system", "standardized")
        }
        kind = checkpoint if checkpoint in found["checkpoints"] else next(iter(found["checkpoints"]))
        evaluation = found["checkpoints"][kind]
    except (KeyError, StopIteration) as error:
        raise RunFolderError(f"{folder.path / 'evaluation.json'} lacks {error}: {again}") from error
    last = folder.checkpoint_steps("last")
    if last and last[0] != config["training.steps"]:
        raise RunFolderError(f"{folder.path} is not trained to its end (step {last[0]} of {config['training.steps']})")
    newest = folder.checkpoint_steps(kind)
    if newest and newest[0] != evaluation["step"]:
        raise RunFolderError(f"{folder.path} was trained on since it was evaluated: {again}")
    if checkpoint == "best" and not config["training.validate_every"] * config["data.validation"]:
        config["last weights"] = "no validation"
    return config, evaluation, test


def _refuse_repeated(configs: list[dict[str, Any]], paths: Sequence[Path | str]) -> None:
    """One trial counted twice would shrink the spread over seeds."""
    seen: dict[Any, Path | str] = {}
    for config, path in zip(configs, paths, strict=True):
        trial = (_compared(config), config["training.seed"])
        if trial in seen:
            raise RunFolderError(f"{seen[trial]} and {path} are the same configuration with the same seed: give one")
        seen[trial] = path


def _compared(config: dict[str, Any]) -> tuple[tuple[str, str], ...]:
    """What makes two runs members of one group."""
    return tuple(sorted((key, repr(value)) for key, value in config.items() if key not in NOT_COMPARED))


def _grouped(
    configs: list[dict[str, Any]], evaluations: list[dict[str, Any]], places: dict[str, Place]
) -> tuple[Group, ...]:
    keys = dict.fromkeys(key for config in configs for key in config if key not in NOT_COMPARED)
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    members: dict[Any, list[int]] = {}
    for i, config in enumerate(configs):
        members.setdefault(_compared(config), []).append(i)
    return tuple(
        Group(
            _label(configs[indices[0]], differing),
            tuple(configs[i]["training.seed"] for i in indices),
            tuple(evaluations[i] for i in indices),
            places,
        )
        for indices in members.values()
    )


def _label(config: dict[str, Any], differing: list[str]) -> str:
    """What sets a group apart; the name of the loss always leads."""
    words = [config["loss.name"]]
    for key in differing:
        if key != "loss.name" and config.get(key) is not None:
            words.append(f"{key.rpartition('.')[2].replace('_', ' ')} {config[key]}")
    return ", ".join(words)
