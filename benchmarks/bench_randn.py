"""``ops.randn`` beside torch.randn."""

import torch
from gates import graphed, only_noise

import fastdiff


def test_randn(contest, device, shape):
    def ours():
        return fastdiff.randn(shape, seed=1, device=device)

    def textbook():
        return torch.randn(shape, device=device)

    assert torch.equal(ours(), fastdiff.randn(shape, seed=1, device=device, backend="reference"))
    compiled = torch.compile(textbook, fullgraph=True)
    zero = torch.zeros((), device=device)
    for rival in (textbook, compiled):
        only_noise(rival(), zero, 1.0)

    contest(
        "randn",
        "float32",
        {**graphed(ours, device), "textbook": textbook, "torch.compile": compiled},
        shape=shape,
        moved=4 * torch.Size(shape).numel(),
        targets=[{"kind": "ratio", "contestant": "textbook", "goal": 4}] if device.type == "cpu" else [],
    )
