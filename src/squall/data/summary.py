"""What was understood of a data file, in words."""

import math
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float

from squall.data.conditions import Areas, Condition, Mask
from squall.data.errors import DataError
from squall.data.missing import Screened
from squall.data.periods import whole_windows
from squall.data.source import Source

WHOLE_BYTES = 192 * 2**20
"""Up to this size all states are looked at for masks and gaps, in a fraction of a second."""

# Few enough that a description takes two seconds: eight states of two fields at 0.25 degrees.
SAMPLE_BYTES = 64 * 2**20
SAMPLE_STATES = 16
"""A description of a larger file reads this many states at most, within `SAMPLE_BYTES`."""


def summary(source: Source) -> str:
    """Sizes, units, axes, time step, boundaries, areas, masks, gaps, conditions and what was left out.

    Masks and gaps of a large file are those of a few states spread over it; the text says so.
    """
    about, space = source.description, " × ".join(map(str, source.space))
    units = about.units
    lines = {
        "format": f"{getattr(source, 'format', 'in memory')}, '{source.name}'",
        "states": f"{source.trajectories} trajectories × {source.shape[1]} times × {source.channels} fields on {space} "
        f"points, {str(source.dtype).removeprefix('torch.')}, {source.nbytes / 2**20:.4g} MiB",
        "fields": ", ".join(f"{name} [{units[name]}]" if name in units else name for name in source.fields),
        "time step": f"{source.dt:g} {units.get('time', '')}".rstrip()
        + (f", first {about.provenance['first_time']}" if "first_time" in about.provenance else "")
        + (f", calendar {about.provenance['calendar']}" if "calendar" in about.provenance else ""),
        "axes": "; ".join(map(_axis, about.axes, source.coordinates, source.spacing)),
        "boundary": ", ".join(f"{axis} {end}" for axis, end in zip(about.axes, source.boundary, strict=True)),
        "areas": _areas(source.measure),
        **_missing(source),
        **_storage(source),
        "conditions": "; ".join(map(_condition, source.conditions)) or "none",
    }
    if source.parts is not None:
        lines["parts"] = ", ".join(f"{n} {p.trajectories}" for n, p in source.parts._asdict().items())
    text = [f"{name:<11} {line}" for name, line in lines.items()]
    return "\n".join([*text, *(f"{'note':<11} {note}" for note in getattr(source, "notes", ()))])


def next_command(path: Path, source: Source, options: str) -> str:
    """The command to give after `describe`: training, or writing what the options say into a file."""
    if options:
        return f"squall data convert {path}{options} --out {path.stem}-squall.hdf5"
    held = " --data.validation 0.1 --data.test 0.2" if source.trajectories == 1 else ""
    return f"squall train --data.path {path}{held} --out runs/{path.stem}"


def _axis(name: str, points: Float[np.ndarray, " points"], spacing: float | None) -> str:
    step = f"spacing {spacing:g}" if spacing is not None else "unequally spaced"
    return f"{name} {points[0]:g} ... {points[-1]:g} ({len(points)} points, {step})"


def _areas(measure: Areas | None) -> str:
    return (
        "equal" if measure is None else f"from {float(measure.min()):.3g} to {float(measure.max()):.3g} of their mean"
    )


def _condition(condition: Condition) -> str:
    return f"{condition.name} ({condition.kind}, {' × '.join(map(str, condition.shape))})"


def _storage(source: Source) -> dict[str, str]:
    together = (
        source.piece_bytes * source.shape[0] * source.shape[1] // source.nbytes if isinstance(source, Screened) else 1
    )
    if together < 8:
        return {}
    return {"storage": f"{together} states are unpacked for each that is read: convert the file before training"}


def _missing(source: Source) -> dict[str, str]:
    if isinstance(source, Screened) and source._missing is None and source.nbytes > WHOLE_BYTES:
        return _sampled(source)
    parts = getattr(source, "sources", [source])
    if len(parts) > 1 and source.nbytes > WHOLE_BYTES and any(isinstance(part, Screened) for part in parts):
        return {f"{name} (first file)": line for name, line in _missing(parts[0]).items()}
    mask, valid = source.mask, source.valid
    gaps = "none" if isinstance(source, Screened) or valid is not None else "none declared; NaN would be an error"
    if valid is not None:
        whole = whole_windows(source, 2)
        pairs = source.trajectories * source.steps if whole is None else int(whole.sum())
        gaps = f"{int((~valid).sum())} of {valid.numel()} states; {pairs} pairs of neighbours are whole"
    return {"mask": _points(source, mask), "gaps": gaps}


def _points(source: Source, mask: Mask | None) -> str:
    if mask is None:
        return "none"
    total = math.prod(source.space)
    if bool((mask == mask[0]).all()):
        return f"{int((~mask[0]).sum())} of {total} points"
    counts = (~mask).flatten(1).sum(1).tolist()
    return (
        ", ".join(f"{name} {count}" for name, count in zip(source.fields, counts, strict=True)) + f" of {total} points"
    )


def _sampled(source: Screened) -> dict[str, str]:
    """Masks and gaps of a few states, spread over the file."""
    total = source.shape[0] * source.shape[1]
    count = min(SAMPLE_STATES, SAMPLE_BYTES // source.piece_bytes, total)
    if count < 2:  # large chunks: the first states are unpacked together
        count = 2
        states = source._raw(torch.tensor([0]), torch.tensor([0]), count)[0]
    else:
        places = torch.linspace(0, total - 1, count).long()
        states = source._raw(places // source.shape[1], places % source.shape[1], 1)[:, 0]
    absent = torch.isnan(states)
    masked = absent.all(0)
    lacking = int((absent & ~masked).flatten(1).any(1).sum())
    if masked.flatten(1).all(1).any():
        names = [n for n, m in zip(source.fields, masked.flatten(1).all(1).tolist(), strict=True) if m]
        raise DataError(f"{source.name}: all points of {', '.join(names)} are masked in {count} states looked at")
    said = f"in {count} of {total} states looked at"
    return {
        "mask": f"{_points(source, ~masked if masked.any() else None)}, {said}",
        "gaps": f"{lacking} {said}" if lacking else f"none {said}",
    }
