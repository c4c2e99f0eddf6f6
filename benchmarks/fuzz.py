"""Do the readers of files, folders and configurations answer whatever they are given with an error in a sentence?

    pip install atheris
    python benchmarks/fuzz.py --minutes 60 --out faults

Valid files are mutated (bytes flipped, cut, doubled, spliced; values of YAML and JSON replaced) and read as the
commands read them. atheris follows the branches of squall's readers; a file that reaches a new one is mutated further.
A fault is an exception that the command line does not turn into a sentence, a signal such as a segmentation fault, or
more than ten seconds of the processor. The first file of each goes into --out; `--case FILE` repeats it.
"""

import argparse
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import atheris  # pyright: ignore[reportMissingImports]

os.environ["SQUALL_FAST"] = "0"  # numba compiles no code that atheris has changed
READERS_OF = ("cli", "data", "runs", "study", "report", "_process.documents", "_process.files", "_process.names")
with atheris.instrument_imports(include=[f"squall.{room}" for room in READERS_OF]):
    import numpy as np
    import torch

    import squall.data
    from squall._process.documents import dump_yaml, load_yaml, read_json
    from squall._process.limits import too_large
    from squall.data.endless import endless_refused
    from squall.report import compare, write_report
    from squall.runs.config import from_dict
    from squall.runs.emulator import load
    from squall.runs.evaluate import evaluate_runs
    from squall.runs.export import export_run
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


def mutated_document(content: bytes, suffix: str, draw: random.Random) -> bytes:
    with tempfile.NamedTemporaryFile(suffix=suffix) as file:
        Path(file.name).write_bytes(content)
        values = load_yaml(file.name) if suffix == ".yaml" else read_json(content.decode())
    changed = mutated_values(values, draw)
    return (dump_yaml(changed) if suffix == ".yaml" else json.dumps(changed)).encode(errors="replace")


def opened(**options: Any) -> Callable[[Path], object]:
    def read(path: Path) -> None:
        source = squall.data.open(path, **options)
        squall.data.summary(source)
        source.read([0])

    return read


def read_run(path: Path) -> None:
    trained = open_run(path)
    trained.load()
    folder = RunFolder(path)
    folder.read_metrics()
    compare([path])
    evaluate_runs([path])


def read_config(path: Path) -> None:
    values = load_yaml(path)
    if isinstance(values, dict):
        from_dict(values)


def read_packed(path: Path) -> None:
    read_results(path)
    write_report(path)


def read_export(path: Path) -> None:
    emulator = load(path)
    emulator(torch.zeros(1, 1, 12))


def make(base: Path) -> None:
    """What is mutated."""
    import xarray

    simulate_to_file(CahnHilliard(points=12), base / "ch.hdf5", trajectories=6, steps=10, seed=0)
    states = squall.data.open(base / "ch.hdf5").read(range(2)).numpy()
    np.save(base / "states.npy", states)
    np.savez(base / "states.npz", states)
    torch.save({"x": torch.from_numpy(states[:, 0]), "y": torch.from_numpy(states[:, 1])}, base / "states.pt")
    axes = {"time": np.arange(11.0), "x": np.arange(12.0)}
    fields = xarray.Dataset({"u": (("time", "x"), states[0, :, 0])}, axes)
    fields.to_netcdf(base / "u3.nc", engine="scipy")
    fields.to_netcdf(base / "u4.nc", engine="h5netcdf")
    fields.to_zarr(base / "u.zarr")
    import h5py

    with h5py.File(base / "tensor.h5", "w") as file:
        file["tensor"], file["t-coordinate"], file["x-coordinate"] = states[:, :, 0], *axes.values()
    with h5py.File(base / "u.mat", "w") as file:
        file["u"], file["t"] = states[:, :, 0].transpose(1, 2, 0), axes["time"][None]
        for name in "ut":
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    (base / "config.yaml").write_text(dump_yaml(SETTINGS))
    (base / "study.yaml").write_text(dump_yaml(STUDY))
    data = SETTINGS["data"] | {"path": str(base / "ch.hdf5")}
    run(from_dict(SETTINGS | {"data": data}), base / "run")
    evaluate_runs([base / "run"])
    export_run(base / "run", base / "export")
    run_study(read_study(base / "study.yaml"), base / "study", workers=1)
    pack_study(base / "study")
    shutil.rmtree(base / "study" / "runs")


READERS: dict[str, Callable[[Path], Any]] = {
    "ch.hdf5": opened(),
    **dict.fromkeys(("states.npy", "states.npz"), opened(axes="batch time channel x", dt=1.0)),
    **dict.fromkeys(("states.pt", "u3.nc", "u4.nc", "u.zarr", "tensor.h5", "u.mat"), opened(dt=1.0)),
    "config.yaml": read_config,
    "study.yaml": read_study,
    "run": read_run,
    "export": read_export,
    "study": read_packed,
}


def victims(base: Path) -> list[Path]:
    """The files that are mutated; an input begins with the number of its own."""
    files = sorted(path for name in READERS for path in [base / name, *(base / name).rglob("*")])
    kept = [x for x in files if x.is_file() and x.name not in (".lock", "README.md", "model.pt2")]
    return [path.relative_to(base) for path in kept if path.suffix not in (".png", ".gif")]


def fault(content: bytes, base: Path, files: list[Path]) -> str | None:
    """Read a mutated file as a command does; what is wrong, if anything."""
    victim = files[content[0] % len(files)]
    name = victim.parts[0]
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / name
        if (base / name).is_dir():
            shutil.copytree(base / name, path)
        (Path(place) / victim).write_bytes(content[1:])
        try:
            with endless_refused():
                READERS[name](path)
        except (ValueError, OSError, TrainingDiverged):
            return None
        except BaseException as error:
            if too_large(error):
                return None
            where = [x for x in traceback.extract_tb(error.__traceback__) if "/squall/" in x.filename][-1]
            return f"{victim}: {where.filename}:{where.lineno}: {type(error).__name__}: {error}"
    return None


def work(base: Path, out: Path, options: list[str]) -> None:
    """Mutate and read in this process until the time is over or a case kills it."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    files, seen = victims(base), {path.name for path in out.iterdir()}
    count = (base / "count").open("ab", buffering=0)

    def one(content: bytes) -> None:
        if not content:
            return
        (base / "current").write_bytes(content)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        problem = fault(content, base, files)
        signal.setitimer(signal.ITIMER_PROF, 0)
        count.write(b".")
        place = ":".join((problem or "").split(":")[1:4]).replace("/", "_")[-120:]
        if problem and place not in seen:
            seen.add(place)
            (out / place).write_bytes(content)
            print(f"FAULT {problem[:2000]}", flush=True)

    def mutated(content: bytes, largest: int, seed: int) -> bytes:
        draw, body = random.Random(seed), content[1:]
        suffix, kind = files[content[0] % len(files)].suffix if content else "", draw.random()
        if kind < 0.4 and suffix in (".yaml", ".json"):
            try:
                body = mutated_document(body, suffix, draw)
            except (ValueError, OSError, RecursionError):
                kind = 1.0
        elif kind < 0.7:
            body = mutated_bytes(body, draw)
        if kind >= 0.7 or not body:
            body = bytes(atheris.Mutate(body or b"0", largest - 1))
        return content[:1] + body[: largest - 1]

    atheris.Setup([sys.argv[0], *options], one, custom_mutator=mutated)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("faults"), help="a folder for files that show a fault")
    parser.add_argument("--case", type=Path, default=None, help="read one of them again")
    parser.add_argument("--base", type=Path, default=None, help=argparse.SUPPRESS)
    options, more = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.base is not None:  # this is the process that reads
        work(options.base, options.out, more)
    with tempfile.TemporaryDirectory() as place:
        base = Path(place)
        make(base)
        files = victims(base)
        if options.case is not None:
            print(fault(options.case.read_bytes(), base, files))
            return
        corpus = base / "corpus"
        corpus.mkdir()
        for number, path in enumerate(files):
            (corpus / f"seed{number}").write_bytes(bytes([number]) + (base / path).read_bytes())
        seed, end = options.seed, time.monotonic() + 60 * options.minutes
        while (left := int(end - time.monotonic())) > 0:
            words = [sys.executable, __file__, "--base", place, "--out", str(options.out), str(corpus)]
            words += [f"-seed={seed}", f"-max_total_time={left}", "-len_control=0", "-max_len=65536"]
            words += ["-timeout=120", "-rss_limit_mb=0", "-runs=20000", "-reduce_inputs=0", "-keep_seed=1"]
            words += [f"-artifact_prefix={place}/"]
            code = subprocess.run(words).returncode
            if code:
                print(f"FAULT the process ended with {code}", flush=True)
                shutil.copy(base / "current", options.out / f"ended-{code}-{seed}")
            seed += 1
        cases, faults = (base / "count").stat().st_size, len(list(options.out.iterdir()))
        print(f"{cases} cases, {len(list(corpus.iterdir()))} files reached new branches, {faults} faults", flush=True)


if __name__ == "__main__":
    main()
