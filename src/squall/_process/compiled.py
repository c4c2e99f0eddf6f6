"""What the loops that numba compiles share: how they are compiled, and the bits of their numbers.

Optional (`pip install squall[fast]`): every importer falls back to plain PyTorch or NumPy.
"""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numba
from numba import types
from numba.core import config
from numba.extending import intrinsic

if getattr(config, "DISABLE_JIT", False):  # the loops would run uncompiled, and some of their parts not at all
    raise ImportError("NUMBA_DISABLE_JIT is set")


def compiled(
    function: Callable[..., Any], *, fastmath: frozenset[str] = frozenset({"contract"}), inlined: bool = False
) -> Any:
    """Compiled at the first call; kept on disk for the next process where there is a place for it.

    Args:
        function: loops over NumPy arrays.
        fastmath: what LLVM may do to sums and products; by default fuse one of each, which loses nothing.
        inlined: for what other compiled functions call. Otherwise each of them has a copy of its own, optimised for
            itself, and a process takes for all the one that it happens to load first: rounding would depend on what
            ran before, and on what was found on the disk.
    """
    function = inspect.unwrap(function)  # from what a type checker of the tests may have put around it
    options = {"nogil": True, "fastmath": set(fastmath), "error_model": "numpy", "forceinline": inlined}
    try:
        dispatcher: Any = numba.njit(function, cache=True, **options)
    except RuntimeError:  # no folder that can be written
        return numba.njit(function, **options)
    cache = dispatcher._cache
    for name in ("load_overload", "save_overload"):
        setattr(cache, name, _without_errors(getattr(cache, name), cache))
    return dispatcher


def _without_errors(access: Callable[..., Any], cache: Any) -> Callable[..., Any]:
    """Access to a cache that may be damaged, or on a disk that is full: without it the loops are compiled again."""

    def attempt(*arguments: Any) -> Any:
        try:
            return access(*arguments)
        except Exception as error:
            cache.disable()
            warnings.warn(f"numba's cache in {cache.cache_path} cannot be used: {error!r}", stacklevel=2)
            return None

    return attempt


@intrinsic
def bits_of(typing_context, x):  # pyright: ignore[reportUnusedParameter]
    """The bits of a float as an integer. Of what has no sign they are ordered like the floats, NaN above all."""
    integer = types.int32 if x == types.float32 else types.int64
    return integer(x), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], context.get_value_type(signature.return_type)
    )


@intrinsic
def real_of(typing_context, i):  # pyright: ignore[reportUnusedParameter]
    """The inverse of `bits_of`."""
    real = types.float32 if i == types.int32 else types.float64
    return real(i), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], context.get_value_type(signature.return_type)
    )
