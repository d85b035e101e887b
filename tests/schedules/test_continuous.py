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
