"""Attention over pixels and tokens, ours and diffusers', without copies between layouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import ops
from fastdiff.acceleration.convolutions import Packed
from fastdiff.acceleration.layers import GroupNorm, Projection
from fastdiff.acceleration.module import Context, Fast, Made, fast_of, hooked
from fastdiff.ops.attention_block import attend


class SelfAttention(Fast):
    """GroupNorm, one projection to queries, keys and values, attention, projection, residual: pixels stay in place."""

    does = "one projection to q, k and v, no layout copies, residual summed as it is stored"

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__(module, context)
        self.to_qkv, self.to_out = (Packed(self.conditioning) for _ in range(2))
        self.joined: Made[tuple[Tensor, Tensor | None]] = Made()
        self.weight: Made[Tensor] = Made()

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        m = module
        linear = (m.to_q, m.to_k, m.to_v, m.to_out[0])
        if any(type(layer) is not nn.Linear for layer in linear):
            return "its projections are not Linear"
        if len({(layer.in_features, layer.out_features) for layer in linear[:3]}) > 1:
            return "its projections differ in width"
        if fast_of(m.group_norm, GroupNorm) is None:
            return "it has no GroupNorm"
        return "a layer in it has hooks" if hooked(m.group_norm, *linear) else None

    def run(self, x: Tensor) -> Tensor:
        m = self.module
        x = x.to(self.dtype)
        h = m.group_norm.forward.fused(x, silu=False)
        linear = (m.to_q, m.to_k, m.to_v)
        weight, bias = self.joined.get(
            [p for layer in linear for p in (layer.weight, layer.bias)], lambda: _joined(linear)
        )
        h = attend(self.to_qkv(h, weight, bias), m.heads)
        out = m.to_out[0]
        weight = self.weight.get([out.weight], lambda: out.weight.detach()[:, :, None, None])
        residual = x if getattr(m, "residual_connection", True) else None
        y = self.to_out(h, weight, out.bias, residual)
        factor = m.rescale_output_factor
        return y if factor == 1 else y / factor


def _joined(linear: tuple[nn.Linear, ...]) -> tuple[Tensor, Tensor | None]:
    weight = torch.cat([layer.weight.detach() for layer in linear])[:, :, None, None]
    if all(layer.bias is None for layer in linear):
        return weight, None
    zeros = weight.new_zeros(linear[0].out_features)
    return weight, torch.cat([zeros if layer.bias is None else layer.bias.detach() for layer in linear])


class Attention(Fast):
    """diffusers' attention: over pixels with a GroupNorm, over tokens, or from tokens to a prompt.

    The keys and values of a prompt that is the same tensor as in the last call are kept.
    """

    does = "one projection to q, k and v; a prompt's keys and values kept from step to step"
    processors = ("AttnProcessor2_0", "AttnProcessor")

    def __init__(self, module: nn.Module, context: Context) -> None:
        super().__init__(module, context)
        self.pixels = SelfAttention(module, context) if SelfAttention.refuses(module) is None else None
        self.to_qkv, self.to_q, self.to_kv, self.to_out = (Projection() for _ in range(4))
        self.prompt: Made[Tensor] = Made()

    @classmethod
    def refuses(cls, module: Any) -> str | None:
        m = module
        if type(m.processor).__name__ not in cls.processors:
            return f"its processor is {type(m.processor).__name__}"
        linear = (m.to_q, m.to_k, m.to_v, m.to_out[0])
        if any(type(layer) is not nn.Linear for layer in linear):
            return "its projections are not Linear"
        names = ("spatial_norm", "norm_q", "norm_k", "norm_cross", "add_k_proj", "add_q_proj")
        unknown = [name for name in names if getattr(m, name, None) is not None and getattr(m, name) is not False]
        if unknown or not m.scale_qk:
            return f"it has {', '.join(unknown) or 'no scale'}"
        if m.group_norm is not None and SelfAttention.refuses(m) is not None:
            return SelfAttention.refuses(m)
        return "a layer in it has hooks" if hooked(*linear) else None

    def run(
        self,
        x: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        m = self.module
        temb = kwargs.pop("temb", None)
        changed = type(m.processor).__name__ not in self.processors
        if changed or attention_mask is not None or kwargs:
            return self.original(x, encoder_hidden_states, attention_mask, temb=temb, **kwargs)
        if x.ndim == 4 and encoder_hidden_states is None and self.pixels is not None:
            return self.pixels.run(x)
        if x.ndim != 3 or m.group_norm is not None:
            return self.original(x, encoder_hidden_states, attention_mask, temb=temb)
        x = x.to(self.dtype)
        q, k, v = (t.unflatten(2, (m.heads, -1)).transpose(1, 2) for t in self.projected(x, encoder_hidden_states))
        h = ops.attention(q, k, v).transpose(1, 2).flatten(2)
        y = self.to_out(h, [m.to_out[0].weight], [m.to_out[0].bias])
        if m.residual_connection:
            y = y + x
        return y if m.rescale_output_factor == 1 else y / m.rescale_output_factor

    def projected(self, x: Tensor, prompt: Tensor | None) -> tuple[Tensor, ...]:
        m = self.module
        if prompt is None:
            layers = (m.to_q, m.to_k, m.to_v)
            return self.to_qkv(x, *_of(layers)).chunk(3, dim=-1)
        q = self.to_q(x, *_of((m.to_q,)))
        both = (m.to_k, m.to_v)

        def project() -> Tensor:
            return self.to_kv(prompt.to(self.dtype), *_of(both))

        keep = not prompt.is_inference() and not (prompt.is_cuda and torch.cuda.is_current_stream_capturing())
        kv = self.prompt.get([prompt, *_of(both)[0]], project) if keep else project()
        return (q, *kv.chunk(2, dim=-1))


def _of(layers: tuple[nn.Linear, ...]) -> tuple[list[Tensor], list[Any]]:
    return [layer.weight for layer in layers], [layer.bias for layer in layers]
