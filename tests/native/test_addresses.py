"""Entries that take a call's addresses: the bits of the plain ones, from parameters that stay as they were prepared."""

from concurrent.futures import ThreadPoolExecutor
from itertools import product

import pytest
import torch
from helpers import assert_same_bits
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.conv2d.winograd import pack

B, C, N, H, W = 3, 32, 48, 6, 5


def image(channels: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(B, channels, H, W, generator=generator).contiguous(memory_format=torch.channels_last)


def group_norm_silu(module, seed: int, optional: tuple[bool, bool], **_):
    """The parameters of a call and its operands in the order of the entry; out is the last of them."""
    x, x2 = image(C, seed), image(C, seed + 1) if optional[0] else None
    add = torch.randn(B, 2 * C if optional[0] else C) if optional[1] else None
    out = torch.full((B, 2 * C if optional[0] else C, H, W), float("nan")).contiguous(memory_format=torch.channels_last)

    def planes(t: Tensor):
        return module.Planes(t.data_ptr(), t.stride(0), t.stride(1), t.stride(3))

    params = module.GroupNormSiluParams()
    params.batch, params.channels, params.pixels, params.groups, params.channels_last = B, C, H * W, 8, True
    params.x, params.out = planes(x), planes(out)
    if x2 is not None:
        params.channels2, params.x2 = C, planes(x2)
    if add is not None:
        params.add = module.Channels(add.data_ptr(), 0, add.stride(0))
    return params, [x, x2, add, out]


def conv_epilogue(module, seed: int, optional: tuple[bool, bool], **_):
    x, residual = image(C, seed), image(C, seed + 1) if optional[0] else None
    add, out = torch.randn(B, C) if optional[1] else None, torch.full_like(x, float("nan"))

    def rows(t: Tensor):
        return module.View(t.data_ptr(), 0, t.stride(0), C, C, 1)

    params = module.ConvEpilogueParams()
    params.batch, params.rows, params.length, params.channels_last, params.scale = B, H * W, C, True, 0.7
    params.x, params.out = rows(x), rows(out)
    if residual is not None:
        params.residual = rows(residual)
    if add is not None:
        params.shift, params.shift_stride = add.data_ptr(), C
    return params, [x, add, residual, out]


def winograd_conv(module, seed: int, optional: tuple[bool, bool], weights: Tensor):
    x, residual = image(C, seed), image(N, seed + 1) if optional[0] else None
    out = torch.full_like(image(N, seed), float("nan"))
    params = module.WinogradConvParams()
    params.batch, params.channels, params.height, params.width, params.features = B, C, H, W, N
    params.x, params.weights, params.out = x.data_ptr(), weights.data_ptr(), out.data_ptr()
    params.residual = native.address(residual)
    return params, [x, residual, out]


MAKERS = {"group_norm_silu": group_norm_silu, "conv_epilogue": conv_epilogue, "winograd_conv": winograd_conv}
NAMES = {
    "group_norm_silu": ("x", "x2", "add", "out"),
    "conv_epilogue": ("x", "add", "residual", "out"),
    "winograd_conv": ("x", "residual", "out"),
}


@pytest.mark.parametrize("optional", list(product((False, True), repeat=2)))
@pytest.mark.parametrize("op", MAKERS)
def test_the_bits_of_the_plain_entry(simd, seed, op, optional):
    """Four threads share one set of parameters, which keep the addresses that they were made with."""
    module = native.extension()
    weights = pack(torch.randn(N, C, 3, 3), dtype=torch.float32)
    prepared, first = MAKERS[op](module, seed, optional, weights=weights)
    calls = [MAKERS[op](module, seed + 10 * i, optional, weights=weights) for i in range(1, 9)]
    for params, _ in calls:
        getattr(module, f"{op}_cpu")(params, 2)
    expected = [operands[-1].clone() for _, operands in calls]
    at = getattr(module, f"{op}_cpu_at")

    def run(operands: list[Tensor | None]) -> None:
        operands[-1].fill_(float("nan"))
        at(prepared, 2, *(native.address(t) for t in operands))

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(run, [operands for _, operands in calls]))
    for (_, operands), y in zip(calls, expected, strict=True):
        assert_same_bits(operands[-1], y)
    assert first[-1].isnan().all()
    getattr(module, f"{op}_cpu")(prepared, 1)
    assert first[-1].isfinite().all()


@pytest.mark.parametrize("op", MAKERS)
def test_refuses_what_the_parameters_do_not_say(simd, seed, op):
    module = native.extension()
    weights = pack(torch.randn(N, C, 3, 3), dtype=torch.float32)
    for present in (False, True):
        params, operands = MAKERS[op](module, seed, (present, present), weights=weights)
        addresses = [native.address(t) for t in operands]
        for i, (name, address) in enumerate(zip(NAMES[op], addresses, strict=True)):
            wrong = [*addresses[:i], 0 if address else operands[0].data_ptr(), *addresses[i + 1 :]]
            message = f"{name} must be " + ("an address: the parameters have one; got 0" if address else "0: the param")
            with pytest.raises(ValueError, match=message):
                getattr(module, f"{op}_cpu_at")(params, 1, *wrong)
        assert operands[-1].isnan().all()
