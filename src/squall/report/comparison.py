"""Several evaluated runs side by side: those that differ only by seed make one group."""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from squall.config import flat
from squall.run_folder import Kind, RunFolder, RunFolderError

__all__ = ["METRICS", "Comparison", "Group", "Spread", "compare"]

METRICS: dict[str, tuple[str, ...]] = {
    "rollout: states": ("rollout", "states"),
    "rollout: energy": ("rollout", "energy"),
    "rollout: mass": ("rollout", "mass"),
    "rollout: diverged": ("rollout", "diverged"),
    "one step: mean": ("one_step", "mean"),
    "one step: top 1 %": ("one_step", "top_1_percent"),
    "one step: max": ("one_step", "max"),
    "one step: quiet": ("regimes", "quiet", "error"),
    "one step: active": ("regimes", "active", "error"),
    "one step: extreme": ("regimes", "extreme", "error"),
    "growth factor: median": ("growth", "median"),
    "growth factor: max": ("growth", "max"),
}
"""Every number that is compared, and where `evaluation.json` has it. Of each, smaller is better."""

NOT_COMPARED = (
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

    def spread(self, metric: str) -> Spread | None:
        """A metric over the seeds; None if it does not apply, such as the energy of data without a system."""
        found = [_at(evaluation, METRICS[metric]) for evaluation in self.evaluations]
        present = [value for value in found if value is not _ABSENT]
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


def compare(paths: Sequence[Path | str], checkpoint: Kind = "best") -> Comparison:
    """Read evaluated runs and group those that differ only by seed.

    Args:
        paths: run folders, each with an `evaluation.json`.
        checkpoint: which weights; a run without a validation has only its last.

    Raises:
        RunFolderError: if a run is not evaluated, or two were evaluated on different data or steps.
    """
    configs, evaluations = [], []
    about: dict[str, Any] = {}
    paths = list(dict.fromkeys(Path(path) for path in paths))
    for path in paths:
        folder = RunFolder(path)
        configs.append(flat(folder.read_config()))
        if not folder.has("evaluation.json"):
            raise RunFolderError(f"{path} is not evaluated yet: run `squall evaluate {path}` first")
        found = folder.read_json("evaluation.json")
        checkpoints = found.pop("checkpoints")
        test = {name: found[name] for name in ("data", "dt", "steps", "fields", "system")}
        if about and about != test:
            raise RunFolderError(
                f"{path} was evaluated on other test data than {paths[0]}: compare runs of one data set"
            )
        about = test
        evaluations.append(checkpoints.get(checkpoint) or next(iter(checkpoints.values())))
    _refuse_repeated(configs, paths)
    return Comparison(_grouped(configs, evaluations), evaluations[0]["baselines"], checkpoint)


def _refuse_repeated(configs: list[dict[str, Any]], paths: Sequence[Path | str]) -> None:
    """One trial counted twice would shrink the spread over seeds."""
    seen: dict[str, Path | str] = {}
    for config, path in zip(configs, paths, strict=False):
        trial = repr([config[key] for key in config if key not in NOT_COMPARED or key == "training.seed"])
        if trial in seen:
            raise RunFolderError(f"{seen[trial]} and {path} are the same configuration with the same seed: give one")
        seen[trial] = path


def _grouped(configs: list[dict[str, Any]], evaluations: list[dict[str, Any]]) -> tuple[Group, ...]:
    keys = [key for key in configs[0] if key not in NOT_COMPARED]
    differing = [key for key in keys if len({repr(config.get(key)) for config in configs}) > 1]
    members: dict[str, list[int]] = {}
    for i, config in enumerate(configs):
        members.setdefault(_label(config, differing), []).append(i)
    return tuple(
        Group(
            label,
            tuple(configs[i]["training.seed"] for i in indices),
            tuple(evaluations[i] for i in indices),
        )
        for label, indices in members.items()
    )


def _label(config: dict[str, Any], differing: list[str]) -> str:
    """What sets a run apart; the loss by the one rule that it has."""
    words = [f"{config['loss.name']}"] if "loss.name" in differing or not differing else []
    for key in differing:
        if key != "loss.name" and config.get(key) is not None:
            words.append(f"{key.rpartition('.')[2].replace('_', ' ')} {config[key]}")
    return ", ".join(words) or config["loss.name"]


_ABSENT = object()


def _at(values: dict[str, Any], path: tuple[str, ...]) -> Any:
    found: Any = values
    for name in path:
        if not isinstance(found, dict) or name not in found:
            return _ABSENT
        found = found[name]
    return found
