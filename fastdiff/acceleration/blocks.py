"""The convolutional blocks of a UNet and an autoencoder, ours and diffusers', with few passes over memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.layers import LIBRARY, Conv, GroupNorm
from fastdiff.acceleration.module import ADDRESS, StandIn, hooked, stand_in_of, unusual, wide

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Network


class Block(StandIn):
    """A block whose result has the network's dtype, or, amid code that is not known, its input's."""

    def result(self, y: Tensor, x: Tensor) -> Tensor:
        return y if self.network.whole or y.dtype == x.dtype else y.to(x.dtype)


class Resnet(Block):
    """GroupNorm, SiLU, convolution, twice; the time embedding and the first bias enter with the second norm.

    A skip connection comes as a second tensor and is not copied beside the first.
    """

    summary = "GroupNorm and SiLU in one pass that adds the embedding and reads the skip; residual summed as stored"
    of_batch = LIBRARY
    reads = ("output_scale_factor", "time_embedding_norm", "skip_time_act", "upsample", "downsample")
    number: int  # among the network's blocks that take the time embedding

    def __init__(self, module: nn.Module, network: Network) -> None:
        super().__init__(module, network)
        self.timed = module.time_emb_proj is not None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        m = module
        if type(m.nonlinearity) is not nn.SiLU or m.nonlinearity.inplace:  # which would change the embedding, too
            return f"its activation is {m.nonlinearity}"
        plain = getattr(m, "time_embedding_norm", "default") == "default" or m.time_emb_proj is None
        if not plain or getattr(m, "skip_time_act", False):
            return "its time embedding scales, too"
        if getattr(m, "upsample", None) is not None or getattr(m, "downsample", None) is not None:
            return "it changes the resolution"
        parts = (m.norm1, m.conv1, m.time_emb_proj, m.norm2, m.dropout, m.conv2, m.nonlinearity, m.conv_shortcut)
        reason = unusual(*(p for p in parts if p is not None))
        if reason is not None:
            return reason
        if any(stand_in_of(n, GroupNorm) is None for n in (m.norm1, m.norm2)):
            return "its norms are not GroupNorm"
        if any(stand_in_of(c, Conv) is None for c in (m.conv1, m.conv2, m.conv_shortcut) if c is not None):
            return "its convolutions are not Conv2d"
        if m.conv_shortcut is not None and not _pointwise(m.conv_shortcut):
            return "its shortcut is no 1x1 convolution"
        if m.time_emb_proj is not None and type(m.time_emb_proj) is not nn.Linear:
            return "its time projection is no Linear"
        if type(m.dropout) is not nn.Dropout or m.dropout.training:  # p may change later
            return "its dropout is at work"
        return None

    def run(self, x: Tensor, temb: Tensor | None = None, skip: Tensor | None = None) -> Tensor:
        if (temb is not None) is not self.timed:
            return self.own((x if skip is None else torch.cat([x, skip], dim=1), temb), {})
        network, given = self.network, x
        add = None
        if temb is not None:
            add = network.embeddings.added(temb, self.number)
        if x.dtype != network.dtype:
            x = self.taken(x)
        if skip is not None and skip.dtype != network.dtype:
            skip = self.taken(skip)
        layout = None if skip is None else (skip.shape, skip.stride())
        key = x.shape, x.stride(), layout, None if add is None else (len(add), add.stride(0))
        return self.result(self.computed(key, self.bind, x, skip, add), given)

    def bind(self, x: Tensor, skip: Tensor | None, add: Tensor | None) -> tuple[Any, Tensor]:
        """The block for tensors like these, and its result for them, from which each layer's layout is seen."""
        m = self.module
        norm1 = m.norm1.forward.bind(x, skip)
        h = norm1(x, skip, None)
        first = m.conv1.forward.bind(h, **({} if add is None else {"bias": None}))
        h = first(h)
        norm2 = m.norm2.forward.bind(h, add=add)
        h = norm2(h, None, add)
        scale = 1.0 / m.output_scale_factor
        shortcut = m.conv_shortcut
        if shortcut is None:
            second = m.conv2.forward.bind(h, x if skip is None else torch.cat([x, skip], dim=1))
        else:
            # W [x, skip] is W₁ x + W₂ skip: the two are never copied side by side.
            inputs = (x,) if skip is None else (x, skip)
            weights, bias = self._shortcut(inputs)
            # The bias is not the convolution's own, so what is packed must not be shared with calls of it by itself.
            store = self.store(h).setdefault(("second", len(inputs)), {})
            second = m.conv2.forward.bind(h, bias=bias, inputs=inputs, pointwise=weights, packed=store)

        def finish(h: Tensor, x: Tensor, skip: Tensor | None) -> Tensor:
            if shortcut is None:
                y = second(h, x if skip is None else torch.cat([x, skip], dim=1))
            else:
                y = second(h, None, (x,) if skip is None else (x, skip))
            return y if scale == 1 else y * scale

        def call(x: Tensor, skip: Tensor | None, add: Tensor | None) -> Tensor:
            return finish(norm2(first(norm1(x, skip, None)), None, add), x, skip)

        return call, finish(h, x, skip)

    def _shortcut(self, inputs: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """The shortcut's weights for each of its inputs, and the sum of its bias and the second convolution's."""
        m, store = self.module, self.store(inputs[0])
        key = "shortcut", tuple(t.shape[1] for t in inputs)  # a caller may also give x and skip as one
        if key not in store:
            biases = [b.detach().float() for b in (m.conv2.bias, m.conv_shortcut.bias) if b is not None]
            bias = torch.stack(biases).sum(0) if biases else None
            weight = wide(m.conv_shortcut.weight.detach(), inputs[0].dtype)
            store[key] = tuple(weight.split(list(key[1]), 1)), bias
        return store[key]


def _pointwise(conv: nn.Conv2d) -> bool:
    return conv.kernel_size == (1, 1) and conv.stride == (1, 1) and conv.padding == (0, 0) and conv.groups == 1


class Up(StandIn):
    """Residual blocks that each read x and a skip connection, which are not copied side by side; then up-sampling."""

    summary = "skip connections read where they are"
    of_batch = ""

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        if any(stand_in_of(resnet, Resnet) is None for resnet in module.resnets):
            return "its residual blocks are not all known"
        if hooked(*module.resnets):  # which would be given x without the skip connection
            return "a residual block in it has hooks"
        return None

    def look(self) -> None:
        super().look()
        self.weights, self.addresses = [], []  # its blocks look at their own
        m = self.module
        attentions = getattr(m, "attentions", None) or [None] * len(m.resnets)
        self.pairs = list(zip(m.resnets, attentions, strict=True))

    def residual(self, resnet: nn.Module, x: Tensor, temb: Tensor | None, skip: Tensor) -> Tensor:
        block: Any = resnet.forward
        if list(map(ADDRESS, block.weights)) != block.addresses:
            return block.own((torch.cat([x, skip.to(x.dtype)], dim=1), temb), {})
        return block.run(x, temb, skip)

    def run(self, x: Tensor, skips: list[Tensor], temb: Tensor) -> Tensor:
        deep = self.network.local.deep
        if deep is not None and deep.leaves_out(self.module):
            return x
        for i, ((resnet, attention), skip) in enumerate(zip(self.pairs, skips, strict=True)):
            if deep is not None and (x := deep.before(self.module, i, x)) is None:
                continue
            x = attention(self.residual(resnet, x, temb, skip))
        for upsample in self.module.upsamplers:
            x = upsample(x)
        return x


class DiffusersUp(Up):
    """The same for diffusers' up blocks without a prompt, whose skips come last first."""

    def run(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        upsample_size: Any = None,
    ) -> Tensor:
        m, x = self.module, hidden_states
        if freeu(m) or len(res_hidden_states_tuple) < len(self.pairs):
            return self.network.by_sample(self.original, (x, res_hidden_states_tuple, temb, upsample_size))
        deep = self.network.local.deep
        if deep is not None and deep.leaves_out(m):
            return x
        skips = reversed(res_hidden_states_tuple)
        for i, ((resnet, attention), skip) in enumerate(zip(self.pairs, skips, strict=False)):
            if deep is not None and (x := deep.before(m, i, x)) is None:
                continue
            x = self.residual(resnet, x, temb, skip)
            if attention is not None:
                x = attention(x)
        for upsample in m.upsamplers or ():
            x = upsample(x, temb=temb) if getattr(m, "upsample_type", None) == "resnet" else upsample(x, upsample_size)
        return x


class CrossAttentionUp(Up):
    """The same for diffusers' CrossAttnUpBlock2D."""

    def run(  # type: ignore[override]
        self,
        hidden_states: Tensor,
        res_hidden_states_tuple: tuple[Tensor, ...],
        temb: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        upsample_size: Any = None,
        attention_mask: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
    ) -> Tensor:
        m, x = self.module, hidden_states
        if freeu(m) or len(res_hidden_states_tuple) < len(self.pairs):
            rest = encoder_hidden_states, cross_attention_kwargs, upsample_size, attention_mask, encoder_attention_mask
            return self.network.by_sample(self.original, (x, res_hidden_states_tuple, temb, *rest))
        deep = self.network.local.deep
        if deep is not None and deep.leaves_out(m):
            return x
        skips = reversed(res_hidden_states_tuple)
        for i, ((resnet, attention), skip) in enumerate(zip(self.pairs, skips, strict=False)):
            if deep is not None and (x := deep.before(m, i, x)) is None:
                continue
            x = self.residual(resnet, x, temb, skip)
            x = attention(
                x, encoder_hidden_states=encoder_hidden_states, cross_attention_kwargs=cross_attention_kwargs,
                attention_mask=attention_mask, encoder_attention_mask=encoder_attention_mask, return_dict=False,
            )[0]  # fmt: skip
        for upsample in m.upsamplers or ():
            x = upsample(x, upsample_size)
        return x


def freeu(module: Any) -> bool:
    """Whether FreeU rescales x and the skips of an up block."""
    return any(getattr(module, name, None) for name in ("s1", "s2", "b1", "b2"))


class Upsample(Block):
    """Nearest-neighbour doubling and a 3x3 convolution on the small grid, where there is a kernel for that."""

    summary = "the doubled image is not made: 4/9 of the multiplications, or 1/4 by Winograd's"
    of_batch = LIBRARY
    reads = ("use_conv", "use_conv_transpose", "interpolate", "norm")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        m = module
        if getattr(m, "norm", None) is not None or getattr(m, "use_conv_transpose", False):
            return "it has a norm or a transposed convolution"
        if not getattr(m, "use_conv", True) or not getattr(m, "interpolate", True):
            return "it has no convolution, or no interpolation"
        conv: Any = getattr(m, "conv", None)
        reason = unusual(conv) if isinstance(conv, nn.Module) else "its convolution has another name"
        if reason is not None:
            return reason
        if stand_in_of(conv, Conv) is None or (conv.kernel_size, conv.padding, conv.groups) != ((3, 3), (1, 1), 1):
            return "its convolution is not a plain 3x3 one"
        if (conv.stride, conv.dilation) != ((1, 1), (1, 1)):
            return "its convolution is not a plain 3x3 one"
        return None

    def run(self, x: Tensor, output_size: Any = None) -> Tensor:
        if output_size is not None and tuple(output_size) != tuple(2 * size for size in x.shape[2:]):
            return self.own((x, output_size), {})
        given = x
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        return self.result(self.computed((x.shape, x.stride()), self.bind, x), given)

    def bind(self, x: Tensor) -> Any:
        return self.module.conv.forward.bind(x, upsample=True, packed=self.store(x))


class Downsample(Block):
    """A convolution of stride 2, whose zeros at the right and the bottom are not stored where the kernel adds them."""

    summary = "no padded copy"
    of_batch = LIBRARY
    reads = ("padding", "use_conv", "norm")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        m = module
        if getattr(m, "norm", None) is not None or not getattr(m, "use_conv", True) or m.padding not in (0, 1):
            return "it has a norm, no convolution or another padding"
        conv: Any = m.conv
        reason = unusual(conv)
        if reason is not None:
            return reason
        if stand_in_of(conv, Conv) is None or (conv.kernel_size, conv.stride) != ((3, 3), (2, 2)):
            return "its convolution is not a plain 3x3 one"
        if (conv.dilation, conv.groups) != ((1, 1), 1):
            return "its convolution is not a plain 3x3 one"
        return None

    def run(self, x: Tensor) -> Tensor:
        given = x
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        return self.result(self.computed((x.shape, x.stride()), self.bind, x), given)

    def bind(self, x: Tensor) -> Any:
        padding: Any = ((0, 1), (0, 1)) if self.module.padding == 0 else 1
        return self.module.conv.forward.bind(x, padding=padding)
