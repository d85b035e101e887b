"""An attention block of our operations, without copies between layouts, against the same of torch's in float64."""

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from torch import Tensor

from fastdiff.ops import attention, conv2d, group_norm_silu


def attention_block(
    x, groups, norm_weight, norm_bias, qkv_weight, qkv_bias, out_weight, out_bias, *, heads, rescale
) -> Tensor:
    """y = (x + W_out · attention(W_qkv · GroupNorm(x))) / rescale, over the pixels of x: queries, keys and values are
    views of what one pointwise convolution wrote.
    """
    x = x.contiguous(memory_format=torch.channels_last)
    h = group_norm_silu(x, norm_weight, norm_bias, groups, silu=False)
    qkv = conv2d(h, qkv_weight[:, :, None, None], qkv_bias)
    batch, channels, height, width = qkv.shape
    pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, channels // (3 * heads))
    h = attention(*pixels.permute(2, 0, 3, 1, 4))
    h = h.transpose(1, 2).reshape(batch, height, width, channels // 3).permute(0, 3, 1, 2)
    return conv2d(h, out_weight[:, :, None, None], out_bias, residual=x) / rescale


def operands(dtype: torch.dtype, *, bias: bool = True, inner: int = 16, channels: int = 16) -> dict[str, Tensor | None]:
    """Of a block on [2, channels, 5, 7]."""
    values = {
        "x": torch.randn(2, channels, 5, 7),
        "norm_weight": 1 + 0.1 * torch.randn(channels),
        "norm_bias": 0.1 * torch.randn(channels),
        "qkv_weight": torch.randn(3 * inner, channels) / channels**0.5,
        "qkv_bias": 0.1 * torch.randn(3 * inner),
        "out_weight": torch.randn(channels, inner) / inner**0.5,
        "out_bias": 0.1 * torch.randn(channels),
    }
    return {name: None if name == "qkv_bias" and not bias else value.to(dtype) for name, value in values.items()}


def textbook(
    values: dict[str, Tensor | None], heads: int, rescale: float, dtype: torch.dtype, sizes: bool = False
) -> Tensor:
    """The block written out, in ``dtype``; with ``sizes`` its Σ|terms|, given the attention's weights."""
    x, norm_weight, norm_bias, *rest = (None if t is None else t.to(dtype) for t in values.values())
    h = F.group_norm(x, 4, norm_weight, norm_bias, 1e-5).flatten(2).mT  # [B, H·W, C]
    q, k, v = (t.unflatten(2, (heads, -1)).transpose(1, 2) for t in F.linear(h, rest[0], rest[1]).chunk(3, 2))
    weights = torch.softmax(q @ k.mT / q.shape[3] ** 0.5, -1)
    if sizes:
        x, h, *rest = (None if t is None else t.abs() for t in (x, h, *rest))
        v = F.linear(h, rest[0], rest[1]).chunk(3, 2)[2].unflatten(2, (heads, -1)).transpose(1, 2)
    h = F.linear((weights @ v).transpose(1, 2).flatten(2), rest[2], rest[3])
    return (x + h.mT.reshape(x.shape)) / rescale


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("bias", "inner", "rescale"), [(True, 16, 1.0), (False, 16, 2**0.5), (True, 32, 0.5), (False, 8, 1.0)]
)
def test_against_float64(seed, dtype, heads, layout, bias, inner, rescale):
    values = operands(dtype, bias=bias, inner=inner)
    values["x"] = values["x"].contiguous(memory_format=layout)
    before = values["x"].clone()
    y = attention_block(groups=4, heads=heads, rescale=rescale, **values)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert values["x"].equal(before)
    exact = textbook(values, heads, rescale, torch.float64)
    size = textbook(values, heads, rescale, torch.float64, sizes=True)
    assert_accurate(y, exact, textbook(values, heads, rescale, dtype), size)


@pytest.mark.parametrize("heads", [1, 4])
@pytest.mark.parametrize("bias", [False, True])
def test_gradients(seed, heads, bias):
    values = operands(torch.float32, bias=bias)
    grad = torch.randn(2, 16, 5, 7)

    def gradients(function, dtype):
        leaves = {name: None if t is None else t.to(dtype).requires_grad_() for name, t in values.items()}
        given = [t for t in leaves.values() if t is not None]
        return torch.autograd.grad(function(leaves), given, grad.to(dtype))

    exact = gradients(lambda leaves: textbook(leaves, heads, 1.5, torch.float64), torch.float64)
    ours = gradients(lambda leaves: attention_block(groups=4, heads=heads, rescale=1.5, **leaves), torch.float32)
    names = [name for name, t in values.items() if t is not None]
    for name, a, b in zip(names, ours, exact, strict=True):
        error = float((a - b).abs().max() / b.abs().max())
        assert error < 1e-5, f"the gradient of {name} is off by {error}"
