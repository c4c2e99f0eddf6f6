"""What all figures share: colours, panels, legends, medians with intervals, maps over two axes, saving.

Built on Matplotlib's objects, not on pyplot: nothing global is changed.
"""

import math
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Shaped
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from squall._process.files import write_beside
from squall.study.statistics import Summary

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999999")
"""The colour-blind-safe palette of Okabe and Ito, Color Universal Design (2008), and a grey in place of its yellow."""


def save(figure: Figure, path: Path | str) -> Path:
    """Write a figure beside and rename it into place, in the format of its suffix: png, pdf, svg."""
    path = Path(path)
    kind = path.suffix.removeprefix(".")
    undated = {"pdf": {"CreationDate": None}, "svg": {"Date": None}}  # the same figure is the same file
    with write_beside(path) as part:
        figure.savefig(part, format=kind, dpi=130, metadata=undated.get(kind))
    return path


def grid_of_panels(
    count: int, columns: int, width: float, height: float, below: float = 0.0
) -> tuple[Figure, list[Axes]]:
    """A figure with as many panels, row by row.

    Args:
        count: how many.
        columns: at most, side by side.
        width, height: of a panel, inches.
        below: room for a legend, inches.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width * columns, height * rows + below), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).ravel().tolist()
    for panel in panels[count:]:
        panel.axis("off")
    return figure, panels[:count]


def legend_below(figure: Figure, panels: Iterable[Axes]) -> None:
    """One legend for all panels: every label once."""
    named = {label: h for panel in panels for h, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(list(named.values()), list(named), loc="outside lower center", ncols=4, fontsize=8)


def title_above(figure: Figure, title: str) -> None:
    """One title for all panels, broken into lines that are no wider than the figure."""
    figure.suptitle(textwrap.fill(title, int(13 * figure.get_figwidth())), fontsize=10)  # 13 letters of size 10 an inch


def with_intervals(summaries: Sequence[Summary | None]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, "2 n"]]:
    """Medians, NaN where they are not finite, and how far their intervals reach below and above, 0 where unbounded."""
    known = [(math.nan,) * 3 if s is None else (s.low, s.median, s.high) for s in summaries]
    low, middle, high = np.where(np.isfinite(known), known, np.nan).T
    return middle, np.nan_to_num([middle - low, high - middle])


def mesh(
    panel: Axes,
    time: Shaped[np.ndarray, " time"],
    space: Shaped[np.ndarray, " point"],
    values: Shaped[np.ndarray, "time point"],
    title: str,
    limit: float = 0.0,
    **options: Any,
) -> Any:
    """A map over time and space (or two space axes), diverging around 0 up to a limit; what is not finite is grey."""
    panel.set_title(title, fontsize=9)
    panel.set_facecolor("0.75")
    style = {"vmin": -limit, "vmax": limit, "cmap": "RdBu_r"} if limit else {}
    values = np.ma.masked_invalid(values.T)
    return panel.pcolormesh(time, space, values, **(style | {"shading": "nearest", "rasterized": True} | options))


def scale(low: float, high: float) -> dict[str, Any]:
    """The colours from a number to another: diverging where they differ in sign."""
    return {"vmin": low, "vmax": high, "cmap": "RdBu_r" if low < 0 < high else "viridis"}


def limits(*fields: Shaped[np.ndarray, "..."]) -> tuple[float, float]:
    """The extremes of the finite numbers, symmetric about zero where there are both signs."""
    finite = np.concatenate([field[np.isfinite(field)] for field in fields])
    low, high = (float(finite.min()), float(finite.max())) if len(finite) else (0.0, 1.0)
    if low < 0 < high:
        return -max(-low, high), max(-low, high)
    return low, high if high > low else low + 1.0
