"""Figures that no test looks at."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@contextlib.contextmanager
def without_drawing() -> Iterator[None]:
    """Figures are made, but their files stay empty: to draw one takes half a second."""
    from matplotlib.figure import Figure

    def savefig(self: Figure, file: object, draw=Figure.savefig, **options: object) -> None:
        if isinstance(file, str | os.PathLike):
            Path(file).touch()
        else:  # a frame of an animation
            draw(self, file, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", savefig)
        yield
