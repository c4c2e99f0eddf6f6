"""Whether values can be looked at: not while a program is being traced or a function transform runs."""

import torch
from torch import Tensor

__all__ = ["in_backward", "is_traced", "is_transformed", "is_vmapped"]


def is_transformed() -> bool:
    """Inside torch.func.vmap, grad, jvp and kin (as far as Python can tell: not while compiling)."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None  # pyright: ignore[reportAttributeAccessIssue]


def is_vmapped() -> bool:
    """Inside torch.func.vmap, whatever other transforms are inside it."""
    if not is_transformed():
        return False
    functorch = torch._C._functorch  # pyright: ignore[reportAttributeAccessIssue]
    return any(level.key() == functorch.TransformType.Vmap for level in functorch.get_interpreter_stack())


def is_traced(tensor: Tensor) -> bool:
    """True where Python must not branch on the tensor's values: torch.compile, export, vmap, a CUDA graph."""
    if torch.compiler.is_compiling():
        return True
    if is_transformed():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def in_backward() -> bool:
    """Inside a backward pass: the forward is being recomputed by activation checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
