"""Convolutions with weights packed or transformed once, by whichever kernel suits the images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.acceleration.layers import onednn
from fastdiff.acceleration.module import Context, Fast, Made
from fastdiff.ops.conv2d.gemm import pack as pack_joint
from fastdiff.ops.conv2d.gemm import packed_conv, suits
from fastdiff.ops.conv2d.phases import pack, packed_upsample_conv
from fastdiff.ops.conv2d.winograd import pack as pack_winograd
from fastdiff.ops.conv2d.winograd import packed_winograd_conv
from fastdiff.ops.conv2d.winograd import suits as suits_winograd

if TYPE_CHECKING:
    from fastdiff.acceleration.time_embedding import Conditioning


def _cast(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if tensor is None else tensor.detach().to(dtype)


class Joint:
    """``ops.conv`` with weights packed once: a convolution, pointwise ones, biases and a residual as one kernel."""

    def __init__(self, stride: int = 1, padding: tuple[int, int] | None = None, upsample: bool = False) -> None:
        self.options: Any = {"stride": stride, "padding": padding, "upsample": upsample}
        self._packed: Made[Any] = Made()
        self._bias: Made[Tensor | None] = Made()

    def suits(self, x: Tensor, weight: Tensor, **more: Any) -> bool:
        return suits(x, weight, stride=self.options["stride"], upsample=self.options["upsample"], **more)

    def __call__(
        self,
        x: Tensor,
        weight: Tensor,
        biases: tuple[Tensor | None, ...],
        counters: Tensor,
        inputs: tuple[Tensor, ...] = (),
        pointwise: tuple[Tensor, ...] = (),
        residual: Tensor | None = None,
    ) -> Tensor:
        packed = self._packed.get(
            [weight, *pointwise], lambda: pack_joint(weight, pointwise, dtype=x.dtype, **self.options)
        )
        bias = self._bias.get(biases, lambda: _sum(biases))
        return packed_conv(x, packed, bias, inputs=inputs, residual=residual, counters=counters)


def _sum(biases: tuple[Tensor | None, ...]) -> Tensor | None:
    known = [b.detach().float() for b in biases if b is not None]
    return torch.stack(known).sum(0) if known else None


class Winograd:
    """``ops.winograd_conv`` with weights transformed once: a 3×3 convolution on a CPU, bias and residual."""

    def __init__(self, upsample: bool = False) -> None:
        self.upsample = upsample
        self._packed: Made[Any] = Made()
        self._bias: Made[Tensor | None] = Made()

    def suits(self, x: Tensor, weight: Tensor) -> bool:
        return x.device.type == "cpu" and suits_winograd(x, weight, upsample=self.upsample)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        packed = self._packed.get([weight], lambda: pack_winograd(weight, upsample=self.upsample, dtype=x.dtype))
        offset = self._bias.get([bias], lambda: _cast(bias, torch.float32))
        return packed_winograd_conv(x, packed, offset, residual=residual)


class Packed:
    """A convolution's weights, kept as the kernel wants them: y = conv(x) + bias + residual, channels_last.

    On the CPU ``ops.winograd_conv`` serves where it suits (unless ``exact``); else weights are laid out in oneDNN's
    blocks once, not in every call, and the sum is taken as the result is stored. Elsewhere they are in x's dtype and
    channels_last; where ``ops.conv`` suits the images it serves, else the library's convolution does, and bias and
    residual are one pass; or its matrix product, with the bias in it, where a window is one pixel.
    """

    def __init__(
        self,
        conditioning: Conditioning,
        stride: tuple[int, ...] = (1, 1),
        padding: tuple[int, ...] = (0, 0),
        dilation: tuple[int, ...] = (1, 1),
        groups: int = 1,
        exact: bool = False,
    ) -> None:
        self.conditioning = conditioning
        self.geometry: tuple[list[int], list[int], list[int], int] = (
            list(padding),
            list(stride),
            list(dilation),
            groups,
        )
        self._blocked: Made[Tensor] = Made()
        self._plain: Made[Tensor] = Made()
        self._bias: Made[Tensor | None] = Made()
        usual = dilation == (1, 1) and groups == 1 and len(set(stride)) == len(set(padding)) == 1
        self.joint = Joint(stride[0], (padding[0],) * 2) if usual else None
        self.winograd = Winograd() if usual and not exact and (stride[0], padding[0]) == (1, 1) else None

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] in the dtype of the arithmetic; weight and bias in any."""
        x = x.contiguous(memory_format=torch.channels_last)
        padding, stride, dilation, groups = self.geometry
        if self.winograd is not None and self.winograd.suits(x, weight):
            return self.winograd(x, weight, bias, residual)
        if onednn(x):
            # Blocks for other images serve, but oneDNN may lay them out again in every call, which takes far longer.
            blocked = self._blocked.get([weight], lambda: self._block(weight.detach().to(x.dtype), x), x.shape)
            offset = self._bias.get([bias], lambda: _cast(bias, x.dtype))
            if residual is None:
                return torch.ops.mkldnn._convolution_pointwise(
                    x, blocked, offset, padding, stride, dilation, groups, "none", [], ""
                )
            residual = residual.contiguous(memory_format=torch.channels_last)
            return torch.ops.mkldnn._convolution_pointwise(
                x, residual, blocked, offset, padding, stride, dilation, groups, "add", 1.0, None, [], None
            )
        if self.joint is not None and self.joint.suits(x, weight, residual=residual is not None):
            return self.joint(x, weight, (bias,), self.conditioning.counters(x.device), residual=residual)
        plain = self._plain.get(
            [weight], lambda: weight.detach().to(x.dtype).contiguous(memory_format=torch.channels_last)
        )
        if x.is_cuda and weight.shape[2:] == (1, 1) and self.geometry == ([0, 0], [1, 1], [1, 1], 1):
            if residual is None:
                bias, offset = None, self._bias.get([bias], lambda: _cast(bias, x.dtype))
            y = F.linear(x.permute(0, 2, 3, 1), plain.flatten(1), offset if residual is None else None)
            y = y.permute(0, 3, 1, 2)
        else:
            y = F.conv2d(x, plain, None, stride, padding, dilation, groups)
        if bias is None and residual is None:
            return y
        return ops.conv_epilogue(y, bias=bias, residual=residual)

    def _block(self, weight: Tensor, x: Tensor) -> Tensor:
        return torch.ops.mkldnn._reorder_convolution_weight(weight, *self.geometry, list(x.shape))


class PackedUpsample:
    """``ops.upsample_conv`` with weights summed and laid out once; by ``ops.winograd_conv`` where that suits; on a GPU
    by ``ops.conv``, or else as two steps.

    cuDNN's transposed convolution may add in any order, so that a result would not have the same bits twice.
    """

    def __init__(self, conditioning: Conditioning) -> None:
        self.conditioning = conditioning
        self._packed: Made[Any] = Made()
        self._bias: Made[Tensor | None] = Made()
        self.joint = Joint(upsample=True)
        self.winograd = Winograd(upsample=True)
        self.large = Packed(conditioning, padding=(1, 1))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x [B, C, H, W] in the dtype of the arithmetic; weight and bias in any."""
        x = x.contiguous(memory_format=torch.channels_last)
        if self.joint.suits(x, weight):
            return self.joint(x, weight, (bias,), self.conditioning.counters(x.device))
        if x.is_cuda:
            return self.large(F.interpolate(x, scale_factor=2.0, mode="nearest"), weight, bias)
        if self.winograd.suits(x, weight):
            return self.winograd(x, weight, bias)
        packed = self._packed.get([weight], lambda: pack(weight, tuple(x.shape), x.dtype), x.shape)
        return packed_upsample_conv(x, packed, self._bias.get([bias], lambda: _cast(bias, x.dtype)))


class Conv(Fast):
    """A convolution with packed weights."""

    does = "weights packed or transformed once, channels_last"

    def __init__(self, module: nn.Conv2d, context: Context) -> None:
        super().__init__(module, context)
        padding = module.padding
        assert not isinstance(padding, str)
        m = module
        self.packed = Packed(self.conditioning, m.stride, padding, m.dilation, m.groups, exact=context.exact)

    @classmethod
    def refuses(cls, module: nn.Conv2d) -> str | None:
        if module.padding_mode != "zeros" or isinstance(module.padding, str):
            return f"padding {module.padding_mode!r}, {module.padding!r}"
        return None

    def run(self, x: Tensor) -> Tensor:
        return self.fused(x)

    def fused(self, x: Tensor, residual: Tensor | None = None, bias: bool = True) -> Tensor:
        """The convolution, with or without its bias, plus a residual."""
        m = self.module
        if x.ndim == 3:
            return self.fused(x[None], None if residual is None else residual[None], bias)[0]
        return self.packed(x.to(self.dtype), m.weight, m.bias if bias else None, residual)
