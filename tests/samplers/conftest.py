"""Failed assertions of the helpers are explained as those of the tests are."""

import pytest

pytest.register_assert_rewrite("beside_diffusers", "multistep_cases", "samplers_onestep")
