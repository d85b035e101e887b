"""Which weights Winograd's kernel computes, how they are packed, and where an accelerated network takes it."""

import pytest
import torch

from fastdiff.ops import native
from fastdiff.ops.conv2d.choice import suits_winograd as suits
from fastdiff.ops.conv2d.winograd import computes, pack

X, WEIGHT = torch.zeros(2, 32, 4, 4), torch.zeros(16, 32, 3, 3)


@pytest.mark.parametrize("weight", [
    torch.zeros(16, 32, 1, 1), torch.zeros(17, 32, 3, 3), torch.zeros(16, 24, 3, 3), torch.zeros(16, 32, 3),
    torch.zeros(0, 32, 3, 3), torch.zeros(16, 0, 3, 3), torch.zeros(16, 32, 3, 3, device="meta"),
    torch.zeros(16, 32, 3, 3, dtype=torch.float64),
])  # fmt: skip
def test_weights_that_it_does_not_compute(simd, weight):
    assert not computes(weight, weight.dtype)


def test_without_the_extension(monkeypatch):
    monkeypatch.setattr(native, "extension", lambda: "it is not built")
    assert not suits(X, WEIGHT)


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


def test_how_weights_are_packed(simd):
    """Panels of 32 features, the last one filled with zeros."""
    weight = torch.randn(48, 32, 3, 3)
    packed = pack(weight, upsample=True, dtype=torch.float32)
    assert packed.shape == (2, 32, 9, 32)
    assert torch.equal(packed[1, 5, :, 3].view(3, 3), weight[35, 5])
    assert not packed[1, :, :, 16:].any()
