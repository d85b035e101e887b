"""What several tests use: the run's seed, SIMD variants, bit comparison, layouts of a tensor, ulps, networks, runs."""

import inspect
import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.sampling.request import Request
from fastdiff.sampling.stepper import Stepper, plain_tensors
from fastdiff.schedules.level import Level
from fastdiff.schedules.spacing import gathered, levels

SEED_VARIABLE = "FASTDIFF_TEST_SEED"
SEED = int(os.environ.get(SEED_VARIABLE) or int.from_bytes(os.urandom(4), "little") >> 1)

INTS = {torch.float64: torch.int64, torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SIZES = ((1,), (2,), (3,), (5,), (127,), (129,), (3, 32, 32))
SIMD = ("avx512", "avx2", "portable")
LAYOUTS = ("contiguous", "channels_last", "sliced", "offset", "permuted")


def use_simd(name: str) -> Iterator[str]:
    """Runs what follows with the kernels of an instruction set; skips where the CPU lacks it."""
    _C = pytest.importorskip("fastdiff._C", reason="the extension is not built")
    before = _C.cpu_simd()
    if not _C.set_cpu_simd(name):
        pytest.skip(f"this CPU has no {name}")
    yield name
    assert _C.set_cpu_simd(before)


def assert_same_bits(a: Tensor, b: Tensor, name: str = "tensor") -> None:
    """Equal to the bit, the sign of zero included; any NaN equals any other."""
    assert a.dtype == b.dtype, f"{name}: {a.dtype} against {b.dtype}"
    assert a.shape == b.shape, f"{name}: {list(a.shape)} against {list(b.shape)}"
    bits = INTS[a.dtype]
    same = (a.contiguous().view(bits) == b.contiguous().view(bits)) | (a.isnan() & b.isnan())
    assert bool(same.all()), f"{name}: {int((~same).sum())} of {same.numel()} elements differ"


def laid_out(tensor: Tensor, layout: str) -> Tensor:
    """The same values in another place or order of memory; "permuted" needs three strides inside a sample."""
    if layout == "contiguous":
        return tensor.contiguous()
    if layout == "sliced":  # every other sample, and a gap after each row of elements
        shape = (2 * tensor.shape[0], *tensor.shape[1:-1], tensor.shape[-1] + 3)
        view = torch.full(shape, float("nan"), dtype=tensor.dtype)[::2, ..., : tensor.shape[-1]]
    elif layout == "offset":
        view = torch.full((tensor.numel() + 1,), float("nan"), dtype=tensor.dtype)[1:].view(tensor.shape)
    elif tensor.ndim != 4:
        return tensor.contiguous()
    elif layout == "channels_last":
        return tensor.contiguous(memory_format=torch.channels_last)
    else:
        batch, channels, height, width = tensor.shape
        view = torch.full((batch, width, channels + 1, height), float("nan"), dtype=tensor.dtype)
        view = view[:, :, :channels].permute(0, 2, 3, 1)
    assert not view.is_contiguous() or layout == "offset" or len(tensor) <= 1
    return view.copy_(tensor)


def ulp(size: Tensor, dtype: torch.dtype) -> Tensor:
    """The spacing of ``dtype`` at the magnitudes ``size``, float64."""
    info = torch.finfo(dtype)
    _, exponent = torch.frexp(size.to(torch.float64).clamp(min=info.tiny))
    return torch.ldexp(torch.full_like(size, info.eps, dtype=torch.float64), exponent - 1)


def assert_accurate(
    got: Tensor, exact: Tensor, textbook: Tensor, size: Tensor, name: str = "result", roundings: int = 0
) -> None:
    """At most twice PyTorch's largest error, or 2 ulp of the output's dtype at Σ|coefficient·term|, where more.

    A formula that rounds more often names its ``roundings``: each is at most half of eps, of a part of that sum.
    """
    worst = (textbook.to(torch.float64) - exact).abs().amax() if exact.numel() else torch.zeros(())
    error = (got.to(torch.float64) - exact).abs()
    explained = torch.maximum(2 * ulp(size, got.dtype), roundings * torch.finfo(got.dtype).eps / 2 * size)
    allowed = torch.maximum(2 * worst.to(torch.float64), explained)
    assert bool((error <= allowed).all()), f"{name}: {float((error / allowed).max())} times the tolerance"


class Affine(nn.Module):
    """A network of one multiplication and one addition: the same bits on every backend, x·t/(t + 1)-like."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.75, dtype=dtype))
        self.seen: list[tuple[Tensor, Tensor]] = []

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.seen.append((x.clone(), t.clone()))
        return x * self.weight + 0.125


class TwoParts(nn.Module):
    """A network with deep features, 0.5x + y + t/1000, that it gives and takes; the same bits on every backend."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(0.5))
        self.calls: list[str] = []

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.forward_deep(x, t, None, 0, y)[0]

    def forward_deep(
        self, x: Tensor, t: Tensor, deep: Tensor | None, branch: int, y: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        self.calls.append("whole" if deep is None else "shallow")
        wide = (-1, *[1] * (x.ndim - 1))
        if deep is None:
            deep = x * self.weight + (t.view(wide) / 1000).to(x.dtype) + (0 if y is None else y.view(wide).to(x.dtype))
        return deep - x * 0.25, deep


def dummy(x: Tensor, t: Tensor) -> Tensor:
    """diffusers' test model."""
    t = t.view(-1, *[1] * (x.ndim - 1))
    return x * t / (t + 1)


def dummy_sample() -> Tensor:
    """diffusers' test images [4, 3, 8, 8]."""
    return (torch.arange(768, dtype=torch.float32).reshape(3, 8, 8, 4) / 768).permute(3, 0, 1, 2).contiguous()


def half(x: Tensor, t: Tensor) -> Tensor:
    return x * 0.5


def history_plan() -> Plan:
    """Rows with an anchor, slots, other levels and a row without a network call, to be resumed anywhere."""
    rows = []
    for i, t in enumerate((40, 30, 20, 20, 10, 0)):
        rows.append(
            Row(
                t=t, alpha=0.5, sigma=0.8, x={"x": 0.5, "slot0": 0.2, "anchor": 0.1, "z": 0.3 if i < 5 else 0.0},
                p=0.9, q=-0.1 if i != 3 else 0.0, anchor={"x": 1.0} if i == 1 else None,
                slot={"x0": 1.0, "x": 0.5} if i % 2 == 0 else None, write=i // 2 if i % 2 == 0 else None,
                reads=(i // 3,), c_in=1 / (i + 1), calls_model=i != 3,
            )
        )  # fmt: skip
    return Plan(tuple(rows))


def planned(sampler: Any, schedule: Any, steps: int | None = None, **options: Any) -> Plan:
    """A sampler's plan, fields of its ``Spacing`` and ``ve`` (the schedule's states) beside its options."""
    if "ve" in options and sampler is not fastdiff.samplers.lms:
        schedule = schedule.as_ve() if options.pop("ve") else schedule
    return sampler(schedule, steps, **gathered(options))


def spaced(schedule: Any, steps: int | None = None, *, ve: bool = False, **options: Any) -> list[Level]:
    """The levels of a ``Spacing`` given by its fields."""
    return levels(schedule.as_ve() if ve else schedule, steps, **gathered(options))


def prepared(model: Any, shape: tuple[int, ...], **options: Any) -> Stepper:
    """The Stepper that ``fastdiff.sample`` would make, not started."""
    bound = inspect.signature(fastdiff.sample).bind(model, shape, **options)
    bound.apply_defaults()
    with plain_tensors():
        return Stepper(Request.of(*bound.args, **bound.kwargs))


def run(*arguments: object) -> Any:
    """``fastdiff`` with these arguments in this process, which spares the start of Python: typer's result."""
    from typer.testing import CliRunner  # few tests need it

    from fastdiff import cli

    return CliRunner(env={"COLUMNS": "120", "NO_COLOR": "1", "TERM": "dumb"}).invoke(cli.app, list(map(str, arguments)))
