"""The laws of the models: locality, symmetry, conservation, seeds, derivatives, and errors that help."""

from collections.abc import Callable

import pytest
import torch
from processes import COMPILERS, run_program
from torch import Tensor, nn
from torch.autograd import forward_ad

from squall._process.threads import threads
from squall.integrators import INTEGRATORS, discrete_gradient, implicit_midpoint, increment, rollout
from squall.models import HNN, NODE, RateModel, energy_rate
from squall.models.normalized import Normalized

# PyTorch's own use of its deprecated compiler, when forward-mode differentiation is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")

DX = 0.02


def laplacian(v: Tensor) -> Tensor:
    return (v.roll(1, -1) - 2 * v + v.roll(-1, -1)) / DX**2


def central(v: Tensor) -> Tensor:
    return (v.roll(-1, -1) - v.roll(1, -1)) / (2 * DX)


def laplacian_nd(v: Tensor) -> Tensor:
    space = range(2, v.dim())
    return sum((v.roll(1, d) - 2 * v + v.roll(-1, d) for d in space), start=torch.zeros_like(v))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def states(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=generator(seed))


MODELS: dict[str, Callable[[int], tuple[RateModel, Tensor]]] = {
    "node": lambda seed: (NODE(hidden=12, generator=generator(seed)), states(3, 1, 10)),
    "node 2-d": lambda seed: (NODE(2, 12, 2, generator=generator(seed)), states(3, 2, 5, 6)),
    "node 3-d": lambda seed: (NODE(3, 12, 3, generator=generator(seed)), states(2, 3, 4, 5, 3)),
    "hnn dissipative": lambda seed: (HNN(laplacian, 12, generator=generator(seed)), states(3, 1, 10)),
    "hnn conservative": lambda seed: (HNN(central, 12, generator=generator(seed)), states(3, 1, 10)),
    "hnn 2-d": lambda seed: (HNN(laplacian_nd, 12, 2, generator=generator(seed)), states(3, 1, 5, 6)),
    "hnn 3-d": lambda seed: (HNN(laplacian_nd, 12, 3, generator=generator(seed)), states(2, 1, 4, 5, 3)),
}


@pytest.fixture(params=MODELS)
def model_and_states(request) -> tuple[RateModel, Tensor]:
    model, u = MODELS[request.param](0)
    for parameter in model.parameters():  # biases too: a zero bias hides mistakes
        nn.init.normal_(parameter, std=0.7, generator=generator(5))
    return model.double(), u


def test_the_rate_has_the_shape_of_the_state(model_and_states) -> None:
    model, u = model_and_states
    assert model(u).shape == u.shape
    assert model(u[:0]).shape == u[:0].shape


def test_shifting_the_state_shifts_the_rate(model_and_states) -> None:
    model, u = model_and_states
    for axis in range(2, u.dim()):
        torch.testing.assert_close(model(u.roll(2, axis)), model(u).roll(2, axis), rtol=1e-12, atol=1e-12)


def test_states_of_a_batch_do_not_mix(model_and_states) -> None:
    model, u = model_and_states
    torch.testing.assert_close(model(u)[1:2], model(u[1:2]), rtol=1e-12, atol=1e-12)


def test_gradients_reach_every_parameter(model_and_states) -> None:
    model, u = model_and_states
    model(u).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert (parameter.grad != 0).all(), name


def test_equal_seeds_give_equal_models_and_leave_the_global_generator_alone() -> None:
    for make in MODELS.values():
        before = torch.get_rng_state()
        first, again, other = make(0)[0].state_dict(), make(0)[0].state_dict(), make(1)[0].state_dict()
        assert torch.equal(torch.get_rng_state(), before)
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert not any(torch.equal(first[name], other[name]) for name in first if name.endswith("weight"))


def test_initial_weights_are_orthogonal_and_biases_zero() -> None:
    for model in (NODE(generator=generator()), HNN(central, generator=generator())):
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                assert (parameter == 0).all()
                continue
            tall = parameter.double() if parameter.shape[0] >= parameter.shape[1] else parameter.double().T
            torch.testing.assert_close(tall.T @ tall, torch.eye(tall.shape[1]).double(), rtol=0, atol=1e-5), name


def test_the_sizes_are_those_of_the_paper() -> None:
    """By hand, for hidden 200: 3·200 + 200 + 200² + 200 and 200 weights of the last layer, and its bias."""
    assert sum(p.numel() for p in NODE().parameters()) == 41_201
    assert sum(p.numel() for p in HNN(central).parameters()) == 41_200
    assert {p.dtype for p in NODE().parameters()} == {torch.float32}


def test_node_is_the_stack_of_periodic_convolutions() -> None:
    """Against PyTorch's own convolutions, in one to three dimensions."""
    for dimensions, conv in [(1, nn.Conv1d), (2, nn.Conv2d), (3, nn.Conv3d)]:
        model = NODE(2, 7, dimensions, generator=generator())
        network = model.network
        first = conv(2, 7, 3, padding=1, padding_mode="circular")
        second, last = conv(7, 7, 1), conv(7, 2, 1)
        for layer, ours in [(first, network.first), (second, network.second), (last, network.last)]:
            layer.weight.data = ours.weight.data.reshape(layer.weight.shape)
            layer.bias.data = nn.init.normal_(ours.bias.data, generator=generator(2))
        stack = nn.Sequential(first, nn.Tanh(), second, nn.Tanh(), last).double()
        u = states(2, 2, *[4, 5, 6][:dimensions])
        torch.testing.assert_close(model.double()(u), stack(u), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("structure", [laplacian, central])
def test_hnn_conserves_mass_whatever_its_weights(structure) -> None:
    for seed in range(3):
        model = HNN(structure, hidden=20, generator=generator(seed)).double()
        rate = model(states(4, 1, 50, seed=seed))
        assert (rate.sum(-1).abs() <= 1e-13 * rate.abs().sum(-1)).all()


def test_hnn_dissipates_or_conserves_the_energy_that_it_learned() -> None:
    """dH/dt = ∇H · G ∇H: never positive for the Laplacian, zero for the antisymmetric central difference."""
    for structure, conserved in [(laplacian, False), (central, True)]:
        model = HNN(structure, hidden=20, generator=generator()).double()
        u = states(4, 1, 50)
        gradient, rate = model.energy_gradient(u), model(u)
        change = (gradient * rate).sum((1, 2))
        scale = (gradient * rate).abs().sum((1, 2))
        assert (change.abs() < 1e-13 * scale).all() if conserved else (change < -0.1 * scale).all()


def test_hnn_is_the_rate_of_its_energy() -> None:
    for name in ("hnn dissipative", "hnn conservative", "hnn 2-d", "hnn 3-d"):
        model, u = MODELS[name](0)
        model.double()
        assert isinstance(model, HNN)
        expected = energy_rate(model.energy, model.structure, u)
        torch.testing.assert_close(model(u), expected, rtol=1e-12, atol=1e-10)


@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("hnn")])
@pytest.mark.parametrize("distance", [0.0, 1e-3, 1.0, 30.0])
def test_the_mean_rate_between_two_states_is_of_a_discrete_gradient(name, distance) -> None:
    """(v − u) · ∇̄H = H(v) − H(u), and ∇̄H(u, u) = ∇H(u)."""
    network, u = MODELS[name](0)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.7, generator=generator(5))
    model = HNN(lambda v: v, network.hidden, network.dimensions).double()
    model.load_state_dict(network.state_dict())
    v = u + distance * torch.randn(u.shape, dtype=u.dtype, generator=generator(3))
    gradient = model.between(u, v)
    change = ((v - u) * gradient).flatten(1)
    scale = change.abs().sum(1) + model.energy(u).abs() * (distance > 0)
    assert ((change.sum(1) - (model.energy(v) - model.energy(u))).abs() <= 1e-13 * scale).all()
    if distance == 0:
        torch.testing.assert_close(gradient, model.energy_gradient(u), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("normalized", [False, True])
@pytest.mark.parametrize("structure", [laplacian, central])
def test_a_rollout_by_a_discrete_gradient_dissipates_or_conserves_the_learned_energy(structure, normalized) -> None:
    network = HNN(structure, 12, generator=generator()).double()
    model = Normalized(network, [0.3], [2.0]).double() if normalized else network
    with torch.no_grad():
        trajectory = rollout(discrete_gradient, model, states(3, 1, 20), 2e-3, 20)
        seen = (trajectory - model.mean) / model.std if isinstance(model, Normalized) else trajectory
        energies = network.energy(seen.flatten(0, 1)).reshape(3, 21)
    scale = energies.abs().amax()
    if structure is laplacian:
        assert (energies.diff(dim=1) <= 1e-12 * scale).all()
    else:
        assert (energies - energies[:, :1]).abs().max() <= 1e-11 * scale
    assert energies.isfinite().all()
    assert torch.autograd.gradcheck(lambda u: discrete_gradient(model, u, 1e-4), states(1, 1, 8).requires_grad_())


def test_the_true_energy_gives_the_true_rate_of_cahn_hilliard() -> None:
    """h = −a/2 u² + b/4 u⁴ + γ/2 S(u), the energy over dx, with G the Laplacian: the rate by hand."""
    a, b, gamma = 1.0, 1.0, 5e-4

    def energy(u: Tensor) -> Tensor:
        forward, backward = (u.roll(-1, -1) - u) / DX, (u - u.roll(1, -1)) / DX
        slope = (forward.square() + backward.square()) / 2
        return (-a / 2 * u**2 + b / 4 * u**4 + gamma / 2 * slope).sum((1, 2))

    u = 0.5 * states(4, 1, 50)
    expected = laplacian(-a * u + b * u**3 - gamma * laplacian(u))
    torch.testing.assert_close(energy_rate(energy, laplacian, u), expected, rtol=1e-10, atol=1e-9)


def test_the_true_energy_gives_the_true_rate_of_korteweg_de_vries() -> None:
    """h = −α/6 u³ − β/2 S(u), the energy over dx, with G the central difference: the rate by hand."""
    alpha, beta = -6.0, 1.0

    def energy(u: Tensor) -> Tensor:
        forward, backward = (u.roll(-1, -1) - u) / DX, (u - u.roll(1, -1)) / DX
        slope = (forward.square() + backward.square()) / 2
        return (-alpha / 6 * u**3 - beta / 2 * slope).sum((1, 2))

    u = states(4, 1, 50)
    expected = central(-alpha / 2 * u**2 + beta * laplacian(u))
    torch.testing.assert_close(energy_rate(energy, central, u), expected, rtol=1e-10, atol=1e-7)


def test_energy_rate_trains_an_energy_of_the_users_own() -> None:
    """h = c u²/2 has ∇H = c u, so d(Σ rate²)/dc = 2 Σ (G u)² for c = 1."""
    c = torch.ones((), dtype=torch.float64, requires_grad=True)
    u = states(2, 1, 8)
    energy_rate(lambda u: c * u.square().sum((1, 2)) / 2, central, u).square().sum().backward()
    assert c.grad is not None
    torch.testing.assert_close(c.grad, 2 * central(u).square().sum())
    with torch.no_grad():
        assert not energy_rate(lambda u: c * u.square().sum((1, 2)), central, u).requires_grad


@pytest.mark.parametrize("step", [m for m in INTEGRATORS.values() if m is not discrete_gradient], ids=lambda m: m.name)
def test_derivatives_of_a_training_step_are_right(model_and_states, step) -> None:
    """With respect to the state and the first weight, through every integrator, against differences."""
    model, u = model_and_states
    u = u[:1].requires_grad_()
    weight = model.get_parameter("network.first.weight")

    def change(u: Tensor, weight: Tensor) -> Tensor:
        def rate(u: Tensor) -> Tensor:
            return torch.func.functional_call(model, {"network.first.weight": weight}, (u,))

        return increment(step, rate, u, 1e-5 if step is implicit_midpoint else 1e-3)  # a step that is solved

    assert torch.autograd.gradcheck(change, (u, weight), fast_mode=True)


def test_second_derivatives_are_right(model_and_states) -> None:
    model, u = model_and_states
    assert torch.autograd.gradgradcheck(model, (u[:1].requires_grad_(),), fast_mode=True)


def test_the_transforms_of_torch_func_work(model_and_states) -> None:
    """Forward and reverse mode and per-state gradients agree with each other and with autograd."""
    model, u = model_and_states
    one = u[:1]
    reverse = torch.autograd.functional.jacobian(model, one)
    torch.testing.assert_close(torch.func.jacrev(model)(one), reverse)
    torch.testing.assert_close(torch.func.jacfwd(model)(one), reverse)
    torch.testing.assert_close(torch.vmap(lambda v: model(v[None])[0])(u), model(u))

    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def loss(weights: dict[str, Tensor], v: Tensor) -> Tensor:
        return torch.func.functional_call(model, weights, (v[None],)).square().sum()

    per_state = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, u)
    model(u).square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(per_state[name].sum(0), parameter.grad)


def test_a_dual_number_goes_through(model_and_states) -> None:
    model, u = model_and_states
    direction = states(*u.shape, seed=7)
    with forward_ad.dual_level():
        tangent = forward_ad.unpack_dual(model(forward_ad.make_dual(u, direction))).tangent
    _, expected = torch.autograd.functional.jvp(model, u, direction)
    torch.testing.assert_close(tangent, expected)


COMPILE = """
import torch
from squall.models import HNN, NODE

for model, shape in [
    (NODE(2, 8, 2), (3, 2, 5, 6)),
    (HNN(lambda v: v.roll(1, -1) - v.roll(-1, -1), 8), (3, 1, 10)),
]:
    u, weights = torch.randn(shape), list(model.parameters())
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(u), model(u))
    found, expected = (torch.autograd.grad(f(u).square().sum(), weights) for f in (compiled, model))
    torch.testing.assert_close(found, expected)
"""


def test_compiles_to_one_graph() -> None:
    """In a process of its own: the compiler cannot look through the type checks that the tests run with."""
    result = run_program(COMPILE, modules=COMPILERS)
    assert result.returncode == 0, result.stderr


def test_autocast_lowers_the_precision() -> None:
    for model in (NODE(hidden=16, generator=generator()), HNN(central, 16, generator=generator())):
        u = states(2, 1, 10).float()
        with torch.autocast("cpu", torch.bfloat16):
            low = model(u)
        assert not torch.equal(low.float(), model(u))
        torch.testing.assert_close(low.float(), model(u), rtol=0.1, atol=0.1 * model(u).abs().max().item())


def test_a_step_repeats_to_the_bit() -> None:
    """More rows than a block, several threads: the same gradient every time."""
    u = states(210, 1, 50).float()
    for model in (NODE(generator=generator()), HNN(central, generator=generator())):
        with threads(2):
            first, again = (torch.autograd.grad(model(u).square().sum(), list(model.parameters())) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_models_roll_out_by_every_integrator(model_and_states) -> None:
    model, u = model_and_states
    for step in INTEGRATORS.values():
        if step is discrete_gradient and not isinstance(model, HNN):
            continue
        with torch.no_grad():
            assert rollout(step, model, u, 1e-6, 2).shape == (u.shape[0], 3, *u.shape[1:])


def test_errors_say_what_came_and_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"NODE: hidden is 0, but must be at least 1"):
        NODE(hidden=0)
    with pytest.raises(ValueError, match=r"NODE: dimensions is 4, but must be 1 to 3"):
        NODE(dimensions=4)
    with pytest.raises(ValueError, match=r"NODE: channels is 0"):
        NODE(channels=0)
    with pytest.raises(ValueError, match=r"\(2, 3, 10\).*1 channel\(s\).*1 axes"):
        NODE(hidden=4)(torch.zeros(2, 3, 10))
    with pytest.raises(ValueError, match=r"\(2, 1, 10, 10\).*1 axes of space.*dimensions"):
        HNN(central, 4)(torch.zeros(2, 1, 10, 10))
    with pytest.raises(ValueError, match=r"\(2, 10\)"):
        HNN(central, 4).energy(torch.zeros(2, 10))
    with pytest.raises(TypeError, match=r"state is torch.float64 and the weights are torch.float32"):
        HNN(central, 4)(torch.zeros(2, 1, 10).double())
