"""Nearly real weather: trajectories of NeuralGCM, a pretrained toy model that starts from a state of ERA5.

Both come in the wheel of neuralgcm, which wants JAX; an environment of its own keeps it apart from PyTorch:

    python -m venv gcm && gcm/bin/pip install "neuralgcm==1.2.2" "jax<0.7" scipy
    gcm/bin/python examples/neuralgcm_states.py gcm.nc --days 5 --members 2
    squall train --data.path gcm.nc --data.split time --data.validation 0.1 --data.test 0.2 --model.name unet \\
        --model.predicts state --model.residual true --training.residual state --out runs/gcm
    squall evaluate runs/gcm --storms=-geopotential_500

The model is stochastic: members start on 2 January 1959, 0 UTC, and drift apart. The file has geopotential,
temperature and winds at 500 and 850 hPa on 64 × 128 Gaussian latitudes and longitudes, every six hours, in the layout
of ERA5, so that squall makes a channel of each level. A day of one member takes about 40 s of a core.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import xarray

START = np.datetime64("1959-01-02T00", "ns")
FIELDS = ("geopotential", "temperature", "u_component_of_wind", "v_component_of_wind")
LEVELS = (500, 850)


def trajectories(days: int, members: int, seed: int) -> list[xarray.Dataset]:
    """States of each member every six hours; sea and ice stay as they are at first."""
    import jax
    from neuralgcm import PressureLevelModel, demo

    model = PressureLevelModel.from_checkpoint(demo.load_checkpoint_tl63_stochastic())
    start = demo.load_data(model.data_coords)
    forcings = model.forcings_from_xarray(start)
    inputs, first = (read(start.isel(time=0)) for read in (model.inputs_from_xarray, model.forcings_from_xarray))
    hours = np.timedelta64(6, "h")
    day = jax.jit(lambda state: model.unroll(state, forcings, steps=4, timedelta=hours, start_with_input=True))
    times = START + np.arange(4 * days) * hours
    runs = []
    for key in jax.random.split(jax.random.key(seed), members):
        state, parts = model.encode(inputs, first, key), []
        for i in range(days):
            state, states = day(state)
            part = model.data_to_xarray(jax.device_get(states), times=times[4 * i : 4 * i + 4])
            parts.append(chosen(part))
            print(f"member {len(runs) + 1} of {members}, day {i + 1} of {days}", flush=True)
        runs.append(xarray.concat(parts, "time"))
    return runs


def chosen(states: xarray.Dataset) -> xarray.Dataset:
    """The fields and levels that the file holds, of all that the model has."""
    return states[list(FIELDS)].sel(level=list(LEVELS))


def write(runs: Sequence[xarray.Dataset], out: Path) -> None:
    """Members as one NetCDF file of ERA5's layout, (member, time, level, latitude, longitude)."""
    data = xarray.concat(runs, "member").transpose("member", "time", "level", "latitude", "longitude")
    data.attrs = {"source": "neuralgcm, tl63_stochastic_mini, from ERA5 of 1959-01-02T00"}
    data["level"].attrs = {"units": "hPa"}
    data["latitude"].attrs = {"units": "degrees_north"}
    data["longitude"].attrs = {"units": "degrees_east"}
    data.to_netcdf(out)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the NetCDF file to write")
    parser.add_argument("--days", type=int, default=5)
    parser.add_argument("--members", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of the model's noise")
    options = parser.parse_args(words)
    if options.out.exists():
        raise SystemExit(f"{options.out} exists and is not overwritten: name another file")
    if min(options.days, options.members) < 1:
        raise SystemExit(f"--days is {options.days} and --members {options.members}; both must be at least 1")
    write(trajectories(options.days, options.members, options.seed), options.out)
    print(options.out)


if __name__ == "__main__":
    main()
