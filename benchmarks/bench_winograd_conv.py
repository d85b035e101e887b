"""``ops.conv2d`` by Winograd's products on a CPU, beside oneDNN's convolution as PyTorch calls it and packed.

The gate is the float64 convolution. Every contestant adds a bias; weights are prepared before anything is timed.
"""

import pytest
import torch
import torch.nn.functional as F
from gates import GPU

from fastdiff.ops.conv2d import bind
from fastdiff.ops.conv2d.choice import suits_winograd

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
    if not suits_winograd(x, weight, upsample=upsample):
        pytest.skip("accelerate takes the library's here")
    offset = bias.to(dtype)
    geometry = ([1, 1], [1, 1], [1, 1], 1)

    def eager():
        large = F.interpolate(x, scale_factor=2.0, mode="nearest") if upsample else x
        return F.conv2d(large, narrow, offset, padding=1)

    ours = bind(x, weight, bias, padding=1, upsample=upsample)
    calls = {"fastdiff": lambda: ours(x), "PyTorch": eager}
    if upsample:
        transposed = bind(x, weight, offset, padding=1, upsample=True, backend="torch")
        calls["oneDNN's transposed convolution, weights packed"] = lambda: transposed(x)
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
