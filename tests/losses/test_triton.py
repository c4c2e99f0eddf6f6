"""The Triton kernels: interpreted on the CPU, against float64; and compiled for GPUs, without one."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from squall.losses import fused

triton = pytest.importorskip("triton")

SCRIPT = """
    import os
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    from scipy.special import logsumexp
    from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, Relative, recipe
    from squall.losses.fused_triton import LANES, ROWS, SAMPLE, TritonPasses
    from squall.losses.sums import LN2, scattered

    def passes_of(prediction, target):
        return TritonPasses(prediction.detach(), target.detach(), keep=prediction.requires_grad)

    for n in (100, ROWS * LANES, 3 * ROWS * LANES, 9 * ROWS * LANES + 17):
        for rule in (3.0, float("inf"), KLBudget(0.3), KLBudget(0.05), EffectiveFraction(0.5), Relative(4.0)):
            prediction, target = torch.randn(2, n, generator=torch.Generator().manual_seed(n))
            prediction.requires_grad_()
            recipe.passes_for = passes_of
            loss = ImbalanceAwareLoss(rule)
            for _ in range(2):
                value = loss(prediction, target)
                assert "Fused" in type(value.grad_fn).__name__
                started, = torch.autograd.grad(value, prediction, retain_graph=True)
                scaled = [torch.autograd.grad(-3 * value, prediction, retain_graph=True)[0] for _ in range(2)]
                scaled += torch.autograd.grad(-3 * loss(prediction, target), prediction)  # what was started, scaled
            d = (prediction.detach() - target).double().numpy()
            z = d**2 / loss.report()["temperature"]
            w = np.exp(z - logsumexp(z))
            np.testing.assert_allclose(value.item(), w @ d**2, rtol=2e-6)
            for factor, ours in zip((1, -3, -3, -3), (started, *scaled)):
                gradient = factor * 2 * w * d
                assert np.linalg.norm(ours.numpy() - gradient) < 2e-6 * np.linalg.norm(gradient)
            few = passes_of(prediction, target).sample()[0]
            places = scattered(n, SAMPLE, torch.device("cpu"))
            torch.testing.assert_close(few, (prediction - target).detach()[places].square())
    d = (prediction.detach() - target).double().numpy()
    for asked, factor in (((0.2, 1.0, 2.0), 1.0), ((0.2, 1.0, 2.0), -3.0), ((0.4, 1.0, 2.0), 1.0)):
        passes = TritonPasses(prediction.detach(), target, keep=True)
        passes.anticipate(0.2, 1.0, 2.0)
        given = [passes.gradient(*asked, torch.tensor(factor)) for _ in range(2)]
        for gradient in given:  # each a tensor of its own, whether started before or not
            np.testing.assert_allclose(gradient, factor * 2 * d * np.exp(asked[0] * d**2 - 1), rtol=2e-6, atol=1e-7)
    passes = TritonPasses(prediction.detach(), target, keep=False)
    passes.anticipate(0.2, 1.0, 2.0)
    assert passes.started is None
    rising = (0.4 * torch.randn(9 * ROWS * LANES + 17, generator=torch.Generator().manual_seed(0))).exp().sort().values
    for roots in (rising, rising.flip(0)):  # each tile above those before, or below
        passes, beta = passes_of(roots, torch.zeros_like(roots)), 3 * LN2  # a float32 in the kernel's unit
        assert passes.sweep(beta, (10, 4)).moments is None  # until the largest is known
        sums = passes.sweep(beta, (10, 4))
        z = beta * roots.double().numpy() ** 2
        e, v = np.exp(z - z.max()), 2 * z / sums.moments.span - 1
        exact = [[np.polynomial.Chebyshev.basis(k)(v) @ e**power for k in range(10)] for power in (1, 2)]
        np.testing.assert_allclose([sums.top, sums.plain], [z.max(), z.sum()], rtol=1e-6)
        np.testing.assert_allclose([sums.zeroth, sums.first, sums.squares], [e.sum(), z @ e, e @ e], rtol=1e-6)
        np.testing.assert_allclose(sums.moments.once, exact[0], atol=2e-6 * e.sum())
        np.testing.assert_allclose(sums.moments.twice, exact[1][:4], atol=2e-6 * (e @ e))
    large = torch.randn(2, 3 * SAMPLE, generator=torch.Generator().manual_seed(0))
    places = scattered(3 * SAMPLE, SAMPLE, torch.device("cpu"))
    errors = (large[0] - large[1]).square()
    assert (passes_of(*large).sample()[0] == errors[places]).double().mean() > 0.99
    bad = torch.ones(500)
    bad[7] = float("nan")
    for rule in (3.0, KLBudget(0.3)):
        try:
            ImbalanceAwareLoss(rule)(bad, torch.zeros(500))
        except ValueError as error:
            assert "1 non-finite values of 500, the first at index (7,)" in str(error)
        else:
            raise AssertionError("not refused")
    print("equal")
"""


COMPILED = """
    import runpy
    import sys
    from squall.losses.fused_triton import PER_PROCESSOR

    benchmark = runpy.run_path(sys.argv[1])
    for capability in (80, 90):
        for case in benchmark["CASES"]:
            made = benchmark["compiled"](case, capability)
            loads = [line for line in made.instructions if "LDG" in line]
            assert made.stack == 0, f"{case.name}: {made.stack} bytes spilled"
            assert any(".128" in line for line in loads), f"{case.name}: {loads}"
            if case.name.startswith("sweep"):
                assert made.programs >= PER_PROCESSOR, f"{case.name}: {made.registers} registers"
                waits = [line for line in made.instructions if "BAR" in line or "SHFL" in line]
                assert not waits and all(".128" in line for line in loads), f"{case.name}: {waits}, {loads}"
    print("lean")
"""


def printed(script: str, *arguments: str, **environment: str) -> str:
    """By a process of its own: the checks of shapes while tests run would hide a kernel's source from Triton."""
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_kernels_in_the_interpreter():
    assert printed(SCRIPT) == "equal"


@pytest.mark.parametrize(("version", "new_enough"), [("3.2.0", False), ("3.3.0+git8d0", True), ("4.0.1", True)])
def test_an_older_triton_leaves_the_loss_to_the_formula(monkeypatch, version, new_enough):
    monkeypatch.setattr(triton, "__version__", version)
    assert fused.triton_compiles.__wrapped__() is new_enough


def test_compiled_loops_load_wide_keep_to_registers_and_wait_for_nobody(tmp_path):
    benchmark = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    assert printed(COMPILED, str(benchmark), TRITON_CACHE_DIR=str(tmp_path)) == "lean"
