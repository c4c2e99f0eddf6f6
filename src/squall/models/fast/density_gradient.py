"""The passes of `density_gradient`: per step six products of hidden size, and few passes over memory."""

from functools import partial

import torch
from torch import Tensor

from squall.models.fast.by_hand import ByHand, Gradients, add_product, affine, tanh_, times_slope, with_one
from squall.models.fast.rows import Blocks, over_rows
from squall.models.formulas import density_gradient


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> tuple[Tensor, ...]:
    out = torch.empty_like(x)
    a1, a2, d1 = (x.new_empty(*x.shape[:-1], w1.shape[-2]) for _ in range(3))
    over_rows(partial(_forward_rows, (x, w1, b1, w2, b2, w3), (out, a1, a2, d1)), a1, scratch=1)
    return out, a1, a2, d1


def _forward_rows(inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...], blocks: Blocks) -> tuple[()]:
    x, w1, b1, w2, b2, w3 = inputs
    w1_by_columns = w1.mT.contiguous().mT  # makes a narrow product four times as fast
    for rows, (d2,) in blocks:
        out, a1, a2, d1 = (y[rows] for y in outs)
        tanh_(affine(b1, x[rows], w1, out=a1))
        tanh_(affine(b2, a1, w2, out=a2))
        times_slope(w3.expand_as(d2), a2, out=d2)
        torch.matmul(d2, w2, out=d1)
        times_slope(d1, a1, out=d1)
        torch.matmul(d1, w1_by_columns, out=out)
    return ()


def _backward(g: Tensor, inputs: tuple[Tensor, ...], kept: tuple[Tensor, ...], needed: tuple[bool, ...]) -> Gradients:
    r"""Gradients of Σ g · ∂h/∂x for all inputs; a dot is a gradient of this sum.

    .. math::

        \dot d_1 = W_1 g, \quad p = (1 - a_1^2) \dot d_1, \quad q = (1 - a_2^2) \, W_2 p, \\
        \dot z_2 = -2 w_3 a_2 q, \quad
        \dot z_1 = (1 - a_1^2) \, W_2^T \dot z_2 - 2 a_1 d_1 \dot d_1, \quad \dot x = W_1^T \dot z_1, \\
        \dot W_1 = \dot z_1 x^T + d_1 g^T, \quad
        \dot W_2 = \dot z_2 a_1^T + d_2 p^T, \quad
        \dot w_3 = \textstyle\sum q

    The diagonal matrix w₃ is kept out of the sums over rows: d₂ and ż₂ appear without it.
    """
    grad_x = torch.empty_like(inputs[0]) if needed[0] else None
    sums = over_rows(partial(_backward_rows, g, inputs, kept, grad_x), kept[0], scratch=3)
    grad_first, grad_w2, grad_b2, grad_w3 = sums
    w3 = inputs[5].mT
    of_first = grad_first[..., :-1, :].mT, grad_first[..., -1, :]
    return grad_x, *of_first, w3 * grad_w2, -2 * w3.squeeze(-1) * grad_b2, grad_w3.unsqueeze(-2)


def _backward_rows(
    g: Tensor, inputs: tuple[Tensor, ...], kept: tuple[Tensor, ...], grad_x: Tensor | None, blocks: Blocks
) -> tuple[Tensor, ...]:
    x, w1, _, w2, b2, w3 = inputs
    w3_w2, one = -2 * w3.mT * w2, x.new_ones(())
    grad_first = x.new_zeros(*w1.shape[:-2], w1.shape[-1] + 1, w1.shape[-2])
    grad_w2, grad_b2, grad_w3 = torch.zeros_like(w2), torch.zeros_like(b2), torch.zeros_like(b2)
    for rows, (e, p, q) in blocks:
        a1, a2, d1 = (y[rows] for y in kept)
        g_rows = g[rows]
        torch.matmul(g_rows, w1.mT, out=e)
        times_slope(e, a1, out=p)
        times_slope(one.expand_as(q), a2, out=q)
        add_product(grad_w2, q.mT, p)
        torch.matmul(p, w2.mT, out=q)
        times_slope(q, a2, out=q)
        grad_w3 += q.sum(-2)
        q *= a2
        grad_b2 += q.sum(-2)
        add_product(grad_w2, q.mT, a1, alpha=-2)
        torch.matmul(q, w3_w2, out=p)
        times_slope(p, a1, out=p)
        e *= d1
        p.addcmul_(e, a1, value=-2)
        add_product(grad_first, with_one(x[rows]).mT, p)  # in this order: twice as fast as its transpose
        add_product(grad_first[..., :-1, :], g_rows.mT, d1)
        if grad_x is not None:
            torch.matmul(p, w1, out=grad_x[rows])
    return grad_first, grad_w2, grad_b2, grad_w3


fast_density_gradient = ByHand(density_gradient, _forward, _backward)
"""`density_gradient`, with passes by hand that take fewer passes over memory."""
