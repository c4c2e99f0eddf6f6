"""What one run left, as plain data: read from its folder, or from the pack of its study."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Shaped

from squall.evaluation.scores import BANDS
from squall.runs.folder import SAMPLING, Kind, RunFolder
from squall.runs.record import SEAL

Place = tuple[str, ...]
"""Where a checkpoint's part of `evaluation.json` has a number: the names on the way to it."""

ABSENT = object()
"""Default of `value_at` for a missing number; null stands for a number that is NaN or infinite."""

FIELDS = "rollouts.npz"
"""The kept fields of the last weights."""

LOGGED = ("effective_fraction", "gradient_noise")
"""What the history of an outcome has of the log."""

STATES: Place = ("rollout", "states")
_ROLLOUT = ("states", "energy", "mass", "diverged")
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


VALID = ("correlation", "nrmse")
"""Criteria of a valid time, as `scores` names them."""


class Metric(NamedTuple):
    """A number of a run: its place, the checkpoint, and the integrator of the rollouts ("" for that of the training,
    else the suffix of the evaluation's file)."""

    place: Place
    checkpoint: Kind = "last"
    integrator: str = ""


def metrics(fields: Sequence[str]) -> dict[str, Place]:
    """Every headline number of an evaluation by its name; of each, smaller is better."""
    rollout: dict[str, Place] = {f"rollout: {name}": ("rollout", name) for name in _ROLLOUT}
    vrmse: dict[str, Place] = {f"rollout: VRMSE of {name}": ("rollout", "vrmse", name) for name in fields}
    return rollout | vrmse | _ONE_STEP


def relative_errors(fields: Sequence[str]) -> dict[str, Place]:
    """Errors relative to the truth by name, which evaluations of earlier versions lack; smaller is better."""
    kinds = {"nRMSE": "nrmse", "nRMSE, 99th percentile": "nrmse_p99"}
    return {f"rollout: {text} of {name}": ("scores", key, name) for text, key in kinds.items() for name in fields}


def scores(fields: Sequence[str], headline: Mapping[str, Any]) -> dict[str, Place]:
    """The headline scores that there are, by names that say what is best where it is not zero."""
    places = relative_errors(fields)
    for key in VALID:
        places |= {f"valid time by {key} (longer is better) of {x}": ("scores", "valid_time", key, x) for x in fields}
    for band in BANDS:
        places |= {
            f"power of {x}, {band} waves (best: 1)": ("scores", "spectrum", x, band, "power_ratio") for x in fields
        }
    for key in ("csi", "sedi"):
        places |= {f"events of {x}: {key.upper()} (best: 1)": ("scores", "events", x, key) for x in fields}
    if "storms" in headline:
        places["storms: CSI (best: 1)"] = ("scores", "storms", "csi")
        places["storms: position error, km"] = ("scores", "storms", "position_error")
    places |= {f"drift of {name}": ("scores", "conserved", name, "drift") for name in headline.get("conserved", {})}
    return places


@dataclass(frozen=True)
class Outcome:
    """One run, as far as it is.

    Attributes:
        name: of its folder.
        seed: of the training.
        state: `done`, `failed` (the training diverged), `started` or `missing`.
        config: its configuration, nested plain values.
        evaluations: what `evaluation.json` holds under "", evaluations by other integrators under their suffix.
        history: the validations during the training by quantity, also `step`, with what was logged at the same step
            of the weights and the gradient; None is a number that is not finite.
        environment: versions, commit, machine and data.
        failure: where and why the training diverged.
        arrays: gives the arrays of a file of the run, such as `rollouts.npz`, or None.
    """

    name: str
    seed: int
    state: str
    config: Mapping[str, Any] = field(repr=False)
    evaluations: Mapping[str, Mapping[str, Any]] = field(repr=False, default_factory=dict)
    history: Mapping[str, Sequence[float | None]] = field(repr=False, default_factory=dict)
    environment: Mapping[str, Any] = field(repr=False, default_factory=dict)
    failure: Mapping[str, Any] = field(repr=False, default_factory=dict)
    arrays: Callable[[str], dict[str, np.ndarray] | None] = field(repr=False, default=lambda name: None)

    def checkpoint(self, checkpoint: Kind, integrator: str = "") -> Mapping[str, Any]:
        """The evaluation of a checkpoint; weights that are both the best and the last are evaluated once."""
        checkpoints = self.evaluations.get(integrator, {}).get("checkpoints", {})
        return checkpoints.get(checkpoint) or next(iter(checkpoints.values()), {})

    def value(self, place: Place, checkpoint: Kind = "last", integrator: str = "") -> float | None:
        """A number of an evaluation; infinite where it became NaN or infinite or the training diverged, None where it
        does not apply or does not exist yet."""
        if self.state == "failed":
            return math.inf
        number = value_at(self.checkpoint(checkpoint, integrator), place)
        return None if number is ABSENT else math.inf if number is None else number

    def fields(self) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """Truth, prediction and one-step errors of some test trajectories, if they were kept."""
        return self.arrays(FIELDS)

    def regime_fields(self) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """The same, if the system has regimes."""
        fields = self.fields()
        return fields if fields and "regime" in fields and (fields["regime"] >= 0).any() else None

    def stiffness(self) -> dict[str, Shaped[np.ndarray, "..."]] | None:
        """The stiffness-aware index of the training transitions, if the run sampled by it."""
        return self.arrays(SAMPLING)


def read_outcome(folder: RunFolder, seed: int, state: str, config: Mapping[str, Any]) -> Outcome:
    """What a run folder holds; evaluations only of a run that is done."""
    paths = sorted(folder.path.glob("evaluation*.json"), key=lambda path: path.stem) if state == "done" else []
    metrics = folder.read_metrics()
    logged = {line["step"]: {name: line[name] for name in LOGGED if name in line} for line in metrics if "loss" in line}
    lines = [
        {"step": line["step"], **line["validation"], **logged.get(line["step"], {})}
        for line in metrics
        if "validation" in line
    ]
    quantities = dict.fromkeys(name for line in lines for name in line)
    environment = folder.read_json("environment.json") if folder.has("environment.json") else {}
    return Outcome(
        folder.path.name,
        seed,
        state,
        config,
        {path.stem.removeprefix("evaluation"): folder.read_json(path.name) for path in paths},
        {name: [None if (x := line.get(name)) is None else float(x) for line in lines] for name in quantities},
        {name: x for name, x in environment.items() if name != SEAL},  # the seal belongs to the folder
        folder.read_json("failed.json") if state == "failed" else {},
        lambda name: folder.read_arrays(name) if folder.has(name) else None,
    )


def value_at(values: Any, place: Place, missing: Any = ABSENT) -> Any:
    """What nested values have at a place."""
    for name in place:
        if not isinstance(values, dict) or name not in values:
            return missing
        values = values[name]
    return values
