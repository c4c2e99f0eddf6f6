"""Threads and memory of the process that computes."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings, as in its malloc.h."""
KEPT_BYTES, MOST_MAPPED = 1 << 30, 32 << 20
"""Freed memory that stays with the process, and the largest piece that older versions of glibc let stay."""


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """So many threads of the CPU for the block; 0 leaves PyTorch's choice."""
    before = torch.get_num_threads()
    if count:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, up to a gibibyte, where its allocator is glibc's.

    A training step frees the megabytes that the next one asks for. Given back to the system in between, every page of
    them costs a fault: a tenth to a fifth of a small step. For processes that do nothing but train.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        # Older versions take no more than MOST_MAPPED; the second setting without the first makes things worse.
        if mallopt(M_MMAP_THRESHOLD, KEPT_BYTES) or mallopt(M_MMAP_THRESHOLD, MOST_MAPPED):
            mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)
