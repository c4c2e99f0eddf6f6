"""One thread for these small batches: waking a second one costs more than it brings on a busy machine."""

import pytest
import torch

from squall.losses import fused_cpu


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["numba", "plain"])
def passes(request):
    """The passes on the CPU: compiled (where numba is installed), and those of NumPy and torch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(fused_cpu, "compiled_passes", lambda: None)
        else:
            pytest.importorskip("numba")
        yield
