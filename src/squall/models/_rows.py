"""Work on the rows of matrices: in blocks that stay in the caches, and on a few threads at once."""

import functools
import math
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

BLOCK = 1 << 20
"""Bytes of a matrix worked on at once on a CPU: a few such blocks stay in the caches of a core."""

FEW_THREADS = 6
"""Up to so many threads work on shares of the rows of their own; more are left to PyTorch, operation by operation."""

Blocks = Iterator[tuple[slice, Tensor]]
"""Slices of rows, each with scratch memory of shape (scratch, rows, columns)."""

Item = TypeVar("Item")
Result = TypeVar("Result")


def over_rows(part: Callable[[Blocks], tuple[Tensor, ...]], like: Tensor, scratch: int) -> tuple[Tensor, ...]:
    """The sums over all rows that `part` returns for some of them, computed by as many threads as PyTorch may use.

    A thread that works on its own rows from the first operation to the last waits for the others once, and finds
    every block in its core's cache. The shares and the order of the sums depend on nothing but the number of threads.

    Args:
        part: from blocks of rows to tensors. It may write to these rows of matrices that it knows.
        like: a matrix that has the rows, and the type and columns of the scratch memory.
        scratch: matrices of scratch memory.
    """
    shares = min(max(math.ceil(like.nbytes / BLOCK), 1), _workers()) if _plain(like) else 1
    size = max(math.ceil(len(like) / shares), 1)
    rows = [slice(start, min(start + size, len(like))) for start in range(0, max(len(like), 1), size)]
    sums = on_threads(lambda share: part(_blocks(like, share, scratch)), rows)
    return tuple(functools.reduce(torch.add, parts) for parts in zip(*sums, strict=True))


def on_threads(function: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
    """The function of every item, on a few threads that each have PyTorch compute on themselves alone.

    Those that would leave a thread without work, one item or the rest of a division, are computed on the thread of
    the caller, where the operations may share the processor.
    """
    workers = _workers()
    even = len(items) - len(items) % workers if workers > 1 else 0
    inference = torch.is_inference_mode_enabled()

    def on_thread(item: Item) -> Result:
        with torch.inference_mode() if inference else torch.no_grad():  # a thread starts with neither
            return function(item)

    shared = list(_pool(workers).map(on_thread, items[:even])) if even else []
    return shared + [function(item) for item in items[even:]]


def _workers() -> int:
    """How many threads of ours are to share the work: 1 leaves it to PyTorch's, operation by operation."""
    count = torch.get_num_threads()
    return count if count <= FEW_THREADS and not torch._C._len_torch_dispatch_stack() else 1


def _plain(x: Tensor) -> bool:
    return type(x) is Tensor and x.device.type == "cpu"


@functools.cache
def _pool(count: int) -> ThreadPoolExecutor:
    """Threads that each have PyTorch compute on themselves alone.

    Each one first starts the threads of OpenMP that it will not use. After an operation GNU's OpenMP has its threads
    spin for milliseconds, on the cores that ours need, unless it counts more of them than there are cores.

    All start at once, because PyTorch's number of threads is also the one that later threads begin with.
    """
    pool = ThreadPoolExecutor(count, thread_name_prefix="squall")
    together = threading.Barrier(count)

    def start(_: int) -> None:
        torch.ones(1 << 18).add_(1)
        torch.set_num_threads(1)
        together.wait()

    list(pool.map(start, range(count)))
    torch.set_num_threads(count)
    return pool


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a fork has the pool, but not its threads


def _blocks(like: Tensor, rows: slice, scratch: int) -> Blocks:
    count = math.ceil((rows.stop - rows.start) * like.shape[1] * like.itemsize / BLOCK)
    size = math.ceil((rows.stop - rows.start) / max(count, 1)) if like.device.type == "cpu" else rows.stop - rows.start
    memory = like.new_empty(scratch, size, like.shape[1])
    for start in range(rows.start, rows.stop, max(size, 1)):
        block = slice(start, min(start + size, rows.stop))
        yield block, memory[:, : block.stop - block.start]


def tanh_(z: Tensor) -> Tensor:
    """tanh z in place. NumPy's takes a seventh of the time of PyTorch's, but knows one thread only."""
    if not _plain(z) or z.dtype not in (torch.float32, torch.float64) or torch.get_num_threads() > FEW_THREADS:
        return z.tanh_()
    np.tanh(z.numpy(), out=z.numpy())
    return z


def times_slope(g: Tensor, a: Tensor, *, out: Tensor) -> Tensor:
    """(1 − a²) g in one pass, with a = tanh z: g times the slope of the tanh at z."""
    return torch.ops.aten.tanh_backward.grad_input(g, a, grad_input=out)


def with_one(x: Tensor) -> Tensor:
    """(x, 1) for every row x: with it a bias is one more column of its matrix."""
    return torch.nn.functional.pad(x, (0, 1), value=1.0)
