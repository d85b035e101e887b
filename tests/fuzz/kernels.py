"""The operations against their references and formulas in float64."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from helpers import assert_same_bits
from ops.update_cases import random_row
from torch import Tensor

import fastdiff
from fastdiff import ops
from fastdiff.plan.plan import Plan, guidance_weights
from fuzz.draws import Call, Draw, call_text, spoiled

SCHEDULE = fastdiff.NoiseSchedule.linear(100)


def same_bits(name: str, function: Any, options: dict[str, Any]) -> Call:
    """A call whose result must have the reference's bits."""

    def tensors(result: Any) -> list[Tensor]:
        return [result] if isinstance(result, Tensor) else [t for t in result if t is not None]

    def check(result: Any) -> None:
        want = tensors(function(**{**options, "backend": "reference"}))
        got = tensors(result)
        assert len(got) == len(want)
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            assert_same_bits(a, b, f"result {i}")

    return Call(call_text(name, (), options), lambda: function(**options), check)


def keys(draw: Draw, batch: int) -> dict[str, Any]:
    if draw.chance(0.5):
        return {"seeds": [draw.getrandbits(64) for _ in range(batch)]}
    return {"seed": draw.getrandbits(64), "sample_offset": draw.randrange(1 << 31)}


def randn(draw: Draw) -> Call:
    shape = draw.shape(1)
    options = {"shape": shape, "dtype": draw.dtype(), "draw": draw.getrandbits(32), "stream": draw.getrandbits(32)}
    options |= keys(draw, shape[0])
    if draw.chance(0.3):
        return spoiled(draw, ops.randn, options)
    if len(shape) == 4 and draw.chance(0.5):
        options["memory_format"] = torch.channels_last
    return same_bits("randn", ops.randn, options)


def add_noise(draw: Draw) -> Call:
    shape, dtype = draw.shape(1), draw.dtype()
    options: dict[str, Any] = {"x0": draw.tensor(shape, dtype, 0.2), "schedule": SCHEDULE}
    options["t"] = draw.randrange(100)
    if draw.chance(0.5):
        options["t"] = draw.laid(torch.tensor([draw.randrange(100) for _ in range(shape[0])], dtype=torch.int64))
    if draw.chance(0.5):
        options["noise"] = draw.tensor(shape, dtype, 0.2)
    else:
        options |= keys(draw, shape[0]) | {"draw": draw.getrandbits(32)}
    if draw.chance(0.3):
        return spoiled(draw, ops.add_noise, options)
    return same_bits("add_noise", ops.add_noise, options)


def update(draw: Draw) -> Call:
    shape, count = draw.shape(1), draw.choice((0, 1, 1, 2, 3))
    learned = bool(count) and len(shape) > 1 and shape[1] > 0 and draw.chance(0.2)
    more = {"log_variance": (-8.0, -1.0)} if learned else {}
    plan = Plan([random_row(draw, count, t, **more) for t in range(3)], learned_variance=learned)
    number = draw.randrange(3)
    row = plan[number]
    outputs = [draw.tensor(shape, draw.dtype(), 0.1) for _ in range(count)]
    if learned:
        outputs[-1] = draw.tensor((shape[0], 2 * shape[1], *shape[2:]), draw.dtype(), 0.1)
    options: dict[str, Any] = {
        "x": draw.values(shape, special=0.1), "outputs": outputs, "plan": plan, "row": number,
        "return_x0": draw.chance(0.5),
    } | keys(draw, shape[0])  # fmt: skip
    if count > 1:
        options["guidance"] = guidance_weights(draw.uniform(-2, 9) if count == 2 else (draw.uniform(0, 9), 1.5))
    slots: list[Any] = [None] * 4
    for k, slot in enumerate(row.reads):
        if row.uses(f"slot{k}") or draw.chance(0.3):
            slots[slot] = draw.values(shape, special=0.1)
    options["slots"] = slots
    given = {"anchor": row.uses("anchor"), "gradient": row.uses("g"), "noise": draw.chance(0.3)}
    options |= {name: draw.values(shape, special=0.1) for name, has in given.items() if has}
    if draw.chance(0.3):
        options |= {"gain": draw.values(shape[:1])}
    if draw.chance(0.3):
        options |= {"clip": draw.values((shape[0], 2)).abs() + 0.1}
    if draw.chance(0.3):
        options |= {"mask": (draw.values(shape) > 0).float(), "known": draw.values(shape, special=0.1)}
        if draw.chance(0.5):
            options["known_noise"] = draw.values(shape, special=0.1)
    if draw.chance(0.5):
        options |= {"model_dtype": draw.dtype(), "channels_last": len(shape) == 4 and draw.chance(0.5)}
    if draw.chance(0.3):
        return spoiled(draw, ops.update, options)
    return same_bits("update", ops.update, options)


def conv_epilogue(draw: Draw) -> Call:
    shape, dtype = draw.shape(2), draw.dtype()
    wide = lambda: draw.choice((dtype, torch.float32))  # noqa: E731
    options: dict[str, Any] = {"x": draw.tensor(shape, dtype, 0.2), "scale": draw.choice((1.0, 0.7, -2, 0))}
    if draw.chance(0.5):
        options["bias"] = draw.tensor(shape[1:2], wide())
    if draw.chance(0.5):
        options["add"] = draw.tensor(draw.choice(((shape[0], shape[1]), (1, shape[1]), (shape[1],))), wide())
    if draw.chance(0.5):
        options["residual"] = draw.tensor(shape, dtype, 0.2)
    if draw.chance(0.3):
        return spoiled(draw, ops.conv_epilogue, options)
    return same_bits("conv_epilogue", ops.conv_epilogue, options)


def near(got: Tensor, exact: Tensor, size: Tensor, of: int, what: str = "result") -> None:
    """Within ``of`` roundings of numbers as large as ``size``."""
    assert got.shape == exact.shape, f"{what}: {list(got.shape)} against {list(exact.shape)}"
    if not got.numel():
        return
    info = torch.finfo(got.dtype)
    allowed = of * (info.eps * size + info.smallest_normal * 2)
    wrong = (got.double() - exact).abs() > allowed
    beyond = (exact.abs() > info.max * 0.99) & ~got.isfinite()  # float16's
    wrong = (wrong | ~got.isfinite()) & ~beyond
    worst = ((got.double() - exact).abs() / allowed).nan_to_num(torch.inf)[wrong]
    assert not bool(wrong.any()), f"{what}: {int(wrong.sum())} of {got.numel()} off by {float(worst.max()):.3g} allowed"


def group_norm_silu(draw: Draw) -> Call:
    groups, dtype = draw.randint(1, 4), draw.dtype()
    channels = groups * draw.randint(1, 9)
    second = draw.randrange(channels) if draw.chance(0.3) else 0
    batch, rest = draw.choice((0, 1, 2, 3)), draw.shape(0, 3)
    wide = lambda: draw.choice((dtype, torch.float32))  # noqa: E731
    options: dict[str, Any] = {
        "x": draw.tensor((batch, channels - second, *rest), dtype), "weight": None, "bias": None, "groups": groups,
        "silu": draw.chance(0.5), "eps": draw.choice((1e-5, 1e-3, 1e-6)),
    }  # fmt: skip
    if second:
        options["x2"] = draw.tensor((batch, second, *rest), dtype)
    for name in ("weight", "bias"):
        if draw.chance(0.6):
            options[name] = draw.tensor((channels,), wide())
    if draw.chance(0.3):
        options["add"] = draw.tensor(draw.choice(((batch, channels), (1, channels), (channels,))), wide())
    if draw.chance(0.3):
        return spoiled(draw, ops.group_norm_silu, options)

    def check(y: Tensor) -> None:
        assert y.dtype == dtype
        if not y.numel():
            return
        near(y, *normalised(**options), 16)

    return Call(call_text("group_norm_silu", (), options), lambda: ops.group_norm_silu(**options), check)


def normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, groups: int, silu: bool, eps: float,
    x2: Tensor | None = None, add: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The operation in float64, and the numbers that float32 arithmetic rounds: a group's standard deviation and mean
    among them.
    """
    h = (x if x2 is None else torch.cat([x, x2], 1)).double()
    shape = (-1, h.shape[1], *[1] * (h.ndim - 2))
    h = h if add is None else h + add.double().reshape(shape)
    w, b = (torch.full(h.shape[:2], float(v is None and k == 0)).reshape(shape) if v is None else
            v.double().reshape(shape) for k, v in enumerate((weight, bias)))  # fmt: skip
    grouped = h.reshape(len(h), groups, -1)
    mean = grouped.mean(2, keepdim=True)
    d = grouped - mean
    variance = d.square().mean(2, keepdim=True)
    rstd = (variance + eps).rsqrt()
    numbers = (d.abs() + variance.sqrt() + 1e-7 * (grouped.abs() + mean.abs()) / torch.finfo(x.dtype).eps) * rstd
    y = (d * rstd).reshape(h.shape) * w + b
    size = numbers.reshape(h.shape) * w.abs() + b.abs()
    return (F.silu(y), size + y.abs()) if silu else (y, size)


def attention(draw: Draw) -> Call:
    B, H = draw.choice((0, 1, 2)), draw.choice((0, 1, 2, 3))
    N, M, D = draw.choice((0, 1, 2, 5, 17, 64)), draw.choice((1, 2, 5, 17, 70)), draw.choice((1, 2, 8, 9, 40, 64))
    dtype = draw.dtype()
    options: dict[str, Any] = {"q": draw.tensor((B, H, N, D), dtype)}
    options |= {name: draw.tensor((B, H, M, D), dtype) for name in ("k", "v")}
    options["scale"] = draw.choice((None, None, 0.1, -0.3, 0.0, 1))
    options["backend"] = draw.choice(("auto", "torch", "reference"))
    if draw.chance(0.3):
        return spoiled(draw, ops.attention, options)

    def check(y: Tensor) -> None:
        q, k, v = (options[name].double() for name in "qkv")
        scale = D**-0.5 if options["scale"] is None else options["scale"]
        scores = (q @ k.transpose(2, 3)) * scale
        # A score's rounding, of as many as its terms are large, is a factor of its weight.
        of = 8 * (1 + (q.abs() @ k.abs().transpose(2, 3) * abs(scale)).amax(dim=-1, keepdim=True)) if M else 1
        weights = scores.softmax(-1)
        assert y.dtype == dtype
        near(y, weights @ v, of * v.abs().amax(dim=2, keepdim=True).expand(B, H, N, D), 1)

    return Call(call_text("attention", (), options), lambda: ops.attention(**options), check)


def conv2d(draw: Draw) -> Call:
    dtype, groups = draw.choice((*DTYPES_AND_DOUBLE,)), draw.choice((1, 1, 1, 2))
    inside, outside = draw.choice((1, 2, 3, 16, 32)), draw.choice((1, 2, 5, 16, 32))
    channels, features = groups * inside, groups * outside
    size = draw.choice(((1, 1), (3, 3), (3, 3), (3, 3), (2, 5), (1, 3)))
    pair = lambda low, high: draw.choice((draw.randint(low, high), (draw.randint(low, high), draw.randint(low, high))))  # noqa: E731
    sides = draw.choice((pair(0, 2), pair(0, 1), ((draw.randint(0, 2), 1), (0, draw.randint(0, 2)))))
    if size == (3, 3) and draw.chance(0.5):  # as networks have it: Winograd's, and the doubled image's
        options = {"padding": 1, "upsample": draw.chance(0.5)}
    else:
        options = {"stride": pair(1, 3), "padding": sides, "dilation": pair(1, 2), "groups": groups}
        options["upsample"] = draw.chance(0.2)
    groups = options.get("groups", 1)
    x = draw.tensor((draw.choice((0, 1, 2)), channels, draw.randint(1, 9), draw.randint(1, 9)), dtype)
    weight = draw.tensor((features, channels // groups, *size), draw.choice((dtype, torch.float32)))
    options |= {"x": x, "weight": weight, "exact": draw.chance(0.3)}
    if draw.chance(0.5):
        options["bias"] = draw.tensor((features,), draw.choice((dtype, torch.float32)))
    if draw.chance(0.2):
        return spoiled(draw, ops.conv2d, options)
    wide = {**options, "x": x.double(), "weight": weight.to(dtype).double()}
    wide["bias"] = None if options.get("bias") is None else options["bias"].to(dtype).double()
    try:
        exact = exactly(**{k: v for k, v in wide.items() if k != "exact"})
    except RuntimeError:  # a window that is larger than the image
        return Call(call_text("conv2d", (), options), lambda: ops.conv2d(**options), refused=True, names=("x",))
    if draw.chance(0.3):
        options["residual"] = draw.tensor(exact.shape, dtype)
    if draw.chance(0.3):
        options["inputs"] = [draw.tensor((len(x), 4, *exact.shape[2:]), dtype) for _ in range(draw.randint(1, 2))]
        options["pointwise"] = [draw.tensor((features, 4, 1, 1), dtype) for _ in options["inputs"]]

    def check(y: Tensor) -> None:
        assert y.dtype == dtype
        names = ("x", "weight", "bias", "residual")
        more = {n: None if options.get(n) is None else options[n].to(dtype).double() for n in names}
        lists = {n: [t.double() for t in options.get(n, ())] for n in ("inputs", "pointwise")}
        shape = {n: v for n, v in options.items() if n in ("stride", "padding", "dilation", "groups", "upsample")}
        want = exactly(**more, **lists, **shape)
        absolute = {n: None if t is None else t.abs() for n, t in more.items()}
        terms = exactly(**absolute, **{n: [t.abs() for t in ts] for n, ts in lists.items()}, **shape)
        # Winograd's products are of sums of numbers of a whole tile, and its weights' sums of nine.
        largest = terms.abs().amax(dim=(1, 2, 3), keepdim=True) if y.numel() else terms
        near(y, want, largest.expand_as(want), 16)

    return Call(call_text("conv2d", (), options), lambda: ops.conv2d(**options), check)


DTYPES_AND_DOUBLE = (torch.float32, torch.float32, torch.bfloat16, torch.float16, torch.float64)


def exactly(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1,
    groups: int = 1, upsample: bool = False, residual: Tensor | None = None, inputs: Any = (), pointwise: Any = (),
) -> Tensor:  # fmt: skip
    """The convolution in the dtype of its arguments."""
    if upsample:
        x = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    rows, columns = padding if isinstance(padding, tuple) else (padding, padding)
    top, bottom = rows if isinstance(rows, tuple) else (rows, rows)
    left, right = columns if isinstance(columns, tuple) else (columns, columns)
    y = F.conv2d(F.pad(x, (left, right, top, bottom)), weight, bias, stride, 0, dilation, groups)
    for image, w in zip(inputs, pointwise, strict=True):
        y = y + F.conv2d(image, w)
    return y if residual is None else y + residual
