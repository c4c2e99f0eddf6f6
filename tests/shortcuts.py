"""What a test leaves out that it does not look at."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
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


@contextlib.contextmanager
def without_shape_checks() -> Iterator[None]:
    """They take half of a small training, and know no symbolic sizes, such as that of the batch in `torch.export`."""
    jaxtyping.config.update("jaxtyping_disable", True)
    try:
        yield
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)
