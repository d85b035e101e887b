"""``ops.winograd_conv``'s kernel on a CPU, beside oneDNN's convolution as PyTorch calls it and with its weights packed.

The gate is the float64 convolution. Every contestant adds a bias; weights are prepared before anything is timed.
"""

import pytest
import torch
import torch.nn.functional as F
from gates import GPU

from fastdiff.ops.conv2d.phases import pack as pack_upsample
from fastdiff.ops.conv2d.phases import packed_upsample_conv
from fastdiff.ops.conv2d.winograd import pack, packed_winograd_conv, suits

# A CIFAR-10 network's at batch 8, Stable Diffusion's in two of its four sizes: images, features, doubled first.
CASES = [
    ((8, 128, 32, 32), 128, False), ((8, 256, 16, 16), 256, False), ((8, 512, 8, 8), 256, False),
    ((2, 320, 64, 64), 320, False), ((2, 1280, 16, 16), 1280, False), ((8, 256, 16, 16), 256, True),
]  # fmt: skip
PACKED = "oneDNN, weights packed"


@pytest.mark.skipif(GPU, reason="a kernel for CPUs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("image", "features", "upsample"), CASES)
def test_winograd_conv(contest, image, features, upsample, dtype):
    if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("this CPU has no instructions for it")
    x = torch.randn(image, dtype=dtype).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(features, image[1], 3, 3) / (9 * image[1]) ** 0.5
    bias, narrow = torch.randn(features), weight.to(dtype).contiguous(memory_format=torch.channels_last)
    if not suits(x, weight, upsample=upsample):
        pytest.skip("accelerate takes the library's here")
    packed, offset = pack(weight, upsample=upsample, dtype=dtype), bias.to(dtype)
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def eager():
        large = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
        return F.conv2d(large, narrow, offset, padding=1)

    calls = {"fastdiff": lambda: packed_winograd_conv(x, packed, bias), "PyTorch": eager}
    if upsample:
        summed = pack_upsample(weight, image, dtype)
        calls["oneDNN's transposed convolution, weights packed"] = lambda: packed_upsample_conv(x, summed, offset)
    else:
        blocked = torch.ops.mkldnn._reorder_convolution_weight(narrow, *geometry, list(image))
        calls[PACKED] = lambda: torch.ops.mkldnn._convolution_pointwise(x, blocked, offset, *geometry, "none", [], "")
    wide = F.interpolate(x.double(), scale_factor=2.0, mode="nearest") if upsample else x.double()
    exact = F.conv2d(wide, weight.double(), bias.double(), padding=1)
    with torch.no_grad():
        for name, call in calls.items():
            error = float((call().double() - exact).abs().max() / exact.abs().max())
            assert error <= (1e-5 if dtype == torch.float32 else 0.02), f"{name} is off by {error:.3g} of the largest"
        contest(
            "winograd_conv",
            f"{str(dtype).removeprefix('torch.')}, {features} features{', doubled' if upsample else ''}",
            calls,
            shape=image,
            flops=18 * exact.numel() * image[1],
        )
