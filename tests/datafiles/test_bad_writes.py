"""What cannot be written is refused before, and what fails midway leaves everything as it was."""

import sys
import textwrap

import numpy as np
import pytest
import torch
from processes import run_program

import squall.data
from squall.data import DataError


def write(path, states, **about):
    return squall.data.write(path, states, **({"dt": 0.1} | about))


def append_all(path, like, *batches, then=lambda: None):
    with squall.data.create(path, like.shape, dt=0.1) as file:
        for batch in batches:
            file.append(batch)
        then()


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ({"dt": 0.0}, "dt: got 0.0"),
        ({"dt": -1.0}, "dt: got -1.0"),
        ({"dt": float("nan")}, "dt: got nan"),
        ({"fields": ("u",)}, "fields: got 1 names .* for 2 channels"),
        ({"fields": ("u", "u")}, "have to be different"),
        ({"fields": ("u", "a/b")}, "without '/'"),
        ({"fields": ("u", "")}, "not empty"),
        ({"lengths": -1.0}, "lengths: got"),
        ({"lengths": (1.0, 2.0)}, "lengths: got 2 for 1 space axes"),
        ({"coordinates": np.arange(6.0)}, r"coordinates: got arrays of shapes \(\(6,\),\)"),
        ({"coordinates": np.zeros(7)}, "in order"),
        ({"coordinates": np.arange(7.0), "lengths": 1.0}, "both were given"),
        ({"boundary": "periodical"}, "allowed: periodic, wall, open"),
        ({"parameters": {"grid_type": 1.0}}, "'grid_type' is taken"),
        ({"parameters": {"gamma": [1.0]}}, "gamma is"),
        ({"provenance": {"when": object()}}, "provenance: "),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, states, about, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "a.hdf5", states, **about)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((5, 1, 2, 7), "at least two"),
        ((5, 12, 7), r"expected \(batch, time, channel, \*space\)"),
        ((2, 2, 1, 2, 2, 2, 2), "7 axes"),
        ((0, 12, 2, 7), "no axis may be empty"),
        ((3, 12, 2, 0), "no axis may be empty"),
    ],
)
def test_states_of_a_wrong_shape(tmp_path, shape, message):
    with pytest.raises(DataError, match=message):
        write(tmp_path / "a.hdf5", np.zeros(shape))
    with pytest.raises(DataError, match=message), squall.data.create(tmp_path / "a.hdf5", shape, dt=0.1):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("dtype", [np.int64, np.float16, np.complex128, bool])
def test_states_of_a_wrong_type(tmp_path, dtype):
    with pytest.raises(DataError, match=f"got {np.dtype(dtype)}"):
        write(tmp_path / "a.hdf5", np.zeros((5, 12, 2, 7), dtype))
    with pytest.raises(DataError, match=r"torch\.bfloat16"):
        write(tmp_path / "a.hdf5", torch.zeros((5, 12, 2, 7), dtype=torch.bfloat16))


def test_states_that_are_not_finite(tmp_path, states):
    states[2, 7, 1, 3] = np.nan
    states[4, :, 0] = -np.inf
    with pytest.raises(DataError) as caught:
        write(tmp_path / "a.hdf5", states, fields=("u", "v"))
    assert "85 of 840 values" in str(caught.value)
    assert "trajectory 2, time index 7, field 'v', point (3,)" in str(caught.value)
    with pytest.raises(DataError, match="trajectory 4, time index 0, field 'u0'"):
        append_all(tmp_path / "a.hdf5", states, states[:2], states[[0, 1]], states[4:])
    assert list(tmp_path.iterdir()) == []


def test_largest_numbers_are_finite(tmp_path):
    """A sum of them overflows; that is no infinity in the data."""
    large = np.full((2, 3, 1, 4), np.finfo(np.float32).max, dtype=np.float32)
    assert np.array_equal(squall.data.open(write(tmp_path / "a.hdf5", large)).read(), large)


def test_existing_file_is_never_touched(path, states):
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match=r"waves\.hdf5 exists and is not overwritten.*move it away"):
        write(path, states + 1)
    with pytest.raises(FileExistsError), squall.data.create(path, states.shape, dt=0.1):
        pass
    assert path.read_bytes() == before
    assert list(path.parent.iterdir()) == [path]


def test_file_that_appears_while_writing_is_not_touched(tmp_path, states):
    path = tmp_path / "a.hdf5"
    with pytest.raises(FileExistsError):
        append_all(path, states, states, then=lambda: path.write_text("someone else's"))
    assert path.read_text() == "someone else's"
    assert list(tmp_path.iterdir()) == [path]


def test_dangling_link_is_something_that_exists(tmp_path, states):
    (tmp_path / "a.hdf5").symlink_to(tmp_path / "gone")
    with pytest.raises(FileExistsError):
        write(tmp_path / "a.hdf5", states)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_error_in_the_block_leaves_nothing(tmp_path, states, error):
    def interrupt():
        raise error

    with pytest.raises(error):
        append_all(tmp_path / "a.hdf5", states, states[:2], then=interrupt)
    assert list(tmp_path.iterdir()) == []


def test_missing_and_surplus_trajectories(tmp_path, states):
    with pytest.raises(DataError, match="3 of the 5"):
        append_all(tmp_path / "a.hdf5", states, states[:3])
    with pytest.raises(DataError, match=r"got 3 .* after 3; announced were 5"):
        append_all(tmp_path / "a.hdf5", states, states[:3], states[:3])
    with pytest.raises(DataError, match="announced was"):
        append_all(tmp_path / "a.hdf5", states, states.astype(np.float32))
    assert list(tmp_path.iterdir()) == []


def test_folders_are_made_and_a_file_is_no_folder(tmp_path, states):
    path = write(tmp_path / "new" / "folder" / "a.hdf5", states)
    assert squall.data.open(path).trajectories == 5
    for below in (path / "b.hdf5", path / "c" / "b.hdf5"):
        with pytest.raises(NotADirectoryError, match="a part of the path is a file"):
            write(below, states)


@pytest.mark.parametrize("code", ["EACCES", "EROFS", "ENOSPC", "EDQUOT"])
def test_errors_of_the_system_name_the_file_and_what_to_do(tmp_path, states, code, monkeypatch):
    import errno
    import os

    def fail(*_):
        raise OSError(getattr(errno, code), "no")

    monkeypatch.setattr(os, "posix_fallocate", fail)
    with pytest.raises(OSError, match=r"cannot write .* choose a.*|make room") as caught:
        write(tmp_path / "a.hdf5", states)
    assert caught.value.errno == getattr(errno, code)
    assert caught.value.filename == str(tmp_path / "a.hdf5")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("nth", [0, 1, 2])
def test_disk_that_fills_midway(tmp_path, states, nth, monkeypatch):
    import errno

    from squall.data import writing

    calls = iter(range(100))
    write_all = writing.write_all

    def fill(file, numbers):
        if next(calls) == nth:
            raise OSError(errno.ENOSPC, "full")
        write_all(file, numbers)

    monkeypatch.setattr(writing, "write_all", fill)
    with pytest.raises(OSError, match="make room") as caught:
        write(tmp_path / "a.hdf5", states)
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def python(code, *arguments):
    return run_program(textwrap.dedent(code), *arguments, modules=("torch", "squall.data"))


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("reserve", [True, False], ids=["reserved", "unreserved"])
@pytest.mark.parametrize("limit", [100, 5_000, 500_000, 3_000_000])
def test_full_disk(tmp_path, limit, reserve):
    """A limit on the size of files fails as a full disk does, in the middle of a write.

    With room reserved it fails at once; where the system cannot reserve, it fails midway. Both end cleanly.
    """
    result = python(
        """
        import os, resource, sys
        import torch
        import squall.data
        limit, reserve = int(sys.argv[2]), sys.argv[3] == "True"
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if not reserve:
            del os.posix_fallocate
        try:
            squall.data.write(sys.argv[1], torch.ones(10, 1000, 1, 50, dtype=torch.float64), dt=0.1)
        except OSError as error:
            print(type(error).__name__, error)
        """,
        tmp_path / "a.hdf5",
        limit,
        reserve,
    )
    assert result.returncode == 0, result.stderr
    assert "cannot write" in result.stdout
    assert "Nothing was kept" in result.stdout
    assert "a.hdf5" in result.stdout
    assert result.stderr == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="limits of a process")
@pytest.mark.parametrize("name", ["a.nc", "a.hdf5"])
def test_a_stream_on_a_disk_with_room_for_its_numbers_only(tmp_path, name):
    """HDF5 must not meet the limit: it ends the process when it cannot close its file."""
    result = python(
        """
        import resource, sys
        from pathlib import Path
        import torch
        from squall.data import describe
        from squall.data.streaming import stream
        shape = 1, 5, 1, 32
        limit = 2_000  # 640 bytes of numbers
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            with stream(Path(sys.argv[1]), shape, torch.float32, describe(shape, dt=1.0)):
                print("made")
        except OSError as error:
            print(error)
        """,
        tmp_path / name,
    )
    assert result.returncode == 0, result.stderr
    assert "cannot write" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform == "win32", reason="signals")
@pytest.mark.parametrize("moment", ["publish", "_put"])
def test_killed_before_the_end_leaves_no_data_file(tmp_path, moment):
    """Only a hidden `.part` stays, which no reader takes for data, and the same command works again."""
    code = """
        import os, signal, sys
        import torch
        import squall.data.writing as writing
        def die(*_):
            os.kill(os.getpid(), signal.SIGKILL)
        if sys.argv[2] == "publish":
            writing.publish = die
        elif sys.argv[2] == "_put":
            writing.Writer._put = die
        writing.write(sys.argv[1], torch.ones(3, 4, 1, 5), dt=0.1)
        """
    path = tmp_path / "a.hdf5"
    assert python(code, path, moment).returncode == -9
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".a.hdf5.")
    assert left.suffix == ".part"
    assert python(code, path, "nothing").returncode == 0
    squall.data.open(path).check()
