"""Does the unevenness of data tell whether weighting by the error helps?

A case is a system and a model of a committed study: the ratio of a weighted loss to MSE, geometric mean over seeds.
Weighting helped if the ratio is below 0.95. A rule says "weight" on one side of a threshold of one measure of the
training data. For every system, the threshold and the side with the most hits on all other systems are checked on its
own cases. Run it from the root of the repository:

    python benchmarks/advice.py
"""

import csv
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from squall.study.results import read_results
from squall.study.statistics import paired_ratio

HELPED = 0.95

MEASURES = {  # share of the squared change in its top 1 %, Gini coefficient: `squall diagnose` of the data
    "burgers": (0.637, 0.956),
    "korteweg-de-vries": (0.274, 0.920),
    "kuramoto-sivashinsky": (0.179, 0.753),
    "paper KdV": (0.260, 0.886),
    "paper CH": (0.251, 0.896),
    "storms": (0.106, 0.687),
    "diff_burgers": (0.335, 0.867),
    "diff_kdv": (0.284, 0.848),
    "diff_ks": (0.119, 0.673),
}

SYSTEM = {
    "diff_burgers": "burgers",
    "diff_kdv": "kdv",
    "korteweg-de-vries": "kdv",
    "paper KdV": "kdv",
    "diff_ks": "ks",
    "kuramoto-sivashinsky": "ks",
}
"""Data of one equation are one system: they are left out together."""

GRIDS = (
    ("rivals-small", "small", "MSE", "budget 0.3"),
    ("rivals-small", "large", "MSE", "budget 0.3"),
    ("default-small", "kdv", "MSE", "KL budget 0.3"),
    ("paper", "table-1", "original", "KL budget 0.3"),
    ("paper-small", "table-1", "original", "KL budget 0.3"),
    ("storms-small", "storms", "MSE", "budget 0.3"),
)

OUTCOMES = {
    "rollout, best weights": (("rollout", "states"), "best"),
    "top 1 %": (("one_step", "top_1_percent"), "last"),
}


@dataclass(frozen=True)
class Case:
    """A ratio of a weighted loss to MSE, and what may foretell it."""

    name: str
    system: str
    outcome: str
    loss: str
    ratio: float
    features: dict[str, float]

    @property
    def helped(self) -> bool:
        return self.ratio < HELPED


def cases() -> Iterator[Case]:
    """Of all committed results."""
    for study, grid, baseline, plain in GRIDS:
        found = read_results(Path("studies") / study).grids[grid]
        for key, rows in found.by_loss(baseline).items():
            config = rows[baseline].outcomes[0].config
            data = _data(study, key, config["data"]["path"])
            for loss, label in (("cap 3", "budget 1, cap 3"), ("KL budget 0.3", plain)):
                for outcome, (place, kind) in OUTCOMES.items():
                    if label not in rows:
                        continue
                    ratio = paired_ratio(rows[label].values(place, kind), rows[baseline].values(place, kind))
                    if ratio is not None:
                        rate = config["model"]["predicts"] == "rate"
                        yield _case(f"{study} {' '.join(key)}", data, outcome, loss, ratio.mean, rate)
    yield from _apebench()


def _data(study: str, key: Sequence[str], path: str) -> str:
    if study == "storms-small":
        return "storms"
    if study in ("paper", "paper-small", "default-small"):
        return f"paper {key[0]}"
    return next(name for name in MEASURES if Path(path).name.startswith(name))


def _apebench() -> Iterator[Case]:
    with Path("benchmarks/results/apebench.csv").open() as file:
        lines = [line for line in csv.DictReader(file) if line["steps"] == "2500"]
    numbers = {(x["scenario"], x["loss"], int(x["seed"])): x for x in lines}
    columns = {"rollout, best weights": "gmean100", "top 1 %": "one_step_top_1_percent"}
    for data, (loss, label), (outcome, column) in itertools.product(
        dict.fromkeys(x["scenario"] for x in lines),
        (("cap 3", "budget 1, cap 3"), ("KL budget 0.3", "budget 0.3")),
        columns.items(),
    ):
        of = {
            name: {s: float(x[column]) for (d, n, s), x in numbers.items() if (d, n) == (data, name)}
            for name in (label, "MSE")
        }
        ratio = paired_ratio(of[label], of["MSE"])
        if ratio is not None:
            yield _case(f"apebench {data}", data, outcome, loss, ratio.mean, rate=False)


def _case(name: str, data: str, outcome: str, loss: str, ratio: float, rate: bool) -> Case:
    share, gini = MEASURES[data]
    features = {"share of the top 1 %": share, "Gini coefficient": gini, "the model predicts the rate": float(rate)}
    return Case(name, SYSTEM.get(data, data), outcome, loss, ratio, features)


def fitted(known: Sequence[Case], feature: str) -> tuple[float, bool]:
    """The threshold, and whether "weight" is above it, with the most hits; "never" first among equals."""
    values = sorted({case.features[feature] for case in known})
    between = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    rules = [(math.inf, True), *itertools.product([*between, -math.inf], (True, False))]
    return max(rules, key=lambda rule: sum(says(rule, case, feature) == case.helped for case in known))


def says(rule: tuple[float, bool], case: Case, feature: str) -> bool:
    threshold, above = rule
    return (case.features[feature] > threshold) == above


def hits(found: Sequence[Case], feature: str) -> int:
    """On every system by the rule of the others."""
    count = 0
    for system in {case.system for case in found}:
        rule = fitted([case for case in found if case.system != system], feature)
        count += sum(says(rule, case, feature) == case.helped for case in found if case.system == system)
    return count


def main() -> None:
    found = list(cases())
    for loss, outcome in itertools.product(("cap 3", "KL budget 0.3"), OUTCOMES):
        some = [case for case in found if (case.loss, case.outcome) == (loss, outcome)]
        helped = sum(case.helped for case in some)
        systems = len({case.system for case in some})
        print(f"\n{loss}, {outcome}: helped in {helped} of {len(some)} cases on {systems} systems")
        for case in some:
            print(f"  {case.name:<42} {case.ratio:8.3g}  {'helped' if case.helped else ''}")
        print(f"  the more frequent answer every time: {max(helped, len(some) - helped)} hits of {len(some)}")
        for feature in some[0].features:
            print(f"  rule by {feature}: {hits(some, feature)} hits of {len(some)}")


if __name__ == "__main__":
    main()
