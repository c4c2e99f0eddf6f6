"""An evaluation as an xarray data set, with dimensions, coordinates and units."""

from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from squall._process.extras import explain_missing_extra
from squall.data.description import DEGREES

if TYPE_CHECKING:
    import xarray

    from squall.evaluation.rollouts import Evaluation

SINGLE = {"states": "mean squared error of the states", "energy": "mean squared error of the energy"}
BY_FIELD = {
    "nrmse": "root mean square error relative to that of zero",
    "correlation": "correlation with the truth",
    "csi": "critical success index of events",
    "acc": "anomaly correlation coefficient",
}
OF_STORMS = {
    "csi": ("critical success index of storms", "1"),
    "position_error": ("mean position error of storms", "km"),
}
BY_BAND = {"power_ratio": "power relative to the truth", "coherence": "coherence with the truth"}


@explain_missing_extra()
def to_xarray(evaluation: "Evaluation") -> "xarray.Dataset":
    """Kept fields by rollout and time, and errors and scores by lead time; see `Evaluation.to_xarray`."""
    import xarray

    about, kept, curves = evaluation.description, evaluation.rollouts, evaluation.curves
    dims = ("rollout", "time", *about.axes)
    units = {**DEGREES, **about.units}
    units.pop("time", None)  # a lead time has no date
    variables: dict[str, Any] = {}
    for part in ("truth", "prediction", "step_error"):
        values = getattr(kept, part)
        if values is None:
            continue
        for i, name in enumerate(about.fields):
            field = values[:, :, i].astype(np.float32)
            short = [(0, 0), (0, len(kept.time) - field.shape[1]), *[(0, 0)] * len(about.axes)]
            attributes = {"units": units[name]} if name in units and part != "step_error" else {}
            attributes["long_name"] = f"{name}, {part.replace('_', ' ')}"
            variables[f"{name}_{part}"] = dims, np.pad(field, short, constant_values=np.nan), attributes
    for key, text in SINGLE.items():
        if key in curves:
            variables[key] = ("lead_time", _numbers(curves[key]), {"long_name": text})
    for key, text in BY_FIELD.items():
        if key not in curves:
            continue
        values = [_numbers(curves[key][name]) for name in about.fields]
        variables[key] = (("field", "lead_time"), np.stack(values), {"long_name": text, "units": "1"})
    bands = list(curves.get("power_ratio", ()))
    for key, text in BY_BAND.items() if bands else ():
        values = [[_numbers(curves[key][band][name]) for name in about.fields] for band in bands]
        variables[key] = (("band", "field", "lead_time"), np.array(values), {"long_name": text, "units": "1"})
    for key, (text, unit) in OF_STORMS.items() if "storms" in curves else ():
        attributes = {"long_name": text, "units": unit}
        variables[f"storm_{key}"] = ("lead_time", _numbers(curves["storms"][key]), attributes)
    for name, curve in curves.get("conserved", {}).items():
        variables[f"drift_{name}"] = ("lead_time", _numbers(curve), {"long_name": f"drift of {name}"})
    space = {
        axis: (axis, points, {"units": units[axis]} if axis in units else {})
        for axis, points in zip(about.axes, about.coordinates, strict=True)
    }
    coordinates = {"time": kept.time, "lead_time": curves["time"], "field": list(about.fields), **space}
    rollout = {name: x for name, x in evaluation.rollout.items() if isinstance(x, int | float)}
    attributes = {"Conventions": "CF-1.8", "title": f"evaluation of a model of {about.name}", **rollout}
    return xarray.Dataset(variables, coordinates | ({"band": bands} if bands else {}), attributes)


def _numbers(curve: list[float | None]) -> Float[np.ndarray, " time"]:
    return np.array([np.nan if x is None else x for x in curve])
