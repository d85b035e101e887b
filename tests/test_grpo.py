"""The example of policy gradients: in a few steps the digits become brighter, whatever the seed."""

import importlib.util
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "grpo.py"


@pytest.mark.slow
@pytest.mark.skipif(not EXAMPLE.exists(), reason="no examples beside the tests")
@pytest.mark.parametrize("seed", [0, 1])
def test_the_reward_rises(seed):
    spec = importlib.util.spec_from_file_location("grpo", EXAMPLE)
    grpo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(grpo)
    rewards = grpo.train(seed, steps=6)
    assert len(rewards) == 7
    assert rewards[-1] > rewards[0] + 0.01, rewards
