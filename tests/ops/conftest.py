"""What the operations' tests share."""

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _dynamo_knows_the_true_functions():
    """torch.compile lists torch's functions once a process: not while a test has put a poisoned torch.empty there."""
    from torch._dynamo import trace_rules

    trace_rules.lookup(torch.empty)
