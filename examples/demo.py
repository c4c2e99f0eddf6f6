"""Simulate two systems, train on each with the mean squared error and the imbalance-aware loss, and compare.

    python examples/demo.py --out demo

Trains two seeds of each loss on each system, two runs at a time with one thread each, one system after the other.
A second call resumes where the first stopped, and prints the comparison again once everything is trained.
"""

import argparse
import math
import multiprocessing
import time
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

from rich.console import Console
from rich.progress import Progress

from squall._process.progress import progress_bar
from squall._process.threads import keep_freed_memory
from squall.report import Comparison, compare, comparison_figure, comparison_table, terminal, write_figures
from squall.report.figures import save
from squall.runs.config import DataConfig, DeviceConfig, LossConfig, ModelConfig, RunConfig
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolder
from squall.runs.simulate import simulate_to_file
from squall.runs.train import run
from squall.study.outcome import Metric
from squall.study.results import Row
from squall.systems import CahnHilliard, KortewegDeVries, System
from squall.training.loop import TrainingSettings

SYSTEMS: dict[str, tuple[System, str]] = {
    "Korteweg-de Vries": (KortewegDeVries(), "node"),  # the cheaper one first
    "Cahn-Hilliard": (CahnHilliard(), "hnn"),
}
LOSSES = {"mse": LossConfig("mse"), "imbalance-aware": LossConfig("imbalance-aware")}
METRICS = ("rollout: states", "rollout: energy", "one step: mean", "one step: extreme")
SEEDS = (0, 1)
STEPS = 2000
HIDDEN = 64
LARGE = 1e9
"""The factor between a finite error and one that became infinite."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder for data, runs and pictures")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps of each run")
    options = parser.parse_args()
    console = Console()
    options.out.mkdir(parents=True, exist_ok=True)

    comparisons = []
    for name in SYSTEMS:
        console.rule(name)
        with progress_bar(console) as progress:
            data = simulated(name, options.out, progress)
            jobs = [
                (configuration(name, data, loss, seed, options.steps), options.out / f"{slug(name)}-{loss}-{seed}")
                for seed in SEEDS
                for loss in LOSSES
            ]
            train_all(jobs, progress)
        for checkpoint in ("best", "last"):
            comparison = compare([folder for _, folder in jobs], checkpoint)
            comparisons.append((f"{name} ({checkpoint} weights)", comparison))
            console.print(terminal(comparison_table(comparison)))
            print(save(comparison_figure(comparison), options.out / f"{slug(name)}-{checkpoint}.png"))
    console.rule("figures of each run")
    for path in sorted(options.out.glob("*/figures")):
        print(path)
    console.rule("which loss predicts better")
    console.print(verdict(comparisons), highlight=False)


def slug(name: str) -> str:
    return name.lower().replace(" ", "-")


def simulated(name: str, out: Path, progress: Progress) -> Path:
    system, _ = SYSTEMS[name]
    path = out / f"{slug(name)}.hdf5"
    if not path.exists():
        task = progress.add_task(f"simulating {name}", total=500, status="")
        simulate_to_file(system, path, progress=lambda done: progress.update(task, completed=done))
    return path


def configuration(name: str, data: Path, loss: str, seed: int, steps: int) -> RunConfig:
    return RunConfig(
        data=DataConfig(str(data)),
        model=ModelConfig(SYSTEMS[name][1], HIDDEN),
        loss=LOSSES[loss],
        training=TrainingSettings(steps=steps, seed=seed, validate_every=max(1, steps // 10)),
        device=DeviceConfig(accelerator="cpu", threads=1),
    )


def train_all(jobs: Sequence[tuple[RunConfig, Path]], progress: Progress) -> None:
    """Train in two processes; the bar follows what they write into their folders."""
    total = sum(config.training.steps for config, _ in jobs)
    task = progress.add_task(f"training {len(jobs)} models", total=total, status="")
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, mp_context=context, initializer=keep_freed_memory) as pool:
        pending: list[Future[None]] = [pool.submit(train_one, *job) for job in jobs]
        while not all(future.done() for future in pending):
            progress.update(task, completed=sum(steps_done(folder) for _, folder in jobs))
            time.sleep(0.5)
        for future in pending:
            future.result()
    progress.update(task, completed=total)


def train_one(config: RunConfig, folder: Path) -> None:
    run(config, folder)
    if not RunFolder(folder).has("figures/rollout_1.png"):
        evaluate_runs([folder])
        write_figures(folder)


def steps_done(folder: Path) -> int:
    lines = RunFolder(folder).read_metrics()
    return lines[-1]["step"] if lines else 0


def verdict(comparisons: Sequence[tuple[str, Comparison]]) -> str:
    """A line per system and checkpoint, from the numbers alone: which loss has the smaller rollout error."""
    parts = []
    for name, comparison in comparisons:
        rows = {row.name.split(",")[0]: row for row in comparison.rows}
        factors = {name: factor(rows["mse"], rows["imbalance-aware"], comparison.metrics[name]) for name in METRICS}
        better = "imbalance-aware" if factors[METRICS[0]] > 1 else "mse"
        worse = [metric for metric in METRICS[1:] if (factors[metric] > 1) != (better == "imbalance-aware")]
        but = f", but it is worse in {', '.join(worse)}" if worse else ""
        parts.append(f"{name}: {better} by a factor of {max(factors[METRICS[0]], 1 / factors[METRICS[0]]):.2f}{but}")
    return "\n".join([f"By the rollout error of the states, median of {len(SEEDS)} seeds:", *parts])


def factor(theirs: Row, ours: Row, metric: Metric) -> float:
    """The first row's median error divided by the second's; a diverged median counts as the larger one."""
    a, b = (summary.median if (summary := row.summary(*metric)) else math.inf for row in (theirs, ours))
    if math.isinf(a) or math.isinf(b):
        return 1.0 if a == b else LARGE if math.isinf(a) else 1 / LARGE
    return a / b if b else LARGE


if __name__ == "__main__":
    main()
