"""
Land, missing days and cell areas
=================================

A NetCDF file as a model of the ocean writes it: temperature on latitudes and longitudes, NaN on land, and a few
days that are missing. ``squall.data.open`` finds the mask, the gaps and the areas of the cells.
"""

import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray

import squall

latitude, longitude = np.linspace(-60, 60, 31), np.arange(0, 360, 6.0)
y, x = np.deg2rad(latitude)[:, None], np.deg2rad(longitude)
days = np.arange(80)
waves = np.sin(3 * x - 0.1 * days[:, None, None]) * np.cos(2 * y)
temperature = 28 * np.cos(y) ** 2 + waves
temperature[:, (np.sin(2 * x) * np.cos(3 * y) > 0.6)] = np.nan  # land
temperature[[20, 21, 50]] = np.nan  # missing days

folder = Path(tempfile.mkdtemp())
xarray.Dataset(
    {"sst": (("time", "latitude", "longitude"), temperature, {"units": "degC"})},
    {
        "time": ("time", days, {"units": "days since 2000-01-01"}),
        "latitude": ("latitude", latitude, {"units": "degrees_north"}),
        "longitude": ("longitude", longitude, {"units": "degrees_east"}),
    },
).to_netcdf(folder / "sst.nc", engine="h5netcdf")

source = squall.data.open(folder / "sst.nc")
print(source)
print("boundary:", source.boundary, "  whole states:", int(source.valid.sum()), "of", source.valid.numel())
pairs = squall.data.Transitions(source)
print(len(pairs), "one-step pairs touch no gap")

# %%
# The mask and the areas, and the weights of the loss for the persistence forecast: land has none, and a cell counts
# by its area and its error.

now, following = pairs.fetch([0])
loss = squall.ImbalanceAwareLoss()
print("loss of persistence:", float(loss(now, following, mask=source.mask, measure=source.measure)))
error = (now - following).square()
weight = squall.imbalance_weights(error, squall.KLBudget(0.3), mask=source.mask, measure=source.measure)

figure, panels = plt.subplots(1, 3, figsize=(11, 2.6), layout="constrained")
sea = source.mask[0]
for axes, title, values in (
    (panels[0], "sst, degC", now[0, 0]),
    (panels[1], "relative area of the cell", source.measure.expand(sea.shape)),
    (panels[2], "weight × number of cells", weight[0, 0] * int(sea.sum())),
):
    axes.set_facecolor("lightgrey")
    image = axes.pcolormesh(longitude, latitude, np.where(sea, values, np.nan), rasterized=True)
    axes.set(title=title, xlabel="longitude")
    figure.colorbar(image, ax=axes)
panels[0].set_ylabel("latitude")
plt.show()
