"""The share of noise in gradients, from Adam's moments."""

import pytest
import torch

from squall.training.noise import gradient_noise

MEANS = torch.tensor([[3.0, -1.0, 0.5], [0.0, 0.0, 0.0]])
"""Of the gradients of two members with noise of variance 4."""


def after(
    steps: int, parameter: torch.Tensor, means: torch.Tensor, betas: tuple[float, float] = (0.9, 0.999)
) -> torch.optim.Optimizer:
    draw = torch.Generator().manual_seed(0)
    optimizer = torch.optim.Adam([parameter], 1e-3, betas)
    for _ in range(steps):
        parameter.grad = means + 2 * torch.randn(parameter.shape, generator=draw)
        optimizer.step()
    return optimizer


def test_the_share_is_that_of_the_variance_in_the_mean_square():
    many = MEANS[0].repeat(200)  # Adam's first moment averages ten steps only
    (share,) = gradient_noise(after(200, torch.zeros(600, requires_grad=True), many))
    expected = 3 * 4 / (3 * 4 + MEANS[0].square().sum().item())
    assert share["gradient_noise"] == pytest.approx(expected, rel=0.03)


def test_members_of_a_stack_have_shares_of_their_own():
    (first, second) = gradient_noise(after(300, torch.zeros(2, 3, requires_grad=True), MEANS), members=2)
    assert first["gradient_noise"] == pytest.approx(0.54, abs=0.2)
    assert second["gradient_noise"] > 0.9
    scalars = gradient_noise(after(300, torch.zeros(2, requires_grad=True), torch.tensor([9.0, 0.0])), members=2)
    assert scalars[0]["gradient_noise"] < 0.3 < scalars[1]["gradient_noise"]


def test_constant_gradients_have_no_noise_and_the_two_parts_of_complex_ones_count():
    parameter = torch.zeros(2, dtype=torch.complex64, requires_grad=True)
    optimizer = torch.optim.Adam([parameter], 1e-3)
    for _ in range(5):
        parameter.grad = torch.tensor([1 + 2j, 3 - 1j])
        optimizer.step()
    assert gradient_noise(optimizer)[0]["gradient_noise"] == pytest.approx(0, abs=1e-5)
    for sign in (1, -1) * 500:
        parameter.grad = torch.tensor([1 + 2j * sign, 3 * sign - 1j])
        optimizer.step()
    assert gradient_noise(optimizer)[0]["gradient_noise"] == pytest.approx((4 + 9) / (1 + 4 + 9 + 1), abs=0.05)


def test_nothing_is_known_of_one_step_of_other_optimizers_and_of_gradients_that_are_not_finite():
    parameter = torch.zeros(3, requires_grad=True)
    assert gradient_noise(after(1, parameter, MEANS[0])) == [{}]
    assert gradient_noise(torch.optim.SGD([parameter], 0.1)) == [{}]
    without_momentum = after(3, torch.zeros(3, requires_grad=True), MEANS[0], betas=(0.0, 0.9))
    assert gradient_noise(without_momentum) == [{}]
    assert gradient_noise(after(3, torch.zeros(3, requires_grad=True), MEANS[0] / 0)) == [{}]
