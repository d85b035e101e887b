"""A convolution with all that a residual block adds to it, for weights that stay the same: one kernel on a GPU.

    y = conv2d(x, weight, bias) + Σ conv2d(inputs[i], pointwise[i]) + residual

``conv`` says what is computed, in PyTorch and with gradients. ``pack`` lays weights out once for ``packed_conv``, which
triton_impl.py computes; ``suits`` says where that was faster than the library's convolution and a pass after it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastdiff.ops import triton_support
from fastdiff.ops.conv2d.geometry import Geometry
from fastdiff.ops.conv2d.phases import presum
from fastdiff.ops.packed import bias_of

FEW = 1 << 21  # numbers of an output, up to which the library's kernels do not fill a large GPU
STEP = 64  # channels that the kernel multiplies at a time


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    upsample: bool = False,
    inputs: Sequence[Tensor] = (),
    pointwise: Sequence[Tensor] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """conv2d(x, weight, bias) + Σ conv2d(inputs[i], pointwise[i]) + residual, by PyTorch's operations.

    Args:
        x: [B, C, H, W], doubled first by its nearest neighbours if ``upsample``.
        weight: [N, C, 1, 1] or [N, C, 3, 3].
        bias: [N] or None.
        stride: of the window, 1 or 2.
        padding: rows and columns of zeros (before, after); None keeps the size where the stride is 1.
        inputs, pointwise: images of the result's height and width, and weights [N, Ci, 1, 1].
        residual: [B, N, H', W'] or None.
    """
    low, high = _padding(weight, padding)
    if upsample:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    if low == high:
        y = F.conv2d(x, weight, bias, stride, low)
    else:
        y = F.conv2d(F.pad(x, (low, high, low, high)), weight, bias, stride)
    for image, w in zip(inputs, pointwise, strict=True):
        y = y + F.conv2d(image, w)
    return y if residual is None else y + residual


class Packed(NamedTuple):
    """Weights as ``pack`` leaves them, and what they belong to."""

    weights: Tensor  # [phases, N, K]
    channels: tuple[int, ...]  # of x and of the pointwise inputs
    side: int  # of the window on x
    stride: int
    padding: tuple[int, int]
    upsample: bool


def pack(
    weight: Tensor,
    pointwise: Sequence[Tensor] = (),
    *,
    stride: int = 1,
    padding: tuple[int, int] | None = None,
    upsample: bool = False,
    dtype: torch.dtype | None = None,
) -> Packed:
    """The weights of ``conv``, without gradients, in ``dtype`` (their own where None) and the kernel's order.

    Of an ``upsample`` they are four windows of 2×2 on the small grid (ops.upsample_conv), summed in float32.

    Raises:
        ValueError: for weights, a stride or a padding that the kernel does not compute.
    """
    _check_weights(weight, pointwise, stride, upsample)
    dtype = weight.dtype if dtype is None else dtype
    low, high = _padding(weight, padding)
    if upsample:
        summed = presum(weight.detach().float())  # [C, N, 4, 4]
        taps = ((3, 1), (2, 0))
        windows = [summed[:, :, taps[a]][:, :, :, taps[b]] for a in (0, 1) for b in (0, 1)]
        main = torch.stack([w.permute(1, 2, 3, 0).flatten(1) for w in windows])
    else:
        main = weight.detach().permute(0, 2, 3, 1).flatten(1)[None]
    points = [w.detach().flatten(1)[None] for w in pointwise]
    weights = torch.cat([w.to(dtype) for w in (main, *points)], 2).contiguous()
    channels = (weight.shape[1], *(w.shape[1] for w in pointwise))
    return Packed(weights, channels, 2 if upsample else weight.shape[2], stride, (low, high), upsample)


def packed_conv(
    x: Tensor,
    packed: Packed,
    bias: Tensor | None = None,
    *,
    inputs: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    counters: Tensor | None = None,
) -> Tensor:
    """``conv`` by one kernel, without gradients; sums in float32, rounded once.

    Args:
        x, inputs, residual: images of the packed weights' dtype.
        bias: [N] of float32 or that dtype.
        counters: int32 zeros on x's device, which calls that follow one another on a stream may share; None makes some.

    Returns:
        [B, N, H', W'], channels_last.

    Raises:
        TypeError, ValueError: for what does not fit the packed weights.
        RuntimeError: gradients are wanted, or Triton cannot serve the device.
    """
    weights, channels, side, stride, (low, high), up = packed
    images = (x, *inputs)
    if len(images) != len(channels):
        raise ValueError(f"these weights are for {len(channels) - 1} pointwise inputs; got {len(inputs)}")
    for i, (image, c) in enumerate(zip(images, channels, strict=True)):
        name = f"inputs[{i - 1}]" if i else "x"
        if not isinstance(image, Tensor) or image.ndim != 4 or image.shape[1] != c or image.shape[0] != x.shape[0]:
            got = list(image.shape) if isinstance(image, Tensor) else type(image).__name__
            raise ValueError(f"{name} must be an image [{x.shape[0]}, {c}, H, W]; got {got}")
        if image.dtype != weights.dtype or image.device != weights.device:
            raise TypeError(f"{name} must be {weights.dtype} on {weights.device}; got {image.dtype} on {image.device}")
    reason = triton_support.why_missing(x.device.type)
    if reason is not None:
        raise RuntimeError(f"packed_conv cannot serve {x.device.type} tensors: {reason}")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (*images, bias, residual)):
        raise RuntimeError("packed_conv has no gradients: call conv, or use torch.no_grad()")
    size = [2 * n if up else (n + low + high - side) // stride + 1 for n in x.shape[2:]]
    shape = (x.shape[0], weights.shape[1], *size)
    for name, image in [(f"inputs[{i}]", image) for i, image in enumerate(inputs)]:
        if list(image.shape[2:]) != size:
            raise ValueError(f"{name} must be of the result's size {size}; got {list(image.shape[2:])}")
    for name, tensor in (("bias", bias), ("residual", residual), ("counters", counters)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} must be on x's device {x.device}; got {tensor.device}")
    if counters is not None and counters.dtype != torch.int32:
        raise TypeError(f"counters must be int32; got {counters.dtype}")
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise ValueError(f"residual must be {x.dtype} {list(shape)}; got {residual.dtype} {list(residual.shape)}")
    if bias is not None and (bias.shape != shape[1:2] or bias.dtype not in (torch.float32, x.dtype)):
        raise ValueError(f"bias must be [{shape[1]}] of float32 or {x.dtype}; got {bias.dtype} {list(bias.shape)}")
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    if out.numel() == 0:
        return out
    from fastdiff.ops.conv2d import gemm_triton

    x, *others = map(_aligned, images)
    residual = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
    bias = None if bias is None else bias.contiguous()
    gemm_triton.conv(out, x, tuple(others), weights, bias, residual, side, stride, low, up, counters)
    return out


def bind(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, inputs: Sequence[Tensor],
    pointwise: Sequence[Tensor], residual: Tensor | None, packed: dict[Any, Any],
) -> Callable[..., Tensor]:  # fmt: skip
    """call(x, residual=None, inputs=()) for images of these layouts; arguments as for ``conv2d.bind``."""
    stride, (low, high), upsample = geometry.stride[0], geometry.padding[0], geometry.upsample
    key = "gemm", x.dtype, stride, low, high, upsample, len(pointwise)
    if key not in packed:
        packed[key] = pack(
            weight, pointwise, stride=stride, padding=(low, high), upsample=upsample, dtype=x.dtype
        ).weights
    weights, side = packed[key], 2 if upsample else weight.shape[2]
    offset = bias_of(packed, bias, torch.float32)
    shape = (x.shape[0], len(weight), *geometry.size(x, weight))
    dtype, device = x.dtype, x.device

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        from fastdiff.ops.conv2d import gemm_triton

        out = torch.empty(shape, dtype=dtype, device=device, memory_format=torch.channels_last)
        other = None if residual is None else residual.contiguous(memory_format=torch.channels_last)
        images = tuple(map(_aligned, inputs))
        counters = gemm_triton.counters(device)
        gemm_triton.conv(out, _aligned(x), images, weights, offset, other, side, stride, low, upsample, counters)
        return out

    return call


def _aligned(image: Tensor) -> Tensor:
    """A dense channels_last image whose pixels can be read 16 bytes at a time: itself, or a copy."""
    image = image.contiguous(memory_format=torch.channels_last)
    return image if image.data_ptr() % 16 == 0 else image.clone()


def computes(weight: Tensor, stride: int = 1, upsample: bool = False) -> bool:
    """Whether the kernel computes a convolution with such weights."""
    try:
        _check_weights(weight, (), stride, upsample)
    except ValueError:
        return False
    return True


def suits(
    x: Tensor,
    weight: Tensor,
    *,
    inputs: Sequence[Tensor] = (),
    residual: bool = False,
    stride: int = 1,
    upsample: bool = False,
) -> bool:
    """Whether ``packed_conv`` was faster for such images than the library's convolution and a pass after it.

    Measured on an H100 with torch 2.11, cuDNN 9.19 and triton 3.6; other chips, and float32, take the library's. The
    kernel's share is what the library is slow at: outputs of few tiles, windows that step or grow, sums of several
    convolutions, and a residual, which would take another pass.
    """
    if not x.is_cuda or x.dtype == torch.float32 or triton_support.why_missing("cuda") is not None:
        return False
    if torch.version.hip or torch.cuda.get_device_capability(x.device) != (9, 0):
        return False
    if weight.ndim != 4 or any(t.shape[1] % STEP for t in inputs) or not computes(weight, stride, upsample):
        return False
    pixels = x.shape[0] * x.shape[2] * x.shape[3] // stride**2
    return pixels * len(weight) <= FEW or bool(inputs) or residual or stride == 2 or upsample


def _padding(weight: Tensor, padding: tuple[int, int] | None) -> tuple[int, int]:
    return (weight.shape[2] // 2,) * 2 if padding is None else padding


def _check_weights(weight: Tensor, pointwise: Sequence[Tensor], stride: int, upsample: bool) -> None:
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)) or weight.shape[1] % STEP or not len(weight):
        raise ValueError(
            f"weight must be [N, C, 3, 3] or [N, C, 1, 1], C a multiple of {STEP}; got {list(weight.shape)}"
        )
    if stride not in (1, 2) or (upsample and (stride != 1 or weight.shape[2] != 3 or pointwise)):
        raise ValueError(f"stride must be 1 or 2, and 1 for an up-sampling 3×3 window alone; got {stride}")
    if len(pointwise) > 2:
        raise ValueError(f"there may be two pointwise inputs; got {len(pointwise)}")
    for w in pointwise:
        if w.ndim != 4 or w.shape[2:] != (1, 1) or w.shape[1] % STEP or len(w) != len(weight):
            raise ValueError(
                f"pointwise weights must be [{len(weight)}, C, 1, 1], C a multiple of {STEP}; got {list(w.shape)}"
            )
