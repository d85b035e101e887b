"""The deterministic DPM-Solver++ samplers by their names, and ancestral 2S, against the published updates."""

import pytest
from multistep_cases import CASE, check_named_multistep, check_singlestep


@CASE
@pytest.mark.parametrize("name", ["dpmpp_1s", "dpmpp_2m", "dpmpp_3m"])
def test_named_multistep(seed, case, name):
    check_named_multistep(case, name)


@CASE
@pytest.mark.parametrize("name", ["dpmpp_2s", "dpmpp_2s_ancestral"])
def test_singlestep(seed, case, name):
    check_singlestep(case, name)
