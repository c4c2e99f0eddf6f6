"""A U-Net commutes with shifts along periodic axes, sees no way around a wall, and follows its seed."""

import copy
import pickle
import textwrap

import pytest
import torch
from processes import COMPILERS, run_program
from torch import Tensor, nn

from squall.models import UNet
from squall.models.padding import convolution
from squall.models.stacked import Stacked


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    return torch.randn(shape, dtype=dtype, generator=seeded(seed))


def unet(channels: int = 2, **options) -> UNet:
    return UNet(channels, **{"width": 4, "levels": 2, "generator": seeded(), **options}).double()


def without_norms(model: UNet) -> UNet:
    """The same network without the one operation that sees the whole grid."""
    for block in (*model.down, model.middle, *model.up):
        block.norm1, block.norm2 = nn.Identity(), nn.Identity()
    return model


@pytest.mark.parametrize("boundary", ["periodic", "wall", "open"])
@pytest.mark.parametrize("space", [(16,), (1,), (13,), (16, 12), (15, 9), (2, 3), (8, 8, 4), (5, 6, 7)], ids=str)
def test_the_output_is_on_the_grid_of_the_input(space, boundary):
    model = unet(dimensions=len(space), boundary=boundary, out_channels=3)
    y = model(normal(2, 2, *space))
    assert y.shape == (2, 3, *space)
    assert y.isfinite().all()


@pytest.mark.parametrize(("space", "shift"), [((16,), (4,)), ((16, 12), (4, 8)), ((8, 8, 4), (4, 4, 0))], ids=str)
def test_a_periodic_network_commutes_with_shifts_by_multiples_of_the_coarsest_cell(space, shift):
    model, u = unet(dimensions=len(space)), normal(2, 2, *space)
    axes = tuple(range(2, u.dim()))
    shifted = model(u.roll(shift, axes))
    torch.testing.assert_close(shifted, model(u).roll(shift, axes), rtol=1e-12, atol=1e-12)


def test_beyond_a_pole_the_field_of_the_sphere_goes_on():
    """A function of the point on the sphere, beyond 90 degrees: latitude 95 is latitude 85, half a circle away."""
    latitude = torch.arange(-95.0, 100, 10, dtype=torch.float64).deg2rad()[:, None]
    longitude = torch.arange(-15.0, 375, 15, dtype=torch.float64).deg2rad()[None]
    x, y, z = latitude.cos() * longitude.cos(), latitude.cos() * longitude.sin(), latitude.sin().expand(-1, 26)
    beyond = torch.stack((x, x * y + z, x * z - y**3))[None]
    padding = convolution(3, 3, ("pole", "periodic"))[0]
    torch.testing.assert_close(padding(beyond[..., 1:-1, 1:-1]), beyond)


def test_a_network_with_poles_commutes_with_turns_of_the_sphere_about_its_axis():
    model, u = unet(boundary=("pole", "periodic")), normal(2, 2, 12, 16)
    torch.testing.assert_close(model(u.roll(4, 3)), model(u).roll(4, 3), rtol=1e-12, atol=1e-12)
    assert (model(u) - unet(boundary=("open", "periodic"))(u)).abs().max() > 1e-3


@pytest.mark.parametrize("boundary", ["pole", ("pole", "wall"), ("periodic", "pole"), ("pole", "pole", "periodic")])
def test_poles_need_a_circle_of_longitude(boundary):
    with pytest.raises(ValueError, match=r"'pole', 'periodic'"):
        unet(boundary=boundary, dimensions=2 if isinstance(boundary, str) else len(boundary))


def test_shifts_commute_along_the_periodic_axis_only():
    model, u = unet(boundary=("periodic", "wall")), normal(2, 2, 16, 16)
    torch.testing.assert_close(model(u.roll(4, 2)), model(u).roll(4, 2), rtol=1e-12, atol=1e-12)
    assert (model(u.roll(4, 3)) - model(u).roll(4, 3)).abs().max() > 1e-3


@pytest.mark.parametrize("kind", ["periodic", "wall", "open"])
@pytest.mark.parametrize("axis", [2, 3])
def test_information_goes_around_a_ring_and_not_around_a_wall(axis, kind):
    boundary = tuple(kind if 2 + i == axis else "wall" for i in range(2))
    model, u = without_norms(unet(levels=1, boundary=boundary)), normal(1, 2, 64, 64)
    bumped = u.clone()
    bumped.select(axis, 0).add_(1.0)
    change = (model(bumped) - model(u)).abs().amax(dim=(0, 1, 5 - axis))
    # Two convolutions a block, and each on the coarse grid reaches two points: fewer than 32 in all.
    assert change[0] > 1e-3
    assert change[32] == 0
    assert (change[-1] > 1e-6) == (kind == "periodic")


@pytest.mark.parametrize(
    ("kind", "before", "after"),
    [("periodic", 3.0, 1.0), ("wall", 0.0, 0.0), ("open", 1.0, 3.0)],
)
def test_a_convolution_sees_the_boundary_beyond_the_edge(kind, before, after):
    layer = convolution(1, 2, (kind, "wall"))
    weight = torch.zeros(2, 1, 3, 3)
    weight[0, 0, 0, 1] = weight[1, 0, 2, 1] = 1  # the point before; the point after
    with torch.no_grad():
        layer[1].weight.copy_(weight)
        layer[1].bias.zero_()
    y = layer(torch.tensor([1.0, 2.0, 3.0])[None, None, :, None])
    assert y[0, :, :, 0].tolist() == [[before, 1.0, 2.0], [2.0, 3.0, after]]


def test_a_periodic_convolution_is_that_of_pytorch():
    layer = convolution(2, 3, ("periodic", "periodic"), stride=2).double()
    reference = nn.Conv2d(2, 3, 3, stride=2, padding=1, padding_mode="circular").double()
    reference.load_state_dict(layer[1].state_dict())
    u = normal(2, 2, 9, 8)
    torch.testing.assert_close(layer(u), reference(u), rtol=1e-12, atol=1e-12)


def test_every_parameter_gets_a_gradient():
    model = unet(conditions=1, film=2, history=2)
    model(normal(3, 4, 8, 8), normal(3, 1, 8, 8), normal(3, 2)).square().sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_the_gradient_is_that_of_finite_differences():
    model, u = unet(1, dimensions=1, boundary="open", film=1), normal(2, 1, 7).requires_grad_()
    assert torch.autograd.gradcheck(lambda u, s: model(u, None, s), (u, normal(2, 1).requires_grad_()))


def test_conditions_scalars_and_earlier_states_change_the_output():
    model = unet(conditions=1, film=2, history=2)
    inputs = (normal(3, 4, 8, 8), normal(3, 1, 8, 8), normal(3, 2))
    y = model(*inputs)
    for changed in range(3):
        others = [x + 1 if i == changed else x for i, x in enumerate(inputs)]
        assert (model(*others) - y).abs().amax((1, 2, 3)).min() > 1e-3


def test_scalars_act_on_their_own_sample_only():
    model, u, scalars = unet(film=1), normal(2, 2, 8, 8), normal(2, 1)
    other = scalars + torch.tensor([[0.0], [1.0]], dtype=torch.float64)
    change = (model(u, None, other) - model(u, None, scalars)).abs().amax((1, 2, 3))
    assert change[0] == 0
    assert change[1] > 1e-3


def test_the_amplitude_of_the_state_reaches_the_output():
    """A norm before the last layer would make a state and its double nearly the same."""
    model, u = unet(), 100 * normal(2, 2, 16, 16)
    assert model(2 * u).std() > 1.5 * model(u).std()


def test_the_weights_follow_the_generator_in_any_default_dtype():
    single = UNet(2, width=4, generator=seeded(1))
    before = torch.get_rng_state()
    torch.set_default_dtype(torch.float64)
    try:
        double = UNet(2, width=4, generator=seeded(1))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), before)
    for a, b in zip(single.parameters(), double.parameters(), strict=True):
        assert (a.dtype, b.dtype) == (torch.float32, torch.float64)
        assert torch.equal(a.double(), b)
    assert not torch.equal(single.first[1].weight, UNet(2, width=4, generator=seeded(2)).first[1].weight)


def test_the_weights_follow_the_global_seed_without_a_generator():
    weights = []
    for seed in (0, 0, 1):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            weights.append(UNet(1, width=4).first[1].weight)
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def test_copies_and_pickles_compute_the_same():
    model, u = unet(film=1), normal(2, 2, 8, 8)
    scalars = normal(2, 1)
    expected = model(u, None, scalars)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(u, None, scalars), expected)


def test_stacked_networks_compute_what_each_computes():
    models = [unet(boundary=("periodic", "open"), generator=seeded(seed)) for seed in range(3)]
    u = normal(3, 2, 2, 8, 9)
    expected = torch.stack([model(own) for model, own in zip(models, u, strict=True)])
    torch.testing.assert_close(Stacked(models)(u), expected, rtol=1e-12, atol=1e-12)


TRACED = """
    import torch
    from squall.models import UNet

    generator = torch.Generator().manual_seed(0)
    model = UNet(2, width=4, levels=1, boundary=("periodic", "open"), film=1, generator=generator)
    u, s = torch.randn(5, 2, 8, 9, generator=generator), torch.randn(5, 1, generator=generator)
    batch = {0: torch.export.Dim("batch", min=2)}
    program = torch.export.export(model, (u[:3], None, s[:3]), dynamic_shapes=(batch, None, batch)).module()
    torch.testing.assert_close(program(u, None, s), model(u, None, s))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, compiled):
        model.zero_grad()
        call(u, None, s).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-4)
"""


def test_exported_and_compiled_networks_compute_the_same():
    """The graph and its derivatives: what Inductor makes of a graph is PyTorch's, and tested of the FNO's."""
    result = run_program(textwrap.dedent(TRACED), modules=COMPILERS)
    assert result.returncode == 0, result.stderr


def test_every_call_of_a_unet_with_noise_is_another_member_that_the_default_generator_decides():
    model, u = unet(noise=2), normal(1, 2, 16, 16).expand(3, -1, -1, -1)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        first, second = model(u), model(u)
        torch.manual_seed(0)
        assert torch.equal(model(u), first)
    assert (first - second).abs().max() > 1e-3
    assert (first[0] - first[1]).abs().max() > 1e-3  # of the same state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise": -1}, "noise is -1, but must be at least 0"),
        ({"levels": 0}, "levels is 0, but must be at least 1"),
        ({"dimensions": 4}, "dimensions is 4, but must be 1 to 3"),
        ({"conditions": -1}, "conditions is -1, but must be at least 0"),
        ({"film": -1}, "film is -1, but must be at least 0"),
        ({"boundary": "ring"}, "unknown boundary 'ring': the boundaries are periodic, wall, open"),
        ({"boundary": ("wall",)}, r"boundary has 1 name\(s\), \('wall',\), for 2 axes of space"),
    ],
)
def test_a_size_out_of_range_is_an_error(options, message):
    with pytest.raises(ValueError, match=message):
        UNet(1, **options)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        (((2, 3, 8, 8), (2, 1, 8, 8), (2, 2)), "has shape .2, 3, 8, 8., but this model takes"),
        (((2, 4, 8), (2, 1, 8), (2, 2)), "has shape .2, 4, 8., but this model takes"),
        (((2, 4, 8, 8), None, (2, 2)), r"conditions are missing: this model takes 1, .* \(2, 1, 8, 8\)"),
        (((2, 4, 8, 8), (1, 1, 8, 8), (2, 2)), r"conditions have shape \(1, 1, 8, 8\), but must have \(2, 1, 8, 8\)"),
        (((2, 4, 8, 8), (2, 1, 8, 8), None), r"scalars are missing: this model takes 2, .* \(2, 2\)"),
        (((2, 4, 8, 8), (2, 1, 8, 8), (2,)), r"scalars have shape \(2,\), but must have \(2, 2\)"),
    ],
    ids=["channels", "axes", "no conditions", "conditions", "no scalars", "scalars"],
)
def test_an_input_of_another_shape_is_an_error(shapes, message):
    model = unet(conditions=1, film=2, history=2)
    with pytest.raises(ValueError, match=message):
        model(*(None if shape is None else normal(*shape) for shape in shapes))


def test_an_input_that_is_not_expected_is_an_error():
    with pytest.raises(ValueError, match="conditions were given, but this model takes none"):
        unet()(normal(1, 2, 8, 8), normal(1, 1, 8, 8))
    with pytest.raises(ValueError, match="scalars were given, but this model takes none"):
        unet()(normal(1, 2, 8, 8), None, normal(1, 1))


def test_another_dtype_than_the_weights_is_an_error():
    with pytest.raises(TypeError, match=r"the state is torch.float32 and the weights are torch.float64"):
        unet()(normal(1, 2, 8, 8, dtype=torch.float32))
