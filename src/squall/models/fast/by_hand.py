"""Functions of tensors with a formula, and with passes by hand that make their first derivatives cheap."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from squall.models import fast
from squall.models.fast.rows import FEW_THREADS, on_threads, plain

Gradients = tuple[Tensor | None, ...]

# In all of them *member is there for stacks only.
Rows = Float[Tensor, "*member row column"]
Inputs = Float[Tensor, "*member row input"]
Outputs = Float[Tensor, "*member row output"]
Weights = Float[Tensor, "*member output input"]
Bias = Float[Tensor, "*member output"]
Left = Float[Tensor, "*member left inner"]
Right = Float[Tensor, "*member inner right"]
Products = Float[Tensor, "*member left right"]


NUMPY_TANH = torch.backends.cpu.get_cpu_capability() == "AVX512"
"""There NumPy's tanh takes 0.36 ns a number, PyTorch's 2.5. With AVX2, in float32 and float64: NumPy's 2.6 and 16,
PyTorch's 3.2 and 8, that of `tanh_numba` 0.7 and 2.4."""


SMALL = 1 << 14
"""Numbers of the largest matrix up to which the formula is faster without gradients: it takes 0.4 times as long with
4096, 0.8 with 16 384, 1.4 with 65 536."""


@final
@dataclass(frozen=True)
class ByHand:
    """A formula, computed by `forward` and `backward` where these can take its place.

    They do in plain evaluation and in first derivatives by reverse mode, under `torch.vmap` too. All else falls back
    to the formula (see `squall.models.fast`), so the passes need no derivatives and may work in place.

    Args:
        formula: from tensors to a tensor, by operations that PyTorch can differentiate.
        forward: from the same tensors, or from stacks (member, ...) of them, to the result, followed by whatever
            `backward` wants to have kept.
        backward: from the gradient of the result, the tensors, what was kept, and for every tensor whether its
            gradient is needed, to the gradients of the tensors. It may return None for what is not needed.
    """

    formula: Callable[..., Tensor]
    forward: Callable[..., tuple[Tensor, ...]]
    backward: Callable[[Tensor, tuple[Tensor, ...], tuple[Tensor, ...], tuple[bool, ...]], Gradients]

    def __call__(self, *inputs: Tensor) -> Tensor:
        # The compiler and autocast need to see the operations.
        if not fast.enabled or torch.compiler.is_compiling() or torch.is_autocast_enabled(inputs[0].device.type):
            return self.formula(*inputs)
        if _is_small(inputs):
            return self.formula(*inputs)
        return _ByHand.apply(self, *inputs)[0]

    def batched(self) -> "ByHand":
        """The function of many inputs at once, (member, ...) each: the passes over whole stacks, whose many small
        products are one large one."""
        return replace(self, formula=torch.vmap(self.formula, randomness="error"))

    def on_threads(self) -> "ByHand":
        """The function of many inputs at once, (member, ...) each: the same passes, member by member on threads."""

        def size(inputs: tuple[Tensor, ...]) -> int:
            """Bytes of the largest matrix of a member: its rows by the widest of its weights."""
            return inputs[0].shape[1] * max(x.shape[-1] for x in inputs) * inputs[0].itemsize

        def forward(*inputs: Tensor) -> tuple[Tensor, ...]:
            members = list(zip(*inputs, strict=True))
            results = on_threads(lambda member: self.forward(*member), members, size(inputs))
            outs, *kept = zip(*results, strict=True)
            return torch.stack(outs), *itertools.chain(*zip(*kept, strict=True))

        def backward(
            g: Tensor, inputs: tuple[Tensor, ...], kept: tuple[Tensor, ...], needed: tuple[bool, ...]
        ) -> Gradients:
            each = len(kept) // len(g)

            def of_member(i: int) -> Gradients:
                return self.backward(g[i], tuple(x[i] for x in inputs), kept[each * i : each * (i + 1)], needed)

            gradients = on_threads(of_member, range(len(g)), size(inputs))
            return tuple(None if parts[0] is None else torch.stack(parts) for parts in zip(*gradients, strict=True))

        return ByHand(torch.vmap(self.formula, randomness="error"), forward, backward)


def _is_small(inputs: tuple[Tensor, ...]) -> bool:
    """Whether nothing is to be differentiated or batched, and the passes would take longer to start than they save."""
    if len(inputs[0]) * max(x.shape[-1] for x in inputs) > SMALL or not plain(inputs[0]):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None  # pyright: ignore[reportAttributeAccessIssue]


class _ByHand(torch.autograd.Function):
    """A `ByHand` in PyTorch's terms. What is kept for the backward pass is made of further outputs."""

    @staticmethod
    def forward(function: ByHand, *inputs: Tensor) -> tuple[Tensor, ...]:
        return function.forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.function, *tensors = inputs
        _, *kept = output
        ctx.kept = len(kept)
        ctx.mark_non_differentiable(*kept)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *kept)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Gradients:
        function, g = ctx.function, grads[0]
        if g is None:
            return (None,) * len(ctx.needs_input_grad)
        count = len(ctx.needs_input_grad) - 1  # the first input is the function
        inputs, kept = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
        if torch.is_grad_enabled():  # someone will differentiate the result
            return None, *torch.func.vjp(function.formula, *inputs)[1](g)
        return None, *function.backward(g.contiguous(), inputs, kept, ctx.needs_input_grad[1:])

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Gradients:
        inputs = ctx.saved_tensors
        directions = (torch.zeros_like(x) if t is None else t for x, t in zip(inputs, tangents[1:], strict=True))
        out, transpose = torch.func.vjp(ctx.function.formula, *inputs)[:2]
        # Forward mode does not nest; the transpose of the transpose is the same derivative.
        derivative = torch.func.vjp(transpose, torch.zeros_like(out))[1]
        return derivative(tuple(directions))[0], *(None,) * ctx.kept

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
        function, *tensors = inputs
        on_cpu, own = tensors[0].device.type == "cpu", None not in in_dims[1:]
        if not on_cpu and not (own and tensors[0].dim() == 3):  # weights in common, or a stack of stacks
            return (torch.vmap(function.formula, in_dims[1:], randomness="error")(*tensors),), (0,)
        stacked = [
            x.expand(info.batch_size, *x.shape) if dim is None else x.movedim(dim, 0)
            for x, dim in zip(tensors, in_dims[1:], strict=True)
        ]
        return ((function.on_threads() if on_cpu else function.batched())(*stacked),), (0,)


def tanh_(z: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """tanh z in place: on few threads by what takes the least time on each, otherwise by PyTorch."""
    if not plain(z) or z.dtype not in (torch.float32, torch.float64) or torch.get_num_threads() > FEW_THREADS:
        return z.tanh_()
    if NUMPY_TANH:
        np.tanh(z.numpy(), out=z.numpy())
        return z
    compiled = _compiled_tanh() if z.is_contiguous() else None
    if compiled is None:
        return z.tanh_()
    compiled(z.numpy())
    return z


@functools.cache
def _compiled_tanh() -> Callable[[np.ndarray], None] | None:
    """tanh in place by numba, None where it is not installed."""
    try:
        from squall.models.fast.tanh_numba import tanh_of
    except ImportError:  # also where numba does not know the version of NumPy
        return None
    return tanh_of


def times_slope(g: Rows, a: Rows, *, out: Rows) -> Rows:
    """(1 − a²) g in one pass, with a = tanh z: g times the slope of the tanh at z."""
    return torch.ops.aten.tanh_backward.grad_input(g, a, grad_input=out)


def affine(b: Bias, x: Inputs, w: Weights, *, out: Outputs) -> Outputs:
    """W x + b for every row x; of stacks, member by member."""
    if x.dim() == 2:
        return torch.addmm(b, x, w.T, out=out)
    return torch.baddbmm(b.unsqueeze(-2), x, w.mT, out=out)


def add_product(total: Products, a: Left, b: Right, alpha: float = 1) -> None:
    """total += alpha · a b; of stacks, member by member."""
    if total.dim() == 2:
        total.addmm_(a, b, alpha=alpha)
    else:
        total.baddbmm_(a, b, alpha=alpha)


def with_one(x: Float[Tensor, "*member row column"]) -> Float[Tensor, "*member row column+1"]:
    """(x, 1) for every row x: with it a bias is one more column of its matrix."""
    return torch.nn.functional.pad(x, (0, 1), value=1.0)
