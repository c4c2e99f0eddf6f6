"""The first states: those of the reference, reproducible, and each within what is promised."""

import numpy as np
import pytest
import torch
from numpy.random import RandomState

from squall.systems import SYSTEMS, CahnHilliard, CahnHilliard2D, KortewegDeVries

every_class = pytest.mark.parametrize("cls", SYSTEMS.values())


@pytest.mark.parametrize(("system", "key"), [(CahnHilliard(), "ch_u"), (KortewegDeVries(), "kdv_u")])
def test_the_seed_of_the_paper_gives_the_states_of_the_reference(system, key, reference):
    drawn = system.initial_states(2, RandomState(system.paper_seed))
    torch.testing.assert_close(drawn, reference(key)[:, :1], rtol=0, atol=1e-14)


@every_class
@pytest.mark.parametrize("make", [RandomState, lambda seed: torch.Generator().manual_seed(seed)])
def test_the_generator_alone_decides(cls, make):
    system = cls(points=31, width=10.0) if cls is not CahnHilliard2D else cls(points=9)
    before = torch.get_rng_state()
    drawn = system.initial_states(5, make(3))
    assert drawn.shape == (5, *system.shape)
    assert drawn.dtype == torch.float64
    assert torch.equal(drawn, system.initial_states(5, make(3)))
    assert not torch.equal(drawn, system.initial_states(5, make(4)))
    assert torch.equal(drawn[:2], system.initial_states(2, make(3)))
    assert torch.equal(torch.get_rng_state(), before)


def test_a_mixture_is_uniform_within_its_bounds():
    drawn = CahnHilliard().initial_states(400, torch.Generator().manual_seed(0))
    assert drawn.abs().max() <= 0.05
    assert drawn.mean().abs() < 5 * 0.1 / np.sqrt(12 * drawn.numel())
    assert drawn.std() == pytest.approx(0.1 / np.sqrt(12), rel=0.02)


def test_solitons_are_shifted_only_on_demand_and_with_the_same_draws():
    system = KortewegDeVries()
    plain = system.initial_states(20, RandomState(5))
    shifted = system.initial_states(20, RandomState(5), shift=True)
    moved = 0
    for one, other in zip(plain[:, 0], shifted[:, 0], strict=True):
        places = [s for s in range(50) if torch.equal(one.roll(s), other)]
        assert places, "a shifted state is the plain one, moved around the ring"
        moved += places != [0]
    assert moved > 10


def test_about_half_of_the_soliton_pairs_are_mirrored():
    # Unmirrored crests lie in the first 0.8 widths, and the first of them in the first 0.3.
    system = KortewegDeVries(points=400, width=40.0)
    drawn = system.initial_states(200, torch.Generator().manual_seed(0))[:, 0]
    first = drawn[:, :125].amax(-1) > 0.4  # a crest near 0.2 ... 0.3 widths
    mirrored = drawn[:, 275:].amax(-1) > 0.4  # a crest near 0.7 ... 0.8 widths
    assert int((first & ~mirrored).sum()) > 60
    assert int((mirrored & ~first).sum()) > 60


@every_class
def test_bad_requests_are_refused(cls):
    with pytest.raises(ValueError, match=r"n is 0.*at least 1"):
        cls().initial_states(0, RandomState(0))


def test_solitons_need_both_terms():
    for system in (KortewegDeVries(alpha=0.0), KortewegDeVries(beta=0.0)):
        with pytest.raises(ValueError, match="solitons need both"):
            system.initial_states(1, RandomState(0))
