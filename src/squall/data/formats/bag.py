"""Named arrays without a word on their axes: NumPy, PyTorch, MATLAB, PDEBench and plain HDF5 files."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from squall.data.arrays import Handle, Variable
from squall.data.errors import DataError
from squall.data.formats.layout import Reading, finish
from squall.data.stored import Layout

TIMES = ("t", "time", "times", "t-coordinate")
SPACE = ("x", "y", "z")
"""Names of arrays that are taken for the coordinates of the space axes."""

REAL = "biuf"
"""NumPy's kinds of real numbers: booleans, signed and unsigned integers, floats."""

GENERIC = ("array", "arr_0", "tensor", "data", "states", "x, y", "a, u")
"""Names that say nothing: such a field is called u."""


def looks_like(shape: Sequence[int]) -> str:
    """The axes that an array of this shape probably has, as the argument `axes` wants them."""
    # Data sets of this field have up to eight channels, and more points along an axis.
    last = len(shape) >= 4 and shape[-1] <= 8 < shape[-2]  # channels last, as in the samples of The Well and PDEBench
    plane = len(shape) == 3 + last and shape[1] == shape[2]  # one trajectory
    lead = ["time"] if plane or len(shape) == 2 else ["batch", "time"]
    if not last and (len(shape) >= 5 or (len(shape) == 4 and shape[2] <= 8 < shape[3])):
        lead.append("channel")
    return " ".join([*lead, *SPACE[: len(shape) - len(lead) - last], *["channel"] * last])


def parse_axes(axes: str, shape: Sequence[int], name: str, *, timed: bool = True) -> tuple[str, ...]:
    """The words of `axes`, one per stored axis; initial states may lack the time.

    Raises:
        DataError: where their number does not fit, one comes twice, or time or space is missing.
    """
    words = tuple(re.findall(r"[A-Za-z_]\w*", axes))
    space = [word for word in words if word not in ("batch", "time", "channel")]
    lacks_time = timed and "time" not in words
    if len(words) != len(shape) or len(set(words)) != len(words) or lacks_time or not 1 <= len(space) <= 3:
        raise DataError(
            f"axes: got {axes!r} for '{name}' of shape {tuple(shape)}; expected {len(shape)} different words among "
            f"batch, time, channel and one to three names of space axes, such as {looks_like(shape)!r}"
        )
    return words


def around_time(shape: Sequence[int], times: int, backwards: bool) -> str:
    """The axes that an array probably has of which one is as long as the list of times; "" where that cannot be told.

    Example:
        >>> around_time((21, 32, 32, 12), 21, backwards=True)
        'time y x batch'
    """
    rest = [n for n in shape if n != times]
    if not 1 <= len(rest) == len(shape) - 1 <= 4:
        return ""
    whole = len(rest) == 1 or (len(rest) == 2 and rest[0] == rest[1])  # one trajectory
    words = [*(() if whole else ("batch",)), *SPACE[: len(rest) - (not whole)]]
    words = words[::-1] if backwards else words
    position = list(shape).index(times)
    return " ".join([*words[:position], "time", *words[position:]])


def ask(name: str, shape: Sequence[int], times: int = 0, *, backwards: bool = False) -> DataError:
    """The file cannot say what its axes are."""
    guess = around_time(shape, times, backwards) or looks_like(shape)
    last = " (channels last)" if guess.endswith("channel") else ""
    return DataError(
        f"'{name}' has the shape {tuple(shape)} and the file does not say what its axes are. It looks like "
        f"axes={guess!r}{last}; give axes=... with one word per axis: batch, time, channel and names of space axes"
    )


def read_bag(
    format: str,
    handle: Handle,
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    options: Reading,
    *,
    axes: tuple[str, ...] | None = None,
    space: tuple[str, ...] | None = None,
    **about: Any,
) -> Layout:
    """The layout of a file of named arrays: the largest make the state, the others are axes and conditions.

    Args:
        format: name for people.
        handle: gives the arrays.
        shapes: shape and type of each array.
        options: of `open`.
        axes: of the states, where the format says them.
        space: order of the space axes in the state, where it is not that in the file.
        about: more of the description.
    """
    usable = {name: shape for name, (shape, dtype) in shapes.items() if dtype.kind in REAL}
    notes = [f"left out '{name}': it holds {shapes[name][1]}" for name in shapes if name not in usable]
    states = _states(usable, options.get("fields"), handle)
    shape = usable[states[0]]
    if usable.get("dt") == ():
        options = {"dt": float(handle.array("dt")[()]), **{k: v for k, v in options.items() if v is not None}}  # type: ignore[assignment]
        del usable["dt"]
    given = options.get("axes")
    if given is None and axes is None and (axes := _by_lengths(shape, usable)) is not None:
        notes.append(f"axes: {' '.join(axes)}, by the lengths of the lists of times and points")
    if given is None and (axes is None or len(axes) != len(shape)):
        raise DataError(f"{handle.shown}: this is {format}. {_ask(states[0], shape, usable, format)}")
    timed = options.get("initial") is None
    words = parse_axes(given, shape, states[0], timed=timed) if given is not None else axes or ()
    lengths = {"time": 1} | dict(zip(words, shape, strict=True))
    order = space or tuple(word for word in words if word not in ("batch", "time", "channel"))
    named = {axis: _points(axis, lengths, usable) for axis in ("time", *order)}
    places = {axis: name for axis, name in named.items() if name is not None}
    points = {axis: np.ravel(handle.array(name)[()]) for axis, name in places.items()}
    rename = options.get("fields") if set(options.get("fields") or ()).isdisjoint(usable) else None
    variables = _variables(states, shapes, words, lengths.get("channel", 1), rename)
    conditions = []
    for name in sorted(usable.keys() - {*states, *places.values()}):
        role = _condition_axes(usable[name], lengths, words)
        if role is None:
            notes.append(f"left out '{name}': its shape {usable[name]} fits none of the axes {' '.join(words)}")
        else:
            conditions.append(Variable(name, name, role, _components(name, role, usable[name]), shapes[name][1]))
    sizes = tuple(lengths[axis] for axis in order)
    channels = sum(len(variable.channels) for variable in variables)
    times = points.get("time")
    return finish(
        format,
        handle,
        variables,
        conditions,
        (lengths.get("batch", 1), lengths["time"], channels, *sizes),
        options,
        times=times[: lengths["time"]] if times is not None else None,  # PDEBench has one time more than states
        coordinates=[points.get(axis) for axis in order],
        notes=notes,
        axes=order,
        **about,
    )


def _by_lengths(shape: tuple[int, ...], usable: Mapping[str, tuple[int, ...]]) -> tuple[str, ...] | None:
    """The axes of an array, where each is as long as one of the lists t, x, y, z and no other axis or list is."""
    clock = next((name for name in TIMES if name in usable), "")
    lists = {"time": clock, **{axis: axis for axis in SPACE if axis in usable}}
    lengths = {axis: max(usable.get(name, ()), default=0) for axis, name in lists.items()}
    vectors = all(int(np.prod(usable.get(name, (0,)))) == lengths[axis] for axis, name in lists.items())
    if not vectors or len(lengths) < 2 or sorted(lengths.values()) != sorted({*shape}) or len({*shape}) != len(shape):
        return None
    return tuple(next(axis for axis, length in lengths.items() if length == n) for n in shape)


def _ask(name: str, shape: tuple[int, ...], usable: Mapping[str, tuple[int, ...]], format: str) -> DataError:
    times = next((int(np.prod(usable[clock])) for clock in TIMES if clock in usable), 0)
    return ask(name, shape, times, backwards=format.startswith("MATLAB"))


def _states(usable: Mapping[str, tuple[int, ...]], fields: Sequence[str] | None, handle: Handle) -> list[str]:
    """The arrays named in `fields`, or all those of the shape with the most axes."""
    chosen = [name for name in fields or () if name in usable]
    if chosen and len(chosen) < len(fields or ()):
        missing = sorted(set(fields or ()) - set(usable))
        raise DataError(f"{handle.shown}: fields: no {', '.join(missing)}; the file has {', '.join(usable)}")
    most = max((len(shape) for shape in usable.values()), default=0)
    if most < 2:
        raise DataError(f"{handle.shown}: it holds no array of two axes or more; found: {dict(usable) or 'no numbers'}")
    states = chosen or [name for name, shape in usable.items() if len(shape) == most]
    different = {name: usable[name] for name in states}
    if len(set(different.values())) > 1:
        raise DataError(f"{handle.shown}: the fields differ in shape: {different}; choose some by fields=[...]")
    return states


def _points(axis: str, lengths: Mapping[str, int], usable: Mapping[str, tuple[int, ...]]) -> str | None:
    """The array that holds the points of an axis."""
    for name in TIMES if axis == "time" else (axis, f"{axis}-coordinate"):
        size = int(np.prod(usable.get(name, ())))
        line = name in usable and max(usable[name], default=0) == size
        if line and (size == lengths[axis] or (axis == "time" and size == lengths[axis] + 1)):
            return name
    return None


def _variables(
    states: Sequence[str],
    shapes: Mapping[str, tuple[tuple[int, ...], np.dtype]],
    words: tuple[str, ...],
    channels: int,
    rename: Sequence[str] | None,
) -> tuple[Variable, ...]:
    total = len(states) * channels
    if rename is not None and len(rename) != total:
        raise DataError(f"fields: got {len(rename)} names {tuple(rename)} for {total} channels of {', '.join(states)}")
    names = list(rename or ())
    if not names:
        stems = ["u" if name in GENERIC else name for name in states]
        names = [stem if channels == 1 else f"{stem}{i}" for stem in stems for i in range(channels)]
    return tuple(
        Variable(name, name, words, tuple(names[i * channels : (i + 1) * channels]), shapes[name][1])
        for i, name in enumerate(states)
    )


def _condition_axes(
    shape: tuple[int, ...], lengths: Mapping[str, int], words: tuple[str, ...]
) -> tuple[str, ...] | None:
    """The axes of an array that goes with the states: those of the states without some, in the same order."""
    space = tuple(word for word in words if word not in ("batch", "time", "channel"))
    lead = [("batch", "time"), ("batch",), ("time",), ()]
    for axes in [(*front, *rest, *last) for rest in (space, ()) for front in lead for last in ((), ("channel",))]:
        if set(axes) - {"channel"} <= set(words):
            ordered = tuple(sorted((a for a in axes if a in words), key=words.index))
            ordered = ordered if "channel" not in axes or "channel" in ordered else (*ordered, "channel")
            sizes = [lengths.get(axis, 1) if axis != "channel" else None for axis in ordered]
            if len(shape) == len(ordered) and all(n in (None, s) for n, s in zip(sizes, shape, strict=True)):
                if ordered == ("channel",):
                    continue
                return ordered
    squeezed = tuple(n for n in shape if n > 1)
    if squeezed == (lengths.get("batch"),):  # MATLAB keeps a list as a matrix of one row
        return tuple("batch" if n > 1 else "" for n in shape)
    return None if shape and squeezed else ("",) * len(shape)


def _components(name: str, axes: tuple[str, ...], shape: tuple[int, ...]) -> tuple[str, ...]:
    count = shape[axes.index("channel")] if "channel" in axes else 1
    return (name,) if count == 1 else tuple(f"{name}{i}" for i in range(count))
