"""Does a kill at any moment cost a bit? Commands are killed, given again, and compared with ones that were not.

    python benchmarks/kills.py --kills 1000 --out kills.jsonl

A kill comes at the k-th operation on a file, or in the middle of a write (a limit on the size of files, whose signal
kills once a file has reached it, also inside of HDF5). Every command runs in a forked child: simulate, train, evaluate,
predict, and a study with two workers, of which the study's own process is killed while they live, or one of them while
it lives. The same command then runs undisturbed, at once; what it leaves must equal, byte for byte, what the command
leaves that nobody killed, and no worker may remain. One line per kill goes into the file.
"""

import argparse
import contextlib
import importlib
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, MutableSequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import torch

from squall.data import write
from squall.losses import ImbalanceAwareLoss
from squall.runs.config import from_dict
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolderError
from squall.runs.simulate import simulate_to_file
from squall.runs.train import run
from squall.runs.trained import open_run
from squall.study import runner
from squall.study.definition import read_study
from squall.systems import CahnHilliard

SWEEPING = ("train", "study")
WORKER_KILLED = 3
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.listdir", "os.scandir"}
STEPS = {"steps": 12, "batch": 8, "log_every": 2, "validate_every": 4, "checkpoint_every": 3}
SETTINGS: dict[str, Any] = {
    "model": {"hidden": 4},
    "training": STEPS,
    "device": {"threads": 1, "accelerator": "cpu"},
}
STUDY = {
    "name": "killed",
    "seeds": 2,
    "base": SETTINGS | {"data": {"validation": 1, "test": 2}},
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "node"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
}


class Commands:
    """What is killed; every command works in a folder of its own and reads from `given`."""

    def __init__(self, given: Path) -> None:
        self.given = given

    def simulate(self, out: Path) -> None:
        if not (out / "ch.hdf5").exists():
            simulate_to_file(CahnHilliard(points=12), out / "ch.hdf5", trajectories=6, steps=20, seed=0)

    def train(self, out: Path) -> None:
        data = {"path": str(self.given / "ch.hdf5"), "validation": 1, "test": 2}
        run(from_dict(SETTINGS | {"data": data}), out / "run")

    def evaluate(self, out: Path) -> None:
        evaluate_runs([out / "run"])

    def predict(self, out: Path) -> None:
        if (out / "p.hdf5").exists():
            return
        trained = open_run(self.given / "run")
        trained.load()
        states = trained.predict(trained.experiment.split.test.read([0, 1])[:, 0], 20)
        write(out / "p.hdf5", states, dt=1.0)

    def study(self, out: Path) -> None:
        fork = SimpleNamespace(get_context=lambda _: multiprocessing.get_context("fork"))  # spares the imports
        vars(runner).update(multiprocessing=fork)
        try:
            runner.run_study(read_study(self.given / "study.yaml"), out / "study", workers=2)
        except RunFolderError as error:
            if "a worker was killed" not in str(error):
                raise
            os._exit(WORKER_KILLED)


def make(out: Path, given: Path, name: str) -> None:
    """The folder of a command, with what is there before it."""
    out.mkdir(parents=True)
    if name == "evaluate":
        shutil.copytree(given / "run", out / "run")


def import_all() -> None:
    """In this process, whose children then need not: all but automatic differentiation, whose threads do not fork."""
    for module in ("lightning_fabric", "scipy.linalg", "safetensors.torch", "rich.progress"):
        importlib.import_module(module)
    from_dict({})
    with torch.no_grad():
        loss = ImbalanceAwareLoss()
        loss(torch.ones(8, 1, 12), torch.zeros(8, 1, 12))


def in_child(work: Callable[[], object]) -> tuple[int, int]:
    """The exit code, or the signal with a minus, of work in a forked child, and the group of its processes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setpgid(0, 0)
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), child


def killed_at(
    operation: int, of_worker: bool, spent: Path, out: Path, work: Callable[[], object], counts: MutableSequence[int]
) -> None:
    """Work until the k-th operation on files of this process, or of the first worker that gets so far."""
    main, counted = os.getpid(), Counter[int]()

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event in OPERATIONS and str(arguments[0]).startswith(str(out)):
            process = os.getpid()
            counted[process] += 1
            is_worker = process != main
            counts[is_worker] = max(counts[is_worker], counted[process])
            if counted[process] == operation and is_worker == of_worker:
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(spent, os.O_CREAT | os.O_EXCL))
                    os.kill(process, signal.SIGKILL)

    sys.addaudithook(hook)
    work()


def killed_in_a_write(size: int, of_worker: bool, work: Callable[[], object]) -> None:
    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        sys.dont_write_bytecode = True  # Python would cut it off
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    def start(event: Any, start: Callable[[Any], None] = runner.start_worker) -> None:
        limit()
        start(event)

    if of_worker:
        vars(runner).update(start_worker=start)
    else:
        limit()
    work()


def remaining(group: int) -> bool:
    """Whether a worker lives ten seconds after its study."""
    for _ in range(100):
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        time.sleep(0.1)
    os.killpg(group, signal.SIGKILL)
    return True


def contents(out: Path, swept: bool) -> dict[str, Any]:
    """What a command left, without what names the time; `swept`: it clears up what a kill left half-written."""
    found: dict[str, Any] = {}
    for path in sorted(out.rglob("*")):
        name = str(path.relative_to(out))
        if not path.is_file() or path.name in (".lock", "environment.json", "state.pt", "checksums.json"):
            continue
        if path.name.endswith(".part"):
            if swept:
                found[name] = "left over"
        elif path.name == "metrics.jsonl":
            found[name] = [json.loads(line) | {"seconds": 0} for line in path.read_text().splitlines()]
        elif path.suffix == ".hdf5":
            with h5py.File(path) as file:
                found[name] = np.asarray(file["t0_fields/u"]).tobytes()
        elif path.suffix == ".npz":
            with np.load(path) as file:
                found[name] = {key: value.tobytes() for key, value in file.items()}
        elif path.suffix in (".json", ".yaml"):
            found[name] = path.read_text().replace(str(out), "")
        else:
            found[name] = path.read_bytes()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    import_all()
    draw, tally = random.Random(options.seed), Counter[tuple[str, bool]]()
    with contextlib.ExitStack() as stack:
        base = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        log = stack.enter_context(options.out.open("a")) if options.out else sys.stdout
        given = base / "given"
        given.mkdir()
        commands = Commands(given)
        (given / "study.yaml").write_text(json.dumps(STUDY))
        assert in_child(lambda: (commands.simulate(given), commands.train(given)))[0] == 0
        expected, operations = {}, {}
        names = ("train", "study", "simulate", "evaluate", "predict")
        spent, counts = base / "spent", multiprocessing.Array("i", 2, lock=False)
        for name in names:
            out = base / "reference" / name
            make(out, given, name)
            command, counts[:] = getattr(commands, name), [0, 0]
            assert in_child(lambda: killed_at(0, False, spent, out, lambda: command(out), counts))[0] == 0, name  # noqa: B023
            expected[name], operations[name] = contents(out, name in SWEEPING), tuple(counts)
        print(f"operations on files, by workers: {operations}", file=sys.stderr)
        done = 0
        while done < options.kills:
            name = names[done % len(names)]
            out, command = base / "killed", getattr(commands, name)
            make(out, given, name)
            half, of_worker = draw.random() < 0.5, name == "study" and draw.random() < 0.5
            at = int(10 ** draw.uniform(0, 4.5)) if half else draw.randint(1, operations[name][of_worker])
            if half:
                code, group = in_child(lambda: killed_in_a_write(at, of_worker, lambda: command(out)))  # noqa: B023
            else:
                spent.unlink(missing_ok=True)
                code, group = in_child(lambda: killed_at(at, of_worker, spent, out, lambda: command(out), counts))  # noqa: B023
            if code < 0 or code == WORKER_KILLED:
                again, _ = in_child(lambda: command(out))  # noqa: B023
                found = contents(out, name in SWEEPING)
                equal = again == 0 and found == expected[name] and not remaining(group)
                done += 1
                tally[name + " (worker)" * (code == WORKER_KILLED), equal] += 1
                line = {"command": name, "worker": code == WORKER_KILLED, "half-way": half, "at": at, "equal": equal}
                if not equal:
                    line["differs"] = sorted(
                        k for k in found.keys() | expected[name].keys() if found.get(k) != expected[name].get(k)
                    )
                print(json.dumps(line), file=log, flush=True)
            elif code:
                print(f"{name}: exit {code}, {half=}, {at=}", file=log, flush=True)
            shutil.rmtree(out)
    for (name, equal), count in sorted(tally.items()):
        print(f"{name}: {count} kills, {'equal' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
