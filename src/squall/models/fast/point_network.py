"""The passes of `point_network`: per step three products of hidden size, and few passes over memory."""

from functools import partial

import torch
from torch import Tensor

from squall.models.fast.by_hand import ByHand, Gradients, add_product, affine, tanh_, times_slope, with_one
from squall.models.fast.rows import Blocks, over_rows
from squall.models.formulas import point_network


def _forward(x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor, w3: Tensor) -> tuple[Tensor, ...]:
    # One piece of memory: once freed it stays with the process, where two go back to the system after every step.
    kept = x.new_empty(2, *x.shape[:-1], w1.shape[-2])
    y = x.new_empty(*x.shape[:-1], w3.shape[-2])
    over_rows(partial(_forward_rows, (x, w1, b1, w2, b2, w3), (y, *kept)), kept[0], scratch=0)
    return y, kept


def _forward_rows(inputs: tuple[Tensor, ...], outs: tuple[Tensor, ...], blocks: Blocks) -> tuple[()]:
    x, w1, b1, w2, b2, w3 = inputs
    for rows, _ in blocks:
        y, a1, a2 = (out[rows] for out in outs)
        tanh_(affine(b1, x[rows], w1, out=a1))
        tanh_(affine(b2, a1, w2, out=a2))
        torch.matmul(a2, w3.mT, out=y)
    return ()


def _backward(g: Tensor, inputs: tuple[Tensor, ...], kept: tuple[Tensor, ...], needed: tuple[bool, ...]) -> Gradients:
    r"""Gradients of Σ g · y for all inputs; a dot is a gradient of this sum.

    .. math::

        \dot z_2 = (1 - a_2^2) \, W_3^T g, \quad \dot z_1 = (1 - a_1^2) \, W_2^T \dot z_2, \quad
        \dot x = W_1^T \dot z_1, \\
        \dot W_1 = \dot z_1 x^T, \quad \dot W_2 = \dot z_2 a_1^T, \quad \dot W_3 = g a_2^T
    """
    grad_x = torch.empty_like(inputs[0]) if needed[0] else None
    sums = over_rows(partial(_backward_rows, g, inputs, kept[0], grad_x), kept[0][0], scratch=2)
    grad_first, grad_w2, grad_b2, grad_w3 = sums
    return grad_x, grad_first[..., :-1, :].mT, grad_first[..., -1, :], grad_w2, grad_b2, grad_w3


def _backward_rows(
    g: Tensor, inputs: tuple[Tensor, ...], kept: Tensor, grad_x: Tensor | None, blocks: Blocks
) -> tuple[Tensor, ...]:
    x, w1, _, w2, b2, w3 = inputs
    grad_first = x.new_zeros(*w1.shape[:-2], w1.shape[-1] + 1, w1.shape[-2])
    grad_w2, grad_b2, grad_w3 = (torch.zeros_like(w) for w in (w2, b2, w3))
    for rows, (z1, z2) in blocks:
        a1, a2 = kept[:, rows]
        g_rows = g[rows]
        torch.matmul(g_rows, w3, out=z2)
        times_slope(z2, a2, out=z2)
        torch.matmul(z2, w2, out=z1)
        times_slope(z1, a1, out=z1)
        add_product(grad_first, with_one(x[rows]).mT, z1)  # in this order: twice as fast as its transpose
        add_product(grad_w2, z2.mT, a1)
        grad_b2 += z2.sum(-2)
        add_product(grad_w3, g_rows.mT, a2)
        if grad_x is not None:
            torch.matmul(z1, w1, out=grad_x[rows])
    return grad_first, grad_w2, grad_b2, grad_w3


fast_point_network = ByHand(point_network, _forward, _backward)
"""`point_network`, with passes by hand that take fewer passes over memory."""
