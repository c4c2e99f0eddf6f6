"""Which storms did the models of a study catch? Scores of forecasts on the sphere, as weather people make them.

    squall study run storms-small --out runs/storms-small
    python examples/score_storms.py runs/storms-small --out studies/storms-small

Every run is rolled out from the first states of its test trajectories. `storms.md` has a table for each combination of
the other labels of the study, such as `one step, width 8`, with a column for each loss, for persistence and for
climatology, and the predictability horizon of the system from perturbed twins. Each cell has the median over seeds; in
brackets the difference to the baseline, paired by seed: its median, smallest and largest value. A score that is not
defined, such as the position error of a forecast without storms, is left out, and the cell says for how many seeds.
`storms.csv` has every number. The pictures are a map of day 3, storm CSI by lead time, the price in the mean, and
spectra by total wavenumber; `--animate` adds the map at all times, `storms.gif`.

A storm is a maximum of cyclonic vorticity that reaches the largest 0.5 % of the sphere at that lead time, in all test
trajectories. It is caught if the forecast has one within 1000 km. `in storms` are the points where the truth reaches
that threshold.

A model that draws noise has two columns: one member, and the mean of eight. `--on jets.nc` scores forecasts of another
file of the same fields and grid, with its own climatology.
"""

import argparse
import csv
import dataclasses
import itertools
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
import yaml
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

import squall
import squall.data
from squall.data import Source
from squall.evaluation.sphere import SphereGrid
from squall.evaluation.storms import cyclonic, find_storms, storm_scores
from squall.evaluation.weather import (
    acc,
    area_mean,
    climatology,
    event_scores,
    predictability_horizon,
    quantile_curve,
    rmse,
    spectra,
)
from squall.report.figures import COLOURS, save
from squall.report.maps import animate, map_figure
from squall.runs.folder import RunFolder
from squall.runs.trained import TrainedRun
from squall.systems import ShallowWater

DAYS = (1, 3, 5)
SHARE = 0.995
"""Storms reach this quantile of the cyclonic vorticity at their time: half a per cent of the sphere."""
BUMPS = 10.0
MEMBERS = 8
"""Of the ensemble whose mean is scored."""
TWINS = 2
"""So many trajectories have twins, whose first height differs by three bumps of at most so many metres."""

Values = Sequence[float | None]
Scores = dict[str, Values]
BySeed = dict[int, Scores]
Look = tuple[str, str, str]
Groups = dict[str, dict[str, BySeed]]
"""By the labels beside the loss, then by loss, then by seed."""


class Judge:
    """The truth, of a study's test or of another file, and the scores of a forecast against it."""

    def __init__(self, run: TrainedRun, system: ShallowWater, other: Source | None = None) -> None:
        split = run.experiment.split
        test, known = (split.test, split.train) if other is None else (other, other)
        self.fields, self.dt = test.fields, test.dt
        self.steps = round(24 * max(DAYS) / self.dt)
        self.days = [round(24 * day / self.dt) for day in DAYS]
        self.truth = test.read()[:, : self.steps + 1].double()
        self.grid = SphereGrid.of(test)
        self.weights = self.grid.areas
        self.climate = climatology(known.read()).double()
        self.storms = self.intensity(self.truth)
        self.thresholds = [
            quantile_curve(self.storms[:, i], [SHARE], self.weights).item() for i in range(self.steps + 1)
        ]
        first = self.truth[:TWINS]
        wrong = system.perturbed(first[:, 0], torch.Generator().manual_seed(0), BUMPS)
        self.horizon = predictability_horizon(first, system.simulate(wrong, self.steps), self.weights, self.dt)

    def intensity(self, states: Tensor) -> Tensor:
        return cyclonic(states[:, :, self.fields.index("vorticity")], self.grid)

    def scores(self, forecast: Tensor) -> Scores:
        """By name, at each step but the first state."""
        height, vorticity = self.fields.index("height"), self.fields.index("vorticity")
        forecast, truth = forecast[:, 1:].double(), self.truth[:, 1:]
        here, there = self.intensity(forecast), self.storms[:, 1:]
        storms = self.by_lead(lambda at, limit: storm_scores(here[:, at], there[:, at], self.grid, limit))
        points = self.by_lead(lambda at, limit: event_scores(here[:, at], there[:, at], self.weights, limit))
        inside = self.weights * (there >= there.new_tensor(self.thresholds[1:]).reshape(-1, 1, 1))
        square = area_mean((here - there).square(), self.weights)
        in_storms = ((here - there).square() * inside).sum((0, 2, 3)) / inside.sum((0, 2, 3))
        return {
            "RMSE height, m": rmse(forecast, truth, self.weights)[:, height].tolist(),
            "ACC vorticity": acc(forecast, truth, self.climate, self.weights)[:, vorticity].tolist(),
            "RMSE vorticity, 1e-5/s": (1e5 * square.mean(0).sqrt()).tolist(),
            "RMSE vorticity in storms, 1e-5/s": (1e5 * in_storms.sqrt()).tolist(),
            "storm hit rate": [a / (a + c) for a, c in zip(storms["hits"], storms["missed"], strict=True)],
            "storm CSI": storms["csi"],
            "position error, km": storms["position_error"],
            "strength bias, 1e-5/s": [None if x is None else 1e5 * x for x in storms["intensity_bias"]],
            "point CSI": points["csi"],
            "point SEDI": points["sedi"],
            "frequency bias": points["frequency_bias"],
        }

    def summary(self) -> str:
        """How strong and how many the storms are, and how far the system can be predicted."""
        reached = [f"{1e5 * self.thresholds[step]:.2f}" for step in self.days]
        counts = [
            sum(len(find_storms(field, self.grid, self.thresholds[step])) for field in self.storms[:, step])
            for step in self.days
        ]
        horizon = [f"{name} {hours:g} h" for name, hours in zip(self.fields, self.horizon.tolist(), strict=True)]
        return (
            f"On days {', '.join(map(str, DAYS))} storms reach {', '.join(reached)} (1e-5/s), and {len(self.truth)} "
            f"test trajectories have {', '.join(map(str, counts))}. Predictability horizon of twins {BUMPS:g} m apart: "
            f"{', '.join(horizon)} (inf: beyond {max(DAYS)} days)."
        )

    def by_lead(self, score: Callable[[slice, float], dict[str, list[float | None]]]) -> Scores:
        """Scores of each step but the first state, with its own threshold."""
        scores = [score(slice(i, i + 1), limit) for i, limit in enumerate(self.thresholds[1:])]
        return {name: [one[name][0] for one in scores] for name in scores[0]}

    def spectra(self, forecast: Tensor) -> dict[str, Float[np.ndarray, " degree"]]:
        """Power ratio and coherence of the vorticity on the middle day."""
        day, vorticity = self.days[1], self.fields.index("vorticity")
        at = slice(day, day + 1)
        found = {
            name: x[0, vorticity, 1:].numpy()
            for name, x in spectra(forecast[:, at].double(), self.truth[:, at], self.grid).items()
        }
        power = found["power_of_truth"]
        count = int((power > 1e-4 * power.max()).cumprod().sum())  # the solver damps and cuts the smallest scales
        return {name: found[name][:count] for name in ("power_ratio", "coherence")}


def runs_of(study: Path, order: Sequence[str]) -> dict[tuple[str, str], dict[int, Path]]:
    """The finished runs by loss and the labels beside it, and by seed; the variants in an order."""
    found: dict[tuple[str, ...], dict[int, Path]] = {}
    for path in sorted((study / "runs").glob("*")):
        if (path / "evaluation.json").exists():
            trial = json.loads((path / "trial.json").read_text())
            found.setdefault(tuple(trial["labels"]), {})[trial["seed"]] = path
    if not found:
        raise SystemExit(f"{study} holds no finished run: squall study run storms-small --out {study}")
    sequence = sorted(found, key=lambda labels: [order.index(label) for label in (*labels[1:], labels[0])])
    return {(labels[0], ", ".join(labels[1:])): found[labels] for labels in sequence}


def opened(path: Path, study: Path) -> TrainedRun:
    """A run of a study, whose data are named from the folder of the study."""
    data = Path(RunFolder(path).read_config()["data"]["path"])
    return squall.open_run(path, str(data if data.is_absolute() else study / data))


def forecasts(run: TrainedRun, first: Tensor, steps: int, loss: str) -> dict[str, Tensor]:
    """The rollout of a run, and the mean of an ensemble where its model draws noise."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = {loss: run.predict(first, steps)}
        if run.experiment.config.model.arguments.get("noise"):
            members = run.predict(first.repeat(MEMBERS, 1, 1, 1), steps).unflatten(0, (MEMBERS, -1))
            found[f"{loss}, mean of {MEMBERS}"] = members.mean(0)
    return found


# Numbers


def median(values: Values) -> float | None:
    known = [x for x in values if x is not None and np.isfinite(x)]
    return statistics.median(known) if known else None


def paired(name: str, step: int, ours: BySeed, theirs: BySeed) -> list[tuple[float, float]]:
    """A score of two losses for every seed that both have."""
    both = [(ours[seed][name][step], theirs[seed][name][step]) for seed in sorted(ours.keys() & theirs.keys())]
    return [(a, b) for a, b in both if a is not None and b is not None]


def table(losses: Mapping[str, BySeed], references: Mapping[str, BySeed], baseline: str, days: Values) -> list[str]:
    """Lines of a table in Markdown."""
    columns = {**losses, **references}
    lines = ["| score | day | " + " | ".join(columns) + " |", "|" + "---|" * (len(columns) + 2)]
    for name in next(iter(next(iter(columns.values())).values())):
        for day, step in zip(DAYS, days, strict=True):
            cells = []
            for label, by_seed in columns.items():
                values = [scores[name][step] for scores in by_seed.values()]
                value, have = median(values), sum(x is not None and np.isfinite(x) for x in values)
                pairs = paired(name, step, by_seed, losses.get(baseline, {})) if label in losses else []
                shown = "" if label == baseline else against(pairs)
                shown += f" [{have} of {len(values)} seeds]" if have < len(values) else ""
                cells.append("" if value is None else f"{value:.3g}" + shown)
            lines.append(f"| {name} | {day} | " + " | ".join(cells) + " |")
    return lines


def against(pairs: Sequence[tuple[float, float]]) -> str:
    differences = [a - b for a, b in pairs]
    if len(differences) < 2:
        return ""
    return f" ({statistics.median(differences):+.2g}; {min(differences):+.2g} … {max(differences):+.2g})"


def numbers(groups: Groups, references: Mapping[str, BySeed], days: Sequence[int]) -> list[list[object]]:
    """Every number of the days as rows of a file."""
    rows: list[list[object]] = [["group", "loss", "seed", "score", "day", "value"]]
    for group, losses in {**groups, "": references}.items():
        for loss, by_seed in losses.items():
            for seed, scores in by_seed.items():
                for name, values in scores.items():
                    for day, step in zip(DAYS, days, strict=True):
                        value = values[step]
                        rows.append([group, loss, seed, name, day, "" if value is None else f"{value:.5g}"])
    return rows


# Pictures


def panels(groups: Groups, rows: int = 1) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(4.6 * len(groups) + 1.8, 3.6 * rows), layout="constrained")
    return figure, figure.subplots(rows, len(groups), squeeze=False, sharey="row")


def looks_of(groups: Mapping[str, Mapping[str, object]]) -> dict[str, Look]:
    """Colour, line and marker of a loss, in whatever group it stands; losses beyond the colours have other lines."""
    losses = dict.fromkeys(label for losses in groups.values() for label in losses)
    looks = [(colour, *shape) for shape in (("-", "o"), ("-.", "s"), (":", "^")) for colour in COLOURS]
    return dict(zip(losses, itertools.cycle(looks), strict=False))


def legend(figure: Figure, corner: Axes) -> None:
    """Of all panels, each name once, beside the last panel of the first row."""
    handles = {}
    for panel in figure.axes:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    corner.legend(handles.values(), handles, loc="upper left", bbox_to_anchor=(1, 1), fontsize=8, frameon=False)


def range_over_seeds(panel: Axes, x: np.ndarray, courses: Sequence[Sequence[float]], label: str, look: Look) -> None:
    """The median as a line, and a band from the smallest to the largest."""
    values, (colour, line, _) = np.array(courses, dtype=float), look
    panel.plot(x, np.median(values, 0), line, color=colour, label=label, lw=1.5)
    panel.fill_between(x, values.min(0), values.max(0), color=colour, alpha=0.12, lw=0)


def lead_time_figure(groups: Groups, references: Mapping[str, BySeed], dt: float) -> Figure:
    (figure, axes), looks = panels(groups), looks_of(groups)
    for panel, (group, losses) in zip(axes[0], groups.items(), strict=True):
        for label, by_seed in losses.items():
            courses = [[np.nan if x is None else x for x in scores["storm CSI"]] for scores in by_seed.values()]
            lead = np.arange(1, len(courses[0]) + 1) * dt / 24
            range_over_seeds(panel, lead, courses, label, looks[label])
        for style, (label, by_seed) in zip(("--", ":"), references.items(), strict=False):
            values = [np.nan if x is None else x for x in by_seed[0]["storm CSI"]]
            panel.plot(lead, values, style, color="0.5", label=label, lw=1.2)
        panel.set(title=group, xlabel="lead time, days", ylim=(0, 0.9))
    axes[0, 0].set_ylabel("storm CSI (1 is best)")
    legend(figure, axes[0, -1])
    return figure


def price_figure(groups: Groups, baseline: str, days: Sequence[int]) -> Figure:
    """Errors in storms against errors everywhere, both in units of the baseline with the same seed."""
    everywhere, storms = "RMSE vorticity, 1e-5/s", "RMSE vorticity in storms, 1e-5/s"
    groups = {group: losses for group, losses in groups.items() if baseline in losses}
    (figure, axes), looks = panels(groups, len(days)), looks_of(groups)
    for row, day, step in zip(axes, DAYS, days, strict=True):
        for panel, (group, losses) in zip(row, groups.items(), strict=True):
            for label, by_seed in losses.items():
                if not paired(everywhere, step, by_seed, losses[baseline]):
                    continue
                ratios = [
                    np.array([a / b for a, b in paired(name, step, by_seed, losses[baseline])])
                    for name in (everywhere, storms)
                ]
                x, y = (np.median(values) for values in ratios)
                bars = [np.abs([[m - v.min()], [v.max() - m]]) for m, v in zip((x, y), ratios, strict=True)]
                colour, _, marker = looks[label]
                panel.errorbar(x, y, bars[1], bars[0], marker, color=colour, label=label, ms=5, lw=1)
            panel.axhline(1, color="0.7", lw=0.8, zorder=0)
            panel.axvline(1, color="0.7", lw=0.8, zorder=0)
            panel.set_title(f"{group}, day {day}", fontsize=9)
        row[0].set_ylabel(f"error in storms / {baseline}")
    for panel in axes[-1]:
        panel.set_xlabel(f"error everywhere / {baseline}")
    legend(figure, axes[0, -1])
    return figure


def spectra_figure(groups: Mapping[str, Mapping[str, Sequence[Mapping[str, np.ndarray]]]]) -> Figure:
    figure = Figure(figsize=(4.6 * len(groups) + 1.8, 6.4), layout="constrained")
    axes, looks = figure.subplots(2, len(groups), squeeze=False, sharex=True, sharey="row"), looks_of(groups)
    for column, (group, losses) in zip(axes.T, groups.items(), strict=True):
        for label, found in losses.items():
            for panel, name in zip(column, ("power_ratio", "coherence"), strict=True):
                courses = [spectrum[name] for spectrum in found]
                range_over_seeds(panel, np.arange(1, len(courses[0]) + 1), courses, label, looks[label])
        column[0].axhline(1, color="0.7", lw=0.8, zorder=0)
        column[0].set(title=f"{group}, day {DAYS[1]}", yscale="log")
        column[1].set_xlabel("total wavenumber")
        column[1].set_xticks(range(0, 21, 5))
    axes[0, 0].set_ylabel("power of the vorticity / truth")
    axes[1, 0].set_ylabel("coherence with the truth")
    legend(figure, axes[0, -1])
    return figure


UNIT = "cyclonic vorticity, 1e-5/s"


def strongest(judge: Judge) -> tuple[float, float]:
    """Where the strongest storm of the first test trajectory is on the middle day."""
    truth = judge.storms[0, judge.days[1]]
    row, column = divmod(int(truth.argmax()), truth.shape[1])
    return float(judge.grid.latitude[row]), float(judge.grid.longitude[column])


def day_map(judge: Judge, courses: Mapping[str, Tensor]) -> Figure:
    """Truth and forecasts of the first test trajectory, around its strongest storm; of the first group and seed."""
    day = judge.days[1]
    maps = {f"{name}, day {DAYS[1]}" if name == "truth" else name: field[day] for name, field in courses.items()}
    storms = {title: find_storms(field, judge.grid, judge.thresholds[day]) for title, field in maps.items()}
    scaled = {title: 1e5 * field for title, field in maps.items()}
    figure = map_figure(scaled, judge.grid, centre=strongest(judge), unit=UNIT, storms=storms)
    figure.set_size_inches(2.4 * len(maps) + 0.9, 2.5)  # a small file
    return figure


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, help="the folder of a study with weights, such as of storms-small")
    parser.add_argument("--out", type=Path, help="the folder of tables and pictures; the study if left out")
    parser.add_argument("--on", type=Path, metavar="FILE", help="of the trajectories to forecast")
    parser.add_argument("--animate", action="store_true", help="the map at all times, too")
    parser.add_argument("--shown", nargs="+", metavar="LOSS", help="losses on the map; the first three if left out")
    options = parser.parse_args(words)
    out = options.out or options.study
    names = ("storms.md", "storms.csv", *(f"storms_{x}.png" for x in ("map", "lead_time", "price", "spectra")))
    paths, film = [out / name for name in names], out / "storms.gif"
    for path in [*paths, *([film] if options.animate else [])]:
        if path.exists():
            raise SystemExit(f"{path} exists and is not overwritten: move it away")

    definition = yaml.safe_load((options.study / "study.yaml").read_text(encoding="utf-8"))
    baseline = definition["baseline"]
    order = [baseline, *(name for name in definition["variants"] if name != baseline)]
    made = definition["base"]["system"]
    system = ShallowWater(**{x.name: made[x.name] for x in dataclasses.fields(ShallowWater) if x.name in made})
    judge, groups, shown = None, {}, {}
    spectra_of: dict[str, dict[str, list[dict[str, np.ndarray]]]] = {}
    for (loss, group), by_seed in runs_of(options.study, order).items():
        for seed, path in by_seed.items():
            run = opened(path, options.study)
            judge = judge or Judge(run, system, None if options.on is None else squall.data.open(options.on))
            for label, forecast in forecasts(run, judge.truth[:, 0], judge.steps, loss).items():
                groups.setdefault(group, {}).setdefault(label, {})[seed] = judge.scores(forecast)
                spectra_of.setdefault(group, {}).setdefault(label, []).append(judge.spectra(forecast))
                shown.setdefault(label, judge.intensity(forecast)[0])
    assert judge is not None
    references: dict[str, BySeed] = {
        "persistence": {0: judge.scores(judge.truth[:, :1].expand_as(judge.truth))},
        "climatology": {0: judge.scores(judge.climate.expand_as(judge.truth))},
    }

    days = [step - 1 for step in judge.days]
    lines = []
    for group, losses in groups.items():
        lines += [f"## {group}" if group else "## All", "", *table(losses, references, baseline, days), ""]
    lines.append(judge.summary())
    out.mkdir(parents=True, exist_ok=True)
    paths[0].write_text("\n".join(lines) + "\n", encoding="utf-8")
    with paths[1].open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(numbers(groups, references, days))
    courses = {"truth": judge.storms[0], **{name: shown[name] for name in options.shown or list(shown)[:3]}}
    figures: list[Callable[[], Figure]] = [
        lambda: day_map(judge, courses),
        lambda: lead_time_figure(groups, references, judge.dt),
        lambda: price_figure(groups, baseline, days),
        lambda: spectra_figure(spectra_of),
    ]
    for path, draw in zip(paths[2:], figures, strict=True):
        save(draw(), path)
    if options.animate:
        captions = [f"{judge.dt * i:g} h" for i in range(judge.steps + 1)]
        fields = {title: 1e5 * field for title, field in courses.items()}
        animate(film, fields, judge.grid, centre=strongest(judge), unit=UNIT, times=captions, frames_per_second=3)
        paths.append(film)
    print("\n".join([*lines, "", *map(str, paths)]))


if __name__ == "__main__":
    main()
