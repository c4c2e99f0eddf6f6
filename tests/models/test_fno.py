"""The FNO is neuraloperator's where that is right, and commutes with shifts on odd grids too, where it is not."""

import copy
import os
import pickle
import subprocess
import sys
import textwrap
import warnings

import pytest
import torch
from processes import run_program
from safetensors.torch import load, save
from torch import Tensor, nn

from squall.models import FNO
from squall.models.fno import SpectralConvolution
from squall.models.stacked import Stacked

needs_neuraloperator = pytest.mark.usefixtures("neuraloperator")


@pytest.fixture
def neuraloperator():
    """Skips without the package; its import must leave the warning filters alone."""
    with warnings.catch_warnings():
        return pytest.importorskip("neuralop.models", reason="needs pip install 'squall[models]'")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def fno(channels: int = 2, **options) -> FNO:
    return FNO(channels, **{"modes": 6, "width": 8, "layers": 2, "generator": seeded(), **options}).double()


@pytest.mark.parametrize("boundary", [("periodic", "periodic"), ("periodic", "wall")], ids=str)
@pytest.mark.parametrize("space", [(16, 12), (8, 6)], ids=str)
def test_it_is_the_network_of_neuraloperator(neuraloperator, space, boundary):
    model = fno(boundary=boundary).float()
    padding = None if boundary[1] == "periodic" else [0.0, 0.125]
    reference = neuraloperator.FNO((6, 6), 2, 2, 8, 2, positional_embedding=None, domain_padding=padding)
    weights = dict(model.network.named_parameters())
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            own = weights[name.removesuffix(".tensor")]
            parameter.copy_(torch.view_as_complex(own) if parameter.is_complex() else own)
    u = normal(3, 2, *space, dtype=torch.float32)
    torch.testing.assert_close(model(u), reference(u), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("space", [(16,), (7,), (9, 7), (12, 4), (3, 2), (6, 5, 7)], ids=str)
def test_a_spectral_convolution_is_a_product_with_the_weights_at_every_kept_wave_number(space):
    """y(x) = b + Σₖ R(k) û(k) exp(2πi k·x), by matrices of the full Fourier transform."""
    modes = (4, 3, 6)[: len(space)]
    layer, u = SpectralConvolution(2, 3, modes).double(), normal(2, 2, *space)
    u_hat = torch.fft.fftn(u, dim=tuple(range(2, u.dim())), norm="forward")
    y_hat = torch.zeros(2, 3, *space, dtype=torch.complex128)
    weight = torch.view_as_complex(layer.weight.detach())
    halves = [range(-(min(m, n) // 2), min(m, n) - min(m, n) // 2) for m, n in zip(modes[:-1], space, strict=False)]
    last = range(min(modes[-1] // 2 + 1, space[-1] // 2 + 1))
    grids = torch.cartesian_prod(*[torch.tensor(list(r)) for r in (*halves, last)]).reshape(-1, len(space))
    for k in grids.tolist():
        place = (*(q + m // 2 for q, m in zip(k[:-1], modes, strict=False)), k[-1])
        index = (slice(None), slice(None), *(q % n for q, n in zip(k, space, strict=True)))
        y_hat[index] = u_hat[index] @ weight[(slice(None), slice(None), *place)]
    # Real: the wave numbers −k of the last axis are the conjugates, those that are their own count once.
    doubled = [2.0 if k > 0 and 2 * k != space[-1] else 1.0 for k in range(space[-1])]
    y_hat = y_hat * torch.tensor(doubled, dtype=torch.float64)
    expected = torch.fft.ifftn(y_hat, dim=tuple(range(2, u.dim())), norm="forward").real + layer.bias
    torch.testing.assert_close(layer(u), expected, rtol=1e-10, atol=1e-12)


@needs_neuraloperator
@pytest.mark.parametrize("space", [(16,), (15,), (16, 12), (9, 7), (4, 4), (3, 8), (5, 6, 7)], ids=str)
def test_a_periodic_network_commutes_with_any_shift_on_any_grid(space):
    model, u = fno(dimensions=len(space), out_channels=3), normal(2, 2, *space)
    axes, shift = tuple(range(2, u.dim())), (1, 2, 3)[: len(space)]
    y = model(u)
    assert y.shape == (2, 3, *space)
    torch.testing.assert_close(model(u.roll(shift, axes)), y.roll(shift, axes), rtol=1e-12, atol=1e-12)


@needs_neuraloperator
@pytest.mark.parametrize("kind", ["wall", "open"])
def test_shifts_commute_along_the_periodic_axis_only(kind):
    model, u = fno(boundary=("periodic", kind)), normal(2, 2, 15, 16)
    torch.testing.assert_close(model(u.roll(1, 2)), model(u).roll(1, 2), rtol=1e-12, atol=1e-12)
    assert (model(u.roll(1, 3)) - model(u).roll(1, 3)).abs().max() > 1e-3


@needs_neuraloperator
def test_a_finer_grid_gives_the_same_function():
    """For a band-limited state without the pointwise nonlinearities' aliasing, up to their size."""
    model = fno(1, dimensions=1, layers=1)
    coarse, fine = (torch.arange(n, dtype=torch.float64) / n for n in (64, 192))
    y, finer = (model((2 * torch.pi * x).sin()[None, None]) for x in (coarse, fine))
    torch.testing.assert_close(finer[..., ::3], y, rtol=1e-8, atol=1e-8)


@needs_neuraloperator
def test_float64_is_computed_in_float64():
    """The gradient agrees with finite differences, which it cannot through a product in float32."""
    model, u = fno(1, dimensions=1, boundary="wall"), normal(2, 1, 8).requires_grad_()
    assert torch.autograd.gradcheck(model, (u,))
    torch.testing.assert_close(model.float()(u.float()).double(), model.double()(u), rtol=1e-4, atol=1e-5)


@needs_neuraloperator
def test_every_parameter_gets_a_gradient_and_any_optimizer_takes_it():
    model, inputs = fno(conditions=1, history=2), (normal(3, 4, 16, 12), normal(3, 1, 16, 12))
    for fused in (False, True):
        optimizer = torch.optim.Adam(model.parameters(), 1e-3, fused=fused)
        before = model(*inputs).square().sum()
        before.backward()
        for name, parameter in model.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.abs().max() > 0, name
        optimizer.step()
        optimizer.zero_grad()
        assert model(*inputs).square().sum() < before


@needs_neuraloperator
def test_conditions_and_earlier_states_change_the_output():
    model, u, condition = fno(conditions=1, history=2), normal(3, 4, 8, 8), normal(3, 1, 8, 8)
    y = model(u, condition)
    assert (model(u, condition + 1) - y).abs().amax((1, 2, 3)).min() > 1e-3
    oldest = u.clone()
    oldest[:, :2] += 1
    assert (model(oldest, condition) - y).abs().amax((1, 2, 3)).min() > 1e-3


@needs_neuraloperator
def test_its_state_is_tensors_only_and_loads_strictly_also_inside_another_module():
    model, u = fno(), normal(2, 2, 8, 8)
    whole, twin = nn.Sequential(model), nn.Sequential(fno(generator=seeded(1)))
    state = whole.state_dict()
    assert all(isinstance(value, Tensor) and not value.is_complex() for value in state.values())
    assert state.keys() == dict(whole.named_parameters()).keys()
    twin.load_state_dict(load(save(state)), strict=True)
    assert torch.equal(twin(u), model(u))


@needs_neuraloperator
def test_copies_and_pickles_compute_the_same():
    model, u = fno(boundary="open"), normal(2, 2, 8, 8)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(u), model(u))
        assert twin.state_dict().keys() == model.state_dict().keys()


@needs_neuraloperator
def test_stacked_networks_compute_what_each_computes():
    models = [fno(boundary=("periodic", "wall"), generator=seeded(seed)) for seed in range(3)]
    u = normal(3, 2, 2, 16, 9)
    expected = torch.stack([model(own) for model, own in zip(models, u, strict=True)])
    torch.testing.assert_close(Stacked(models)(u), expected, rtol=1e-12, atol=1e-12)


@needs_neuraloperator
def test_the_weights_follow_the_generator_in_any_default_dtype():
    single, before = fno(generator=seeded(1)), torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        double = fno(generator=seeded(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert torch.equal(a, b)
    other = fno(generator=seeded(2))
    assert not torch.equal(single.network.fno_blocks.convs[0].weight, other.network.fno_blocks.convs[0].weight)


@needs_neuraloperator
def test_making_one_leaves_the_warning_filters_alone():
    program = (
        "import warnings; from squall.models import FNO; a = [*warnings.filters]; FNO(1); print(a == warnings.filters)"
    )
    assert run_program(program).stdout == "True\n"


def test_without_neuraloperator_the_error_is_the_command_that_installs_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "neuralop.models", None)
    with pytest.raises(ImportError, match=r"^neuralop is not installed; run: pip install 'squall\[models\]'$"):
        FNO(1)


def test_the_models_are_imported_without_neuraloperator():
    program = "import squall.models, sys; print('neuralop' in sys.modules)"
    assert run_program(program).stdout == "False\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modes": 0}, "modes is 0, but must be at least 1"),
        ({"modes": (4, 4, 4)}, r"modes has 3 number\(s\), \(4, 4, 4\), for 2 axes of space"),
        ({"layers": 0}, "layers is 0, but must be at least 1"),
        ({"padding": 1.5}, "padding is 1.5, but must be a fraction"),
        ({"boundary": "ring"}, "unknown boundary 'ring'"),
    ],
)
def test_a_size_out_of_range_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        FNO(1, **options)


@needs_neuraloperator
def test_an_input_of_another_shape_or_a_missing_condition_is_an_error():
    with pytest.raises(ValueError, match=r"FNO: the state has shape \(1, 3, 8, 8\), but this model takes"):
        fno()(normal(1, 3, 8, 8))
    with pytest.raises(ValueError, match="FNO: conditions are missing: this model takes 1"):
        fno(conditions=1)(normal(1, 2, 8, 8))


TRACED = """
    import torch
    from squall.models import FNO

    generator = torch.Generator().manual_seed(0)
    model = FNO(2, modes=4, width=4, layers=1, boundary=("periodic", "wall"), generator=generator)
    u = torch.randn(5, 2, 8, 9, generator=generator)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (u[:3],), dynamic_shapes=(batch,)).module()
    torch.testing.assert_close(program(u), model(u))
    compiled = torch.compile(model, fullgraph=True)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        call(u).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
"""


@needs_neuraloperator
@pytest.mark.slow
def test_exported_and_compiled_networks_compute_the_same(tmp_path):
    """By Inductor, whose kernels know no complex numbers."""
    # In a process without the tests' run-time type checks, which cannot be traced.
    environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    subprocess.run([sys.executable, "-c", textwrap.dedent(TRACED)], check=True, env=environment)
