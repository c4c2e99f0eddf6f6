"""HDF5 without its silence: data come from the file that was named, whole, or not at all.

HDF5 follows links into other files, reads raw numbers from any path that a file names, and gives a fill value for
what was never written.
"""

import errno
import math
import os
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Shaped

from squall.data.errors import DataError

SOFT_LINKS = 16
"""Links followed one after the other, as many as HDF5 itself follows; a circle has no end."""

SMALL_BYTES = 2**30
"""Most that an axis or a mask may take: a packed chunk may declare far more than the file holds. A
mask of the Earth at 0.02 degrees in float32 takes 0.6 of it."""


def open_file(path: Path, location: Path, **options: Any) -> Any:
    """Open an HDF5 file for reading.

    Args:
        path: as the user named it.
        location: its absolute path.
        options: of `h5py.File`.

    Raises:
        DataError: if another process holds the file open for writing. A file system without locks is a warning.
        OSError: if HDF5 cannot open it for another reason.
    """
    try:
        return h5py.File(location, "r", **options)
    except OSError as error:
        reason = str(error)
        if "unable to lock" in reason and error.errno not in (errno.EAGAIN, errno.EWOULDBLOCK):
            warnings.warn(f"{path}: its file system has no locks; no other process may write to it now", stacklevel=2)
            return h5py.File(location, "r", locking=False, **options)
        if "unable to lock" in reason:
            raise DataError(
                f"{path}: the file is locked: another process holds it open for writing. Wait until it has closed "
                "the file, then give the same command again"
            ) from error
        if "already open for" in reason:
            raise DataError(
                f"{path}: the file is marked as open for writing. Wait until its writer has closed it; if the writer "
                "ended without closing it, clear the mark in a copy: `h5clear -s COPY`"
            ) from error
        raise


def member(group: Any, name: str, left: int = SOFT_LINKS) -> Any:
    """An object by its path from a group; None if there is none. Links are followed within the file only.

    Raises:
        DataError: at a link to another file, before that is opened.
    """
    here: Any = group.file["/"] if name.startswith("/") else group
    for part in filter(lambda part: part not in ("", "."), name.split("/")):
        link = here.get(part, getlink=True) if isinstance(here, h5py.Group) else None
        if isinstance(link, h5py.ExternalLink):
            raise DataError(
                f"'{name}' is a link to another file, '{link.filename}', and only the file that was named is read: "
                "copy the numbers into one file, or name the other one"
            )
        if isinstance(link, h5py.SoftLink):
            here = member(here, link.path, left - 1) if left else None
        else:
            here = None if link is None else here[part]
    return here


def members(group: Any) -> dict[str, Any]:
    """The objects in a group by name; a link that leads nowhere is left out.

    Raises:
        DataError: at a link to another file, before that is opened.
    """
    items = {name: member(group, name) for name in group}
    return {name: item for name, item in items.items() if item is not None}


def in_one_piece(dataset: Any) -> bool:
    """Whether the numbers lie in the file one after the other, neither packed nor elsewhere."""
    elsewhere = dataset.is_virtual or dataset.external is not None or dataset.file.userblock_size > 0
    return dataset.chunks is None and not elsewhere and dataset.id.get_storage_size() > 0


class Datasets:
    """The datasets of an open file by their paths, each checked by `dataset_of`."""

    def __init__(self, file: Any) -> None:
        self.file = file

    def __getitem__(self, key: str) -> Any:
        return dataset_of(self.file, key, key)

    def close(self) -> None:
        """Close the file."""
        self.file.close()


def open_hdf5(location: Path) -> Datasets:
    """The datasets of a file, with room for large chunks: one that does not fit is unpacked anew at every read."""
    return Datasets(open_file(location, location, rdcc_nbytes=32 * 2**20))


def dataset_of(group: Any, name: str, key: str) -> Any:
    """A dataset whose numbers all stand in the file.

    Args:
        group: where it is looked for.
        name: its path from there.
        key: what errors call it.

    Raises:
        DataError: if it is not there, or its numbers are elsewhere, were never written or cannot be unpacked.
    """
    dataset = member(group, name)
    if not isinstance(dataset, h5py.Dataset):
        raise DataError(f"'{key}' is {'missing' if dataset is None else 'no dataset'}; expected an array of numbers")
    _refuse_elsewhere(dataset, key)
    if dataset.shape is None:
        raise DataError(f"'{key}' is empty: it declares no numbers at all; write them, or make the file again")
    _refuse_unknown_filters(dataset, key)
    _refuse_unwritten(dataset, key)
    return dataset


def small_values(dataset: Any, key: str) -> Shaped[np.ndarray, "..."]:
    """All numbers of an axis or a mask.

    Raises:
        DataError: if they would take more than a gibibyte.
    """
    if dataset.size * dataset.dtype.itemsize > SMALL_BYTES:
        raise DataError(f"'{key}' declares the shape {dataset.shape}, too many numbers for an axis or a mask")
    return dataset[()]


def _refuse_elsewhere(dataset: Any, key: str) -> None:
    if dataset.external:
        raise DataError(
            f"'{key}' has its numbers in another file, '{dataset.external[0][0]}' (external storage), and only the "
            "file that was named is read: copy them into one file, as `h5repack` does"
        )
    if not dataset.is_virtual:
        return
    written = 0
    for source in dataset.virtual_sources():
        if source.file_name != ".":
            raise DataError(
                f"'{key}' is virtual and takes its numbers from another file, '{source.file_name}', and only the file "
                "that was named is read: copy them into one file"
            )
        numbers = member(dataset.file, source.dset_name)
        if isinstance(numbers, h5py.Dataset) and numbers.is_virtual:  # perhaps of itself
            raise DataError(f"'{key}' is virtual, and so is its source: copy the numbers into one dataset")
        dataset_of(dataset.file, source.dset_name, f"{key}, from {source.dset_name}")
        written += source.vspace.get_select_npoints()
    if written != dataset.size:
        raise DataError(
            f"'{key}' is virtual, and {dataset.size - written} of its {dataset.size} numbers have no source"
        )


def _refuse_unknown_filters(dataset: Any, key: str) -> None:
    properties = dataset.id.get_create_plist()
    for i in range(properties.get_nfilters()):
        code, _, _, name = properties.get_filter(i)
        if not h5py.h5z.filter_avail(code):
            raise DataError(
                f"'{key}' is packed by the HDF5 filter {code} ({name.decode(errors='replace') or 'without a name'}), "
                "which is not installed here: `pip install hdf5plugin` and set HDF5_PLUGIN_PATH to its plugins, or "
                "unpack a copy where the filter is: `h5repack -f NONE FILE COPY`"
            )


def _refuse_unwritten(dataset: Any, key: str) -> None:
    """Chunks that are missing, and a piece that was never allocated or lies behind the end of the file."""
    size = dataset.size * dataset.dtype.itemsize
    if dataset.is_virtual or size == 0:
        return
    if dataset.chunks is not None:
        expected = math.prod(-(-n // chunk) for n, chunk in zip(dataset.shape, dataset.chunks, strict=True))
        written = dataset.id.get_num_chunks()
        if written < expected:
            raise DataError(
                f"'{key}' was not written to its end: {expected - written} of its {expected} chunks are missing, and "
                f"HDF5 would give {dataset.fillvalue} for them. Let its writer finish, or cut a copy to what there is"
            )
    elif dataset.id.get_storage_size() == 0:
        raise DataError(
            f"'{key}' was never written: HDF5 would give {dataset.fillvalue} everywhere. Let its writer finish"
        )
    elif (offset := dataset.id.get_offset()) is not None:
        end, file_bytes = offset + size, os.path.getsize(dataset.file.filename)
        if end > file_bytes:
            raise DataError(
                f"the file is truncated: '{key}' of shape {dataset.shape} ends at byte {end} of {file_bytes}; fetch "
                "the file again, or make it again"
            )
