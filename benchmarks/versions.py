"""Is this version as fast as another one? Process time on one thread, each version in processes of its own, in turn.

    git worktree add /tmp/before COMMIT
    python benchmarks/versions.py /tmp/before/src --rounds 3
    python benchmarks/versions.py /tmp/before/src --rounds 5 --tasks "squall --help" "squall train" "squall evaluate"

A ratio below 1: this version is faster. Process time hides the other programs of a machine, but not that they share its
caches: ratios of single rounds then differ by a tenth.
"""

import argparse
import importlib
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

HERE = Path(__file__).parents[1] / "src"
TASKS = (
    "train hnn",
    "train node",
    "together hnn",
    "together node",
    "simulate ch",
    "simulate kdv",
    "loss",
    "loss large",
    "squall --help",
    "squall train",
    "squall evaluate",
)
BATCH, HIDDEN, MEMBERS = 200, 64, 12


def least(call: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest call after one to warm up."""
    call()
    seconds = []
    for _ in range(times):
        start = time.process_time()
        call()
        seconds.append(time.process_time() - start)
    return min(seconds)


def transitions():
    from squall.data import InMemory, Transitions

    states = 0.5 * torch.randn(20, 101, 1, 50, generator=torch.Generator().manual_seed(0))
    return Transitions(InMemory(states, dt=1e-4, lengths=1.0))


def model(kind: str, seed: int = 0) -> torch.nn.Module:
    import squall

    def laplacian(v: torch.Tensor) -> torch.Tensor:
        return (v.roll(1, -1) - 2 * v + v.roll(-1, -1)) * 2500

    generator = torch.Generator().manual_seed(seed)
    if kind == "hnn":
        return squall.HNN(laplacian, hidden=HIDDEN, generator=generator)
    return squall.NODE(1, HIDDEN, generator=generator)


def settings(steps: int):
    import squall

    return squall.TrainingSettings(steps=steps, batch=BATCH, log_every=1000, checkpoint_every=1000)


def train(kind: str) -> float:
    """One step of a training, without what happens once."""
    import squall

    data = transitions()

    def run(steps: int) -> None:
        squall.train(model(kind), data, settings(steps), loss=squall.ImbalanceAwareLoss())

    return (least(lambda: run(50)) - least(lambda: run(10))) / 40


def together(kind: str) -> float:
    """One step of a member of a batch of trainings."""
    import squall

    warnings.simplefilter("ignore", DeprecationWarning)  # these paths are known to versions before the rooms too
    ensemble, sampling = (importlib.import_module(f"squall.{name}") for name in ("ensemble", "sampling"))
    data = transitions()

    def run(steps: int) -> None:
        members = [
            ensemble.Member(
                model(kind, seed), squall.ImbalanceAwareLoss(), sampling.UniformSampler(len(data), BATCH, seed)
            )
            for seed in range(MEMBERS)
        ]
        ensemble.train_together(members, data, settings(steps))

    return (least(lambda: run(20), 2) - least(lambda: run(5), 2)) / 15 / MEMBERS


def simulate(kind: str) -> float:
    """One step of 100 trajectories."""
    import squall

    system = {"ch": squall.CahnHilliard, "kdv": squall.KortewegDeVries}[kind]()
    initial = system.initial_states(100, torch.Generator().manual_seed(0))
    return least(lambda: system.simulate(initial, steps=30)) / 30


def loss(kind: str) -> float:
    """One forward and backward pass of the default loss."""
    import squall

    function, generator = squall.ImbalanceAwareLoss(), torch.Generator().manual_seed(0)
    shape = (20, 2, 64, 64) if kind == "large" else (BATCH, 1, 50)
    prediction, target = torch.randn(2, *shape, generator=generator).unbind()
    prediction.requires_grad_()

    def passes() -> None:
        for _ in range(50):
            function(prediction, target).backward()

    return least(passes, 5) / 50


def command(kind: str) -> float:
    """A command from its start to its end: `--help`, a training of 200 steps, an evaluation of three trajectories."""
    with tempfile.TemporaryDirectory() as folder:
        data, run = f"{folder}/data.hdf5", f"{folder}/run"
        train = ["train", "--data.path", data, "--data.validation", "2", "--data.test", "3", "--training.steps", "200"]
        words = {"--help": ["--help"], "train": [*train, "--out", run], "evaluate": ["evaluate", run]}
        if kind != "--help":
            seconds(["simulate", "cahn-hilliard", "--trajectories", "20", "--steps", "50", "--out", data])
        if kind == "evaluate":
            seconds(words["train"])
        return seconds(words[kind])


def seconds(words: list[str]) -> float:
    """Processor time of a command, threads and children included."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "squall.cli", *words], capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def measure(task: str) -> float:
    torch.set_num_threads(1)
    name, _, kind = task.partition(" ")
    return {"train": train, "together": together, "simulate": simulate, "loss": loss, "squall": command}[name](kind)


def in_a_process(source: Path, task: str) -> float:
    environment = {**os.environ, "PYTHONPATH": str(source), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, str(source), "--measure", task]
    return float(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the src folder of the other version")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--measure", choices=TASKS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(measure(options.measure))
        return
    for task in options.tasks:
        pairs = [(in_a_process(options.other, task), in_a_process(HERE, task)) for _ in range(options.rounds)]
        before, after = (1e3 * min(times) for times in zip(*pairs, strict=True))
        ratios = ", ".join(f"{ours / theirs:.2f}" for theirs, ours in pairs)
        print(f"{task:14} {before:8.3f} ms {after:8.3f} ms  ratio {after / before:.2f}  (rounds: {ratios})", flush=True)


if __name__ == "__main__":
    main()
