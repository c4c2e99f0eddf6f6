"""NumPy's `.npy` and `.npz`, mapped into memory where they are not compressed."""

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Shaped

from squall._process.files import DAMAGED_ARRAYS
from squall.data.arrays import Handle
from squall.data.errors import DataError
from squall.data.formats.bag import read_bag
from squall.data.formats.layout import Reading
from squall.data.stored import Layout


def open_npy(location: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The one array of the file."""
    return {"array": np.load(location, mmap_mode="r", allow_pickle=False)}


def open_npz(location: Path) -> dict[str, Shaped[np.ndarray, "..."]]:
    """The arrays by name; those that are compressed are read whole."""
    arrays = {}
    with zipfile.ZipFile(location) as archive, np.load(location, allow_pickle=False) as loaded:
        for info in archive.infolist():
            name = info.filename.removesuffix(".npy")
            if name in arrays:
                raise DataError(f"'{info.filename}' is twice in the archive")
            arrays[name] = loaded[name] if info.compress_type else _mapped(location, archive, info)
    return arrays


def read_numpy(path: Path, location: Path, options: Reading, archive: bool) -> Layout:
    """The layout of a `.npy` or `.npz` file.

    Raises:
        DataError: where it holds Python objects, or the options do not fit.
    """
    handle = Handle(location, open_npz if archive else open_npy, path)
    try:
        arrays = (open_npz if archive else open_npy)(handle.location)
    except (OSError, *DAMAGED_ARRAYS) as error:
        raise DataError(f"{path}: not read as NumPy arrays ({error}); Python objects are never loaded") from None
    shapes = {name: (array.shape, array.dtype) for name, array in arrays.items()}
    return read_bag("NumPy " + (".npz" if archive else ".npy"), handle, shapes, options)


def _mapped(location: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Any:
    """An array that lies in the archive as it is, without a copy."""
    with archive.open(info) as member:
        version = np.lib.format.read_magic(member)
        header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = header(member)
        skip = member.tell()
    if dtype.hasobject:
        raise DataError(f"'{info.filename}' holds Python objects")
    with location.open("rb") as file:  # the name and the extra field before the member may differ from the directory's
        file.seek(info.header_offset + 26)
        name, extra = np.frombuffer(file.read(4), "<u2").tolist()
    start = info.header_offset + 30 + name + extra + skip
    return (
        np.memmap(location, dtype, "r", start, shape, "F" if fortran else "C")
        if np.prod(shape)
        else np.empty(shape, dtype)
    )
