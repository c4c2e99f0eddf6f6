"""The figures and animations of one evaluated run, in its folder."""

from pathlib import Path
from typing import Any

from squall._process.names import file_name
from squall.report.animations import animate_field
from squall.report.curves import energy_figure, error_figure
from squall.report.fields import Arrays, Field, field_figure, kept
from squall.report.figures import save
from squall.runs.folder import RunFolder


def write_figures(path: Path | str, suffix: str = "") -> list[Path]:
    """Draw the figures of one evaluated run into its folder.

    Args:
        path: the run folder.
        suffix: that of the evaluation's files, for another integrator.

    Returns:
        the PNG files.
    """
    evaluation, rollouts, target = _read(path, suffix)
    figures = {"error_growth": error_figure(evaluation)}
    if energy := energy_figure(evaluation):
        figures["energy"] = energy
    for name, title, i, channel in kept(evaluation, rollouts):
        figures[name] = field_figure(rollouts, i, channel, title, evaluation)
    return [save(figure, target / f"{file_name(name + suffix)}.png") for name, figure in figures.items()]


def write_animations(path: Path | str, suffix: str = "", kind: str = "gif") -> list[Path]:
    """Draw the kept rollouts of an evaluated run as animations of truth, prediction and error.

    Args:
        path: the run folder.
        suffix: that of the evaluation's files, for another integrator.
        kind: `gif`, or `mp4` where ffmpeg is installed.

    Returns:
        the files.

    Raises:
        ValueError: if ffmpeg is wanted and missing.
    """
    evaluation, rollouts, target = _read(path, suffix)
    files = []
    for name, title, i, channel in kept(evaluation, rollouts):
        files.append(target / f"{file_name(name + suffix)}.{kind}")
        animate_field(Field.of(rollouts, i, channel, evaluation), title, files[-1])
    return files


def _read(path: Path | str, suffix: str) -> tuple[dict[str, Any], Arrays, Path]:
    """The evaluation, what it keeps of the rollouts, and the folder for figures."""
    folder = RunFolder(path)
    target = folder.path / "figures"
    return folder.read_json(f"evaluation{suffix}.json"), folder.read_arrays(f"rollouts{suffix}.npz"), target
