"""Where, and in what precision, a model computes."""

import contextlib
from collections.abc import Iterator

from jaxtyping import Float
from torch import Tensor, nn

from squall._types import Rate


def like_model(model: Rate, u: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """The state on the device of the model and in its precision; as it is for a bare function.

    The precision is that of the model's first real floating-point tensor: a model may hold complex weights or
    counters too, and states are real.

    >>> import torch
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
