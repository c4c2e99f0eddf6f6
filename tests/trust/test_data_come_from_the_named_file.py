"""Data come from the file that was named, whole, or not at all."""

import errno
import fcntl
import os
import warnings

import h5py
import numpy as np
import pytest

import squall.data
from squall.data import DataError

STATES = np.random.default_rng(0).normal(size=(4, 6, 1, 8))
FIELD = "t0_fields/u"


@pytest.fixture
def path(tmp_path):
    squall.data.write(tmp_path / "other.hdf5", STATES + 1, dt=0.1)
    return squall.data.write(tmp_path / "main.hdf5", STATES, dt=0.1)


def replace(file, key, make):
    """Put what `make(group, name)` makes in the place of a dataset, with its attributes."""
    attributes = dict(file[key].attrs)
    file.move(key, "aside")
    group, _, name = key.rpartition("/")
    made = make(file[group or "/"], name)
    if made is not None:
        made.attrs.update(attributes)


def external(group, name):
    group[name] = h5py.ExternalLink("other.hdf5", f"{group.name}/{name}")


def soft_through_external(group, name):
    group.file["away"] = h5py.ExternalLink("other.hdf5", "/")
    group[name] = h5py.SoftLink(f"/away{group.name}/{name}")


def pipe_behind_link(group, name):
    os.mkfifo(os.path.join(os.path.dirname(group.file.filename), "pipe"))
    group[name] = h5py.ExternalLink("pipe", "/x")


def raw_storage(group, name):
    old = group.file["aside"]
    where = os.path.join(os.path.dirname(group.file.filename), "raw.bin")
    with open(where, "wb") as file:
        file.write(bytes(old.size * 8))
    return group.create_dataset(name, old.shape, "f8", external=[(where, 0, old.size * 8)])


def virtual(source, part=slice(None)):
    def make(group, name):
        old = group.file["aside"]
        layout = h5py.VirtualLayout(old.shape, "f8")
        layout[part] = h5py.VirtualSource(source or group.file.filename, (source and FIELD) or "aside", old.shape)[part]
        return group.create_virtual_dataset(name, layout)

    return make


def never_written(**options):
    return lambda group, name: group.create_dataset(name, group.file["aside"].shape, "f8", **options)


def half_written(group, name):
    made = group.create_dataset(name, group.file["aside"].shape, "f8", chunks=(1, *group.file["aside"].shape[1:]))
    made[:2] = 1.0
    return made


def unknown_filter(group, name):
    properties = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    properties.set_chunk(group.file["aside"].shape)
    properties.set_filter(32123, h5py.h5z.FLAG_OPTIONAL, ())
    space = h5py.h5s.create_simple(group.file["aside"].shape)
    return h5py.Dataset(h5py.h5d.create(group.id, name.encode(), h5py.h5t.IEEE_F64LE, space, properties))


ELSEWHERE = {
    "external link": (external, "other.hdf5"),
    "soft link through an external one": (soft_through_external, "other.hdf5"),
    "external link to a pipe": (pipe_behind_link, "pipe"),
    "external storage": (raw_storage, "raw.bin"),
    "virtual source": (virtual("other.hdf5"), "other.hdf5"),
    "virtual source that is gone": (virtual("gone.hdf5"), "gone.hdf5"),
    "virtual with a gap": (virtual(None, slice(0, 2)), "have no source"),
    "chunks never written": (never_written(chunks=(1, 6, 8)), "4 of its 4 chunks are missing"),
    "chunks half written": (half_written, "2 of its 4 chunks are missing"),
    "nothing ever written": (never_written(), "was never written"),
    "no numbers declared": (lambda group, name: group.create_dataset(name, data=h5py.Empty("f8")), "is empty"),
    "unknown filter": (unknown_filter, "filter 32123"),
    "dangling soft link": (lambda group, name: group.__setitem__(name, h5py.SoftLink("/nowhere")), "is not there"),
    "soft link to itself": (lambda group, name: group.__setitem__(name, h5py.SoftLink(name)), "is not there"),
    "a group": (lambda group, name: group.create_group(name), "no dataset"),
}


@pytest.mark.parametrize(("make", "message"), ELSEWHERE.values(), ids=ELSEWHERE)
def test_what_is_not_in_the_file_or_was_never_written_is_refused_by_name(path, make, message):
    with h5py.File(path, "r+") as file:
        replace(file, FIELD, make)
    with pytest.raises(DataError) as caught:
        squall.data.open(path)
    assert message in str(caught.value)
    assert "'u'" in str(caught.value) or FIELD in str(caught.value)


@pytest.mark.parametrize("key", ["dimensions/time", "dimensions/x", "boundary_conditions/x_periodic/mask"])
@pytest.mark.parametrize("make", [external, raw_storage, never_written(chunks=(2,))])
def test_axes_and_masks_come_from_the_file_too(path, key, make):
    with h5py.File(path, "r+") as file:
        replace(file, key, make)
    with pytest.raises(DataError, match=key.rpartition("/")[2]):
        squall.data.open(path)


def test_a_group_behind_a_link_to_another_file_is_refused(path):
    with h5py.File(path, "r+") as file:
        file.move("t0_fields", "aside")
        file["t0_fields"] = h5py.ExternalLink("other.hdf5", "/t0_fields")
    with pytest.raises(DataError, match=r"other\.hdf5"):
        squall.data.open(path)


def test_links_and_virtual_datasets_within_the_file_are_read(path):
    def soft(group, name):
        group[name] = h5py.SoftLink("/aside")

    for make in (soft, virtual(None)):
        with h5py.File(path, "r+") as file:
            replace(file, FIELD, make)
        assert np.array_equal(squall.data.open(path).read(), STATES)
        with h5py.File(path, "r+") as file:
            del file[FIELD]
            file.move("aside", FIELD)


def test_a_huge_declared_axis_is_refused_before_memory_is_taken(path):
    with h5py.File(path, "r+") as file:
        replace(file, "dimensions/x", lambda group, name: group.create_dataset(name, (10**12,), "f4", chunks=(10**6,)))
    with pytest.raises(DataError, match="chunks are missing"):
        squall.data.open(path)


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir], ids=["pipe", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(tmp_path, make):
    make(tmp_path / "x.hdf5")
    with pytest.raises(DataError, match="this is a"):
        squall.data.open(tmp_path / "x.hdf5")
    with pytest.raises(DataError, match="a device"):
        squall.data.open("/dev/null")


def test_a_file_that_is_locked_is_not_called_damaged(path):
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # as HDF5 does where it writes
        with pytest.raises(DataError) as caught:
            squall.data.open(path)
    assert "is locked: another process holds it open for writing" in str(caught.value)
    assert "damaged" not in str(caught.value)
    assert squall.data.open(path).trajectories == 4


def test_a_file_system_without_locks_is_a_warning(path, monkeypatch):
    real = h5py.File

    def file(place, mode, locking=None, **options):
        if locking is None:
            raise OSError(errno.ENOLCK, "unable to lock file, errno = 37, error message = 'No locks available'")
        return real(place, mode, locking=locking, **options)

    monkeypatch.setattr(h5py, "File", file)
    with pytest.warns(UserWarning, match="has no locks"):
        assert squall.data.open(path).trajectories == 4


@pytest.mark.parametrize("land", [True, False])
def test_the_advice_for_land_does_not_leave_out_every_trajectory(land):
    states = STATES.copy()
    states[:, :, :, 3] = np.nan
    if not land:
        states[0, 0, 0, 3] = 0.0
    with pytest.raises(DataError, match="the mask" if land else "leave them out\\."):
        squall.data.InMemory(states, dt=0.1)


@pytest.mark.parametrize("dtype", [complex, int, np.float16])
def test_the_advice_for_other_numbers_keeps_them_all(dtype):
    with pytest.raises(DataError, match="complex numbers as two channels"):
        squall.data.InMemory(np.ones((2, 3, 1, 4), dtype), dt=0.1)


def test_what_a_training_does_not_see_of_a_file_is_said(path):
    from squall.runs.build import build
    from squall.runs.config import from_dict

    with h5py.File(path, "r+") as file:
        file["scalars/forcing"] = np.zeros(6)
        file["scalars/forcing"].attrs["time_varying"] = True
        file["scalars/gravity"] = 9.81
        file["t0_fields/depth"] = np.zeros((4, 8))
        file["t0_fields/depth"].attrs.update(time_varying=False, sample_varying=True, dim_varying=[True])
        file["t0_fields"].attrs["field_names"] = ["u", "depth"]
    config = from_dict({"data": {"path": str(path), "validation": 1, "test": 1}})
    with pytest.warns(UserWarning, match="constant in time: depth; the scalars that vary .*: forcing;"):
        build(config)


def test_whole_files_are_read_without_a_word(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(squall.data.open(path).read(), STATES)


def netcdf(path):
    with h5py.File(path, "w") as file:
        for name, values in (("time", np.arange(6.0)), ("x", np.arange(8.0)), ("u", STATES[0, :, 0])):
            file[name] = values
        for name in ("time", "x"):
            file[name].make_scale(name)
        for axis, name in enumerate(("time", "x")):
            file["u"].dims[axis].attach_scale(file[name])
    return "u", "time"


def pdebench(path):
    with h5py.File(path, "w") as file:
        file["tensor"] = STATES[:, :, 0]
        file["t-coordinate"], file["x-coordinate"] = np.arange(6.0), np.arange(8.0)
    return "tensor", "t-coordinate"


def pdebench_groups(path):
    with h5py.File(path, "w") as file:
        file["0000/data"] = STATES[0, :, 0, :, None]
        file["0000/grid/t"], file["0000/grid/x"] = np.arange(6.0), np.arange(8.0)
    return "0000/data", "0000/grid/t"


def matlab(path):
    with h5py.File(path, "w") as file:
        file["u"], file["t"] = STATES[:, :, 0].transpose(1, 2, 0), np.arange(6.0)[None]
        file["a"] = STATES[:, 0, 0].T
        for name in "uta":
            file[name].attrs["MATLAB_class"] = np.bytes_("double")
    return "u", "t"


@pytest.mark.parametrize("write", [netcdf, pdebench, pdebench_groups, matlab])
@pytest.mark.parametrize(
    "make",
    [external, soft_through_external, pipe_behind_link, raw_storage, virtual("other.hdf5"), never_written(chunks=True)],
)
@pytest.mark.parametrize("which", [0, 1], ids=["states", "times"])
def test_other_formats_in_hdf5_take_nothing_from_elsewhere(tmp_path, write, make, which):
    path = tmp_path / "data.h5"
    keys = write(path)
    assert squall.data.open(path).read().isfinite().all()
    with h5py.File(path, "r+") as file:
        replace(file, keys[which], make)
    with pytest.raises(DataError, match=r"another file|never|chunks are missing"):
        squall.data.open(path).read()


@pytest.mark.parametrize("write", [netcdf, pdebench, pdebench_groups, matlab])
def test_a_lock_is_said_for_other_formats_too(tmp_path, write):
    path = tmp_path / "data.h5"
    write(path)
    with path.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(DataError, match="is locked"):
            squall.data.open(path)


def test_pipes_in_folders_are_refused_and_not_waited_for(tmp_path):
    (tmp_path / "data").mkdir()
    os.mkfifo(tmp_path / "data" / "a.npy")
    with pytest.raises(DataError, match="named pipe"):
        squall.data.open(tmp_path)


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("/etc/hostname", path)], ids=["pipe", "link"])
def test_zarr_takes_nothing_from_elsewhere(tmp_path, make):
    zarr = pytest.importorskip("zarr")
    store = tmp_path / "a.zarr"
    group = zarr.open_group(store, mode="w")
    group.create_array("u", data=STATES[0, :, 0], dimension_names=("time", "x"))
    assert squall.data.open(store, dt=1.0).shape == (1, 6, 1, 8)
    make(next(entry for entry in (store / "u").rglob("*") if entry.name != "zarr.json").with_name("more"))
    with pytest.raises(DataError, match=r"named pipe|a link to a file elsewhere"):
        squall.data.open(store, dt=1.0)
