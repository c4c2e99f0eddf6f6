"""How long does `squall diagnose` take on a large file, and how much memory?

    python benchmarks/diagnosis.py --gigabytes 10 --threads 2

The file, random walks of four fields on 256 × 256 points in The Well's layout, is written into a temporary folder and
read once before the measurement, so that as much of it as fits is in the page cache.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import h5py
import numpy as np

import squall.data

TIMES, SHAPE = 128, (4, 256, 256)


def write(path: Path, gigabytes: float) -> None:
    """Write one trajectory of random walks, and then the others into the same file."""
    generator = np.random.default_rng(0)
    walk = generator.standard_normal((1, TIMES, *SHAPE), np.float32).cumsum(axis=1)
    squall.data.write(path, walk, dt=1.0)
    count = max(1, round(gigabytes * 1e9 / walk.nbytes))
    with h5py.File(path, "r+") as file:
        file.attrs["n_trajectories"] = count
        for i in range(SHAPE[0]):
            name = f"t0_fields/u{i}"
            attributes = dict(file[name].attrs)
            del file[name]
            whole = file.create_dataset(name, (count, TIMES, *SHAPE[1:]), np.float32)
            whole.attrs.update(attributes)
            for j in range(count):
                whole[j] = np.roll(walk[0, :, i], j, axis=-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=10.0)
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "walks.hdf5"
        write(path, arguments.gigabytes)
        with path.open("rb") as file:
            while file.read(1 << 26):
                pass
        command = [sys.executable, "-m", "squall", "diagnose", str(path)]
        begin = time.perf_counter()
        subprocess.run(
            [*command, "--out", str(Path(folder) / "out")],
            check=True,
            env=os.environ | {"OMP_NUM_THREADS": str(arguments.threads)},
            stdout=subprocess.DEVNULL,
        )
        wall, used = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        print(
            f"{path.stat().st_size / 1e9:.2f} GB: {wall:.1f} s, {used.ru_utime + used.ru_stime:.1f} s of CPU time, "
            f"at most {used.ru_maxrss / 1e6:.2f} GB of memory"
        )


if __name__ == "__main__":
    main()
