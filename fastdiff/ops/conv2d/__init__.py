"""A convolution with all that a residual block adds to it, by whichever kernel suits the images.

    y = conv2d(x, weight, bias) + Σ conv2d(inputs[i], pointwise[i]) + residual

reference.py says what is computed. The kernels: winograd.py (C++, on a CPU), gemm.py (Triton, on a GPU), phases.py
(doubled images on the small grid), and library.py (oneDNN's and cuDNN's). choice.py says which of them serves.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_image, check_operand
from fastdiff.ops.alone import alone
from fastdiff.ops.conv2d.choice import select
from fastdiff.ops.conv2d.geometry import MOST, Geometry, geometry_of
from fastdiff.ops.conv2d.reference import conv2d as reference
from fastdiff.ops.registry import traced, transformed

Call = Callable[..., Tensor]
WIDE = (torch.float32, torch.float64)  # of weights and biases, beside x's own dtype


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    upsample: bool = False,
    inputs: Sequence[Tensor] = (),
    pointwise: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    exact: bool = False,
    backend: str = "auto",
) -> Tensor:
    """conv2d(x, weight, bias) + Σ conv2d(inputs[i], pointwise[i]) + residual.

    Weights are laid out anew in every call, which for a small image takes longer than the convolution: where they stay
    the same, ``bind``.

    Args:
        x: [B, C, H, W] of float32, float64, bfloat16 or float16, of any strides; doubled first by its nearest
            neighbours if ``upsample``.
        weight: [N, C / groups, R, S] of x's dtype, or of float32 or float64, and then used in x's.
        bias: [N], likewise, or None.
        stride, padding, dilation, groups: as torch has them; padding may also be ((top, bottom), (left, right)).
        inputs, pointwise: as many images [B, Ci, H', W'] of x's dtype and weights [N, Ci, 1, 1] as weight's.
        residual: [B, N, H', W'] of x's dtype, or None.
        exact: no Winograd and no summed weights, which are equal in exact arithmetic and round otherwise.
        backend: "auto", "native" (Winograd in C++, on a CPU), "triton", "torch" (its library's own kernels), or
            "reference" (in float32, rounded once).

    Returns:
        [B, N, H', W'] of x's dtype, channels_last. Where gradients are recorded it is computed by torch's operations.

    Raises:
        TypeError, ValueError: naming the argument, what it is and what it should be.
        RuntimeError: for a backend that cannot serve this call, saying why.
    """
    geometry = _check(x, weight, bias, stride, padding, dilation, groups, upsample, inputs, pointwise, residual, exact)
    tensors = (x, weight, bias, residual, *inputs, *pointwise)
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    if traced(*tensors) or transformed() or recorded:
        if backend not in ("auto", "torch", "reference"):
            raise ValueError(f"backend={backend!r} has no gradients and is not traced; take 'auto', or torch.no_grad()")
        wide = None if backend == "reference" else x.dtype
        y = reference(x, weight, bias, geometry, inputs, pointwise, residual, wide).to(x.dtype)
        return y if transformed() else y.contiguous(memory_format=torch.channels_last)  # vmap knows no such format
    call = _bind(x, weight, bias, geometry, inputs, pointwise, residual, exact, {}, backend)
    return call(x, residual, inputs)


def bind(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | tuple[tuple[int, int], tuple[int, int]] = 0,
    dilation: int | tuple[int, int] = 1,
    groups: int = 1,
    upsample: bool = False,
    inputs: Sequence[Tensor] = (),
    pointwise: Sequence[Tensor] = (),
    residual: Tensor | None = None,
    exact: bool = False,
    packed: dict[Any, Any] | None = None,
    backend: str = "auto",
    batch_invariant: bool = False,
) -> Call:
    """``conv2d`` for one layout, without gradients: everything is checked, decided and packed here, once.

    Args:
        x, inputs, residual: examples, whose shape, strides, dtype and device every call's tensors must have.
        packed: the layer's derived weights, looked up and added to, so that calls bound for several shapes share them
            where their form is the same. The owner clears it when weight, bias or pointwise change.
        batch_invariant: a sample's bits are the same in every batch: the kernel is chosen by the sample's shape, and
            computes one sample at a time, but for Winograd's, whose sums depend on a result's own window alone.
        The others: as for ``conv2d``.

    Returns:
        call(x, residual=None, inputs=()) -> Tensor, channels_last, with the bits of ``conv2d``. It checks nothing and
        may be shared by threads.

    Raises:
        As ``conv2d``.
    """
    geometry = _check(x, weight, bias, stride, padding, dilation, groups, upsample, inputs, pointwise, residual, exact)
    packed = {} if packed is None else packed
    with torch.no_grad():
        return _bind(x, weight, bias, geometry, inputs, pointwise, residual, exact, packed, backend, batch_invariant)


def _bind(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, inputs: Sequence[Tensor],
    pointwise: Sequence[Tensor], residual: Tensor | None, exact: bool, packed: dict[Any, Any], backend: str,
    apart: bool = False,
) -> Call:  # fmt: skip
    shape = (x.shape[0], weight.shape[0], *geometry.size(x, weight))
    if x.numel() == 0:
        return lambda x, residual=None, inputs=(): _empty(shape, x)
    chosen_by = x[:1] if apart else x
    kernel = select(chosen_by, weight, geometry, inputs, pointwise, residual is not None, exact, backend)
    chained = bool(inputs) and kernel not in ("gemm", "reference")
    if apart and not chained and kernel != "winograd":
        return _each(x, weight, bias, geometry, inputs, pointwise, residual, exact, packed, backend, shape)
    if kernel == "reference":

        def by_reference(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
            return _empty(shape, x).copy_(reference(x, weight, bias, geometry, inputs, pointwise, residual))

        return by_reference
    if kernel == "gemm":
        from fastdiff.ops.conv2d import gemm

        return gemm.bind(x, weight, bias, geometry, inputs, pointwise, residual, packed)
    if chained:
        return _chain(x, weight, bias, geometry, inputs, pointwise, residual, exact, packed, backend, shape, apart)
    if kernel == "winograd":
        from fastdiff.ops.conv2d import native_impl

        return native_impl.bind(x, weight, bias, geometry.upsample, residual, packed)
    from fastdiff.ops.conv2d import library

    return library.bind(x, weight, bias, geometry, residual, packed, kernel)


def _chain(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, inputs: Sequence[Tensor],
    pointwise: Sequence[Tensor], residual: Tensor | None, exact: bool, packed: dict[Any, Any], backend: str,
    shape: tuple[int, ...], apart: bool,
) -> Call:  # fmt: skip
    """One call after another, each of which adds the sum so far as its residual."""
    between, first = _empty(shape, x), residual
    parts: list[Call] = []
    for i, (image, w) in enumerate(zip(inputs, pointwise, strict=True)):
        own = packed.setdefault(("pointwise", i), {})
        parts.append(_bind(image, w, None, Geometry(), (), (), first, exact, own, backend, apart))
        first = between
    main = _bind(x, weight, bias, geometry, (), (), first, exact, packed, backend, apart)

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        for part, image in zip(parts, inputs, strict=True):
            residual = part(image, residual)
        return main(x, residual)

    return call


def _each(
    x: Tensor, weight: Tensor, bias: Tensor | None, geometry: Geometry, inputs: Sequence[Tensor],
    pointwise: Sequence[Tensor], residual: Tensor | None, exact: bool, packed: dict[Any, Any], backend: str,
    shape: tuple[int, ...],
) -> Call:  # fmt: skip
    """The call of one sample, made for each."""

    def of(i: int, residual: Tensor | None, inputs: Sequence[Tensor]) -> tuple[Tensor | None, list[Tensor]]:
        return None if residual is None else alone(residual, i), [alone(image, i) for image in inputs]

    added, images = of(0, residual, inputs)
    one = _bind(alone(x, 0), weight, bias, geometry, images, pointwise, added, exact, packed, backend)

    def call(x: Tensor, residual: Tensor | None = None, inputs: Sequence[Tensor] = ()) -> Tensor:
        out = _empty(shape, x)
        for i in range(shape[0]):
            out[i : i + 1].copy_(one(alone(x, i), *of(i, residual, inputs)))
        return out

    return call


def _empty(shape: tuple[int, ...], x: Tensor) -> Tensor:
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _check(
    x: Any, weight: Any, bias: Any, stride: Any, padding: Any, dilation: Any, groups: Any, upsample: Any,
    inputs: Any, pointwise: Any, residual: Any, exact: Any,
) -> Geometry:  # fmt: skip
    check_image(x)
    geometry = geometry_of(stride, padding, dilation, groups, upsample)
    if not isinstance(exact, bool):
        raise TypeError(f"exact must be a bool; got {type(exact).__name__}")
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor; got {type(weight).__name__}")
    channels, groups = x.shape[1], geometry.groups
    if weight.ndim != 4 or 0 in weight.shape or weight.shape[1] * groups != channels or weight.shape[0] % groups:
        of = f" and N a multiple of {groups}" if groups > 1 else ""
        raise ValueError(
            f"weight must have the shape [N, C / groups, R, S] for C = {channels} channels in {groups} groups{of}; "
            f"got {list(weight.shape)}"
        )
    check_operand("weight", weight, x, tuple(weight.shape), *WIDE)
    features = weight.shape[0]
    if bias is not None:
        check_operand("bias", bias, x, (features,), *WIDE)
    size = geometry.size(x, weight)
    if min(size) < 1:
        raise ValueError(
            f"x must be larger than the window, with its padding; got {list(x.shape)}, weight {list(weight.shape)}"
        )
    if max(size) > MOST:
        raise ValueError(f"padding must leave a result of at most {MOST} rows and columns; got {geometry.padding}")
    shape = (x.shape[0], features, *size)
    for name, images in (("inputs", inputs), ("pointwise", pointwise)):
        if isinstance(images, Tensor) or not isinstance(images, Sequence):
            raise TypeError(f"{name} must be a sequence of tensors; got {type(images).__name__}")
    if len(inputs) != len(pointwise):
        raise ValueError(f"pointwise must have a weight for each of the {len(inputs)} inputs; got {len(pointwise)}")
    for i, (image, w) in enumerate(zip(inputs, pointwise, strict=True)):
        c = image.shape[1] if isinstance(image, Tensor) and image.ndim == 4 else 0
        check_operand(f"inputs[{i}]", image, x, (shape[0], c, *size))
        check_operand(f"pointwise[{i}]", w, x, (features, c, 1, 1), *WIDE)
    if residual is not None:
        check_operand("residual", residual, x, shape)
    return geometry
