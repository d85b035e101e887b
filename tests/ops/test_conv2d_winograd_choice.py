"""What winograd_conv, pack and packed_winograd_conv refuse, and where an accelerated network takes the kernel."""

import pytest
import torch

from fastdiff.ops import native
from fastdiff.ops.conv2d.choice import suits_winograd as suits
from fastdiff.ops.conv2d.winograd import Packed, computes, pack, packed_winograd_conv, winograd_conv

X, WEIGHT = torch.zeros(2, 32, 4, 4), torch.zeros(16, 32, 3, 3)
REFUSED = [
    ({"x": [1.0]}, TypeError, "x must"),
    ({"x": torch.zeros(2, 32, 4, 4, dtype=torch.int64)}, TypeError, "x must"),
    ({"x": X.to_sparse()}, TypeError, "x must be a dense"),
    ({"x": torch.zeros(32, 4, 4)}, ValueError, r"x must have the shape \[B, C, H, W\]"),
    ({"x": torch.zeros(2, 32, 0, 4)}, ValueError, "x must"),
    ({"bias": 1.0}, TypeError, "bias must"),
    ({"bias": torch.zeros(3)}, ValueError, r"bias must have the shape \[16\]; got \[3\]"),
    ({"bias": torch.zeros(16, dtype=torch.float16)}, TypeError, "bias must"),
    ({"bias": torch.zeros(16, device="meta")}, ValueError, "bias must be on x's device"),
    ({"residual": torch.zeros(2, 16, 8, 8)}, ValueError, "residual must have the shape"),
    ({"residual": torch.zeros(2, 16, 4, 4, dtype=torch.bfloat16)}, TypeError, "residual must"),
]


@pytest.mark.parametrize(("change", "error", "names"), [
    *REFUSED,
    ({"weight": None}, TypeError, "weight must"),
    ({"weight": torch.zeros(16, 32, 5, 5)}, ValueError, "weight must"),
    ({"weight": torch.zeros(16, 31, 3, 3)}, ValueError, "weight must"),
    ({"weight": torch.zeros(3)}, ValueError, "weight must"),
    ({"weight": torch.zeros(16, 32, 3, 3, dtype=torch.float16)}, TypeError, "weight must"),
])  # fmt: skip
def test_refuses(change, error, names):
    given = {"x": X, "weight": WEIGHT, **change}
    with pytest.raises(error, match=names):
        winograd_conv(given.pop("x"), given.pop("weight"), **given)


@pytest.mark.parametrize(("change", "error", "names"), [
    *REFUSED,
    ({"packed": WEIGHT}, TypeError, "packed must come from pack"),
    ({"x": torch.zeros(2, 16, 4, 4)}, ValueError, "for 32 channels; x has 16"),
    ({"x": X.bfloat16()}, TypeError, r"for torch.float32 on a CPU; x is torch.bfloat16"),
    ({"x": X.to("meta")}, TypeError, "x is torch.float32 on meta"),
    ({"x": X.clone().requires_grad_()}, RuntimeError, "has no gradients"),
])  # fmt: skip
def test_packed_refuses(simd, change, error, names):
    given = {"x": X, "packed": pack(WEIGHT), **change}
    with pytest.raises(error, match=names):
        packed_winograd_conv(given.pop("x"), given.pop("packed"), **given)


@pytest.mark.parametrize("weight", [
    torch.zeros(16, 32, 1, 1), torch.zeros(17, 32, 3, 3), torch.zeros(16, 24, 3, 3), torch.zeros(16, 32, 3),
    torch.zeros(0, 32, 3, 3), torch.zeros(16, 0, 3, 3), torch.zeros(16, 32, 3, 3, device="meta"),
    torch.zeros(16, 32, 3, 3, dtype=torch.float64),
])  # fmt: skip
def test_pack_refuses(simd, weight):
    assert not computes(weight, weight.dtype)
    with pytest.raises(ValueError, match=r"weight must be \[N, C, 3, 3\] on a CPU, N a multiple of 16 and C of 16"):
        pack(weight)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: "it is not built")
    assert not suits(X, WEIGHT)
    with pytest.raises(RuntimeError, match="winograd_conv's kernel is missing: it is not built"):
        pack(WEIGHT)


class Core:
    """An extension that says it was loaded on some CPU."""

    def __init__(self, simd: str, bfloat16: str) -> None:
        self.cpu_simd, self.cpu_bfloat16 = lambda: simd, lambda: bfloat16


def test_where_it_is_taken(monkeypatch):
    def taken(channels: int, size: int, dtype: torch.dtype = torch.float32, upsample: bool = False) -> bool:
        x = torch.zeros(1, channels, size, size, dtype=dtype)
        return suits(x, torch.zeros(channels, channels, 3, 3), upsample=upsample)

    for simd, bfloat16 in (("avx512", "vector"), ("avx512", ""), ("avx2", ""), ("avx512", "matrix")):
        core = Core(simd, bfloat16)
        monkeypatch.setattr(native, "extension", lambda core=core: core)
        assert taken(64, 16)
        assert taken(64, 16, torch.float16)
        assert taken(64, 16, torch.bfloat16) == (bfloat16 != "matrix")
        assert not taken(16, 16)
        assert not taken(64, 1)
        assert not taken(64, 3)  # of its four tiles' 16 results 9 are wanted
        assert taken(64, 1, upsample=True)
    monkeypatch.setattr(native, "extension", lambda: Core("portable", ""))
    assert not taken(64, 16)


def test_packed_is_what_it_says(simd):
    packed = pack(torch.zeros(48, 32, 3, 3), upsample=True)
    assert isinstance(packed, Packed)
    assert packed.weights.shape == (2, 32, 9, 32)
    assert packed.weights.dtype == torch.float32
    assert packed[1:] == (torch.float32, 32, 48, True)
