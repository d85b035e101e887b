"""``ops.group_norm_silu`` of two inputs and a time embedding, beside PyTorch's operations and ``torch.compile``.

On a GPU fastdiff and eager PyTorch are timed as nodes of a graph, without what a launch from Python costs, and so is
torch's copy of the whole input, whose bandwidth is what can be reached. Each contestant works on three sets of tensors
in turn, which at batch 64 do not fit the cache together.
"""

import pytest
import torch
import torch.nn.functional as F
from gates import GPU, graph

from fastdiff.ops.group_norm_silu import group_norm_silu

SETS = 3 if GPU else 1
FORMATS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
COPY = "torch's copy of as many bytes"


@pytest.mark.parametrize("operands", ["x", "cat(x, x2) + add"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", DTYPES)
@pytest.mark.parametrize("batch", [64, 1] if GPU else [8])
def test_group_norm_silu(contest, device, batch, name, layout, operands):
    dtype, shape = DTYPES[name], (batch, 256, 32, 32)
    usual = (name, layout) == ("bfloat16", "channels_last")
    if GPU and batch == 1 and not usual:
        pytest.skip("at batch 1 only what the fast path runs")
    sets = [tensors(shape, dtype, FORMATS[layout], operands, device) for _ in range(SETS)]
    weight, bias = torch.randn(2, shape[1], device=device, dtype=dtype)

    def fastdiff(x, x2, add):
        return group_norm_silu(x, weight, bias, 32, x2=x2, add=add)

    def textbook(x, x2, add, wide=dtype):
        h = (x if x2 is None else torch.cat([x, x2], 1)).to(wide)
        if add is not None:
            h = h + add[:, :, None, None].to(wide)
        return F.silu(F.group_norm(h, 32, weight.to(wide), bias.to(wide)))

    compiled = torch.compile(textbook, fullgraph=True) if not GPU or (usual and batch == 64) else None
    calls = {"fastdiff": fastdiff, "eager": textbook} | ({"torch.compile": compiled} if compiled else {})
    with torch.no_grad():
        for operands_of_one in sets:
            exact = textbook(*operands_of_one, wide=torch.float64)
            for contestant in calls.values():
                error = (contestant(*operands_of_one).double() - exact).abs().max() / exact.abs().max()
                assert error <= 4 * torch.finfo(dtype).eps, f"{contestant} is off by {float(error):.3g} of the largest"
        turns = {key: over(sets, call) for key, call in calls.items()}
        targets = [{"kind": "ratio", "contestant": "eager", "goal": 2.5}]
        if GPU:
            source = [(torch.randn(shape, device=device, dtype=dtype),) for _ in range(SETS)]
            replays = {key: graph(turn) for key, turn in turns.items()}
            replays[COPY] = graph(over(source, torch.clone))
            turns = {**replays, "fastdiff, eager": turns["fastdiff"]}
            targets = [{"kind": "of_copy", "contestant": COPY, "goal": 0.8}] if usual and batch == 64 else []
        contest(
            "group_norm_silu",
            f"{name}, {layout}, {operands}",
            turns,
            shape=shape,
            moved=2 * torch.Size(shape).numel() * dtype.itemsize,
            targets=targets,
            repeats=SETS,
        )


def tensors(shape, dtype, layout, operands, device):
    """x, x2 and add."""
    whole = torch.randn(shape, device=device, dtype=dtype)
    if operands == "x":
        return whole.contiguous(memory_format=layout), None, None
    x, x2 = (t.contiguous(memory_format=layout) for t in whole.split(shape[1] // 2, 1))
    return x, x2, torch.randn(shape[:2], device=device, dtype=dtype)


def over(sets, call):
    """The call on each set; all results are kept until the last."""
    if len(sets) == 1:
        return lambda: call(*sets[0])
    return lambda: [call(*operands) for operands in sets]
