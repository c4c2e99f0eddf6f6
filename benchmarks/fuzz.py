"""Do the readers of files, folders and configurations answer whatever they are given with an error in a sentence?

    python benchmarks/fuzz.py --minutes 60

Valid files are mutated (bytes flipped, cut, doubled, spliced; values of YAML and JSON replaced) and read as the
commands read them. An exception that the command line does not turn into a sentence, a signal such as a segmentation
fault, or more than ten seconds of the processor is printed with the seed that repeats it (`--case SEED`).
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import squall.data
from squall._process.documents import dump_yaml, load_yaml, read_json
from squall._process.limits import too_large
from squall.runs.config import from_dict
from squall.runs.evaluate import evaluate_runs
from squall.runs.folder import RunFolder
from squall.runs.simulate import simulate_to_file
from squall.runs.train import run
from squall.runs.trained import open_run
from squall.study.definition import read_study
from squall.study.results import pack_study, read_results
from squall.study.runner import run_study
from squall.systems import CahnHilliard
from squall.training.loop import TrainingDiverged

SECONDS, MEMORY = 10, 6 << 30
JUNK: list[Any] = [None, True, 0, -1, 10**30, 1e308, float("nan"), "", "x", "../x", "\0", "∞" * 300]
JUNK += [[], {}, [[]], {"": None}]
SETTINGS: dict[str, Any] = {
    "data": {"validation": 1, "test": 2},
    "model": {"hidden": 4},
    "training": {"steps": 4, "batch": 8, "validate_every": 2, "checkpoint_every": 2},
    "device": {"threads": 1, "accelerator": "cpu"},
}
STUDY = {
    "name": "fuzzed",
    "seeds": 1,
    "base": SETTINGS,
    "variants": {"CH": {"system": {"name": "cahn-hilliard", "trajectories": 6, "steps": 10}, "model.name": "node"}},
    "grids": {"all": {"axes": [["CH"]], "show": ["table"]}},
}


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """A file with a few errors."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 2, 8))):
        at = draw.randrange(len(data)) if data else 0
        length = draw.choice((1, 1, 4, 8, 64))
        match draw.randrange(5):
            case 0:
                data[at : at + 1] = bytes([draw.randrange(256)])
            case 1:
                data[at : at + length] = draw.choice((b"\0", b"\xff")) * length
            case 2:
                del data[at : at + length * draw.choice((1, 100))]
            case 3:
                data[at:at] = data[at : at + length]
            case _:
                other = draw.randrange(len(data)) if data else 0
                data[at : at + length] = data[other : other + length]
    return bytes(data)


def mutated_values(values: Any, draw: random.Random) -> Any:
    """A document with one value, key or entry replaced."""
    if isinstance(values, dict) and values and draw.random() < 0.85:
        key = draw.choice(list(values))
        if draw.random() < 0.1:
            return {draw.choice(("", "x", f"{key}s")) if name == key else name: x for name, x in values.items()}
        return values | {key: mutated_values(values[key], draw)}
    if isinstance(values, list) and values and draw.random() < 0.7:
        at = draw.randrange(len(values))
        return [*values[:at], mutated_values(values[at], draw), *values[at + 1 :]]
    return draw.choice(JUNK)


def mutate(path: Path, draw: random.Random) -> None:
    """A file in place."""
    if path.suffix in (".yaml", ".json") and draw.random() < 0.6:
        if path.suffix == ".yaml":
            text = dump_yaml(mutated_values(load_yaml(path), draw))
        else:
            text = json.dumps(mutated_values(read_json(path.read_text(encoding="utf-8")), draw))
        path.write_text(text, encoding="utf-8", errors="replace")
    else:
        path.write_bytes(mutated_bytes(path.read_bytes(), draw))


def read_data(path: Path) -> None:
    source = squall.data.open(path)
    squall.data.summary(source)
    source.read([0])


def read_run(path: Path) -> None:
    trained = open_run(path)
    trained.load()
    folder = RunFolder(path)
    folder.read_metrics()
    folder.read_arrays("rollouts.npz")
    evaluate_runs([path])


def read_config(path: Path) -> None:
    values = load_yaml(path)
    if isinstance(values, dict):
        from_dict(values)


def make(base: Path) -> None:
    """What is mutated."""
    simulate_to_file(CahnHilliard(points=12), base / "ch.hdf5", trajectories=6, steps=10, seed=0)
    source = squall.data.open(base / "ch.hdf5")
    states = source.read(range(2)).numpy()
    np.save(base / "states.npy", states)
    np.savez(base / "states.npz", states)
    torch.save(torch.from_numpy(states), base / "states.pt")
    (base / "config.yaml").write_text(dump_yaml(SETTINGS))
    (base / "study.yaml").write_text(dump_yaml(STUDY))
    data = SETTINGS["data"] | {"path": str(base / "ch.hdf5")}
    run(from_dict(SETTINGS | {"data": data}), base / "run")
    evaluate_runs([base / "run"])
    run_study(read_study(base / "study.yaml"), base / "study", workers=1)
    pack_study(base / "study")
    shutil.rmtree(base / "study" / "runs")


READERS: dict[str, Callable[[Path], Any]] = {
    **dict.fromkeys(("ch.hdf5", "states.npy", "states.npz", "states.pt"), read_data),
    "config.yaml": read_config,
    "study.yaml": read_study,
    "run": read_run,
    "study": read_results,
}


def case(seed: int, base: Path) -> str | None:
    """Mutate and read, in this process; what is wrong, if anything."""
    draw = random.Random(seed)
    name = draw.choice(list(READERS))
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        if (base / name).is_dir():
            shutil.copytree(base / name, path)
            files = sorted(p for p in path.rglob("*") if p.is_file() and p.suffix != ".hdf5" and p.name != ".lock")
            victim = draw.choice(files)
        else:
            victim = Path(shutil.copy(base / name, path))
        mutate(victim, draw)
        try:
            READERS[name](path)
        except (ValueError, OSError, TrainingDiverged):
            return None
        except BaseException as error:
            if too_large(error):
                return None
            where = traceback.extract_tb(error.__traceback__)[-1]
            return f"{victim.relative_to(place)}: {type(error).__name__}: {error} ({where.filename}:{where.lineno})"
    return None


def in_child(seed: int, base: Path, count: int) -> tuple[int, str]:
    """`count` cases from a seed on: how many were done, and what was wrong with the last."""
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        warnings.simplefilter("ignore")
        for number in range(count):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)
            signal.alarm(12 * SECONDS)  # for what waits, also on a busy machine
            problem = case(seed + number, base)
            os.write(tell, b".")
            if problem:
                os.write(tell, problem[:2000].encode(errors="replace"))
                break
        os._exit(0)
    os.close(tell)
    with os.fdopen(told, "rb") as pipe:
        said = pipe.read().decode(errors="replace")
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    done = len(said) - len(said.lstrip("."))
    if code < 0:
        slow = -code in (signal.SIGALRM, signal.SIGPROF)
        return done + 1, "took more than ten seconds" if slow else f"died of signal {-code}"
    return done, said.lstrip(".")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, default=None, help="repeat one, with its traceback")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        child = os.fork()  # automatic differentiation starts threads, which do not fork
        if child == 0:
            make(base)
            os._exit(0)
        os.waitpid(child, 0)
        if options.case is not None:
            print(case(options.case, base))
            return
        seed, found, end = options.seed, Counter[str](), time.monotonic() + 60 * options.minutes
        while time.monotonic() < end:
            done, problem = in_child(seed, base, 50)
            if problem:
                found[problem[:60]] += 1
                print(f"case {seed + done - 1}: {problem}", flush=True)
            seed += max(done, 1)
        print(f"{seed - options.seed} cases, {sum(found.values())} problems", file=sys.stderr)


if __name__ == "__main__":
    main()
