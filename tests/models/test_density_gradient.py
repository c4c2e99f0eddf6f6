"""The hand-derived kernel of HNN++ against the formula, and the formula against automatic differentiation."""

import pytest
import torch
from torch import Tensor

from squall.models import _density_gradient as kernel
from squall.models._density_gradient import density_gradient, fast_density_gradient

# PyTorch's own use of its deprecated compiler, when forward-mode differentiation is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

NAMES = ("x", "w1", "b1", "w2", "b2", "w3")


def arguments(rows: int, columns: int = 3, hidden: int = 8, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(rows)
    shapes = [(rows, columns), (hidden, columns), (hidden,), (hidden, hidden), (hidden,), (1, hidden)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for s in shapes]


def test_the_formula_is_the_gradient_of_the_density() -> None:
    x, w1, b1, w2, b2, w3 = arguments(rows=20)
    density = torch.tanh(torch.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T
    (expected,) = torch.autograd.grad(density.sum(), x)
    torch.testing.assert_close(density_gradient(x, w1, b1, w2, b2, w3), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rows", [0, 1, 7, 10, 11, 23])
@pytest.mark.parametrize("columns", [3, 9])
def test_the_kernel_agrees_with_the_formula(rows: int, columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For any number of blocks, the last one shorter."""
    monkeypatch.setattr(kernel, "BLOCK", 10)
    inputs = arguments(rows, columns)
    g = torch.randn(rows, columns, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ours, formula = fast_density_gradient(*inputs), density_gradient(*inputs)
    torch.testing.assert_close(ours, formula, rtol=1e-13, atol=1e-13)
    for name, a, b in zip(
        NAMES, torch.autograd.grad(ours, inputs, g), torch.autograd.grad(formula, inputs, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_one_input_at_a_time(name: str) -> None:
    inputs = [x.detach() for x in arguments(rows=5)]
    wanted = inputs[NAMES.index(name)].requires_grad_()
    ours = torch.autograd.grad(fast_density_gradient(*inputs).square().sum(), wanted)
    formula = torch.autograd.grad(density_gradient(*inputs).square().sum(), wanted)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


def test_float32_is_as_close_to_the_truth_as_the_formula_is() -> None:
    """Both against float64, at the sizes of the paper: the order of the sums may differ, the error may not."""
    exact = arguments(2000, hidden=200)
    for x in exact[1:]:
        x.data *= 0.1
    single = [x.detach().float().requires_grad_() for x in exact]

    def gradients(f, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(f(*inputs).square().mean(), inputs)

    truth = gradients(density_gradient, exact)
    for name, t, ours, formula in zip(
        NAMES, truth, gradients(fast_density_gradient, single), gradients(density_gradient, single), strict=True
    ):
        error, allowed = ((g.double() - t).norm() / t.norm() for g in (ours, formula))
        assert error < 2 * allowed + 1e-7, name


def test_derivatives_against_differences() -> None:
    inputs = arguments(rows=4, hidden=5)
    assert torch.autograd.gradcheck(fast_density_gradient, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(fast_density_gradient, inputs)


def test_a_graph_can_be_walked_twice() -> None:
    inputs = arguments(rows=6)
    out = fast_density_gradient(*inputs).square().sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    again = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_no_gradient_is_made_where_none_is_asked_for() -> None:
    with torch.no_grad():
        assert not fast_density_gradient(*arguments(rows=4)).requires_grad
    assert not fast_density_gradient(*(x.detach() for x in arguments(rows=4))).requires_grad
