"""Attention over pixels and tokens, ours and diffusers', without copies between layouts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastdiff.acceleration.blocks import Block
from fastdiff.acceleration.layers import GroupNorm
from fastdiff.acceleration.module import is_classes_own, stand_in_of, unusual, wide
from fastdiff.ops.attention import LARGEST
from fastdiff.ops.attention import bind as bind_attention
from fastdiff.ops.conv2d import bind as bind_conv2d
from fastdiff.ops.linear import bind as bind_linear

if TYPE_CHECKING:
    from fastdiff.acceleration.network import Network

# diffusers' plain ones. By their full names: others' processors are often called the same.
PROCESSORS = tuple(f"diffusers.models.attention_processor.{name}" for name in ("AttnProcessor2_0", "AttnProcessor"))


def _linear_reason(module: Any) -> str | None:
    """Why the projections of an attention cannot be read instead of called, or None."""
    m = module
    if not isinstance(m.to_out, (nn.ModuleList, nn.Sequential)):
        return "it has no projection of its result"
    linear = (m.to_q, m.to_k, m.to_v, m.to_out[0])
    if any(type(layer) is not nn.Linear for layer in linear):
        return "its projections are not Linear"
    dropout = m.to_out[1] if len(m.to_out) > 1 else None
    if dropout is not None and (type(dropout) is not nn.Dropout or dropout.training):
        return "its dropout is at work"
    if m.to_q.out_features // m.heads > LARGEST:
        return f"its heads have more than {LARGEST} channels"
    return unusual(*linear, *(() if dropout is None else (dropout,)))


class SelfAttention(Block):
    """GroupNorm, one projection to queries, keys and values, attention, projection, residual: pixels stay in place."""

    summary = "one projection to q, k and v, no layout copies, residual summed as it is stored"
    reads = ("heads", "rescale_output_factor", "residual_connection", "scale")

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        m = module
        reason = _linear_reason(m)
        if reason is not None:
            return reason
        linear = (m.to_q, m.to_k, m.to_v)
        if len({(layer.in_features, layer.out_features) for layer in linear}) > 1:
            return "its projections differ in width"
        if m.group_norm is None or stand_in_of(m.group_norm, GroupNorm) is None:
            return "it has no GroupNorm"
        return unusual(m.group_norm)

    def run(self, x: Tensor) -> Tensor:
        given = x
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        return self.result(self.computed((x.shape, x.stride()), self.bind, x), given)

    def bind(self, x: Tensor) -> tuple[Any, Tensor]:
        """The block for tensors like x, and its result for x."""
        m, store = self.module, self.store(x)
        weight, bias = (wide(t, x.dtype) for t in _joined((m.to_q, m.to_k, m.to_v)))
        out = m.to_out[0]
        norm = m.group_norm.forward.bind(x, silu=False)
        h = norm(x, None, None)
        to_qkv = bind_conv2d(h, weight[:, :, None, None], bias, packed=store.setdefault("qkv", {}))
        heads, (batch, _, height, width) = m.heads, x.shape
        size = out.in_features // heads

        def heads_of(qkv: Tensor) -> tuple[Tensor, ...]:
            pixels = qkv.permute(0, 2, 3, 1).reshape(batch, height * width, 3, heads, size)
            return pixels.permute(2, 0, 3, 1, 4).unbind()

        def image(h: Tensor) -> Tensor:
            return h.transpose(1, 2).reshape(batch, height, width, heads * size).permute(0, 3, 1, 2)

        q, k, v = heads_of(to_qkv(h, None))
        attention = bind_attention(q, k, v)
        h = image(attention(q, k, v))
        adds, factor = getattr(m, "residual_connection", True), m.rescale_output_factor
        weight = wide(out.weight.detach(), x.dtype)[:, :, None, None]
        to_out = bind_conv2d(
            h, weight, wide(out.bias, x.dtype), residual=x if adds else None, packed=store.setdefault("out", {})
        )  # fmt: skip

        def finish(h: Tensor, x: Tensor) -> Tensor:
            y = to_out(h, x if adds else None)
            return y if factor == 1 else y / factor

        def call(x: Tensor) -> Tensor:
            return finish(image(attention(*heads_of(to_qkv(norm(x, None, None), None)))), x)

        return call, finish(h, x)


@torch.no_grad()
def _joined(linear: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    """The weights and biases of layers that read the same tensor, one below the other; packed forms alone are kept."""
    weight = torch.cat([layer.weight.detach() for layer in linear])
    if all(layer.bias is None for layer in linear):
        return weight, None
    zeros = [weight.new_zeros(layer.out_features) for layer in linear]
    return weight, torch.cat([z if m.bias is None else m.bias.detach() for m, z in zip(linear, zeros, strict=True)])


class Attention(Block):
    """diffusers' attention: over pixels with a GroupNorm, over tokens, or from tokens to a prompt.

    The keys and values of a prompt that is the same as in an earlier call are kept.
    """

    summary = "one projection to q, k and v; a prompt's keys and values kept from step to step"
    summary_alone = "one projection to q, k and v"  # a sample's prompt is a tensor of its own, made for each call
    reads = ("processor", *SelfAttention.reads, "scale_qk", "spatial_norm", "norm_q", "norm_k", "norm_cross",
             "add_k_proj", "add_q_proj", "fused_projections")  # fmt: skip
    unread = ("temb",)  # which a spatial norm alone looks at

    def __init__(self, module: nn.Module, network: Network) -> None:
        super().__init__(module, network)
        self.pixels = SelfAttention(module, network) if SelfAttention.unsupported_reason(module) is None else None

    @classmethod
    def unsupported_reason(cls, module: Any) -> str | None:
        m = module
        kind = type(m.processor)
        if f"{kind.__module__}.{kind.__qualname__}" not in PROCESSORS:
            return f"its processor is {kind.__module__}.{kind.__qualname__}"
        if not is_classes_own(kind, "__call__"):
            return "the __call__ of its processor's class was replaced"
        reason = _linear_reason(m)
        if reason is not None:
            return reason
        names = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "add_q_proj")
        unknown = [name for name in names if getattr(m, name, None) is not None and getattr(m, name) is not False]
        if unknown or not m.scale_qk:
            return f"it has {', '.join(unknown) or 'no scale'}"
        if m.scale != (m.to_q.out_features // m.heads) ** -0.5:  # which AttnProcessor reads
            return f"it has a scale of its own, {m.scale}"
        return None if m.group_norm is None else SelfAttention.unsupported_reason(m)

    def forget(self) -> None:
        # Keys and values, by the network's number for a prompt; calls that were bound before keep their own.
        self.prompts: dict[Any, Tensor] = {}
        super().forget()
        pixels = getattr(self, "pixels", None)
        if pixels is not None:
            pixels.forget()

    def look(self) -> None:
        super().look()
        widths = [getattr(layer, "in_features", None) for layer in (self.module.to_q, self.module.to_k)]
        self.crosses = widths[0] != widths[1]  # it cannot do without a prompt
        if self.pixels is not None and SelfAttention.unsupported_reason(self.module) is not None:
            self.pixels = None  # its norm was taken away

    def run(
        self, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None
    ) -> Tensor:
        m, given = self.module, x
        if x.ndim == 4 and encoder_hidden_states is None and attention_mask is None and self.pixels is not None:
            return self.pixels.run(x)
        if attention_mask is not None or x.ndim not in (3, 4) or m.group_norm is not None:
            return self.own((x, encoder_hidden_states, attention_mask), {})
        if x.ndim == 4:
            tokens = self.run(x.flatten(2).transpose(1, 2), encoder_hidden_states)
            return tokens.transpose(1, 2).unflatten(2, x.shape[2:])
        if x.dtype != self.network.dtype:
            x = self.taken(x)
        prompt = encoder_hidden_states
        key = x.shape, x.stride(), None if prompt is None else (prompt.shape, prompt.stride(), prompt.dtype)
        if prompt is None and self.crosses:
            return self.own((x,), {})  # which says that it needs a prompt
        y = self.computed(key, self.bind_self if prompt is None else self.bind_cross, x, prompt)
        if m.residual_connection:
            y = y + x
        return self.result(y if m.rescale_output_factor == 1 else y / m.rescale_output_factor, given)

    def bind_self(self, x: Tensor, prompt: None = None) -> Any:
        """Self-attention of tokens like x: call(x, None), without the residual."""
        m, store = self.module, self.store(x)
        to_qkv = bind_linear(x, *_joined((m.to_q, m.to_k, m.to_v)), packed=store.setdefault("qkv", {}))
        widths = [layer.out_features for layer in (m.to_q, m.to_k, m.to_v)]
        heads = m.heads

        def split(qkv: Tensor) -> tuple[Tensor, ...]:
            return tuple(t.unflatten(2, (heads, -1)).transpose(1, 2) for t in qkv.split(widths, dim=-1))

        q, k, v = split(to_qkv(x))
        attention = bind_attention(q, k, v)
        to_out = self.bind_out(attention(q, k, v), store)
        return lambda x, prompt: to_out(attention(*split(to_qkv(x))).transpose(1, 2).flatten(2))

    def bind_cross(self, x: Tensor, prompt: Tensor) -> Any:
        """Attention from tokens like x to a prompt like ``prompt``: call(x, prompt), without the residual."""
        m, store = self.module, self.store(x)
        dtype, heads = self.network.dtype, m.heads
        to_q = bind_linear(x, m.to_q.weight, m.to_q.bias, packed=store.setdefault("q", {}))
        to_kv = bind_linear(self.taken(prompt), *_joined((m.to_k, m.to_v)), packed=store.setdefault("kv", {}))

        def split(t: Tensor) -> Tensor:
            return t.unflatten(2, (heads, -1)).transpose(1, 2)

        prompts, network = self.prompts, self.network

        def keys_values(prompt: Tensor) -> Tensor:
            number = network.prompt_number(prompt)
            kv = prompts.get(number)
            if kv is None:
                kv = to_kv(prompt.to(dtype))
                if number is not None:
                    for old in list(prompts):
                        if old not in network.known_prompts:
                            prompts.pop(old, None)
                    prompts[number] = kv
            return kv

        q, (k, v) = split(to_q(x)), map(split, keys_values(prompt).chunk(2, dim=-1))
        attention = bind_attention(q, k, v)
        to_out = self.bind_out(attention(q, k, v), store)

        def call(x: Tensor, prompt: Tensor) -> Tensor:
            k, v = keys_values(prompt).chunk(2, dim=-1)
            return to_out(attention(split(to_q(x)), split(k), split(v)).transpose(1, 2).flatten(2))

        return call

    def bind_out(self, h: Tensor, store: dict[Any, Any]) -> Any:
        out = self.module.to_out[0]
        return bind_linear(h.transpose(1, 2).flatten(2), out.weight, out.bias, packed=store.setdefault("out", {}))
