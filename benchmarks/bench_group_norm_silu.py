"""``ops.group_norm_silu`` of two inputs and a time embedding, beside PyTorch's operations and ``torch.compile``."""

import pytest
import torch
import torch.nn.functional as F

from fastdiff.ops.group_norm_silu import group_norm_silu

SHAPE = (64 if torch.cuda.is_available() else 8, 256, 32, 32)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@pytest.mark.parametrize("operands", ["x", "cat(x, x2) + add"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("name", DTYPES)
def test_group_norm_silu(contest, device, name, layout, operands):
    dtype, (batch, channels, *_) = DTYPES[name], SHAPE
    whole = torch.randn(SHAPE, device=device, dtype=dtype)
    x = whole.contiguous(memory_format=FORMATS[layout])
    x2 = add = None
    if operands != "x":
        x, x2 = (t.contiguous(memory_format=FORMATS[layout]) for t in whole.split(channels // 2, 1))
        add = torch.randn(batch, channels, device=device, dtype=dtype)
    weight, bias = torch.randn(2, channels, device=device, dtype=dtype)

    def ours():
        return group_norm_silu(x, weight, bias, 32, x2=x2, add=add)

    def textbook(wide=dtype):
        h = (x if x2 is None else torch.cat([x, x2], 1)).to(wide)
        if add is not None:
            h = h + add[:, :, None, None].to(wide)
        return F.silu(F.group_norm(h, 32, weight.to(wide), bias.to(wide)))

    compiled = torch.compile(textbook, fullgraph=True)
    with torch.no_grad():
        exact = textbook(torch.float64)
        for contestant in (ours, textbook, compiled):
            error = (contestant().double() - exact).abs().max() / exact.abs().max()
            assert error <= 4 * torch.finfo(dtype).eps, f"{contestant} is off by {float(error):.3g} of the largest"
        targets = [{"kind": "ratio", "contestant": "eager", "goal": 2.5}]
        if device.type == "cuda":
            targets = [{"kind": "of_copy", "contestant": "fastdiff", "goal": 0.8}]
            targets = targets if (name, layout) == ("bfloat16", "channels_last") else []
        contest(
            "group_norm_silu",
            f"{name}, {layout}, {operands}",
            {"fastdiff": ours, "eager": textbook, "torch.compile": compiled},
            shape=SHAPE,
            moved=2 * whole.nbytes,
            targets=targets,
        )
