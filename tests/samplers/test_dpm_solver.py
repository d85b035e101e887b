"""DPM-Solver of second and third order, of one step and of several, against the published updates."""

import pytest
from multistep_cases import CASE, check_named_multistep, check_singlestep


@CASE
@pytest.mark.parametrize("name", ["dpm_solver_2", "dpm_solver_3"])
def test_named_multistep(seed, case, name):
    check_named_multistep(case, name)


@CASE
@pytest.mark.parametrize("name", ["dpm_solver_2", "dpm_solver_3"])
def test_singlestep(seed, case, name):
    check_singlestep(case, name)
