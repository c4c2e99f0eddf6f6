"""torch-harmonics, imported on first use: its compiled parts fit one PyTorch only."""

import importlib
import importlib.metadata
import re
from types import ModuleType

import torch

from squall._process.extras import MissingExtraError, explain_missing_extra
from squall._process.messages import first_line

INSTALL = "pip install --no-deps 'torch-harmonics>=0.9.3'"


def import_harmonics() -> ModuleType:
    """The package `torch_harmonics` with its `examples`, which hold the shallow-water solver.

    Raises:
        MissingExtraError: it is not installed, or was built for another PyTorch, or is too old.
    """
    with explain_missing_extra():
        try:
            harmonics = importlib.import_module("torch_harmonics")
            importlib.import_module("torch_harmonics.examples").ShallowWaterSolver  # noqa: B018
        except ModuleNotFoundError as error:
            if error.name == "torch_harmonics":
                raise
            raise _unfit(error) from None
        except (ImportError, AttributeError, OSError) as error:
            raise _unfit(error) from None
    return harmonics


def _unfit(error: Exception) -> MissingExtraError:
    version = importlib.metadata.version("torch-harmonics")
    requirements = importlib.metadata.requires("torch-harmonics") or ()
    asks = next((f" (for {name})" for name in requirements if re.match(r"torch\b(?!-)", name)), "")
    reason = first_line(error)
    return MissingExtraError(
        f"torch-harmonics {version}{asks} does not work with PyTorch {torch.__version__} ({reason}); run: {INSTALL}",
        name="torch_harmonics",
    )
