"""A diagnosis of a run: its data, what the weights of its loss did, and where its errors are."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from squall.data import Source
from squall.evaluation.diagnosis import Unevenness, change, errors
from squall.runs.folder import Kind
from squall.runs.trained import open_run

WEIGHTS = ("temperature", "effective_fraction", "kl", "max_weight", "top_share", "gradient_noise")
"""What is logged of a training whose loss weights points."""


@dataclass(frozen=True)
class RunDiagnosis:
    """What a run learned from, and how.

    Attributes:
        change: the unevenness of the squared change of the training data.
        errors: of the squared one-step error on test trajectories; on those of the validation or the training if there
            are none.
        part: which these are: `test`, `validation` or `train`.
        source: these trajectories.
        checkpoint: whose errors, and its step.
        predicts: what the model predicts, `rate` or `state`.
        weights: first, median and last logged value of what the weights did; empty for a loss without weights.
    """

    change: Unevenness
    errors: Unevenness
    part: str
    source: Source
    checkpoint: tuple[Kind, int]
    predicts: Literal["rate", "state"]
    weights: Mapping[str, tuple[float, float, float]]


def diagnose_run(path: Path | str, data: str | None = None, *, trust: bool = False) -> RunDiagnosis:
    """Diagnose a trained run; the arguments are those of `open_run`.

    Raises:
        RunFolderError, ConfigError, CheckpointError: as `open_run` and `TrainedRun.load`.
        squall.data.DataError: if nothing changes in the data.
    """
    run = open_run(path, data, trust=trust)
    checkpoint = run.load()
    experiment = run.experiment
    parts = experiment.split._asdict()
    part = next(name for name in ("test", "validation", "train") if parts[name].trajectories)
    unevenness = errors(experiment.model, parts[part], experiment.integrator, experiment.normalization.std)
    weights = _weights(run.folder.read_metrics())
    predicts = experiment.config.model.predicts
    return RunDiagnosis(change(experiment.split.train), unevenness, part, parts[part], checkpoint, predicts, weights)


def _weights(lines: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float, float]]:
    logged = {name: [line[name] for line in lines if isinstance(line.get(name), float)] for name in WEIGHTS}
    if not logged["temperature"]:  # infinite, or of a loss that has none: every point weighs alike
        return {}
    return {name: (values[0], statistics.median(values), values[-1]) for name, values in logged.items() if values}
