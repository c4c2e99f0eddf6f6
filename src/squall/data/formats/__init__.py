"""Opens trajectories in any known layout, which is recognised by what is in the file, not by its name."""

import functools
import os
import zipfile
from pathlib import Path
from typing import Any, Unpack

import h5py

from squall.data.arrays import Handle
from squall.data.endless import refuse_endless
from squall.data.errors import DAMAGE, DataError, check_exists, damaged
from squall.data.formats import cf, dedalus, matlab, numpy_files, pdebench, torch_files
from squall.data.formats.bag import read_bag
from squall.data.formats.consecutive import Continued
from squall.data.formats.folder import Joint, read_folder
from squall.data.formats.layout import ArrayFile, Reading
from squall.data.hdf5 import members, open_file, open_hdf5
from squall.data.reading import ScreenedTrajectoryFile, TrajectoryFile
from squall.data.source import Source
from squall.data.stored import Layout
from squall.data.structure import FIELD_GROUPS

KNOWN = (
    "The Well (HDF5 with t0_fields, t1_fields, t2_fields), a folder of such files, PDEBench (tensor with "
    "x-coordinate, or groups 0000/data), NetCDF-3 and -4, Zarr, NumPy .npy and .npz, PyTorch .pt with tensors, "
    "MATLAB v7.3, Dedalus"
)
OTHERS = {
    b"GRIB": "GRIB: convert it to NetCDF, as by `cfgrib` and xarray or `grib_to_netcdf`",
    b"MATLAB 5": "MATLAB 5: save it with -v7.3, or load it by scipy.io.loadmat and `squall.data.write` the array",
    b"CDF\x05": "NetCDF-3 with 64-bit data (CDF-5): convert it by `nccopy -k nc4`",
}


def open(path: str | os.PathLike[str], **options: Unpack[Reading]) -> TrajectoryFile | ArrayFile | Joint | Continued:
    """Open trajectories; states stay in the file until they are asked for.

    The layout is recognised by content: The Well's files and folders, PDEBench, NetCDF, Zarr, `.npy` and `.npz`,
    neuraloperator's `.pt`, MATLAB v7.3, Dedalus. NaN and declared fill values are missing values: see `Source.mask` and
    `Source.valid`. In The Well's layout, where simulations are kept, they are errors unless `gaps=True`.

    Args:
        path: of the file or folder.
        dt: time between two states, where the file does not say it, or instead of unequal times.
        axes: one word for each axis of the stored fields, as "batch time channel x y", where the file cannot say it.
        fields: names of those that make the state; other fields become forcings. Names for channels without names.
        lengths: of the domain, one number or one per axis, where the file has no points.
        coordinates: the points of each space axis, where the file has none.
        boundary: "periodic", "wall" or "open", for all axes or one per axis.
        fill: a number that means a missing value.
        gaps: whether NaN in a file of The Well's layout means a missing value.
        initial: for initial states only: one time suffices, and dt is this where the file does not say it.

    Raises:
        MissingFileError: where there is no such file, with the names in the folder that come near.
        DataError: unknown, truncated, without time axis, times not equally spaced, fields of different shapes: what
            was found, what is expected, what to do.

    Example:
        >>> import tempfile, numpy as np, squall.data
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.save(f"{folder}/waves.npy", np.zeros((4, 11, 8)))
        ...     source = open(f"{folder}/waves.npy", axes="batch time x", dt=0.1)
        ...     source.read([3, 0], start=5, stop=7).shape
        torch.Size([2, 2, 1, 8])
    """
    if isinstance(fields := options.get("fields"), str):
        options["fields"] = [fields]
    shown, location = Path(path), Path(os.path.abspath(path))
    check_exists(shown, location)
    format_name = recognise(location)
    if format_name == "folder":
        dt_given = options.get("dt") is not None
        return read_folder(shown, location, functools.partial(_open_part, options), recognise, dt_given=dt_given)
    return _open_file(shown, location, format_name, options)


def _open_part(options: Reading, file: Path, single: float | None) -> TrajectoryFile | ArrayFile:
    check_exists(file, file)
    if single is not None and options.get("initial") is None:
        options = {**options, "initial": single}
    return _open_file(file, file, recognise(file), options)


def recognise(location: Path) -> str:
    """The layout of a file or folder, by its first bytes and the names in it; "" for an unknown one."""
    if location.is_dir():
        zarr = any((location / name).exists() for name in ("zarr.json", ".zgroup", ".zarray", ".zmetadata"))
        return "Zarr" if zarr else "folder"
    with location.open("rb") as file:
        head = file.read(128)
    if h5py.is_hdf5(location) or head.startswith((b"\x89HDF", b"MATLAB 7.3")):
        refuse_endless([location])
        return _recognise_hdf5(location, head)
    if head.startswith(b"PK"):
        try:
            names = zipfile.ZipFile(location).namelist()
        except (zipfile.BadZipFile, NotImplementedError, ValueError):  # damaged, or of a later version of ZIP
            return ""
        if any(name.endswith("data.pkl") for name in names):
            return "torch"
        return "npz" if all(name.endswith(".npy") for name in names) else ""
    starts = {b"CDF\x01": "NetCDF-3", b"CDF\x02": "NetCDF-3", b"\x93NUMPY": "npy", b"\x80\x02\x8a\nl\xfc": "torch"}
    return next((format_name for start, format_name in starts.items() if head.startswith(start)), "")


def _recognise_hdf5(location: Path, head: bytes) -> str:
    try:
        with open_file(location, location) as file:
            if not {*FIELD_GROUPS, "boundary_conditions"}.isdisjoint(file):
                return "The Well"
            items = members(file).values()
            if head.startswith(b"MATLAB 7.3") or any("MATLAB_class" in item.attrs for item in items):
                return "MATLAB"
            if pdebench.side_by_side(file):
                return "PDEBench"
            if pdebench.by_groups(file):
                return "PDEBench, groups"
            if dedalus.is_dedalus(file):
                return "Dedalus"
            scales = any("DIMENSION_LIST" in item.attrs for item in items)
            return "NetCDF-4" if scales or "_NCProperties" in file.attrs else "HDF5"
    except DataError as error:
        raise error if str(location) in str(error) else DataError(f"{location}: {error}") from None
    except DAMAGE:
        return "The Well"  # whose reader says what is damaged


def _open_file(shown: Path, location: Path, format_name: str, options: Reading) -> TrajectoryFile | ArrayFile:
    given = {name for name, value in options.items() if value is not None}
    if unknown := given - Reading.__annotations__.keys():
        raise DataError(f"open: got {', '.join(sorted(unknown))}; allowed are {', '.join(Reading.__annotations__)}")
    if format_name == "The Well":
        if extra := given - {"fields", "gaps", "initial"}:
            raise DataError(
                f"{shown}: a file in The Well's layout describes itself: got {', '.join(sorted(extra))}; allowed are "
                "fields and gaps"
            )
        return (ScreenedTrajectoryFile if options.get("gaps") else TrajectoryFile)(
            shown, options.get("fields"), options.get("initial")
        )
    try:
        layout = _layout(shown, location, format_name, options)
    except DataError as error:
        raise error if str(shown) in str(error) else DataError(f"{shown}: {error}") from None
    except DAMAGE as error:
        raise DataError(damaged(shown, error)) from error
    return ArrayFile(shown, layout, options.get("fill"))


def _layout(shown: Path, location: Path, format_name: str, options: Reading) -> Layout:
    readers: dict[str, Any] = {
        "PDEBench": pdebench.read_side_by_side,
        "PDEBench, groups": pdebench.read_groups,
        "MATLAB": matlab.read_matlab,
        "Dedalus": dedalus.read_dedalus,
        "torch": torch_files.read_torch,
    }
    if format_name in readers:
        return readers[format_name](shown, location, options)
    if format_name in ("npy", "npz"):
        return numpy_files.read_numpy(shown, location, options, archive=format_name == "npz")
    if format_name in cf.OPENERS:
        return cf.read_cf(shown, location, options, format_name)
    if format_name == "HDF5":
        return _plain_hdf5(shown, location, options)
    with location.open("rb") as file:
        head = file.read(16)
    if not head:
        raise DataError(f"{shown}: the file is empty (0 bytes); make or fetch it again")
    near = next((advice for start, advice in OTHERS.items() if head.startswith(start)), None)
    raise DataError(
        f"{shown}: {'this is ' + near if near else f'an unknown layout: it begins with {head[:8]!r}'}. Known are "
        f"{KNOWN}. `squall.data.write` writes a file from an array"
    )


def _plain_hdf5(shown: Path, location: Path, options: Reading) -> Layout:
    """HDF5 of no known layout: its arrays, if the user says what their axes are."""
    with open_file(shown, location) as file:
        items = members(file)
        groups = [name for name, item in items.items() if isinstance(item, h5py.Group)]
        shapes = {name: (item.shape, item.dtype) for name, item in items.items() if isinstance(item, h5py.Dataset)}
        wanted = [name for name in ("x-coordinate", "t-coordinate") if name not in items] if "tensor" in items else []
    if not any(len(shape) >= 2 for shape, _ in shapes.values()) or "dimensions" in groups:
        raise DataError(
            f"{shown}: HDF5 of an unknown layout; found {', '.join([*shapes, *groups][:8]) or 'nothing'}. Looked for "
            f"the groups of The Well ({', '.join(FIELD_GROUPS)}, dimensions, boundary_conditions, scalars), PDEBench's "
            "tensor or 0000/data, NetCDF's dimension scales, and arrays outside of groups. Read the arrays with "
            "h5py and write them by `squall.data.write`"
        )
    format = f"HDF5 like PDEBench's, but without {' and '.join(wanted)}" if wanted else "HDF5 of no known layout"
    return read_bag(format, Handle(location, open_hdf5, shown), shapes, options)


__all__ = ["ArrayFile", "Continued", "Joint", "Source", "open", "recognise"]
