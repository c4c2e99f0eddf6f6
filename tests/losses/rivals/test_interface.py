"""What every rival keeps: the call, masks, measures, gradients, refusals; and the table of their names."""

import math
import re
import sys
from pathlib import Path

import pytest
import torch

from squall.losses import MeanSquaredError
from squall.losses.rivals import RIVALS, rival
from squall.losses.rivals.table import options_of

from .cases import SHAPE, extra, fields, made

PLANE = sorted(set(RIVALS) - {"afcrps", "spherical_amse"})
MASKED = sorted(set(PLANE) - {"amse", "bsp", "relative_h1"})
MEASURED = sorted(set(PLANE) - {"amse", "bsp"})
QUADRATIC = sorted(set(PLANE) - {"bsp", "channel", "relative_h1", "relative_l2", "term"})
"""loss(c e) = c² loss(e)."""


@pytest.mark.parametrize("name", sorted(set(PLANE) - {"focal"}))
def test_the_gradient_is_the_derivative_of_the_value(name):
    """Focal holds its scale: see test_pointwise."""
    prediction, target = fields(2, 2, 3, 4)
    loss = made(name, target)
    if name in ("channel", "rba", "regimes", "vrba"):
        loss(prediction, target, **extra(name, target))  # the state that the frozen loss weighs with
    loss.eval()
    assert torch.autograd.gradcheck(lambda p: loss(p, target, **extra(name, target)), prediction)


@pytest.mark.parametrize("name", PLANE)
def test_a_perfect_prediction_has_no_error_and_a_finite_gradient(name):
    _, target = fields(*SHAPE)
    prediction = target.clone().requires_grad_()
    value = made(name, target)(prediction, target, **extra(name, target))
    value.backward()
    assert value.item() == 0
    assert torch.equal(prediction.grad, torch.zeros_like(target))


@pytest.mark.parametrize("name", PLANE)
def test_a_prediction_of_zeros_has_a_finite_gradient(name):
    _, target = fields(*SHAPE)
    prediction = torch.zeros_like(target).requires_grad_()
    made(name, target)(prediction, target, **extra(name, target)).backward()
    assert prediction.grad.isfinite().all()


@pytest.mark.parametrize("name", MASKED)
def test_masked_points_are_as_if_they_were_not_there(name):
    prediction, target = fields(*SHAPE)
    mask = torch.rand(SHAPE, generator=torch.Generator().manual_seed(1)) > 0.3
    value = made(name, target)(prediction, target, mask=mask, **extra(name, target))
    spoiled, truth = (torch.where(mask, x.detach(), torch.nan) for x in (prediction, target))
    spoiled.requires_grad_()
    again = made(name, target)(spoiled, truth, mask=mask, **extra(name, target))
    assert torch.equal(value, again)
    again.backward()
    assert spoiled.grad.isfinite().all()
    assert (spoiled.grad[~mask] == 0).all()
    as_measure = made(name, target)(prediction, target, measure=mask.double(), **extra(name, target))
    if name != "extreme_value":  # a measure of 0 masks too
        torch.testing.assert_close(as_measure, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", MEASURED)
def test_only_ratios_of_a_measure_matter_and_a_constant_one_changes_nothing(name):
    prediction, target = fields(*SHAPE)
    measure = torch.rand(SHAPE[2:], generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    values = [made(name, target)(prediction, target, measure=c * measure, **extra(name, target)) for c in (1, 7)]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)
    plain = made(name, target)(prediction, target, **extra(name, target))
    constant = made(name, target)(prediction, target, measure=torch.tensor(3.0), **extra(name, target))
    torch.testing.assert_close(plain, constant, rtol=1e-12, atol=0)
    assert abs(values[0] - plain) > 1e-6


@pytest.mark.parametrize("name", sorted(set(MEASURED) - {"relative_h1", "extreme_value"}))
def test_a_measure_of_2_is_the_point_twice(name):
    """Along the axis of space, for losses that see no neighbours."""
    prediction, target = fields(2, 2, 5)
    measure = torch.tensor([1.0, 2.0, 1.0, 3.0, 1.0], dtype=torch.float64)
    twice = [x.detach().repeat_interleave(measure.long(), dim=2) for x in (prediction, target)]
    loss = made(name, target)
    repeated = made(name, twice[1]) if name in ("rba", "vrba") else made(name, target)
    value = loss(prediction, target, measure=measure, **extra(name, target))
    torch.testing.assert_close(value, repeated(*twice, **extra(name, target)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", QUADRATIC)
def test_a_change_of_unit_changes_the_loss_by_its_square(name):
    prediction, target = fields(*SHAPE)
    value = made(name, target)(prediction, target, **extra(name, target))
    scaled = made(name, 10 * target)(10 * prediction, 10 * target, **extra(name, target))
    torch.testing.assert_close(scaled, 100 * value, rtol=1e-6, atol=0)  # density has a table in float32


@pytest.mark.parametrize("name", ["relative_h1", "relative_l2"])
def test_relative_losses_have_no_unit(name):
    prediction, target = fields(*SHAPE)
    value, scaled = (made(name, target)(c * prediction, c * target) for c in (1, 1e-3))
    torch.testing.assert_close(scaled, value, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(set(PLANE) - {"rba", "vrba"}))
def test_the_order_of_samples_does_not_matter(name):
    prediction, target = fields(*SHAPE)
    order = torch.tensor([2, 0, 1])
    values = [made(name, target)(p, t) for p, t in ((prediction, target), (prediction[order], target[order]))]
    torch.testing.assert_close(*values, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", sorted(set(PLANE) - {"rba", "vrba", "term"}))
def test_float32_agrees_with_float64(name):
    prediction, target = (x.detach() for x in fields(*SHAPE))
    exact = made(name, target)(prediction, target)
    value = made(name, target).float()(prediction.float(), target.float())
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.double(), exact, rtol=2e-5, atol=0)


@pytest.mark.parametrize("name", ["amse", "bsp"])
@pytest.mark.parametrize("argument", ["mask", "measure"])
def test_a_spectrum_refuses_masks_and_measures(name, argument):
    prediction, target = fields(*SHAPE)
    given = torch.ones(SHAPE, dtype=torch.bool if argument == "mask" else torch.float64)
    with pytest.raises(ValueError, match=f"a spectrum needs all points, alike; leave out {argument}"):
        made(name, target)(prediction, target, **{argument: given})


def test_differences_refuse_a_mask():
    prediction, target = fields(*SHAPE)
    with pytest.raises(ValueError, match="RelativeH1: a difference across a masked point has no meaning"):
        made("relative_h1", target)(prediction, target, mask=torch.ones(SHAPE, dtype=torch.bool))


@pytest.mark.parametrize("name", PLANE)
def test_nan_and_other_shapes_are_refused(name):
    prediction, target = fields(*SHAPE)
    loss, more = made(name, target), extra(name, target)
    spoiled = prediction.detach().clone()
    spoiled[0, 1, 2, 3] = torch.nan
    with pytest.raises(ValueError, match=r"prediction has 1 non-finite .* \(0, 1, 2, 3\)"):
        loss(spoiled, target, **more)
    with pytest.raises(ValueError, match="nothing is broadcast"):
        loss(prediction, target[:, :, :1], **more)


@pytest.mark.parametrize("name", sorted(set(PLANE) - {"focal", "max_pooling", "rba", "term", "top_k", "vrba"}))
def test_a_loss_of_fields_refuses_a_bare_list_of_points(name):
    _, target = fields(*SHAPE)
    with pytest.raises(ValueError, match=r"takes \(batch, channel, \*space\)"):
        made(name, target)(torch.ones(4), torch.zeros(4))


def test_the_table_is_sorted_and_cannot_be_changed():
    assert list(RIVALS) == sorted(RIVALS)
    with pytest.raises(TypeError):
        RIVALS["mine"] = MeanSquaredError


def test_an_unknown_name_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown loss 'ams'; known: afcrps, amse, .*an import path"):
        rival("ams")


@pytest.mark.parametrize("name", RIVALS)
def test_an_unknown_option_is_answered_with_the_known_ones(name):
    known = ", ".join(options_of(RIVALS[name])) or "none"
    with pytest.raises(ValueError, match=f"loss '{name}' has no option 'alpah'; known: {known}"):
        rival(name, alpah=1)


@pytest.mark.parametrize("name", PLANE)
def test_every_option_is_kept_under_its_own_name(name):
    _, target = fields(*SHAPE)
    loss = made(name, target)
    for option in options_of(RIVALS[name]):
        assert hasattr(loss, option), f"{name} does not keep {option}"


BAD = [
    ("afcrps", "alpha", 1.5),
    ("afcrps", "members", 1),
    ("amse", "epsilon", 0.0),
    ("bsp", "bins", 0),
    ("bsp", "mu", -1.0),
    ("channel", "limit", 0.5),
    ("channel", "window", 0.0),
    ("regimes", "shares", (0.1, 0.5)),
    ("regimes", "window", 0.0),
    ("regimes", "rho", 0.0),
    ("regimes", "front_share", 1.0),
    ("density", "alpha", -1.0),
    ("density", "epsilon", 0.0),
    ("extreme_value", "quantile", 0.5),
    ("extreme_value", "under", -1.0),
    ("focal", "beta", 0.0),
    ("focal", "gamma", -1.0),
    ("max_pooling", "fraction", 0.0),
    ("max_pooling", "p", 1.0),
    ("rba", "gamma", 1.5),
    ("relative_h1", "length", 0.0),
    ("term", "temperature", 0.0),
    ("term", "temperature", math.nan),
    ("top_k", "alpha", 0.0),
    ("top_k", "alpha", 1.5),
    ("vrba", "c", 0.0),
    ("vrba", "phi", 1.5),
]


@pytest.mark.parametrize(("name", "option", "value"), BAD)
def test_a_setting_out_of_its_range_is_refused(name, option, value):
    _, target = fields(*SHAPE)
    with pytest.raises(ValueError, match=f"(?s){option}.*{value}"):
        made(name, target, **{option: value})


def test_a_loss_of_ones_own_is_named_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_losses.py").write_text(
        "import torch\n"
        "def power(prediction, target, *, mask=None, measure=None, exponent=2.0):\n"
        "    return (prediction - target).abs().pow(exponent).mean()\n"
        "class Power(torch.nn.Module):\n"
        "    def __init__(self, *, exponent=2.0):\n"
        "        super().__init__()\n"
        "        self.exponent = exponent\n"
        "    def forward(self, prediction, target, *, mask=None, measure=None):\n"
        "        return power(prediction, target, exponent=self.exponent)\n"
        "value = 3\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    prediction, target = torch.tensor([2.0]), torch.zeros(1)
    assert rival("my_losses.power", exponent=3.0)(prediction, target) == 8
    assert rival("my_losses.Power", exponent=3.0)(prediction, target) == 8
    with pytest.raises(ValueError, match="no option 'mask'"):
        rival("my_losses.power", mask=None)
    with pytest.raises(ValueError, match="no class or function 'value'"):
        rival("my_losses.value")


PAGE = (Path(__file__).parents[3] / "docs/rivals.md").read_text()


def test_the_code_of_the_page_runs(tmp_path, monkeypatch, capsys):
    first, own = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(first, {})
    assert "tensor(" in capsys.readouterr().out
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_losses", raising=False)
    (tmp_path / "my_losses.py").write_text(own)
    loss = rival("my_losses.Power", exponent=3.0)
    assert loss(torch.tensor([2.0, 5.0]), torch.zeros(2), mask=torch.tensor([True, False])) == 8


@pytest.mark.parametrize("name", RIVALS)
def test_the_page_states_every_rival_with_its_settings(name):
    row = next(line for line in PAGE.splitlines() if line.startswith(f"| `{name}`"))
    for option, parameter in options_of(RIVALS[name]).items():
        default = parameter.default
        number = isinstance(default, int | float) and not isinstance(default, bool)
        shown = "" if default is parameter.empty else f" {default:g}" if number else f" {default}"
        assert f"`{option}`{shown}" in row, f"{name}: `{option}`{shown}"
