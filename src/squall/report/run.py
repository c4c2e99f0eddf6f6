"""The figures and animations of one evaluated run, in its folder."""

from pathlib import Path

from squall._process.names import file_name
from squall.report.animations import animate_field
from squall.report.curves import energy_figure, error_figure
from squall.report.fields import Field, field_figure, kept
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
    folder = RunFolder(path)
    found = folder.read_json(f"evaluation{suffix}.json")
    rollouts = folder.read_arrays(f"rollouts{suffix}.npz")
    figures = {"error_growth": error_figure(found)}
    if energy := energy_figure(found):
        figures["energy"] = energy
    for key, i, channel in kept(found, rollouts):
        figures[key] = field_figure(rollouts, i, channel, f"{found['fields'][channel]}, test trajectory {i}", found)
    target = folder.path / "figures"
    target.mkdir(exist_ok=True)
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
    folder = RunFolder(path)
    found, rollouts = folder.read_json(f"evaluation{suffix}.json"), folder.read_arrays(f"rollouts{suffix}.npz")
    target = folder.path / "figures"
    target.mkdir(exist_ok=True)
    files = []
    for name, i, channel in kept(found, rollouts):
        title = f"{found['fields'][channel]}, test trajectory {i}"
        files.append(target / f"{file_name(name + suffix)}.{kind}")
        animate_field(Field.of(rollouts, i, channel, found), title, files[-1])
    return files
