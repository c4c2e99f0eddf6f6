"""Write a data set of your own: two fields that a vortex carries around and that spread at different rates.

    c_t + v·∇c = κ ∇²c,   v = (−∂ψ/∂y, ∂ψ/∂x),   ψ = cos(x) + cos(y),   on the periodic square of width 2π

The fields `dye` (κ = 0.01) and `heat` (κ = 0.05) start as random smooth blobs. The solver is spectral in space and
of fourth order in time; nothing here knows of squall but the last call. Everything is dimensionless.

    python examples/write_own_data.py vortex.hdf5
    squall train --data.path vortex.hdf5 --out runs/vortex
"""

import argparse
from collections.abc import Callable

import numpy as np

import squall.data

WIDTH = 2 * np.pi
DIFFUSIVITY = {"dye": 0.01, "heat": 0.05}


def vortex(points: int) -> Callable[[np.ndarray], np.ndarray]:
    """The rate c ↦ c_t of fields (..., field, x, y)."""
    x = np.arange(points) * WIDTH / points
    velocity = np.sin(x)[None, :], -np.sin(x)[:, None]  # −∂ψ/∂y and ∂ψ/∂x
    k = np.fft.fftfreq(points, 1 / points)
    wave = k[:, None], k[None, : points // 2 + 1]
    kept = (abs(wave[0]) < points / 3) & (abs(wave[1]) < points / 3)  # no aliasing of the product
    diffusion = -np.array(list(DIFFUSIVITY.values()))[:, None, None] * (wave[0] ** 2 + wave[1] ** 2)

    def rate(fields: np.ndarray) -> np.ndarray:
        spectrum = np.fft.rfft2(fields) * kept
        slopes = (np.fft.irfft2(1j * axis * spectrum, s=fields.shape[-2:]) for axis in wave)
        carried = sum(v * slope for v, slope in zip(velocity, slopes, strict=True))
        return np.fft.irfft2(diffusion * spectrum - np.fft.rfft2(carried) * kept, s=fields.shape[-2:])

    return rate


def blobs(trajectories: int, points: int, seed: int) -> np.ndarray:
    """Smooth random fields (trajectory, field, x, y): the waves 1 to 3 of either axis."""
    noise = np.fft.rfft2(np.random.default_rng(seed).standard_normal((trajectories, 2, points, points)))
    k = np.fft.fftfreq(points, 1 / points)
    smooth = (abs(k[:, None]) <= 3) & (abs(k[None, : points // 2 + 1]) <= 3)
    fields = np.fft.irfft2(noise * smooth, s=(points, points))
    return fields / fields.std(axis=(-2, -1), keepdims=True)


def simulate(fields: np.ndarray, steps: int, dt: float) -> np.ndarray:
    """Trajectories (trajectory, time, field, x, y) by the classical Runge-Kutta scheme."""
    rate = vortex(fields.shape[-1])
    states = [fields]
    for _ in range(steps):
        u = states[-1]
        k1 = rate(u)
        k2 = rate(u + dt / 2 * k1)
        k3 = rate(u + dt / 2 * k2)
        k4 = rate(u + dt * k3)
        states.append(u + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4))
    return np.stack(states, axis=1)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", help="of the new file")
    parser.add_argument("--trajectories", type=int, default=20)
    parser.add_argument("--points", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--dt", type=float, default=0.02)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)

    states = simulate(blobs(options.trajectories, options.points, options.seed), options.steps, options.dt)
    squall.data.write(
        options.path,
        states.astype(np.float32),
        dt=options.dt,
        fields=tuple(DIFFUSIVITY),
        lengths=WIDTH,
        name="vortex",
        parameters={f"diffusivity_{name}": value for name, value in DIFFUSIVITY.items()},
        provenance={"made_by": "examples/write_own_data.py", "seed": options.seed},
    )
    print(squall.data.open(options.path))


if __name__ == "__main__":
    main()
