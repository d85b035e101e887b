"""What bound calls keep of a layer's weights: a dictionary that the layer owns and clears when its weights change.

Keys name a form and what it depends on, so that calls bound for two shapes share a form wherever it is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

MOST = 4  # blocked forms of one weight that are kept: oneDNN has two or three for all sizes of images


def onednn(x: Tensor) -> bool:
    """Whether torch's oneDNN kernels with blocked weights serve x; they have no gradients."""
    if x.device.type != "cpu" or not x.numel() or not torch.backends.mkldnn.is_available():
        return False
    if not torch.backends.mkldnn.enabled:
        return False
    if x.dtype == torch.float32:
        return True
    kind = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(x.dtype)
    return kind is not None and getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")()


def blocks(packed: dict[Any, Any], kind: tuple[Any, ...], blocked: Tensor) -> Tensor:
    """oneDNN's blocked weights, or those of the same format that another shape has left in ``packed``.

    oneDNN alone knows which format it wants for a shape; weights in another one it lays out anew in every call.
    """
    format = torch.ops.mkldnn._get_mkldnn_serialized_md(blocked).numpy().tobytes()
    found = packed.get((*kind, format))
    if found is not None:
        return found
    known = [key for key in list(packed) if key[: len(kind)] == kind and len(key) == len(kind) + 1]
    for key in known[: len(known) + 1 - MOST]:  # the oldest go; calls that were bound to them keep theirs
        packed.pop(key, None)
    packed[(*kind, format)] = blocked
    return blocked


def bias_of(packed: dict[Any, Any], bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """The bias in a dtype, its numbers side by side: oneDNN's operations do not look at its stride."""
    if bias is None:
        return None
    key = "bias", dtype
    if key not in packed:
        packed[key] = bias.detach().to(dtype).contiguous()
    return packed[key]


def without_autocast(call: Callable[..., Tensor], device: torch.device) -> Callable[..., Tensor]:
    """``call``, in whose library operations autocast changes no dtype."""
    kind, enabled = device.type, torch.is_autocast_enabled

    def guarded(*tensors: Any) -> Tensor:
        if enabled(kind):
            with torch.autocast(kind, enabled=False):
                return call(*tensors)
        return call(*tensors)

    return guarded
