"""Work on the rows of matrices: in blocks that stay in the caches, and on a few threads at once."""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import EllipsisType
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd.forward_ad import _set_fwd_grad_enabled

BLOCK = 1 << 20
"""Bytes of a matrix worked on at once on a CPU: a few such blocks stay in the caches of a core."""

FEW_THREADS = 6
"""Up to so many threads work on shares of the rows of their own; more are left to PyTorch, operation by operation."""

Rows = slice | EllipsisType
Blocks = Iterator[tuple[Rows, Tensor]]
"""Slices of rows, each with scratch memory of shape (scratch, rows, columns); `...` for all rows of a stack of
matrices, (scratch, member, rows, columns)."""

WORTH_A_THREAD = 1 << 18
"""Bytes of a matrix from which the threads gain more than it takes to hand them their work."""

START_SECONDS = 60.0
"""For a thread to start; a machine that takes longer is left to PyTorch's own threads."""

_STARTING = threading.RLock()
_THREAD = threading.local()
"""`is_ours` marks the threads of a pool, which must not start further ones."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_rows(part: Callable[[Blocks], tuple[Tensor, ...]], like: Tensor, scratch: int) -> tuple[Tensor, ...]:
    """The sums over all rows that `part` returns for some of them, computed by as many threads as PyTorch may use.

    A thread that works on its own rows from the first operation to the last waits for the others once, and finds
    every block in its core's cache. The shares and the order of the sums follow from the number of threads: one within
    `on_threads`.

    Args:
        part: from blocks of rows to tensors. It may write to these rows of matrices that it knows.
        like: a matrix that has the rows, and the type and columns of the scratch memory; or a stack of matrices,
            (member, rows, columns), which is one block.
        scratch: matrices of scratch memory.
    """
    if like.dim() > 2:
        return on_threads(part, [iter([(..., like.new_empty(scratch, *like.shape))])], size=0)[0]
    shares = _workers() if plain(like) and like.nbytes >= _workers() * WORTH_A_THREAD else 1
    size = max(math.ceil(len(like) / shares), 1)
    rows = [slice(start, min(start + size, len(like))) for start in range(0, max(len(like), 1), size)]
    sums = on_threads(lambda share: part(_blocks(like, share, scratch)), rows, like.nbytes // shares)
    return tuple(functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True))


def on_threads(function: Callable[[Item], Result], items: Sequence[Item], size: int) -> list[Result]:
    """The function of every item, without gradients, on a few threads that each have PyTorch compute on them alone.

    `size` is the bytes of a matrix that an item works on: small ones are not worth a thread. Those items that would
    leave a thread without work, one or the rest of a division, are computed on the thread of the caller, where the
    operations may share the processor.
    """
    workers = _workers() if size >= WORTH_A_THREAD else 1
    even = len(items) - len(items) % workers if workers > 1 else 0
    quietly = partial(_quietly, function, torch.is_inference_mode_enabled())
    pool = _pool(workers) if even else None
    if pool is None:
        return [quietly(item) for item in items]
    try:
        shared = [pool.submit(quietly, item) for item in items[:even]]
    except RuntimeError:  # the interpreter is ending, and takes no more work
        return [quietly(item) for item in items]
    rest = [quietly(item) for item in items[even:]]
    return [future.result() for future in shared] + rest


def _quietly(function: Callable[[Item], Result], inference: bool, item: Item) -> Result:
    """The function with nothing recorded of it: a thread starts without the modes of its caller."""
    with torch.inference_mode() if inference else torch.no_grad(), _set_fwd_grad_enabled(False):
        return function(item)


def _workers() -> int:
    """How many threads of ours are to share the work: 1 leaves it to PyTorch's, operation by operation."""
    with _STARTING:  # while threads start, PyTorch's number is theirs
        count = torch.get_num_threads()
    alone = getattr(_THREAD, "is_ours", False) or bool(torch._C._len_torch_dispatch_stack())
    return 1 if alone or count > FEW_THREADS else count


def plain(x: Tensor) -> bool:
    """Whether NumPy and threads may work on it: a tensor of PyTorch's own class, on the CPU."""
    return type(x) is Tensor and x.device.type == "cpu"


def _pool(count: int) -> ThreadPoolExecutor | None:
    """The threads, None where they cannot be started."""
    with _STARTING:
        return _started(count)


@functools.lru_cache(maxsize=1)
def _started(count: int) -> ThreadPoolExecutor | None:
    """Threads that each have PyTorch compute on them alone.

    Each one first starts the threads of OpenMP that it will not use. After an operation GNU's OpenMP has its threads
    spin for milliseconds, on the cores that ours need, unless it counts more of them than there are cores.

    All start at once, because PyTorch's number of threads is also the one that later threads begin with.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="squall")
    together = threading.Barrier(count)

    def start(_: int) -> None:
        _THREAD.is_ours = True
        torch.ones(1 << 18).add_(1)
        torch.set_num_threads(1)
        together.wait(START_SECONDS)

    try:
        list(pool.map(start, range(count)))
    except RuntimeError:  # a limit on threads, which also breaks the barrier
        together.abort()
        return None
    finally:
        torch.set_num_threads(count)
    return pool


def _forget_threads() -> None:
    """A fork has the pool, but not its threads, and maybe a lock that nobody will open."""
    global _STARTING
    _STARTING = threading.RLock()
    _started.cache_clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_threads)


def _blocks(like: Tensor, rows: slice, scratch: int) -> Blocks:
    count = math.ceil((rows.stop - rows.start) * like.shape[1] * like.itemsize / BLOCK)
    size = math.ceil((rows.stop - rows.start) / max(count, 1)) if like.device.type == "cpu" else rows.stop - rows.start
    memory = like.new_empty(scratch, size, like.shape[1])
    for start in range(rows.start, rows.stop, max(size, 1)):
        block = slice(start, min(start + size, rows.stop))
        yield block, memory[:, : block.stop - block.start]
