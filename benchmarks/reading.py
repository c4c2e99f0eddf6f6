"""How long does a random pair of neighbouring states take to read, in every format, and how long must it take?

    python benchmarks/reading.py                       # 500 MB a file
    python benchmarks/reading.py --megabytes 2000 --formats npy "Zarr v3"
    python benchmarks/reading.py --training            # what share of a paper-sized training is it?

The same trajectories (two fields, 32 x 32, float32) are written by other packages. Batches of 64 random pairs are read
by squall, by slices of the package that owns the format, put into one array, and, for its own layout, by The Well's
loader. Files are in the cache of the system. All is measured in one run, alternating; the median over the batches of
the processor time is printed, per pair.
"""

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch

import squall.data
from squall.data import Transitions

TIMES, CHANNELS, SPACE, BATCH, BATCHES = 100, 2, (32, 32), 64, 15


def well(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    (folder / "data").mkdir()
    path = squall.data.write(folder / "data" / "a.hdf5", states, dt=0.1, fields=["u", "v"])
    file = h5py.File(path)
    fields = [file["t0_fields/u"], file["t0_fields/v"]]
    return path, {}, lambda b, t: [field[b, t : t + 2] for field in fields]


def pdebench(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    path = folder / "pdebench.hdf5"
    with h5py.File(path, "w") as file:
        for channel, name in enumerate(("Vx", "density")):
            file[name] = states[:, :, channel]
        for axis, points in (("x", SPACE[0]), ("y", SPACE[1]), ("t", TIMES + 1)):
            file[f"{axis}-coordinate"] = np.linspace(0, 1, points)
    file = h5py.File(path)
    fields = [file["Vx"], file["density"]]
    return path, {}, lambda b, t: [field[b, t : t + 2] for field in fields]


def groups(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    path = folder / "groups.hdf5"
    with h5py.File(path, "w") as file:
        for number, trajectory in enumerate(states):
            file[f"{number:05}/data"] = np.moveaxis(trajectory, 1, -1)
            for axis, points in (("x", SPACE[0]), ("y", SPACE[1]), ("t", TIMES)):
                file[f"{number:05}/grid/{axis}"] = np.linspace(0, 1, points)
    file = h5py.File(path)
    data = [file[f"{number:05}/data"] for number in range(len(states))]
    return path, {}, lambda b, t: data[b][t : t + 2]


def weather(states: np.ndarray) -> Any:
    import xarray

    axes = ("sample", "time", "y", "x")
    return xarray.Dataset(
        {"u": (axes, states[:, :, 0]), "v": (axes, states[:, :, 1])},
        coords={"time": np.arange(TIMES) * 0.1, "y": np.arange(SPACE[0]) * 1.0, "x": np.arange(SPACE[1]) * 1.0},
    )


def netcdf4(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    path = folder / "a.nc"
    weather(states).to_netcdf(path, engine="h5netcdf")
    file = h5py.File(path)
    fields = [file["u"], file["v"]]
    return path, {}, lambda b, t: [field[b, t : t + 2] for field in fields]


def netcdf3(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    from scipy.io import netcdf_file

    path = folder / "a.cdf"
    weather(states).to_netcdf(path, engine="scipy")
    with path.open("rb") as raw:
        file = netcdf_file(raw, mmap=True)
        fields = [file.variables[name].data for name in "uv"]
    return path, {}, lambda b, t: [field[b, t : t + 2].astype(np.float32) for field in fields]


def zarr3(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    import zarr

    path = folder / "a.zarr"
    chunks = (1, 10, *SPACE)
    weather(states).to_zarr(path, zarr_format=3, consolidated=False, encoding={n: {"chunks": chunks} for n in "uv"})
    group = zarr.open_group(path, mode="r")
    fields = [group["u"], group["v"]]
    return path, {}, lambda b, t: [field[b, t : t + 2] for field in fields]


def npy(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    path = folder / "a.npy"
    np.save(path, states)
    array = np.load(path, mmap_mode="r")
    return path, {"axes": "batch time channel x y", "dt": 0.1}, lambda b, t: np.array(array[b, t : t + 2])


def tensors(folder: Path, states: np.ndarray) -> tuple[Path, dict[str, Any], Callable[[int, int], Any]]:
    path = folder / "a.pt"
    torch.save({"u": torch.from_numpy(states)}, path)
    array = torch.load(path, mmap=True, weights_only=True)["u"]
    return path, {"axes": "batch time channel x y", "dt": 0.1}, lambda b, t: array[b, t : t + 2].clone()


FORMATS = {
    "The Well": well,
    "PDEBench": pdebench,
    "PDEBench, groups": groups,
    "NetCDF-4": netcdf4,
    "NetCDF-3": netcdf3,
    "Zarr v3": zarr3,
    "npy": npy,
    "pt": tensors,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--formats", nargs="+", choices=list(FORMATS), default=list(FORMATS))
    parser.add_argument("--training", action="store_true")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.training:
        training()
        return
    warnings.simplefilter("ignore")
    count = arguments.megabytes * 10**6 // (TIMES * CHANNELS * SPACE[0] * SPACE[1] * 4)
    generator = np.random.default_rng(0)
    states = generator.standard_normal((count, TIMES, CHANNELS, *SPACE), dtype=np.float32)
    print(f"{count} trajectories, {states.nbytes / 1e6:.0f} MB, microseconds for a pair")
    print(f"{'format':<18}{'squall':>9}{'raw':>9}{'raw/squall':>12}{'The Well':>10}{'ratio':>7}")
    results, loader = {}, None
    for name in dict.fromkeys(["The Well", *arguments.formats]):  # whose loader the others are compared with
        make = FORMATS[name]
        with tempfile.TemporaryDirectory() as folder:
            path, options, raw = make(Path(folder), states)
            if name == "The Well":
                loader = the_well(path)
            warm(path)
            transitions = Transitions(squall.data.open(path, **options))
            times: dict[str, list[float]] = {"squall": [], "raw": [], "The Well": []}
            for _ in range(BATCHES):
                numbers = generator.integers(0, len(transitions), BATCH)
                rows, starts = (part.tolist() for part in transitions.locate(numbers))
                times["squall"].append(timed(lambda n=numbers, t=transitions: t.fetch(n)))
                times["raw"].append(
                    timed(lambda r=rows, s=starts, read=raw: np.stack([read(b, t) for b, t in zip(r, s, strict=True)]))
                )
                if name == "The Well":
                    times["The Well"].append(timed(lambda n=numbers, wells=loader: [wells[int(i)] for i in n]))
            medians = {key: 1e6 * statistics.median(values) / BATCH for key, values in times.items() if values}
            theirs = results.setdefault("loader", medians.get("The Well"))
            results[name] = medians
            ours, plain = medians["squall"], medians["raw"]
            print(
                f"{name:<18}{ours:9.1f}{plain:9.1f}{plain / ours:12.2f}{theirs:10.0f}{theirs / ours:7.0f}", flush=True
            )
    print(json.dumps(results))


def training() -> None:
    """A minibatch of 200 transitions of 50 points, beside a training step of HNN++ with 200 hidden units in float32."""
    import squall

    system = squall.CahnHilliard()
    initial = system.initial_states(20, torch.Generator().manual_seed(0))
    states = system.simulate(initial, steps=500)
    with tempfile.TemporaryDirectory() as folder:
        path = squall.data.write(Path(folder) / "ch.hdf5", states, dt=1e-4, lengths=1.0)
        file = squall.data.open(path)
        pairs = {"memory": Transitions(squall.data.load(file)), "the file": Transitions(file)}
        model = squall.HNN(system.structure, hidden=200, generator=torch.Generator().manual_seed(0))

        def train(steps: int) -> None:
            settings = squall.TrainingSettings(steps=steps, batch=200, log_every=1000, checkpoint_every=1000)
            squall.train(model, pairs["memory"], settings, loss=squall.ImbalanceAwareLoss())

        train(10)
        step = (min(timed(lambda: train(60)) for _ in range(3)) - min(timed(lambda: train(10)) for _ in range(3))) / 50
        for name, transitions in pairs.items():
            draws = torch.randint(0, len(transitions), (100, 200), generator=torch.Generator().manual_seed(1))
            fetch = statistics.median(timed(lambda n=n, t=transitions: t.fetch(n)) for n in draws)
            print(f"a minibatch from {name}: {1e6 * fetch:.0f} µs, {fetch / step:.2%} of a step of {1e3 * step:.1f} ms")


def warm(path: Path) -> None:
    """Read a file or folder once: the first to read from the disk would wait for it, and the second not."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file():
            with file.open("rb") as raw:
                while raw.read(2**24):
                    pass


def timed(call: Callable[[], Any]) -> float:
    start = time.process_time()  # on a busy machine the clock would count the others
    call()
    return time.process_time() - start


def the_well(path: Path) -> Any:
    from the_well.data import WellDataset

    return WellDataset(path=str(path.parent), n_steps_input=1, n_steps_output=1, use_normalization=False)


if __name__ == "__main__":
    main()
