"""Animations: of evaluated runs, of forecasts, and of any figure whose artists change."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

import squall.data
from squall._process.files import refuse_existing, write_beside
from squall._process.names import file_name
from squall.report.fields import Field, moving_frames
from squall.report.figures import COLOURS, mesh

SHOWN_FORECASTS = 2
"""Most trajectories of a forecast that are drawn."""


def check_animation(kind: str) -> None:
    """Raises:
    ValueError: if ffmpeg is wanted and missing.
    """
    from matplotlib.animation import FFMpegWriter

    if kind == "mp4" and not FFMpegWriter.isAvailable():
        raise ValueError("an mp4 needs ffmpeg, which is not installed: install it, or draw a gif")


def film(
    path: Path, figure: Figure, frames: Iterable[int], draw: Callable[[int], object], frames_per_second: int = 10
) -> None:
    """Write a figure as an animation, beside and renamed.

    Args:
        path: its suffix is the format, `.gif`, or `.mp4` where ffmpeg is installed.
        figure: as it is at the first frame.
        frames: what `draw` is called with, one after the other.
        draw: changes the artists of the figure.
        frames_per_second: speed.

    Raises:
        ValueError: if ffmpeg is wanted and missing.
    """
    from matplotlib.animation import FFMpegWriter, PillowWriter

    check_animation(path.suffix.removeprefix("."))
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # the panels keep their places, and a frame takes half the time
    writer = (PillowWriter if path.suffix == ".gif" else FFMpegWriter)(fps=frames_per_second)
    with write_beside(path) as part:
        moving = part.with_name(part.name + path.suffix)  # which tells the writers what to write
        try:
            with writer.saving(figure, str(moving), dpi=80):
                for frame in frames:
                    draw(frame)
                    writer.grab_frame()
            moving.replace(part)
        finally:
            moving.unlink(missing_ok=True)


def forecast_animations(path: Path, kind: str, fields: Sequence[str], trajectories: int) -> list[Path]:
    """The files that `animate_forecast` writes: one for each field of at most two trajectories.

    Raises:
        FileExistsError: if one of them exists.
    """
    names = [f"_{file_name(field)}" * (len(fields) > 1) for field in fields]
    counts = [f"_{i}" * (trajectories > 1) for i in range(min(trajectories, SHOWN_FORECASTS))]
    files = [path.with_name(f"{path.stem}{name}{count}.{kind}") for name in names for count in counts]
    for file in files:
        refuse_existing(file, "another --out")
    return files


def animate_forecast(path: Path, kind: str) -> list[Path]:
    """Draw a file of predictions as animations beside it.

    Args:
        path: what `squall predict` wrote.
        kind: `gif`, or `mp4` where ffmpeg is installed.
    """
    source = squall.data.open(path)
    files = forecast_animations(path, kind, source.fields, source.trajectories)
    shown = min(source.trajectories, SHOWN_FORECASTS)
    for file, (channel, i) in zip(files, itertools.product(range(source.channels), range(shown)), strict=True):
        animate_field(Field.forecast(source, i, channel), f"{source.fields[channel]}, trajectory {i}", file)
    return files


def animate_field(field: Field, title: str, path: Path) -> None:
    """Write truth, prediction and error of one field, or a forecast of it, over time."""
    extent = [float(np.ptp(points)) or 1.0 for points in field.points]
    tall = 0.8 if len(extent) == 1 else float(np.clip(extent[1] / extent[0], 0.2, 1.5))
    rows, images = field.rows(), []
    figure = Figure(figsize=(11 if len(rows) > 1 else 5, 3.4 * tall + 1.6), layout="constrained")
    panels = figure.subplots(1, len(rows), squeeze=False)[0]
    for panel, (name, values, colours) in zip(panels, rows, strict=True):
        if len(field.points) == 1:
            panel.set(title=name, xlabel=field.axes[0], ylim=_room(colours))
            images.append(panel.plot(field.points[0], values[0], color=COLOURS[0])[0])
        else:
            images.append(mesh(panel, field.points[0], field.points[1], values[0], name, **colours))
            panel.set(xlabel=field.axes[0], aspect="equal" if 0.2 < extent[1] / extent[0] < 5 else "auto")
            figure.colorbar(images[-1], ax=panel, location="bottom", shrink=0.8, label=field.name)
    panels[0].set_ylabel(field.name if len(field.points) == 1 else field.axes[1])
    figure.suptitle(title, fontsize=10)

    def draw(frame: int) -> None:
        for image, (_, values, _) in zip(images, rows, strict=True):
            if len(field.points) == 1:
                image.set_ydata(values[frame])
            else:
                image.set_array(np.ma.masked_invalid(values[frame].T))
        figure.suptitle(f"{title}, t = {field.time[frame]:.4g}{field.unit}", fontsize=10)

    film(path, figure, moving_frames(len(field.time)).tolist(), draw)


def _room(colours: Mapping[str, Any]) -> tuple[float, float]:
    """The limits of a scale, and a twentieth more."""
    more = (colours["vmax"] - colours["vmin"]) / 20
    return colours["vmin"] - more, colours["vmax"] + more
