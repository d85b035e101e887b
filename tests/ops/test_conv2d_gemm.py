"""conv2d by Triton: what its weights' packing refuses, and where the kernel is taken; its numbers are in
triton_conv_cases.py."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import backend as backends
from fastdiff.ops import conv2d
from fastdiff.ops.conv2d.choice import select
from fastdiff.ops.conv2d.gemm import computes, pack
from fastdiff.ops.conv2d.geometry import Geometry, geometry_of


def windows(**options) -> Geometry:
    return geometry_of(options.get("stride", 1), options.get("padding", 1), 1, 1, options.get("upsample", False))


def test_the_formula(seed):
    x, w, b = torch.randn(2, 8, 6, 5), torch.randn(7, 8, 3, 3), torch.randn(7)
    inputs, pointwise = [torch.randn(2, c, 6, 5) for c in (3, 4)], [torch.randn(7, c, 1, 1) for c in (3, 4)]
    residual = torch.randn(2, 7, 6, 5)
    expected = F.conv2d(x, w, b, padding=1) + residual
    for image, weight in zip(inputs, pointwise, strict=True):
        expected = expected + torch.einsum("bchw,nc->bnhw", image, weight[:, :, 0, 0])
    torch.testing.assert_close(
        conv2d(x, w, b, padding=1, inputs=inputs, pointwise=pointwise, residual=residual), expected
    )
    padded = F.conv2d(F.pad(x, (0, 1, 0, 1)), w, stride=2)
    torch.testing.assert_close(conv2d(x, w, stride=2, padding=((0, 1), (0, 1))), padded)
    torch.testing.assert_close(conv2d(x, w, stride=2, padding=1), F.conv2d(x, w, stride=2, padding=1))
    doubled = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(conv2d(x, w, padding=1, upsample=True), F.conv2d(doubled, w, padding=1))


def test_gradients(seed):
    x, w = torch.randn(1, 2, 4, 4).double().requires_grad_(), torch.randn(3, 2, 3, 3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x, w: conv2d(x, w, stride=2, padding=((0, 1), (0, 1))), (x, w))


@pytest.mark.parametrize(
    ("weight", "options", "what"),
    [
        ((8, 60, 3, 3), {}, "multiple of 64"),
        ((8, 64, 5, 5), {}, "weight"),
        ((8, 64, 3, 3), {"stride": 3}, "stride"),
        ((8, 64, 3, 3), {"stride": 2, "upsample": True}, "up-sampling"),
        ((8, 64, 1, 1), {"upsample": True}, "up-sampling"),
        ((8, 64, 3, 3), {"pointwise": [torch.ones(8, 64, 1, 1)] * 3}, "two pointwise"),
        ((8, 64, 3, 3), {"pointwise": [torch.ones(9, 64, 1, 1)]}, "pointwise weights"),
        ((8, 64, 3, 3), {"pointwise": [torch.ones(8, 3, 1, 1)]}, "pointwise weights"),
    ],
)
def test_pack_refuses(weight, options, what):
    with pytest.raises(ValueError, match=what):
        pack(torch.ones(weight), options.pop("pointwise", ()), windows(**options), torch.float32)


def test_without_triton(seed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, weight, point = torch.randn(2, 64, 6, 6), torch.randn(8, 64, 3, 3), torch.randn(8, 64, 1, 1)
    with pytest.raises(RuntimeError, match="cannot serve this conv2d on cpu: Triton has no CPU kernels"):
        conv2d(x, weight, padding=1, inputs=[x], pointwise=[point], backend="triton")
    with pytest.raises(ValueError, match="no gradients"):
        conv2d(x.requires_grad_(), weight, padding=1, backend="triton")


def test_what_the_kernel_computes():
    assert computes(torch.ones(8, 128, 3, 3), windows(stride=2))
    assert not computes(torch.ones(8, 3, 3, 3), windows())
    assert not computes(torch.ones(8, 64, 3, 3), windows(stride=2, upsample=True))


class Claims(Tensor):
    """An image that says it is on a GPU."""

    is_cuda = True
    device = torch.device("cuda", 0)


def test_where_it_is_taken(monkeypatch):
    """On the one chip that was measured, in half precision: few tiles, steps, sums and residuals."""

    def image(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype).as_subclass(Claims)

    def suits(x, geometry, inputs=(), residual=False) -> bool:
        points = [torch.empty(256, t.shape[1], 1, 1) for t in inputs]
        return select(x, torch.empty(256, 256, 3, 3), geometry, inputs, points, residual, False, "auto") == "gemm"

    assert not suits(torch.empty(1, 256, 8, 8, dtype=torch.bfloat16), windows())
    monkeypatch.setattr("fastdiff.ops.triton_support.why_missing", lambda device: None)
    monkeypatch.setattr(backends, "chip_of", lambda device: "sm_80")
    assert not suits(image(1, 256, 8, 8), windows())
    monkeypatch.setattr(backends, "chip_of", lambda device: "sm_90")
    assert suits(image(1, 256, 8, 8), windows())
    assert not suits(image(1, 256, 8, 8, dtype=torch.float32), windows())
    large = image(64, 256, 16, 16)
    assert not suits(large, windows())
    assert suits(large, windows(), residual=True)
    assert suits(large, windows(), inputs=[large])
    assert suits(large, windows(stride=2))
    assert suits(large, windows(upsample=True))
    assert not computes(torch.empty(8, 3, 3, 3), windows())
