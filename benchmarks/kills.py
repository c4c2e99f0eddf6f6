"""Does a kill at any moment cost a bit? Commands are killed, given again, and compared with ones that were not.

    python benchmarks/kills.py --kills 1000 --out kills.jsonl

A kill comes at the k-th operation on a file, or in the middle of a write (a limit on the size of files, whose signal
kills once a file has reached it, also inside of HDF5). Every command runs in a forked child: simulate, train, evaluate,
predict, and a study whose workers are this one process. Afterwards the same command runs undisturbed; what it leaves
must equal, byte for byte, what the command leaves that nobody killed. One line per kill goes into the file.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import threading
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import Future
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
from squall.runs.simulate import simulate_to_file
from squall.runs.train import run
from squall.runs.trained import open_run
from squall.study import runner
from squall.study.definition import read_study
from squall.systems import CahnHilliard

SWEEPING = ("train", "study")
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


class Inline:
    """A pool whose one worker is this process."""

    def __init__(self, *_: Any, **__: Any) -> None: ...
    def __enter__(self) -> "Inline":
        return self

    def __exit__(self, *_: object) -> None: ...
    def shutdown(self, **_: Any) -> None: ...
    def submit(self, function: Callable[..., Any], *arguments: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(function(*arguments))
        return future


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
        vars(runner).update(
            ProcessPoolExecutor=Inline, multiprocessing=SimpleNamespace(get_context=lambda _: threading)
        )
        runner.run_study(read_study(self.given / "study.yaml"), out / "study", workers=1)


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


def in_child(work: Callable[[], object]) -> int:
    """The exit code, or the signal with a minus, of work in a forked child."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            torch.set_num_threads(1)
            warnings.simplefilter("ignore")
            work()
            code = 0
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(operation: int, out: Path, work: Callable[[], object], told: Path | None = None) -> None:
    """Work until its k-th operation on files; with `told`, count them into that file instead."""
    count = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event in OPERATIONS and str(arguments[0]).startswith(str(out)):
            count += 1
            if count == operation:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    work()
    if told is not None:
        told.write_text(str(count))


def killed_in_a_write(size: int, work: Callable[[], object]) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    sys.dont_write_bytecode = True  # Python would cut it off
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    work()


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
        assert in_child(lambda: (commands.simulate(given), commands.train(given))) == 0
        expected, operations = {}, {}
        names = ("train", "study", "simulate", "evaluate", "predict")
        for name in names:
            out = base / "reference" / name
            make(out, given, name)
            command = getattr(commands, name)
            assert in_child(lambda: killed_at(0, out, lambda: command(out), base / "count")) == 0, name  # noqa: B023
            expected[name], operations[name] = contents(out, name in SWEEPING), int((base / "count").read_text())
        print(f"operations on files: {operations}", file=sys.stderr)
        done = 0
        while done < options.kills:
            name = names[done % len(names)]
            out, command = base / "killed", getattr(commands, name)
            make(out, given, name)
            half = draw.random() < 0.5
            at = int(10 ** draw.uniform(0, 4.5)) if half else draw.randint(1, operations[name])
            if half:
                code = in_child(lambda: killed_in_a_write(at, lambda: command(out)))  # noqa: B023
            else:
                code = in_child(lambda: killed_at(at, out, lambda: command(out)))  # noqa: B023
            if code < 0:
                again = in_child(lambda: command(out))  # noqa: B023
                found = contents(out, name in SWEEPING)
                equal = again == 0 and found == expected[name]
                done += 1
                tally[name, equal] += 1
                line = {"command": name, "half-way": half, "at": at, "equal": equal}
                if not equal:
                    line["differs"] = sorted(
                        k for k in found.keys() | expected[name].keys() if found.get(k) != expected[name].get(k)
                    )
                print(json.dumps(line), file=log, flush=True)
            shutil.rmtree(out)
    for (name, equal), count in sorted(tally.items()):
        print(f"{name}: {count} kills, {'equal' if equal else 'DIFFERENT'}")


if __name__ == "__main__":
    main()
