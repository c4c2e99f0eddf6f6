"""The passes written by hand against their formulas, and the formulas against PyTorch's own derivatives."""

import dataclasses
import importlib.util
import runpy
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from squall.models import HNN, NODE, fast
from squall.models.fast import by_hand
from squall.models.fast import rows as fast_rows
from squall.models.fast.by_hand import ByHand
from squall.models.fast.density_gradient import fast_density_gradient
from squall.models.fast.point_network import fast_point_network
from squall.models.formulas import density_gradient, point_network

# PyTorch's own use of its deprecated compiler, when forward-mode differentiation is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

NAMES = ("x", "w1", "b1", "w2", "b2", "w3")


class Case(NamedTuple):
    function: ByHand
    outputs: int

    def inputs(self, rows: int, columns: int = 3, hidden: int = 8) -> list[Tensor]:
        shapes = [(rows, columns), (hidden, columns), (hidden,), (hidden, hidden), (hidden,), (self.outputs, hidden)]
        generator = torch.Generator().manual_seed(rows)
        return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


CASES = {
    "network": Case(fast_point_network, 1),
    "network, three outputs": Case(fast_point_network, 3),
    "density gradient": Case(fast_density_gradient, 1),
}


@pytest.fixture(params=CASES)
def case(request) -> Case:
    return CASES[request.param]


def gradients(f: Callable[..., Tensor], inputs: list[Tensor]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(f(*inputs).square().mean(), inputs)


def test_the_network_is_its_stack_of_layers() -> None:
    x, w1, b1, w2, b2, w3 = CASES["network, three outputs"].inputs(rows=20)
    stack = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3, bias=False)).double()
    for parameter, value in zip(stack.parameters(), (w1, b1, w2, b2, w3), strict=True):
        parameter.data = value.data
    torch.testing.assert_close(point_network(x, w1, b1, w2, b2, w3), stack(x), rtol=1e-13, atol=1e-14)


def test_the_density_gradient_is_the_gradient_of_the_network() -> None:
    x, *weights = CASES["density gradient"].inputs(rows=20)
    (expected,) = torch.autograd.grad(point_network(x, *weights).sum(), x)
    torch.testing.assert_close(density_gradient(x, *weights), expected, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("rows", [0, 1, 7, 10, 11, 23])
@pytest.mark.parametrize("columns", [3, 9])
def test_the_passes_agree_with_the_formula(
    case: Case, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For any number of blocks, the last one shorter."""
    hidden = 8
    monkeypatch.setattr(fast_rows, "BLOCK", 10 * hidden * torch.float64.itemsize)
    inputs = case.inputs(rows, columns, hidden)
    ours, formula = case.function(*inputs), case.function.formula(*inputs)
    torch.testing.assert_close(ours, formula, rtol=1e-13, atol=1e-13)
    g = torch.randn(ours.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for name, a, b in zip(
        NAMES, torch.autograd.grad(ours, inputs, g), torch.autograd.grad(formula, inputs, g), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", NAMES)
def test_one_input_at_a_time(case: Case, name: str) -> None:
    inputs = [x.detach() for x in case.inputs(rows=5)]
    wanted = inputs[NAMES.index(name)].requires_grad_()
    ours = torch.autograd.grad(case.function(*inputs).square().sum(), wanted)
    formula = torch.autograd.grad(case.function.formula(*inputs).square().sum(), wanted)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["numpy", "compiled", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_tanh_is_exact_to_rounding(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_hand, "NUMPY_TANH", kind == "numpy")
    monkeypatch.setattr(torch, "get_num_threads", lambda: fast_rows.FEW_THREADS + (kind == "plain"))
    if kind == "compiled" and by_hand._compiled_tanh() is None:
        pytest.skip("needs numba")
    z = torch.cat([torch.logspace(-30, 2, 1001, dtype=torch.float64), torch.zeros(1), torch.tensor([torch.inf])])
    z = torch.cat([-z, z]).to(dtype).unsqueeze(1)
    truth, ours = z.double().tanh(), by_hand.tanh_(z)
    torch.testing.assert_close(ours.double(), truth, rtol=2 * torch.finfo(dtype).eps, atol=0.0)
    assert ours is z
    assert by_hand.tanh_(torch.full((1,), torch.nan, dtype=dtype)).isnan()


def test_any_memory_layout(case: Case) -> None:
    """Transposed inputs, and the gradient of a sum, which is one number seen from every entry."""
    inputs = case.inputs(rows=12)
    turned = [x.detach().mT.contiguous().mT.requires_grad_() if x.dim() == 2 else x for x in inputs]
    ours = torch.autograd.grad(case.function(*turned).sum(), turned)
    formula = torch.autograd.grad(case.function.formula(*inputs).sum(), inputs)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)


def test_float32_is_as_close_to_the_truth_as_the_formula_is(case: Case) -> None:
    """Both against float64, at the sizes of the paper: the order of the sums may differ, the error may not."""
    exact = case.inputs(2000, hidden=200)
    for x in exact[1:]:
        x.data *= 0.1
    single = [x.detach().float().requires_grad_() for x in exact]
    truth = gradients(case.function.formula, exact)
    for name, t, ours, formula in zip(
        NAMES, truth, gradients(case.function, single), gradients(case.function.formula, single), strict=True
    ):
        error, allowed = ((g.double() - t).norm() / t.norm() for g in (ours, formula))
        assert error < 2 * allowed + 1e-7, name


def test_derivatives_against_differences(case: Case) -> None:
    inputs = case.inputs(rows=4, hidden=5)
    assert torch.autograd.gradcheck(case.function, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(case.function, inputs)


def test_a_graph_can_be_walked_twice(case: Case) -> None:
    inputs = case.inputs(rows=6)
    out = case.function(*inputs).square().sum()
    first = torch.autograd.grad(out, inputs, retain_graph=True)
    again = torch.autograd.grad(out, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_the_inputs_stay_as_they_were(case: Case) -> None:
    inputs = case.inputs(rows=6)
    before = [x.detach().clone() for x in inputs]
    gradients(case.function, inputs)
    assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


def test_the_passes_over_stacks_agree_with_the_formula_of_each(case: Case) -> None:
    members = [case.inputs(rows) for rows in (11, 11)]
    stacks = [torch.stack(parts).detach().requires_grad_() for parts in zip(*members, strict=True)]
    stacks[1].data[1] *= 2
    stacked = case.function.batched()
    ours, formula = gradients(stacked, stacks), gradients(stacked.formula, stacks)
    torch.testing.assert_close(stacked(*stacks), stacked.formula(*stacks), rtol=1e-13, atol=1e-13)
    for name, a, b in zip(NAMES, ours, formula, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12, msg=lambda text, name=name: f"{name}: {text}")


def test_no_gradient_is_made_where_none_is_asked_for(case: Case) -> None:
    inputs = case.inputs(rows=4)
    with torch.no_grad():
        assert not case.function(*inputs).requires_grad
    assert not case.function(*(x.detach() for x in inputs)).requires_grad
    torch.autograd.grad(case.function(*inputs).sum(), inputs[1:])  # the tensors need none for x


def test_plain_evaluation_and_first_derivatives_do_without_the_formula(case: Case) -> None:
    def forbidden(*_: Tensor) -> Tensor:
        raise AssertionError("the formula was used")

    gradients(dataclasses.replace(case.function, formula=forbidden), case.inputs(rows=4))


def transforms(f: Callable[..., Tensor], inputs: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
    """What goes by the formula, with its name."""
    x, *weights = (x.detach() for x in inputs)
    many, directions = x.expand(5, *x.shape) * torch.arange(5.0).view(5, 1, 1).double(), torch.ones_like(x)

    def total(x: Tensor, *weights: Tensor) -> Tensor:
        return f(x, *weights).square().sum()

    yield "vmap", torch.vmap(f, in_dims=(0, *[None] * 5))(many, *weights)
    stacked = [torch.stack([w, 2 * w], -1) for w in weights]
    yield "vmap over the weights", torch.vmap(f, in_dims=(None, 0, 0, 0, 0, 0))(x, *(w.movedim(-1, 0) for w in stacked))
    yield "vmap over the last axis", torch.vmap(f, in_dims=(None, -1, -1, -1, -1, -1))(x, *stacked)
    yield "grad under vmap", torch.vmap(torch.func.grad(total), in_dims=(0, *[None] * 5))(many, *weights)
    yield "jvp", torch.func.jvp(lambda x: f(x, *weights), (x,), (directions,))[1]
    yield (
        "reverse over forward",
        torch.func.grad(lambda x: torch.func.jvp(lambda v: total(v, *weights), (x,), (directions,))[1])(x),
    )
    yield "forward over reverse", torch.func.jvp(torch.func.grad(lambda x: total(x, *weights)), (x,), (directions,))[1]
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, directions), *weights)
        yield "dual numbers", torch.as_tensor(forward_ad.unpack_dual(dual).tangent)
    with torch.autocast("cpu", torch.bfloat16):
        yield "autocast", f(x.float(), *(w.float() for w in weights))


def test_transforms_see_the_formula(case: Case) -> None:
    inputs = case.inputs(rows=6)
    ours, formula = (dict(transforms(f, inputs)) for f in (case.function, case.function.formula))
    for name, a in ours.items():
        torch.testing.assert_close(a, formula[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("kind", ["node", "hnn"])
def test_the_switch_turns_the_passes_by_hand_off(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    model = (
        NODE(2, 8, generator=generator) if kind == "node" else HNN(lambda v: v.roll(1, -1) - v, 8, generator=generator)
    )
    model, calls = model.double(), []
    original = by_hand._ByHand.apply
    monkeypatch.setattr(by_hand._ByHand, "apply", lambda *inputs: calls.append(1) or original(*inputs))
    u = torch.randn(3, model.channels, 10, dtype=torch.float64, generator=generator).requires_grad_()

    def rate_and_gradients() -> list[Tensor]:
        rate = model(u)
        return [rate, *torch.autograd.grad(rate.square().sum(), [u, *model.parameters()], allow_unused=True)]

    by_passes = rate_and_gradients()
    assert calls
    calls.clear()
    monkeypatch.setattr(fast, "enabled", False)
    for ours, plain in zip(by_passes, rate_and_gradients(), strict=True):
        torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    assert not calls


@pytest.mark.parametrize(("value", "enabled"), [("0", False), ("1", True), (None, True)])
def test_the_switch_is_read_from_the_environment(value, enabled, monkeypatch: pytest.MonkeyPatch) -> None:
    if value is None:
        monkeypatch.delenv("SQUALL_FAST", raising=False)
    else:
        monkeypatch.setenv("SQUALL_FAST", value)
    source = importlib.util.find_spec("squall.models.fast").origin
    assert runpy.run_path(source)["enabled"] is enabled
