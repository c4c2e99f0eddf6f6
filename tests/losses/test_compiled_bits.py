"""The compiled loops round alike in every process, whatever was compiled, loaded or called before."""

import os
import subprocess
import sys

import pytest

pytest.importorskip("numba")

PROGRAM = """
import hashlib, sys, torch
from squall.losses import ImbalanceAwareLoss

def digest(shape, options):
    generator = torch.Generator().manual_seed(sum(shape))
    loss, bits = ImbalanceAwareLoss(**options), hashlib.sha256()
    for _ in range(5):
        a, b = (torch.randn(shape, generator=generator) for _ in range(2))
        value = loss(a.requires_grad_(), b)
        value.backward()
        bits.update(value.detach().numpy().tobytes() + a.grad.numpy().tobytes())
    return bits.hexdigest()

of = [((16, 1, 12), {}), ((8, 1, 500), {"temperature": 50.0})]
found = {str(case): digest(*case) for case in (of[::-1] if sys.argv[1] == "backwards" else of)}
print(*sorted(found.items()), sep="\\n")
"""


def test_a_process_that_compiles_the_loops_rounds_as_those_that_load_them(tmp_path):
    def bits(order: str) -> str:
        environment = {**os.environ, "NUMBA_CACHE_DIR": str(tmp_path)}
        command = [sys.executable, "-c", PROGRAM, order]
        return subprocess.run(command, capture_output=True, text=True, env=environment, check=True).stdout

    compiling = bits("forwards")
    assert any(tmp_path.rglob("*.nbc"))
    assert bits("backwards") == compiling
