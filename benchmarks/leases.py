"""What do the leases and the bookkeeping of a study cost per run, in seconds and in operations on the disk?

    python benchmarks/leases.py --runs 1000
    strace -f -c -e trace=%file,%desc python benchmarks/leases.py --runs 1000   # minus the same with --runs 1

The study is real, its workers are not: a run is done as soon as it begins. What is measured is therefore all that a
study does besides its runs. `--held` keeps each run for so many seconds first, with the heartbeats of the leases.
"""

import argparse
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import yaml

from squall.runs.folder import RunFolder
from squall.study.definition import read_study
from squall.study.folder import TRIAL
from squall.study.runner import run_study
from squall.study.worker import Task, Workers

STUDY = {
    "name": "leases",
    "base": {"training": {"steps": 10}},
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 3, "steps": 3}, "model.name": "hnn"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
}


class Instant(Workers):
    """Workers that leave the files of a run at once."""

    def __init__(self, size: int, held: float) -> None:
        self.size, self.held = size, held
        self.threads = ThreadPoolExecutor(size)

    def submit(self, batch: Sequence[Task]) -> Future[None]:
        return self.threads.submit(self.leave, batch)

    def leave(self, batch: Sequence[Task]) -> None:
        time.sleep(self.held)
        for task in batch:
            folder = RunFolder(task.path)
            folder.path.mkdir()
            for name in task.wanted:
                (folder.path / name).write_text("{}")
            (folder.path / TRIAL).write_text("{}")

    def stop(self) -> None:
        self.threads.shutdown(cancel_futures=True)


@contextmanager
def instant(count: int | None, held: float) -> Iterator[Workers]:
    yield Instant(count or 1, held)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--held", type=float, default=0.0, help="seconds that a run lasts")
    parser.add_argument("--folder", type=Path, default=None, help="on the disk to measure; a temporary one if left out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        path, out = Path(folder) / "study.yaml", Path(folder) / "out"
        path.write_text(yaml.safe_dump(STUDY | {"seeds": 1}))
        run_study(read_study(path), out, on=lambda count: instant(count, 0.0))  # with the simulation of its data
        path.write_text(yaml.safe_dump(STUDY | {"seeds": 1 + options.runs}))
        study = read_study(path)
        wall, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_SELF)
        run_study(study, out, workers=options.workers, on=lambda count: instant(count, options.held))
        wall, now = time.perf_counter() - wall, resource.getrusage(resource.RUSAGE_SELF)
    busy = now.ru_utime + now.ru_stime - used.ru_utime - used.ru_stime
    rounds = -(-options.runs // options.workers)
    overhead = (wall - rounds * options.held) / options.runs
    print(f"{options.runs} runs of {options.held} s: overhead per run {1e3 * overhead:.1f} ms", end=" ")
    print(f"(of processor time {1e3 * busy / options.runs:.1f} ms)")
    if options.held:
        print(f"of the time of the study {100 * (wall / (rounds * options.held) - 1):.2f} %")


if __name__ == "__main__":
    sys.exit(main())
