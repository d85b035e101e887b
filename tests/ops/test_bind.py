"""``bind``: calls that decide once have the bits of the functional form in any layout, and threads share them."""

import threading

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_same_bits

from fastdiff.ops import linear
from fastdiff.ops.attention import attention
from fastdiff.ops.attention import bind as bind_attention
from fastdiff.ops.conv2d import bind as bind_conv
from fastdiff.ops.conv2d import conv2d
from fastdiff.ops.conv_epilogue import bind as bind_epilogue
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.group_norm_silu import bind as bind_norm
from fastdiff.ops.group_norm_silu import group_norm_silu

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LAYOUTS = ["contiguous", "channels_last", "slice", "columns", "expanded", "offset", "permuted"]


def image(shape, layout, dtype=torch.float32):
    """Random numbers of a shape [B, C, H, W] in one of LAYOUTS."""
    b, c, h, w = shape
    if layout == "channels_last":
        return torch.randn(shape).to(dtype).contiguous(memory_format=torch.channels_last)
    if layout == "slice":  # of the channels of a larger channels_last image
        wide = torch.randn(b, c + 3, h, w).to(dtype).contiguous(memory_format=torch.channels_last)
        return wide[:, 2 : 2 + c]
    if layout == "columns":
        return torch.randn(b, c, h, 2 * w).to(dtype)[..., ::2]
    if layout == "expanded":
        return torch.randn(1, c, h, 1).to(dtype).expand(shape)
    if layout == "offset":
        return torch.randn(b * c * h * w + 1).to(dtype)[1:].view(shape)
    if layout == "permuted":
        return torch.randn(w, b, h, c).to(dtype).permute(1, 3, 2, 0)
    return torch.randn(shape).to(dtype)


def like(example):
    """Other numbers in the very layout of a tensor."""
    extent = sum((size - 1) * stride for size, stride in zip(example.shape, example.stride(), strict=True)) + 1
    return torch.randn(extent if example.numel() else 0).to(example.dtype).as_strided(example.shape, example.stride())


def poison():
    """Leave NaN where the allocator will take the next results from."""
    for n in (64, 512, 4096, 32768):
        torch.full((n,), float("nan"))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_group_norm_silu(backend, seed, layout, dtype):
    for skip, added, (h, w) in ((False, None, (5, 3)), (True, "rows", (4, 4)), (True, "one", (1, 1))):
        x = image((2, 8, h, w), layout, dtype)
        x2 = image((2, 4, h, w), layout, dtype) if skip else None
        add = {None: None, "rows": torch.randn(12, 2).t(), "one": torch.randn(1, 12)}[added]
        weight, bias = torch.randn(24)[::2][: 12 if skip else 8], torch.randn(1).expand(12 if skip else 8)
        options = {"x2": x2, "add": add, "backend": backend}
        call = bind_norm(x, weight, bias, 4, **options)
        for _ in range(2):
            poison()
            got = call(x, x2, add)
            expected = group_norm_silu(x, weight, bias, 4, **options)
            assert_same_bits(got, expected)
            assert got.stride() == expected.stride()
            x, x2, add = (None if t is None else like(t) for t in (x, x2, add))
            options.update(x2=x2, add=add)
    wide = torch.cat([t for t in (x, x2) if t is not None], 1).double() + add.double().view(1, -1, 1, 1)
    textbook = F.silu(F.group_norm(wide, 4, weight.double(), bias.double()))
    torch.testing.assert_close(call(x, x2, add).double(), textbook, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_conv_epilogue(backend, seed, layout, dtype):
    x, residual = image((2, 5, 4, 3), layout, dtype), image((2, 5, 4, 3), "channels_last", dtype)
    overlapping = torch.arange(6.0).to(dtype).unfold(0, 5, 1)  # [2, 5] of strides (1, 1)
    for bias, add in ((None, None), (torch.randn(10)[::2], None), (None, overlapping), (torch.randn(5), overlapping),
                      (torch.randn(5), torch.randn(1).expand(5))):  # fmt: skip
        options = {"bias": bias, "scale": 0.7, "backend": backend}
        call = bind_epilogue(x, add=add, residual=residual, **options)
        for _ in range(2):
            poison()
            got, expected = call(x, add, residual), conv_epilogue(x, add=add, residual=residual, **options)
            assert_same_bits(got, expected)
            assert got.stride() == expected.stride()
            plain = conv_epilogue(x, add=add, residual=residual, bias=bias, scale=0.7, backend="reference")
            assert_same_bits(got.contiguous(), plain.contiguous())
            x, residual = like(x), like(residual)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["contiguous", "heads", "joined", "overlapping", "expanded"])
def test_attention(seed, kind, dtype):
    def make(tokens):
        if kind == "heads":
            return torch.randn(2, tokens, 3, 8).to(dtype).transpose(1, 2)
        if kind == "joined":
            return torch.randn(2, tokens, 3, 3, 8).to(dtype)[:, :, 1].transpose(1, 2)
        if kind == "overlapping":
            return torch.randn(2 * 3 + tokens + 8).to(dtype).as_strided((2, 3, tokens, 8), (2, 1, 1, 1))
        if kind == "expanded":
            return torch.randn(1, 3, 1, 8).to(dtype).expand(2, 3, tokens, 8)
        return torch.randn(2, 3, tokens, 8).to(dtype)

    q, k, v = make(7), make(9), make(9)
    call = bind_attention(q, k, v)
    for _ in range(2):
        got, expected = call(q, k, v), attention(q, k, v)
        assert_same_bits(got, expected)
        assert got.transpose(1, 2).is_contiguous()
        weights = torch.softmax(q.double() @ k.double().mT * 8**-0.5, -1)
        torch.testing.assert_close(got.double(), weights @ v.double(), rtol=0.02, atol=0.02)
        q, k, v = make(7), make(9), make(9)
    if kind == "joined" and dtype == torch.float32:  # the wanted layout is torch's own: no copy of it
        y = F.scaled_dot_product_attention(q, k, v)
        assert y.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(0,), (1,), (3,), (2, 5), (600, 2)])
def test_linear(seed, rows, dtype):
    packed = {}
    weight, bias = torch.randn(16, 2, 24)[:, 0], torch.randn(32)[::2]
    for offset in (bias, None):
        packed.clear()
        x, residual = torch.randn(*rows, 24).to(dtype), torch.randn(*rows, 16).to(dtype)
        call = linear.bind(x, weight, offset, packed=packed)
        wide = F.linear(x.double(), weight.to(dtype).double(), None if offset is None else offset.to(dtype).double())
        tolerance = 1e-5 if dtype == torch.float32 else 0.1
        torch.testing.assert_close(call(x).double(), wide, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(call(x, residual).double(), wide + residual.double(), rtol=tolerance, atol=tolerance)
        other = linear.bind(torch.randn(7, 24).to(dtype), weight, offset, packed=packed)
        assert other(torch.randn(7, 24).to(dtype)).shape == (7, 16)
        assert len(packed) <= 4


def test_another_default_device(seed):
    """Every result lies where x does: a kernel that is handed another device's address would crash."""
    x, w = torch.randn(1, 32, 8, 8), torch.randn(32, 32, 3, 3)
    q = torch.randn(1, 2, 5, 8)

    def results():
        return [
            bind_norm(x, None, None, 4)(x), bind_epilogue(x, bias=w[:, 0, 0, 0])(x), bind_attention(q, q, q)(q, q, q),
            bind_conv(x, w, padding=1)(x), bind_conv(x, w, padding=1, upsample=True)(x), conv2d(x, w, stride=2),
            conv2d(x, w[:, :, :1, :1]), linear.bind(x, w[:, 0, 0, :1].expand(32, 8))(x),
        ]  # fmt: skip

    expected = results()
    torch.set_default_device("meta")
    try:
        got = results()
    finally:
        torch.set_default_device(None)
    for a, b in zip(got, expected, strict=True):
        assert_same_bits(a, b)


def test_threads_share_a_call(seed):
    x, w, c = torch.randn(2, 32, 8, 8), torch.randn(32, 32, 3, 3), torch.randn(32)
    last = x.contiguous(memory_format=torch.channels_last)
    q = torch.randn(1, 2, 33, 8)
    calls = [
        (bind_norm(x, c, c, 8, add=torch.randn(2, 32)), lambda: (torch.randn_like(x), None, torch.randn(2, 32))),
        (bind_epilogue(x, bias=c, residual=last), lambda: (torch.randn_like(x), None, torch.randn_like(last))),
        (bind_conv(last, w, c, padding=1, residual=last), lambda: (torch.randn_like(last), torch.randn_like(last))),
        (bind_conv(last, w, c, stride=2), lambda: (torch.randn_like(last),)),
        (bind_attention(q, q, q), lambda: tuple(torch.randn_like(q) for _ in range(3))),
        (linear.bind(x, torch.randn(5, 8)), lambda: (torch.randn_like(x),)),
    ]
    jobs = [(call, arguments) for call, make in calls for arguments in [make() for _ in range(8)]]
    expected = [call(*arguments) for call, arguments in jobs]
    wrong = []

    def work():
        for _ in range(20):
            for (call, arguments), right in zip(jobs, expected, strict=True):
                if not torch.equal(call(*arguments), right):
                    wrong.append(call)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_empty_batch(backend, seed, dtype):
    x, w = torch.randn(0, 8, 4, 4).to(dtype), torch.randn(8, 8, 3, 3).to(dtype)
    assert bind_norm(x, None, None, 2, backend=backend)(x).shape == x.shape
    assert bind_epilogue(x, bias=torch.randn(8), backend=backend)(x).shape == x.shape
    assert conv2d(x, w, padding=1, upsample=True).shape == (0, 8, 8, 8)
    q = torch.randn(0, 2, 4, 8).to(dtype)
    assert bind_attention(q, q, q)(q, q, q).shape == q.shape


def test_bind_refuses(seed):
    x = torch.randn(2, 8, 4, 4)
    with pytest.raises(TypeError, match="weight must be torch"):
        bind_norm(x, torch.ones(8, dtype=torch.float64), None, 2)
    with pytest.raises(ValueError, match="groups must divide"):
        bind_norm(x, None, None, 3)
    with pytest.raises(ValueError, match="scale must be finite"):
        bind_epilogue(x, scale=float("nan"))
    with pytest.raises(ValueError, match="v must have"):
        bind_attention(x, x, x[:, :1])
    with pytest.raises(ValueError, match="weight must have the shape"):
        bind_conv(x, torch.randn(8, 7, 3, 3))
