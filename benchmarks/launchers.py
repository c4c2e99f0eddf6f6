"""What do worker processes, several commands on one folder, and Ray add to a study of one-minute runs?

    python benchmarks/launchers.py --runs 8 --workers 2

The trainings are real, but each step waits for its turn on a clock, so that a run trains for a minute on a busy machine
too. What the study lasts beyond that is the overhead: starting, leases, checkpoints, collected files, evaluation.
"""

import argparse
import contextlib
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import yaml

from squall.models import NODE

STEPS = 1000


class Waiting(NODE):
    """A model whose passes in training are `seconds` apart."""

    def __init__(self, *, seconds: float) -> None:
        super().__init__(hidden=3, generator=torch.Generator().manual_seed(0))
        self.seconds, self.due = seconds, 0.0

    def forward(self, u: torch.Tensor) -> torch.Tensor:
        if self.training:
            now = time.monotonic()
            self.due = (self.due or now) + self.seconds
            time.sleep(max(0.0, self.due - now))
        return super().forward(u)


@contextlib.contextmanager
def cluster(workers: int) -> Iterator[str]:
    """The address of a Ray cluster of this machine, for the block."""
    started: Any = importlib.import_module("ray.cluster_utils").Cluster(
        initialize_head=True, head_node_args={"num_cpus": workers, "include_dashboard": False}
    )
    try:
        yield started.address
    finally:
        started.shutdown()


def measure(way: str, definition: Path, out: Path, workers: int) -> float:
    """Seconds that a study lasts."""
    words = [sys.executable, "-m", "squall", "study", "run", str(definition), "--out", str(out)]
    commands = [[*words, "--workers", "1"]] * workers if way == "leases" else [[*words, "--workers", str(workers)]]
    with contextlib.ExitStack() as stack:
        if way == "ray":
            commands[0] += ["--on", "ray", "--address", stack.enter_context(cluster(workers))]
        begin = time.monotonic()
        started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
        codes = [process.wait() for process in started]
        if any(codes):
            sys.exit(f"{way} failed")
        return time.monotonic() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=60.0, help="of a training")
    parser.add_argument("--ways", nargs="+", default=["processes", "leases", "ray"])
    parser.add_argument("--repetitions", type=int, default=1)
    options = parser.parse_args()
    os.environ |= {"PYTHONPATH": f"{Path(__file__).parent}:{os.environ.get('PYTHONPATH', '')}", "OMP_NUM_THREADS": "1"}
    study = {
        "name": "launchers",
        "seeds": options.runs,
        "base": {
            "data": {"validation": 1, "test": 2},
            "model": {"name": "launchers.Waiting", "arguments": {"seconds": options.seconds / STEPS}},
            "training": {"steps": STEPS, "batch": 8, "log_every": 10, "validate_every": 500, "checkpoint_every": 100},
            "device": {"accelerator": "cpu"},
        },
        "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}}},
        "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
    }
    for _ in range(options.repetitions):
        for way in options.ways:
            with tempfile.TemporaryDirectory() as folder:
                definition, out = Path(folder, "study.yaml"), Path(folder, "out")
                definition.write_text(yaml.safe_dump(study))
                wall = measure(way, definition, out, options.workers)
                logs = [path.read_text().splitlines() for path in out.glob("runs/*/metrics.jsonl")]
            trained = sum(max(json.loads(line)["seconds"] for line in lines) for lines in logs) / options.workers
            extra = wall - trained
            print(f"{way:10} study {wall:7.1f} s, trainings {trained:7.1f} s", end=" ")
            print(f"overhead {100 * extra / trained:5.2f} %, {extra:5.1f} s", flush=True)


if __name__ == "__main__":
    main()
