"""A study made by hand: nothing is trained."""

from pathlib import Path

import numpy as np
import yaml

from squall.runs.config import to_dict
from squall.runs.folder import RunFolder
from squall.study.definition import read_study

STUDY = {
    "name": "by-hand",
    "about": "a study <of> four ends",
    "seeds": 2,
    "baseline": "original",
    "base": {"training": {"steps": 20}, "data": {"validation": 2, "test": 2}},
    "variants": {
        "CH": {"system": "cahn-hilliard", "model.name": "hnn"},
        "original": {"loss.name": "mse"},
        "T = 0": {"loss.temperature": 0.0},
        "T = 10": {"loss.temperature": 10.0},
        "T = 100": {"loss.temperature": 100.0},
    },
    "grids": {
        "table-1": {
            "about": "every end",
            "axes": [["CH"], ["original", "T = 0", "T = 100"]],
            "show": ["table", "fields", "temperature", "training"],
            "published": {
                "table": "imbalance_aware_learning.table_1",
                "columns": {"CH": "ch"},
                "rows": {"original": "original"},
            },
        },
        "one-step": {"axes": [["CH"], ["original"]], "seeds": 1, "show": ["one-step"]},
        "nothing-yet": {
            "axes": [["CH"], ["T = 10"]],
            "seeds": 1,
            "show": ["table", "fields", "temperature", "training", "one-step"],
        },
    },
}


def evaluation(error: float | None, best: float | None = None) -> dict:
    """What `evaluate` leaves, with one error everywhere; None is a run of which a rollout diverged."""

    def item(error: float | None) -> dict:
        return {
            "step": 20,
            "rollout": {"states": error, "energy": error, "diverged": int(error is None)},
            "one_step": {"mean": error or 1.0, "top_1_percent": error or 1.0},
            "regimes": {name: {"share": 0.3, "error": error or 1.0} for name in ("quiet", "active", "extreme")},
            "growth": {"max": 1.25},
            "baselines": {"persistence": {"states": 3.5, "energy": 0.5}},
            "curves": {
                "time": [0.125, 0.25, 0.375],
                "states": [1.12345e-7, error, 1 / 3],
                "energy": [0.5, None],
                "energy_truth": [[1.0, 0.5], [1.0, 0.25]],
            },
        }

    about = {
        "integrator": "euler",
        "dt": 0.125,
        "steps": 8,
        "trajectories": 2,
        "fields": ["u"],
        "system": "cahn-hilliard",
        "standardized": False,
        "data": {"bytes": 8, "sha256": "da7a"},
    }
    return {**about, "checkpoints": {"last": item(error), "best": item(best or error)}}


def trial(path, error: float | None, best: float | None = None, diverged_at: int | None = None) -> None:
    folder = RunFolder(path)
    folder.create()
    folder.write_json(
        "environment.json", {"commit": "c0ffee" * 6, "versions": {"torch": "2.0"}, "data": {"sha256": "da7a"}}
    )
    folder.append_metrics({"step": 10, "validation": {"rollout_states": error, "growth_factor": 1.5}})
    folder.write_json("evaluation.json", evaluation(error, best))
    folder.write_json("trial.json", {})
    truth = np.random.default_rng(0).normal(size=(2, 9, 1, 6))
    prediction = truth + 0.5
    if diverged_at is not None:
        prediction[:, diverged_at:] = np.nan
    axes = {"time": np.arange(9) / 8, "axis_0": np.arange(6.0)}
    steps = {"step_error": np.full((2, 8, 1, 6), 0.25, np.float32), "regime": np.full((2, 8, 1, 6), 3, np.int8)}
    if diverged_at is not None:  # made before these were kept
        steps = {}
    folder.write_arrays("rollouts.npz", **axes, truth=truth, prediction=prediction, **steps)


def make_study(folder: Path) -> Path:
    """A study with a done, a missing, a failed, a started and a diverged run."""
    folder.mkdir()
    (folder / "study.yaml").write_text(yaml.safe_dump(STUDY, sort_keys=False))
    runs = folder / "runs"
    trial(runs / "ch-original-seed-0", 0.4321, best=0.1234)
    trial(runs / "ch-t-100-seed-0", 0.0567)
    trial(runs / "ch-t-100-seed-1", None, diverged_at=4)
    failed = RunFolder(runs / "ch-t-0-seed-0")
    failed.create()
    failed.write_json("failed.json", {"step": 7, "message": "the loss is not finite"})
    started = RunFolder(runs / "ch-t-0-seed-1")
    started.create()
    for one in read_study(folder / "study.yaml").trials:
        if (runs / one.name).exists():
            RunFolder(runs / one.name).write_config(to_dict(one.config))
    return folder
