"""EDM's and flows' levels: round trips, and a flow's shift."""

import math

import pytest
from helpers import spaced

from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.level import Level

EDM = EDMSchedule()
FLOW = FlowSchedule()


def sigmas(chosen: list[Level]) -> list[float]:
    return [level.sigma for level in chosen]


def test_continuous_round_trips():
    for sigma in (0.002, 0.3, 80.0):
        level = EDM.at(sigma)
        assert level.t == pytest.approx(math.log(sigma) / 4)
        assert EDM.sigma_at(level.t) == pytest.approx(sigma, rel=1e-12)
        assert level.c_in == pytest.approx(1 / math.sqrt(sigma**2 + 0.25))
    for sigma in (0.0, 0.25, 1.0):
        level = FLOW.at(sigma)
        assert (level.t, level.alpha, level.sigma, level.c_in) == (1000 * sigma, 1 - sigma, sigma, 1)
        assert FLOW.sigma_at(level.t) == sigma
    told = spaced(EDM, timesteps=[math.log(s) / 4 for s in (80, 3, 0.002)])
    assert sigmas(told) == pytest.approx([80, 3, 0.002, 0])
    assert sigmas(spaced(FLOW, timesteps=[1000, 250])) == [1, 0.25, 0]


def test_flow_shift():
    """σ' = s σ/(1 + (s − 1) σ), that is σ'/(1 − σ') = s σ/(1 − σ)."""
    for s in (1.0, 3.0, 0.5):
        for u, got in zip((1, 0.75, 0.5, 0.25), sigmas(spaced(FlowSchedule(s), 4)), strict=False):
            assert got == pytest.approx(1 if u == 1 else (r := s * u / (1 - u)) / (1 + r))
    assert sigmas(spaced(FLOW, 4, spacing="linspace")) == pytest.approx([1, 0.667, 0.334, 0.001, 0])
    assert FlowSchedule(3.0).sigma_min == pytest.approx(0.003 / 1.002)


def test_flow_shift_by_resolution():
    """FLUX.1: μ = 0.5 at 256 tokens (256 pixels), 1.15 at 4096 (1024 pixels), linear between; the shift is exp(μ)."""
    assert FlowSchedule.for_tokens(256).shift == pytest.approx(math.exp(0.5))
    assert FlowSchedule.for_tokens(4096).shift == pytest.approx(math.exp(1.15))
    assert FlowSchedule.for_tokens(2176).shift == pytest.approx(math.exp(0.825))
    assert FlowSchedule.for_tokens(100, base_tokens=100, max_tokens=200, base_shift=0.0, T=10) == FlowSchedule(1.0, 10)
    mu, sigma = 0.825, 0.4
    shifted = FlowSchedule.for_tokens(2176).shifted(sigma)
    assert shifted == pytest.approx(math.exp(mu) / (math.exp(mu) + 1 / sigma - 1))


def test_the_end_of_a_stretched_flow():
    """1 − σ is stretched until the last σ before 0 is the terminal one (LTX-Video); one step is from 1 to 0."""
    for spacing, steps in (("trailing", 5), ("linspace", 5), ("sd3", 9), ("simple", 4), ("sgm_uniform", 3)):
        plain = sigmas(spaced(FlowSchedule(2.0), steps, spacing=spacing))[:-1]
        got = sigmas(spaced(FlowSchedule(2.0, shift_terminal=0.1), steps, spacing=spacing))
        assert got[-2:] == [0.1, 0]
        factor = 0.9 / (1 - plain[-1])
        assert got[:-1] == pytest.approx([1 - (1 - s) * factor for s in plain])
        assert sigmas(spaced(FlowSchedule(2.0, shift_terminal=0.1), 1, spacing=spacing)) == [1, 0]
    assert sigmas(spaced(FlowSchedule(shift_terminal=0.1), 3, spacing="karras"))[-2:] == [0.1, 0]
    for bad, error in ((0.0, ValueError), (1.0, ValueError), (-0.1, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="shift_terminal"):
            FlowSchedule(shift_terminal=bad)
    assert FlowSchedule.for_tokens(2176, time_shift_type="linear").shift == pytest.approx(0.825)
    with pytest.raises(ValueError, match="time_shift_type"):
        FlowSchedule.for_tokens(2176, time_shift_type="cubic")


def test_times_are_floats():
    """The kind of number says what dtype the network is told; whole values are no indices."""
    assert [type(level.t) for level in spaced(FlowSchedule(T=1), 4)] == [float] * 5
    for schedule in (FLOW, FlowSchedule(3.0, T=10), EDM):
        for spacing, steps in (("karras", 1), ("karras", 4), ("simple", 2), ("sgm_uniform", 4)):
            assert all(type(level.t) is float for level in spaced(schedule, steps, spacing=spacing))
    assert all(type(level.t) is float for level in spaced(FLOW, sigmas=[1, 0.5, 0]))
    assert all(type(level.t) is float for level in spaced(FLOW, timesteps=[1000, 500]))
    assert all(type(level.t) is float for level in spaced(FLOW, 4, quantize=True))
    assert [level.t for level in spaced(FLOW, 3, quantize=True)] == [1000, 667, 333, 0]


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: FlowSchedule.for_tokens(1e38), "tokens"),
        (lambda: FlowSchedule(5e-324), "shift"),
        (lambda: FlowSchedule(10**400), "shift"),
        (lambda: EDMSchedule(sigma_max=1e200), "sigma_max"),
        (lambda: EDMSchedule(sigma_min=10**400), "sigma_min"),
        (lambda: spaced(EDM, 5, rho=1e-3), "rho"),
        (lambda: spaced(EDM, sigmas=[10**400, 1.0]), "sigmas"),
        (lambda: FlowSchedule(shift_terminal=10**400), "shift_terminal"),
    ],
)
def test_numbers_beyond_float64_are_refused_in_words(make, names):
    with pytest.raises(ValueError, match=names):
        make()
