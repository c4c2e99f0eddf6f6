"""The Triton kernels, interpreted on the CPU, against float64 and the CPU passes."""

import subprocess
import sys
import textwrap

import pytest

pytest.importorskip("triton")

SCRIPT = """
    import os
    os.environ["TRITON_INTERPRET"] = "1"
    import numpy as np
    import torch
    from scipy.special import logsumexp
    from squall.losses import EffectiveFraction, ImbalanceAwareLoss, KLBudget, Relative, recipe
    from squall.losses.fused_triton import BLOCK, SAMPLE, TritonPasses
    from squall.losses.sums import scattered

    def passes_of(prediction, target):
        return TritonPasses(prediction.detach(), target.detach(), keep=prediction.requires_grad)

    for n in (100, BLOCK, 2 * BLOCK + 17):
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
    large = torch.randn(2, 3 * SAMPLE)
    places = scattered(3 * SAMPLE, SAMPLE, torch.device("cpu"))
    errors = (large[0] - large[1]).square()
    assert (passes_of(*large).sample()[0] == errors[places]).double().mean() > 0.99
    bad = torch.randn(500)
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


def test_kernels_in_the_interpreter():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(SCRIPT)], capture_output=True, text=True, timeout=300
    )
    assert result.stdout.strip() == "equal", result.stderr
