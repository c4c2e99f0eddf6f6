"""Shape annotations are checked at run time; a test file whose extra is not installed is skipped with the reason."""

import contextlib
import re
import sys

import pytest
import torch
from hypothesis import settings
from jaxtyping import install_import_hook
from shortcuts import without_drawing

settings.register_profile("squall", deadline=None, derandomize=True)  # the same draws, however busy the machine is
settings.load_profile("squall")

install_import_hook("squall", "typechecking.check")

from squall._process.extras import EXTRAS  # noqa: E402 (after the hook)


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report(collector):
    report = yield
    missing = re.search(r"No module named '(\w+)|MissingExtraError: (\w+)", str(report.longrepr))
    package = missing and (missing[1] or missing[2])
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    if report.failed and extra:
        reason = f"Skipped: {package} is not installed: pip install 'squall[{extra}]'"
        report.outcome, report.longrepr = "skipped", (str(collector.path), 0, reason)
    return report


@pytest.fixture(autouse=True)
def same_seed():
    """Every test draws the same numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def modules_of_a_test_end_with_it(tmp_path_factory):
    """Else the next test whose working folder holds a module of that name would get this one's."""
    before, temporary = set(sys.modules), str(tmp_path_factory.getbasetemp())
    yield
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(temporary):
            del sys.modules[name]


@pytest.fixture(autouse=True, scope="session")
def own_state_folder(tmp_path_factory):
    """The secret that signs runs is not the one of whoever runs the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
        yield


@pytest.fixture
def undrawn(request):
    """Figures are made but not drawn, unless the test is marked `drawn`."""
    with contextlib.nullcontext() if request.node.get_closest_marker("drawn") else without_drawing():
        yield
