"""The stochastic DPM-Solver++ samplers by their names against the published updates."""

import pytest
from multistep_cases import CASE, check_named_multistep, check_singlestep


@CASE
@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_3m_sde"])
def test_named_multistep(seed, case, name):
    check_named_multistep(case, name)


@CASE
@pytest.mark.parametrize("name", ["dpmpp_sde"])
def test_singlestep(seed, case, name):
    check_singlestep(case, name)
