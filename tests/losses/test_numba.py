"""The passes compiled by numba against those of NumPy and torch, and what they cost when not used."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from squall.losses import ImbalanceAwareLoss, KLBudget
from squall.losses.fused_cpu import BlockPasses

pytest.importorskip("numba")
from squall import _compiled
from squall.losses.fused_numba import BLOCK, CompiledPasses

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-12}


def batch(n: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n)
    return torch.randn(n, generator=generator, dtype=dtype), torch.randn(n, generator=generator, dtype=dtype)


@pytest.mark.parametrize("moments", [None, (14, 3), (8, 2)], ids=str)
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n", [1, 7, BLOCK, 5 * BLOCK + 3])
def test_sums_and_gradient_are_those_of_the_blocks_in_float64(n, dtype, keep, moments):
    prediction, target = batch(n, dtype)
    ours, exact = CompiledPasses(prediction, target, keep), BlockPasses(prediction.double(), target.double())
    beta, rtol = 0.3, TOLERANCE[dtype]
    sums, expected = ours.sweep(beta, moments), exact.sweep(beta, moments)
    for name in ("count", "top", "plain", "zeroth", "first", "squares"):
        assert getattr(sums, name) == pytest.approx(getattr(expected, name), rel=rtol)
    if moments is not None:
        known = expected.moments.over(sums.moments.span)
        assert sums.moments.once == pytest.approx(known.once, abs=rtol * sums.zeroth)  # equally many of them
        assert sums.moments.twice == pytest.approx(known.twice, abs=rtol * sums.squares)
    assert ours.largest_and_mean() == pytest.approx(exact.largest_and_mean(), rel=rtol)
    for at in (beta, 1.01 * beta):  # what the sweep kept, and anew
        gradient = ours.gradient(at, sums.top, -3.0)
        assert gradient.dtype == dtype
        torch.testing.assert_close(gradient.double(), exact.gradient(at, sums.top, -3.0), rtol=2 * rtol, atol=1e-12)


@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf, 1e30])
@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("where", [0, BLOCK, 3 * BLOCK])
def test_what_is_not_finite_shows_in_the_top(bad, keep, where):
    prediction, target = batch(3 * BLOCK + 1)
    prediction[where] = bad
    passes = CompiledPasses(prediction, target, keep)
    assert math.isnan(passes.sweep(1.0).top)
    assert math.isnan(passes.sweep(1.0, passes.moments).top)
    assert not math.isfinite(passes.largest_and_mean()[0])
    with pytest.raises(ValueError, match=r"non-finite values"):
        ImbalanceAwareLoss(KLBudget(0.3))(prediction, target)


def test_no_weight_overflows_however_sharp():
    prediction, target = 1e4 * batch(3 * BLOCK)[0], torch.zeros(3 * BLOCK)
    passes = CompiledPasses(prediction, target)
    sums = passes.sweep(1e20)
    gradient = passes.gradient(1e20, sums.top, 1.0)
    assert sums.zeroth == pytest.approx(1.0)
    assert bool(gradient.isfinite().all())
    assert int(gradient.abs().argmax()) == int(prediction.abs().argmax())


def test_a_folder_that_cannot_be_written_is_no_error(monkeypatch):
    njit = _compiled.numba.njit

    def without_cache(function, cache=False, **options):
        if cache:
            raise RuntimeError("cannot cache function: no locator available")
        return njit(function, **options)

    monkeypatch.setattr(_compiled.numba, "njit", without_cache)
    assert _compiled.compiled(lambda x: x + 1)(1) == 2


def test_inputs_are_left_alone():
    prediction, target = batch(100)
    before = prediction.clone(), target.clone()
    passes = CompiledPasses(prediction, target, keep=True)
    passes.gradient(0.3, passes.sweep(0.3).top, 1.0)
    np.testing.assert_array_equal(passes.sample()[0].numpy(), ((prediction - target) ** 2).numpy())
    assert torch.equal(prediction, before[0])
    assert torch.equal(target, before[1])


def test_importing_squall_does_not_import_numba():
    script = "import sys, squall.losses; sys.exit('numba' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
