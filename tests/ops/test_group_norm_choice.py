"""Which group normalisations the CUDA kernel takes, its blocks, and what serves the others. No GPU is needed."""

from __future__ import annotations

import pytest
import torch
from group_norm_native_cases import image
from group_norm_terms import textbook

from fastdiff.ops import backend as backends
from fastdiff.ops.group_norm_silu import KERNELS, group_norm_silu, native_impl, triton_impl
from fastdiff.ops.group_norm_silu import _compute as compute

_C = pytest.importorskip("fastdiff._C", reason="the extension is not built")


def plan(x, groups, *, x2=None, add=None, weight=None, block=(0, 0, 0)):
    channels = x.shape[1] + (0 if x2 is None else x2.shape[1])
    out = torch.empty(len(x), channels, *x.shape[2:], dtype=x.dtype).contiguous(memory_format=torch.channels_last)
    params = native_impl.parameters(out, x, x2, add, weight, None, groups, 1e-5, True, True)
    params.block_groups, params.block_warps, params.thread_vecs = block
    return _C.group_norm_silu_plan(params)


# channels, groups, side: groups a block, warps, vectors a thread. Chunks of a whole sector, at least four warps.
@pytest.mark.parametrize(
    ("channels", "groups", "side", "expected"),
    [
        (256, 32, 32, (2, 8, 8)), (128, 32, 32, (4, 8, 8)), (384, 32, 16, (4, 7, 8)), (512, 32, 32, (1, 8, 8)),
        (256, 32, 16, (2, 4, 4)), (256, 32, 8, (2, 4, 1)), (320, 32, 16, (8, 11, 8)), (640, 32, 32, (2, 22, 8)),
        (256, 32, 4, (2, 1, 1)), (40, 4, 3, (4, 2, 1)), (8, 1, 4, (1, 1, 1)),
    ],
)  # fmt: skip
def test_blocks(channels, groups, side, expected):
    assert plan(image(1, channels, (side, side), torch.bfloat16, "cpu"), groups) == expected


def test_the_batch_does_not_change_the_block():
    assert len({plan(image(b, 64, (8, 8), torch.float16, "cpu"), 8) for b in (1, 2, 16)}) == 1


def test_forced_blocks():
    x = image(1, 256, (32, 32), torch.bfloat16, "cpu")
    assert plan(x, 32, block=(4, 16, 8)) == (4, 16, 8)
    assert plan(x, 32, block=(2, 0, 4)) == (2, 16, 4)
    assert plan(x, 32, block=(1, 8, 0)) == (1, 8, 4)
    assert "too large" in plan(x, 32, block=(32, 0, 0))
    assert "vecs must" in plan(x, 32, block=(2, 0, 3))


def test_refusals():
    x = image(2, 64, (8, 8), torch.bfloat16, "cpu")
    wide = image(2, 80, (8, 8), torch.bfloat16, "cpu")
    odd = image(2, 68, (8, 8), torch.bfloat16, "cpu")
    params = native_impl.parameters(x.contiguous(), x.contiguous(), None, None, None, None, 8, 1e-5, True, False)
    assert "channels_last" in _C.group_norm_silu_plan(params)
    assert "begin at" in plan(wide[:, 1:65], 8)
    assert isinstance(plan(wide[:, 8:72], 8), tuple)
    assert "apart" in plan(odd[:, :64], 8)
    wider = image(2, 72, (8, 8), torch.bfloat16, "cpu")
    assert "x's channels" in plan(x[:, :60], 2, x2=wider[:, :68])
    assert "odd number" in plan(image(1, 40, (4, 4), torch.bfloat16, "cpu"), 8)
    assert "too large" in plan(image(1, 32, (128, 128), torch.bfloat16, "cpu"), 2)
    assert "512 bytes" in plan(image(1, 512, (2, 2), torch.float32, "cpu"), 2)
    assert "weight" in plan(x, 8, weight=torch.zeros(65)[1:])
    assert "add" in plan(x, 8, add=torch.zeros(2, 66)[:, :64])


def call(backend, x):
    return compute(x, None, None, None, None, 2, 1e-5, True, backend)


def test_what_serves_instead(monkeypatch):
    x = image(2, 8, (4, 4), torch.float32, "cpu")
    expected = textbook(x, None, None, 2).float()
    monkeypatch.setattr(native_impl, "refusal", lambda params, device: "of the weather")
    with pytest.raises(RuntimeError, match="of the weather"):
        call("native", x)
    with pytest.raises(RuntimeError, match="of the weather"):
        group_norm_silu(x, None, None, 2, backend="native")
    torch.testing.assert_close(call("auto", x), expected)  # the reference: there is no Triton for the CPU
    ran = []
    monkeypatch.setattr(triton_impl, "group_norm_silu", lambda out, *rest: ran.append(out))
    monkeypatch.setattr("fastdiff.ops.backend.triton_support.why_missing", lambda device: None)
    rules = backends.table("group_norm_silu")["gpu"]
    monkeypatch.setattr(backends, "table", lambda op: {"cpu": rules})
    out = call("auto", x)
    assert ran[0] is out
    monkeypatch.setenv("FASTDIFF_BACKEND", "native")
    group_norm_silu(x, None, None, 2)
    assert len(ran) == 2


@pytest.mark.parametrize(
    ("channels", "side", "dtype", "slower"),
    [(256, 32, torch.bfloat16, False), (512, 32, torch.bfloat16, False), (256, 16, torch.bfloat16, False),
     (512, 16, torch.bfloat16, True), (256, 16, torch.float32, True), (256, 8, torch.bfloat16, True)],
)  # fmt: skip
def test_which_is_faster(monkeypatch, channels, side, dtype, slower):
    """Triton for small groups and for those that fill sectors, in every batch alike; a CPU has no choice."""
    monkeypatch.setattr(backends, "why_missing", lambda *_: None)
    monkeypatch.setattr(backends, "chip_of", lambda device: "sm_90")
    facts = {"pixels": side * side, "bytes": channels // 32 * dtype.itemsize}
    for device, name in (("cuda", "triton" if slower else "native"), ("cpu", "native")):
        assert backends.select("group_norm_silu", "auto", torch.device(device), facts, KERNELS) == name
