"""The sketch of the errors against the errors themselves."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from squall.losses import ErrorSketch

BIN = 2.0**-6


def heavy(n: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, generator=generator).square() * torch.randn(n, generator=generator).exp()


def sketch_of(*parts: torch.Tensor, **kwargs) -> ErrorSketch:
    sketch = ErrorSketch()
    for part in parts:
        sketch.add(part, **kwargs)
    return sketch


def assert_equal(a: ErrorSketch, b: ErrorSketch) -> None:
    for name, array in a.arrays().items():
        np.testing.assert_allclose(array, b.arrays()[name], rtol=1e-12, err_msg=name)


@settings(deadline=None, max_examples=50)
@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=200), st.floats(0, 1))
def test_quantiles_are_within_a_bin(errors, q):
    sketch = sketch_of(torch.tensor(errors, dtype=torch.float64))
    exact = float(np.quantile(errors, q, method="inverted_cdf"))
    assert sketch.quantile(q) == pytest.approx(exact, rel=BIN, abs=1e-300)
    assert sketch.mean == pytest.approx(np.mean(errors), rel=1e-12)
    assert (sketch.max, sketch.count) == (max(errors), len(errors))
    assert sketch.quantile(1) == max(errors)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=5), st.integers(0, 1000))
def test_parts_merge_to_the_whole(sizes, seed):
    """Whatever the parts, empty ones too, and in whatever order."""
    parts = [heavy(n, seed + i) for i, n in enumerate(sizes)]
    whole = sketch_of(torch.cat(parts))
    merged = ErrorSketch()
    for part in reversed(parts):
        merged.merge(sketch_of(part))
    assert_equal(merged, whole)
    assert_equal(sketch_of(*parts), whole)


def test_the_top_carries_its_share():
    errors = heavy(100_000).double()
    sketch = sketch_of(errors)
    largest = errors.sort(descending=True).values
    for f in (0.001, 0.01, 0.3):
        exact = largest[: int(f * len(errors))].sum() / errors.sum()
        assert sketch.share_of_top(f) == pytest.approx(exact.item(), rel=1e-3)
    assert (sketch.share_of_top(0), sketch.share_of_top(1)) == pytest.approx((0, 1))


def test_lorenz_and_gini():
    errors = heavy(20_000).double()
    points, shares = sketch_of(errors).lorenz()
    assert (points[0], shares[0], points[-1], shares[-1]) == pytest.approx((0, 0, 1, 1))
    assert (np.diff(shares) >= 0).all()
    ascending = errors.sort().values.numpy()
    exact = (
        2 * (np.arange(1, len(errors) + 1) * ascending).sum() / (len(errors) * ascending.sum()) - 1 - 1 / len(errors)
    )
    assert sketch_of(errors).gini() == pytest.approx(exact, abs=1e-3)
    assert sketch_of(torch.full((10,), 3.0)).gini() == pytest.approx(0)
    assert sketch_of(torch.zeros(10)).gini() == pytest.approx(0)
    assert sketch_of(torch.eye(100)[0]).gini() == pytest.approx(0.99)


def test_a_measure_is_a_repetition_and_a_mask_a_removal():
    errors = heavy(3000)
    times = torch.arange(3000) % 4
    measured = sketch_of(errors, measure=times.float())
    repeated = sketch_of(errors.repeat_interleave(times))
    for q in (0.1, 0.5, 0.99):
        assert measured.quantile(q) == pytest.approx(repeated.quantile(q), rel=1e-6)
    assert measured.mean == pytest.approx(repeated.mean)
    mask = times > 0
    dirty = torch.where(mask, errors, math.nan)
    assert_equal(sketch_of(dirty, mask=mask), sketch_of(errors[mask]))


def test_groups_are_sketches_side_by_side():
    errors, labels = heavy(4000).reshape(4, 1000), torch.arange(4).unsqueeze(1)
    sketch = ErrorSketch(groups=4)
    sketch.add(errors, labels=labels)
    each = [sketch_of(row) for row in errors]
    np.testing.assert_allclose(sketch.mean, [one.mean for one in each])
    np.testing.assert_allclose(sketch.quantile(0.9), [one.quantile(0.9) for one in each])
    np.testing.assert_allclose(sketch.share_of_top(0.1), [one.share_of_top(0.1) for one in each], rtol=1e-2)
    assert sketch.count.tolist() == [1000] * 4


def test_precisions_and_scales_share_their_bins():
    """Errors of float32 and float64 may be merged, from denormal to huge."""
    errors = torch.tensor([0.0, 2.0**-149, 1e-38, 1e-20, 1.0, 1e38])
    assert_equal(sketch_of(errors), sketch_of(errors.double()))
    assert sketch_of(-torch.zeros(3)).max == 0
    wide = sketch_of(torch.tensor([1e-300, 1e300], dtype=torch.float64))
    assert wide.quantile(0.1) == pytest.approx(1e-300, rel=BIN)


def test_arrays_bring_it_back():
    sketch = sketch_of(heavy(500))
    again = ErrorSketch.from_arrays({name: np.array(array) for name, array in sketch.arrays().items()})
    assert_equal(again, sketch)
    again.add(heavy(10))
    assert (again.count, sketch.count) == (510, 500)
    with pytest.raises(ValueError, match="missing mass"):
        ErrorSketch.from_arrays({name: array for name, array in sketch.arrays().items() if name != "mass"})
    with pytest.raises(ValueError, match="mass has shape"):
        ErrorSketch.from_arrays({**sketch.arrays(), "mass": np.zeros((1, 3))})


def test_finer_bins():
    sketch = ErrorSketch(bits=12)
    errors = heavy(1000).double()
    sketch.add(errors)
    assert sketch.quantile(0.5) == pytest.approx(np.quantile(errors, 0.5, method="inverted_cdf"), rel=2.0**-12)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda s: s.quantile(1.5), r"q must be in \[0, 1\], got 1.5"),
        (lambda s: s.quantile(math.nan), r"q must be in \[0, 1\]"),
        (lambda s: s.share_of_top(-0.1), r"f must be in \[0, 1\]"),
        (lambda s: s.merge(ErrorSketch(bits=5)), "bits=6 and groups=1, the other bits=5"),
        (lambda s: s.merge(ErrorSketch(groups=2)), "groups=1, the other bits=6 and groups=2"),
        (lambda s: s.add(torch.tensor([-1.0])), "negative"),
        (lambda s: s.add(torch.tensor([math.nan])), "non-finite"),
        (lambda s: s.add(torch.ones(2), labels=torch.tensor([0, 1])), "labels go up to 1, but the sketch has 1"),
        (lambda s: ErrorSketch(groups=0), "groups must be at least 1"),
        (lambda s: ErrorSketch(bits=40), "bits must be from 1 to 12"),
        (lambda s: ErrorSketch().quantile(0.5), "the sketch is empty: add errors first"),
        (lambda s: ErrorSketch().mean, "the sketch is empty"),
        (lambda s: ErrorSketch().gini(), "the sketch is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong(sketch_of(torch.ones(3)))
