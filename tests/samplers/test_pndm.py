"""PNDM and PLMS against Liu et al. 2022, Equations 9, 12 and 13."""

import itertools

import pytest
from multistep_cases import CASES, check
from samplers_multistep import pndm_reference


@pytest.mark.parametrize("case", range(4))
@pytest.mark.parametrize("prk", [False, True])
def test_pndm(seed, case, prk):
    """VP states; the levels between, where the schedule has indices, lie at an index."""
    schedule = CASES[case][0]

    def reference(points, x, f, z):
        t = [(a.t + b.t) / 2 for a, b in itertools.pairwise(points)]
        whole = all(float(p.t).is_integer() for p in points)
        middles = [schedule.level(int(u) if whole else u) for u in t]
        return pndm_reference(points, middles, x, f, prk)

    for clip in (None, 1.0):
        check(case, clip, "pndm", reference, skip_prk_steps=not prk)
