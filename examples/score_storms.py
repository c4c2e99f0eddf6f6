"""Which storms did the models of a study catch? Scores of forecasts on the sphere, as weather people make them.

    squall study run storms-small --out studies/storms-small
    python examples/score_storms.py studies/storms-small

Every run is rolled out from the first states of its test trajectories. For each loss, and for persistence and
climatology, the table has at 1, 3 and 5 days: RMSE of the height and ACC of the vorticity; storms (maxima of cyclonic
vorticity) caught, their position error and the bias of their strength; and the CSI of vorticity above the threshold,
point by point. `against` is the difference to the baseline, paired by seed: median, and the smallest and the largest.
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

import squall
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import cyclonic, find_storms, storm_scores
from squall.evaluation.weather import acc, climatology, event_scores, quantile_curve, rmse
from squall.report.figures import save
from squall.report.maps import map_figure
from squall.runs.folder import RunFolder
from squall.runs.trained import TrainedRun

DAYS = (1, 3, 5)
SHARE = 0.995
"""Storms reach this quantile of cyclonic vorticity in the test trajectories: half a per cent of the sphere."""

Scores = dict[str, list[float | None]]


class Judge:
    """The truth of a study, and the scores of a forecast against it."""

    def __init__(self, run: TrainedRun) -> None:
        split = run.experiment.split
        self.truth, self.fields = split.test.read(), split.test.fields
        self.grid = SphereGrid.of(split.test)
        self.weights = self.grid.areas
        self.climate = climatology(split.train.read())
        self.leads = [round(24 * day / split.test.dt) for day in DAYS]
        self.storms = self.intensity(self.truth)
        self.threshold = quantile_curve(self.storms, [SHARE], self.weights).item()

    def intensity(self, states: Tensor) -> Tensor:
        return cyclonic(states[:, :, self.fields.index("vorticity")], self.grid)

    def scores(self, forecast: Tensor) -> Scores:
        """By name, at each of the days."""
        height, vorticity = self.fields.index("height"), self.fields.index("vorticity")
        forecast, truth = forecast[:, self.leads].double(), self.truth[:, self.leads].double()
        here, there = self.intensity(forecast), self.storms[:, self.leads].double()
        storms = storm_scores(here, there, self.grid, self.threshold)
        events = event_scores(here, there, self.weights, self.threshold)
        return {
            "RMSE height, m": rmse(forecast, truth, self.weights)[:, height].tolist(),
            "ACC vorticity": acc(forecast, truth, self.climate, self.weights)[:, vorticity].tolist(),
            "storm CSI": storms["csi"],
            "position error, km": storms["position_error"],
            "strength bias, 1e-5/s": [None if x is None else 1e5 * x for x in storms["intensity_bias"]],
            "point CSI": events["csi"],
            "frequency bias": events["frequency_bias"],
        }


def runs_of(study: Path) -> dict[str, dict[int, Path]]:
    """The finished runs by their labels and seed."""
    found: dict[str, dict[int, Path]] = {}
    for path in sorted((study / "runs").iterdir()):
        if (path / "evaluation.json").exists():
            trial = json.loads((path / "trial.json").read_text())
            found.setdefault(", ".join(trial["labels"]), {})[trial["seed"]] = path
    if not found:
        raise SystemExit(f"{study} holds no finished run: squall study run storms-small --out {study}")
    return found


def opened(path: Path, study: Path) -> TrainedRun:
    """A run of a study, whose data are named from the folder of the study."""
    data = Path(RunFolder(path).read_config()["data"]["path"])
    return squall.open_run(path, str(data if data.is_absolute() else study / data))


def middle(values: Sequence[float | None]) -> float | None:
    known = [x for x in values if x is not None and x == x]
    return statistics.median(known) if known else None


def rows(scores: dict[str, dict[int, Scores]], baseline: str) -> list[str]:
    """Lines of a table in Markdown."""
    lines = ["| score | day | " + " | ".join(scores) + " |", "|" + "---|" * (len(scores) + 2)]
    for name in next(iter(next(iter(scores.values())).values())):
        for i, day in enumerate(DAYS):
            cells = []
            for label, by_seed in scores.items():
                value = middle([s[name][i] for s in by_seed.values()])
                cells.append("" if value is None else f"{value:.3g}" + _against(name, i, scores, label, baseline))
            lines.append(f"| {name} | {day} | " + " | ".join(cells) + " |")
    return lines


def _against(name: str, i: int, scores: dict[str, dict[int, Scores]], label: str, baseline: str) -> str:
    seeds = scores[label].keys() & scores.get(baseline, {}).keys()
    if label == baseline or len(seeds) < 2:
        return ""
    pairs = [(scores[label][seed][name][i], scores[baseline][seed][name][i]) for seed in sorted(seeds)]
    differences = [a - b for a, b in pairs if a is not None and b is not None]
    if not differences:
        return ""
    return f" ({statistics.median(differences):+.2g}; {min(differences):+.2g} … {max(differences):+.2g})"


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a study with weights, such as of storms-small")
    parser.add_argument("--baseline", default="MSE, one step", help="the labels that the others are compared with")
    options = parser.parse_args(words)
    table, picture = options.study / "storms.md", options.study / "storms.png"
    for path in (table, picture):
        if path.exists():
            raise SystemExit(f"{path} exists and is not overwritten: move it away")

    judge, scores, shown = None, {}, {}
    for label, by_seed in runs_of(options.study).items():
        for seed, path in by_seed.items():
            run = opened(path, options.study)
            judge = judge or Judge(run)
            forecast = run.predict(judge.truth[:, 0], max(judge.leads))
            scores.setdefault(label, {})[seed] = judge.scores(forecast)
            shown.setdefault(label, judge.intensity(forecast)[0, judge.leads[1]] * 1e5)
    assert judge is not None
    scores["persistence"] = {0: judge.scores(judge.truth[:, :1].expand_as(judge.truth))}
    scores["climatology"] = {0: judge.scores(judge.climate.expand_as(judge.truth))}

    lines = rows(scores, options.baseline)
    print("\n".join(lines))
    table.write_text("\n".join(lines) + "\n", encoding="utf-8")
    maps: dict[str, Any] = {"truth, day 3": judge.storms[0, judge.leads[1]] * 1e5, **shown}
    storms = {title: find_storms(field, judge.grid, judge.threshold * 1e5) for title, field in maps.items()}
    chosen = dict(list(maps.items())[:4])
    save(map_figure(chosen, judge.grid, unit="cyclonic vorticity, 1e-5/s", storms=storms), picture)
    print(f"\nstorms reach {judge.threshold * 1e5:.3g}e-5 /s; {len(judge.truth)} test trajectories\n{table}\n{picture}")


if __name__ == "__main__":
    main()
