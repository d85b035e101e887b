"""attention by Triton against float64. Run by test_triton.py."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_accurate
from torch import Tensor
from triton_cases import DEVICE, DTYPES, NAN

from fastdiff.ops.attention import attention
from fastdiff.ops.attention.triton_impl import attention as launch

HEAD_SIZES = (8, 24, 40, 64, 80, 96, 160, 256, 512)


def operands(B: int, H: int, N: int, M: int, D: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, n, D, device=DEVICE).to(dtype) for n in (N, M, M))


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return torch.softmax(scale * (q.double() @ k.double().mT), -1) @ v.double()


def check(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float) -> None:
    """At most twice the error of PyTorch's own, or 2 ulp of Σ|terms|; in float32 a score's own terms count too."""
    # FlashAttention overflows at a negative scale.
    theirs = F.scaled_dot_product_attention(-q if scale < 0 else q, k, v, scale=abs(scale))
    weights = torch.softmax(scale * (q.double() @ k.double().mT), -1)
    if q.dtype == torch.float32:
        weights = weights * (1 + abs(scale) * (q.double().abs() @ k.double().abs().mT))
    assert_accurate(y, oracle(q, k, v, scale), theirs, weights @ v.double().abs())


def strided(t: Tensor, kind: str) -> Tensor:
    """The values in a view of NaN-filled memory."""
    B, H, N, D = t.shape
    if kind == "projection":
        view = torch.full((B, N, 3, H, D), NAN, dtype=t.dtype, device=DEVICE)[:, :, 1].transpose(1, 2)
    elif kind == "offset":
        view = torch.full((t.numel() + 3,), NAN, dtype=t.dtype, device=DEVICE)[3:].view(t.shape)
    else:
        view = torch.full((D, B, N + 1, 2 * H), NAN, dtype=t.dtype, device=DEVICE)[:, :, 1:, ::2].permute(1, 3, 2, 0)
    return view.copy_(t)


def run(N: int, M: int, D: int, dtype: torch.dtype) -> None:
    q, k, v = operands(1, 2, N, M, D, dtype)
    memory = torch.full((2 * N * D + 16,), NAN, dtype=dtype, device=DEVICE)
    out = memory[8:-8].view(1, N, 2, D)
    launch(out, q, k, v, D**-0.5)
    check(out.transpose(1, 2), q, k, v, D**-0.5)
    assert int(memory.isnan().sum()) == 16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("D", HEAD_SIZES)
def test_head_sizes(seed, D, dtype):
    run(9, 81, D, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 4, 16, 77, 128])
def test_keys(seed, M, dtype):
    run(20, M, 40, dtype)


@pytest.mark.parametrize("kind", ["projection", "offset", "permuted"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(seed, dtype, kind):
    plain = operands(2, 3, 7, 33, 40, dtype)
    q, k, v = (strided(t, kind) for t in plain)
    y = attention(q, k, v, backend="triton")
    assert y.transpose(1, 2).is_contiguous()
    check(y, *plain, 40**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("D", [1, 3, 17, 100, 300])
def test_odd_head_sizes(seed, D, dtype):
    q, k, v = operands(1, 1, 4, 77, D, dtype)
    check(attention(q, k, v, -0.2, backend="triton"), q, k, v, -0.2)


@pytest.mark.parametrize(("N", "M"), [(130, 256), (2, 1024)])
def test_many_queries_and_many_keys(seed, N, M):
    q, k, v = operands(1, 1, N, M, 16, torch.float16)
    check(attention(q, k, v, backend="triton"), q, k, v, 0.25)


def test_large_scores(seed):
    """Whose exponentials would overflow, in falling and in rising order."""
    q, k, v = operands(1, 1, 4, 200, 16, torch.float32)
    for sign in (1, -1):
        ramp = sign * torch.linspace(-500, 500, 200, device=DEVICE)[:, None]
        check(attention(torch.ones_like(q), k + ramp, v, backend="triton"), torch.ones_like(q), k + ramp, v, 0.25)


def test_gradients(seed):
    q, k, v = (t.requires_grad_() for t in operands(1, 2, 5, 20, 24, torch.float32))
    got, expected = (
        torch.autograd.grad(attention(q, k, v, backend=backend).square().sum(), [q, k, v])
        for backend in ("triton", "reference")
    )
    torch.testing.assert_close(got, expected)
