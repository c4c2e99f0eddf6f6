"""Work shared out to threads is the work of one, whatever surrounds it."""

import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from processes import run_program
from torch import Tensor
from torch.autograd import forward_ad

from squall._process.threads import threads
from squall.models.fast import rows as fast_rows
from squall.models.fast.density_gradient import fast_density_gradient

# PyTorch's own use of its deprecated compiler, when forward-mode differentiation is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")


LARGE = 1 << 30


def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, each worth a thread."""
    monkeypatch.setattr(fast_rows, "BLOCK", 10 * 16 * 8)
    monkeypatch.setattr(fast_rows, "WORTH_A_THREAD", 1)


@pytest.fixture(params=[1, 2, 3], ids=lambda count: f"{count} threads")
def count(request: pytest.FixtureRequest) -> Iterator[int]:
    with threads(request.param):
        yield request.param


def inputs(rows: int, hidden: int = 16) -> list[Tensor]:
    shapes = [(rows, 3), (hidden, 3), (hidden,), (hidden, hidden), (hidden,), (1, hidden)]
    generator = torch.Generator().manual_seed(rows)
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("rows", [0, 1, 2, 5, 64, 1001])
def test_every_row_once(count: int, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    x = torch.arange(4.0 * rows, dtype=torch.float64).reshape(rows, 4)
    doubled = torch.full_like(x, torch.nan)

    def part(blocks: fast_rows.Blocks) -> tuple[Tensor, ...]:
        total, seen = x.new_zeros(4), x.new_zeros(())
        for some, (scratch,) in blocks:
            doubled[some] = torch.mul(x[some], 2, out=scratch)
            total, seen = total + x[some].sum(0), seen + scratch.shape[0]
        return total, seen

    total, seen = fast_rows.over_rows(part, x, scratch=1)
    assert torch.equal(doubled, 2 * x)
    assert torch.equal(total, x.sum(0))
    assert seen == rows


def test_a_function_and_its_gradients(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    given = inputs(100)
    ours, formula = fast_density_gradient(*given), fast_density_gradient.formula(*given)
    torch.testing.assert_close(ours, formula, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), given) for y in (ours, formula)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_same_bits_every_time(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    given = inputs(500)
    runs = [torch.autograd.grad(fast_density_gradient(*given).square().sum(), given) for _ in range(5)]
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


@pytest.mark.parametrize("items", [0, 1, 2, 7])
def test_the_order_stays_and_threads_work_alone(count: int, items: int) -> None:
    found = fast_rows.on_threads(lambda i: (i, torch.get_num_threads()), range(items), LARGE)
    assert [i for i, _ in found] == list(range(items))
    alone = items - items % count
    assert [n for _, n in found] == [1] * alone + [count] * (items - alone)
    assert torch.get_num_threads() == count


def test_within_a_thread_nothing_is_shared_out(count: int) -> None:
    found = fast_rows.on_threads(lambda i: fast_rows.on_threads(lambda j: 10 * i + j, range(4), LARGE), range(4), LARGE)
    assert found == [[10 * i + j for j in range(4)] for i in range(4)]


def test_an_error_reaches_the_caller(count: int) -> None:
    def fail(i: int) -> None:
        raise RuntimeError(f"item {i}")

    with pytest.raises(RuntimeError, match="item 0"):
        fast_rows.on_threads(fail, range(6), LARGE)
    assert fast_rows.on_threads(lambda i: i, range(6), LARGE) == list(range(6))


def test_inference_mode_goes_along(count: int) -> None:
    with torch.inference_mode():
        assert all(fast_rows.on_threads(lambda _: torch.zeros(1).is_inference(), range(6), LARGE))
    with torch.no_grad():
        assert not any(fast_rows.on_threads(lambda _: torch.zeros(1).is_inference(), range(6), LARGE))


def test_from_several_threads_at_once(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    small_blocks(monkeypatch)
    given = inputs(300)
    expected = fast_density_gradient(*given)
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.equal(y, expected) for y in pool.map(lambda _: fast_density_gradient(*given), range(8)))


def test_a_dispatch_mode_sees_every_operation() -> None:
    """Modes belong to a thread: what counts operations must not lose those of the others."""
    from torch.utils.flop_counter import FlopCounterMode

    x, *weights = inputs(200)
    with threads(2), torch.no_grad():
        with FlopCounterMode(display=False) as ours:
            fast_density_gradient(x, *weights)
        with FlopCounterMode(display=False) as formula:
            fast_density_gradient.formula(x, *weights)
    assert ours.get_total_flops() == formula.get_total_flops() > 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_has_threads_of_its_own() -> None:
    with threads(2):
        fast_rows.on_threads(abs, range(4), 1 << 30)
        child = os.fork()
        if child == 0:  # no assertion here: the child must end without pytest's clearing up
            os._exit(fast_rows.on_threads(abs, range(4), 1 << 30) != [0, 1, 2, 3])
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_forward_mode_through_many_blocks(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward mode is a thread's own, and what works in place knows nothing of it."""
    small_blocks(monkeypatch)
    x, *weights = (y.detach() for y in inputs(200))
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(1), dtype=x.dtype)
    with forward_ad.dual_level():
        ours, formula = (
            forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction), *weights)).tangent
            for f in (fast_density_gradient, fast_density_gradient.formula)
        )
    torch.testing.assert_close(ours, formula, rtol=1e-11, atol=1e-11)


def test_where_threads_cannot_start_the_caller_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    fast_rows._started.cache_clear()
    with threads(2):
        monkeypatch.setattr(threading.Thread, "start", fail)
        assert fast_rows.on_threads(abs, range(-4, 0), 1 << 30) == [4, 3, 2, 1]
        monkeypatch.undo()
        assert torch.get_num_threads() == 2
    fast_rows._started.cache_clear()


def test_first_calls_at_once_leave_every_thread_its_number() -> None:
    script = """
import threading, torch
from squall.models.fast import rows as fast_rows
torch.set_num_threads(2)
found = []
def first():
    fast_rows.on_threads(abs, range(4), 1 << 30)
    found.append(torch.get_num_threads())
them = [threading.Thread(target=first) for _ in range(8)]
[t.start() for t in them], [t.join() for t in them]
assert found == [2] * 8, found
"""
    result = run_program(script)
    assert result.returncode == 0, result.stderr


def test_a_thread_that_outlives_the_main_one() -> None:
    script = """
import threading, torch
from squall.models.fast import rows as fast_rows
torch.set_num_threads(2)
fast_rows.on_threads(abs, range(4), 1 << 30)
def late():
    threading.main_thread().join()  # the interpreter waits for this thread, and takes no more work
    assert fast_rows.on_threads(abs, range(-4, 0), 1 << 30) == [4, 3, 2, 1]
    print("done")
threading.Thread(target=late).start()
"""
    ended = subprocess.run([sys.executable, "-c", script], check=True, timeout=120, capture_output=True, text=True)
    assert ended.stdout == "done\n", ended.stderr
