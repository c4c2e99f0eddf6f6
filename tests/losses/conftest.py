"""One thread for these small batches: waking a second one costs more than it brings on a busy machine."""

import pytest
import torch

from squall.losses import weights


@pytest.fixture(autouse=True, scope="package")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["compiled", "plain"])
def passes(request):
    """The passes on the CPU: compiled by numba (where it is installed), and in plain PyTorch."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(weights, "compiled_kernels", lambda: None)
        else:
            pytest.importorskip("numba")
        yield
