"""The convolutional blocks of a UNet and an autoencoder, ours and diffusers', with few passes over memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.convolutions import Conv, Joint, Packed, PackedUpsample
from fastdiff.acceleration.layers import GroupNorm
from fastdiff.acceleration.module import Context, Fast, Made, fast_of, hooked


class Resnet(Fast):
    """GroupNorm, SiLU, convolution, twice; the time embedding and the first bias enter with the second norm.

    A skip connection comes as a second tensor and is not copied beside the first.
    """

    does = "GroupNorm and SiLU in one pass that adds the embedding and reads the skip; residual summed as it is stored"

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__(module, context)
        m = self.module
        self.number = None if m.time_emb_proj is None else self.conditioning.add(m)
        self.shortcuts = [Packed(self.conditioning) for _ in range(2)]
        self.joint = Joint()
        self.halves: Made[tuple[Tensor, Tensor]] = Made()

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        m = module
        if type(m.nonlinearity) is not nn.SiLU:
            return f"its activation is {type(m.nonlinearity).__name__}"
        plain = getattr(m, "time_embedding_norm", "default") == "default" or m.time_emb_proj is None
        if not plain or getattr(m, "skip_time_act", False):
            return "its time embedding scales, too"
        if getattr(m, "upsample", None) is not None or getattr(m, "downsample", None) is not None:
            return "it changes the resolution"
        if any(fast_of(n, GroupNorm) is None for n in (m.norm1, m.norm2)):
            return "its norms are not GroupNorm"
        if any(fast_of(c, Conv) is None for c in (m.conv1, m.conv2, m.conv_shortcut) if c is not None):
            return "its convolutions are not Conv2d"
        if m.conv_shortcut is not None and not _pointwise(m.conv_shortcut):
            return "its shortcut is no 1x1 convolution"
        if m.time_emb_proj is not None and type(m.time_emb_proj) is not nn.Linear:
            return "its time projection is no Linear"
        parts = (m.norm1, m.conv1, m.time_emb_proj, m.norm2, m.dropout, m.conv2, m.nonlinearity, m.conv_shortcut)
        return "a layer in it has hooks" if hooked(*(p for p in parts if p is not None)) else None

    def run(self, x: Tensor, temb: Tensor | None = None, *_: Any, skip: Tensor | None = None, **__: Any) -> Tensor:
        m = self.module
        if (temb is None) is not (self.number is None):
            x = x if skip is None else torch.cat([x, skip], dim=1)
            return self.original(x, temb)
        norm1, norm2 = m.norm1.forward, m.norm2.forward
        h = m.conv1.forward.fused(norm1.fused(x, x2=skip), bias=False)
        add = m.conv1.bias
        if self.number is not None:
            assert temb is not None
            add = self.conditioning(temb, self.number)
        h = norm2.fused(h, add=add)
        y = self.second(h, x.to(self.dtype), skip)
        factor = m.output_scale_factor
        return y if factor == 1 else y / factor

    def second(self, h: Tensor, x: Tensor, skip: Tensor | None) -> Tensor:
        """The second convolution and the shortcut, summed."""
        m = self.module
        inputs = (x,) if skip is None else (x, skip)
        usual = m.conv_shortcut is not None and (m.conv2.stride, m.conv2.padding) == ((1, 1), (1, 1))
        if not usual or not self.joint.suits(h, m.conv2.weight, inputs=inputs):
            return m.conv2.forward.fused(h, residual=self.shortcut(x, skip))
        pointwise = (m.conv_shortcut.weight,) if skip is None else self.split(x, skip)
        biases = (m.conv2.bias, m.conv_shortcut.bias)
        return self.joint(h, m.conv2.weight, biases, self.conditioning.counters(h.device), inputs, pointwise)

    def split(self, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """The shortcut's weights for x and for the skip connection."""
        weight = self.module.conv_shortcut.weight
        return self.halves.get(
            [weight],
            lambda: tuple(w.contiguous() for w in weight.detach().split([x.shape[1], skip.shape[1]], 1)),
        )

    def shortcut(self, x: Tensor, skip: Tensor | None) -> Tensor:
        conv = self.module.conv_shortcut
        if conv is None:
            return x if skip is None else torch.cat([x, skip], dim=1)
        if skip is None:
            return conv.forward.fused(x)
        first, second = self.split(x, skip)
        return self.shortcuts[1](skip, second, None, self.shortcuts[0](x, first, conv.bias))


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class Up(Fast):
    """Residual blocks that each read x and a skip connection, which are not copied side by side; then up-sampling."""

    does = "skip connections read where they are"

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        if any(fast_of(resnet, Resnet) is None for resnet in module.resnets):
            return "its residual blocks are not all known"
        return None

    def run(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        m = self.module
        for resnet, attention, skip in zip(m.resnets, m.attentions, skips, strict=True):
            x = attention(resnet(x, temb, skip=skip))
        for upsample in m.upsamplers:
            x = upsample(x)
        return x


class DiffusersUp(Up):
    """The same for diffusers' up blocks, whose skips come last first."""

    def run(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        **masks: Any,
    ) -> Tensor:
        m, x = self.module, hidden_states
        more: dict[str, Any] = {}
        if type(m).__name__ == "CrossAttnUpBlock2D":
            more = {"encoder_hidden_states": encoder_hidden_states, "cross_attention_kwargs": cross_attention_kwargs}
            more |= {**masks, "return_dict": False}
        if all(getattr(m, name, None) for name in ("s1", "s2", "b1", "b2")):  # FreeU rescales x and the skips
            more = {k: v for k, v in more.items() if k != "return_dict"}
            return self.original(x, res_hidden_states_tuple, temb, upsample_size=upsample_size, **more)
        attentions = getattr(m, "attentions", [None] * len(m.resnets))
        for resnet, attention, skip in zip(m.resnets, attentions, reversed(res_hidden_states_tuple), strict=True):
            x = resnet(x, temb, skip=skip)
            if attention is not None:
                x = attention(x, **more)[0] if more else attention(x)
        for upsample in m.upsamplers or ():
            x = upsample(x, temb=temb) if getattr(m, "upsample_type", None) == "resnet" else upsample(x, upsample_size)
        return x


class Upsample(Fast):
    """Nearest-neighbour doubling and a 3x3 convolution on the small grid, where there is a kernel for that."""

    does = "the doubled image is not made: 4/9 of the multiplications, or 1/4 by Winograd's"

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__(module, context)
        self.packed = PackedUpsample(self.conditioning)

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        m = module
        if getattr(m, "norm", None) is not None or getattr(m, "use_conv_transpose", False):
            return "it has a norm or a transposed convolution"
        if not getattr(m, "use_conv", True) or not getattr(m, "interpolate", True):
            return "it has no convolution, or no interpolation"
        conv: Any = getattr(m, "conv", None)
        if fast_of(conv, Conv) is None or (conv.kernel_size, conv.padding, conv.groups) != ((3, 3), (1, 1), 1):
            return "its convolution is not a plain 3x3 one"
        if (conv.stride, conv.dilation) != ((1, 1), (1, 1)):
            return "its convolution is not a plain 3x3 one"
        return "a layer in it has hooks" if hooked(conv) else None

    def run(self, x: Tensor, output_size: Any = None, *_: Any, **__: Any) -> Tensor:
        if output_size is not None and tuple(output_size) != tuple(2 * size for size in x.shape[2:]):
            return self.original(x, output_size)
        conv = self.module.conv
        x = x.to(self.dtype)
        return self.packed(x, conv.weight, conv.bias)


class Downsample(Fast):
    """A convolution of stride 2, whose zeros at the right and the bottom are not stored where ``ops.conv`` serves."""

    does = "no padded copy"

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__(module, context)
        self.joint = Joint(2, (0, 1) if module.padding == 0 else (1, 1))

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        m = module
        if getattr(m, "norm", None) is not None or not getattr(m, "use_conv", True) or m.padding not in (0, 1):
            return "it has a norm, no convolution or another padding"
        conv: Any = m.conv
        if fast_of(conv, Conv) is None or (conv.kernel_size, conv.stride) != ((3, 3), (2, 2)):
            return "its convolution is not a plain 3x3 one"
        if (conv.dilation, conv.groups) != ((1, 1), 1):
            return "its convolution is not a plain 3x3 one"
        return "a layer in it has hooks" if hooked(conv) else None

    def run(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        conv, x = self.module.conv, x.to(self.dtype)
        if args or kwargs or not self.joint.suits(x, conv.weight):
            return self.original(x, *args, **kwargs)
        return self.joint(x, conv.weight, (conv.bias,), self.conditioning.counters(x.device))
