"""Where, and in what precision, a model computes."""

import contextlib
import ctypes
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from squall._types import Rate

__all__ = ["evaluating", "keep_freed_memory", "like_model", "threads"]

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Names of glibc's settings, as in its malloc.h."""
KEPT_BYTES, MOST_MAPPED = 1 << 30, 32 << 20


def like_model(model: Rate, u: Tensor) -> Tensor:
    """The state on the device of the model and in its precision; as it is for a bare function.

    The precision is that of the model's first real floating-point tensor: a model may hold complex weights or
    counters too, and states are real.

    >>> like_model(torch.nn.BatchNorm1d(1).double(), torch.zeros(1, 1, 2)).dtype
    torch.float64
    """
    if not isinstance(model, nn.Module):
        return u
    tensors = [*model.parameters(), *model.buffers()]
    if not tensors:
        return u
    dtype = next((x.dtype for x in tensors if x.is_floating_point()), u.dtype)
    return u.to(tensors[0].device, dtype, non_blocking=True)


@contextlib.contextmanager
def evaluating(model: Rate) -> Iterator[None]:
    """The model in evaluation mode, for the block: no dropout, and no running statistics that move."""
    if not isinstance(model, nn.Module):
        yield
        return
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


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
