"""conv_epilogue: every backend against float64 and to the bit against the reference; gradients; what it refuses."""

import itertools
import math

import pytest
import torch
from helpers import LAYOUTS, assert_accurate, assert_same_bits, laid_out
from torch import Tensor

from fastdiff.ops.backend import choose
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.conv_epilogue.layout import Walk, walk_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = [p for k in range(4) for p in itertools.combinations(("bias", "add", "residual"), k)]


@pytest.fixture(autouse=True)
def poison(monkeypatch):
    """Outputs start as NaN, so that an element that is not written shows."""
    make = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda *a, **k: make(*a, **k).fill_(float("nan")))


def operands(shape: tuple[int, ...], dtype: torch.dtype, layout: str = "contiguous") -> dict[str, Tensor]:
    """x and the three others; bias and add are slices, in float32 for one of two."""
    batch, channels = shape[:2]
    small = dtype if torch.rand(()) < 0.5 else torch.float32
    return {
        "x": laid_out(torch.randn(shape).to(dtype), layout),
        "bias": torch.randn(channels, 2).to(small)[:, 0],
        "add": torch.randn(batch, 2 * channels).to(small)[:, channels:],
        "residual": laid_out(torch.randn(shape).to(dtype), layout),
    }


def textbook(given: dict[str, Tensor | None], scale: float) -> Tensor:
    """The expression as a network writes it, in the tensors' own dtypes, without promotion."""
    y = given["x"]
    ones = [1] * (y.ndim - 2)
    for name in ("bias", "add"):
        if (t := given.get(name)) is not None:
            y = y + t.to(y.dtype).view(-1, y.shape[1], *ones)
    if given.get("residual") is not None:
        y = y + given["residual"]
    return y * scale


def check(given: dict[str, Tensor | None], scale: float, backend: str) -> Tensor:
    y = conv_epilogue(**given, scale=scale, backend=backend)
    assert y.dtype == given["x"].dtype
    assert y.stride() == torch.empty_like(given["x"]).stride()
    wide = {name: None if t is None else t.double() for name, t in given.items()}
    sizes = {name: None if t is None else t.abs() for name, t in wide.items()}
    assert_accurate(y, textbook(wide, scale), textbook(given, scale), textbook(sizes, abs(scale)))
    assert_same_bits(y, conv_epilogue(**given, scale=scale, backend="reference"))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("parts", PARTS)
def test_every_combination(backend, seed, parts, dtype):
    for layout, scale in (("contiguous", 1.0), ("channels_last", 1.0), ("contiguous", -0.7), ("channels_last", 2)):
        all_four = operands((3, 37, 5, 9), dtype, layout)
        check({name: all_four[name] for name in ("x", *parts)}, scale, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [
    (1, 1, 1, 1), (2, 1, 3, 5), (2, 5, 1, 1), (0, 3, 4, 4), (2, 0, 4, 4), (2, 3, 0, 4), (3, 7), (1, 130), (2, 6, 131),
    (2, 3, 4, 5, 3), (1, 300, 7, 3), (2, 64, 16, 16), (1, 3, 200, 190),
])  # fmt: skip
def test_shapes(backend, seed, shape, dtype):
    given = operands(shape, dtype)
    if math.prod(shape) == 0:
        assert conv_epilogue(**given, backend=backend).shape == shape
    else:
        check(given, 0.5, backend)
        check({**given, "x": laid_out(given["x"], "channels_last")}, 0.5, backend)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("layout", "other"), [*itertools.product(LAYOUTS, LAYOUTS)])
def test_layouts(backend, seed, layout, other, dtype):
    given = operands((4, 18, 7, 5), dtype, layout)
    check({**given, "residual": laid_out(given["residual"], other)}, 0.7071, backend)


@pytest.mark.parametrize("channels_last", [False, True])
def test_channel_slices(backend, seed, channels_last):
    """Halves of a tensor along its channels, which nothing copies."""
    wide = torch.randn(2, 40, 6, 6)
    wide = wide.contiguous(memory_format=torch.channels_last) if channels_last else wide
    bias = torch.randn(20)
    check({"x": wide[:, 20:], "bias": bias, "residual": wide[:, :20]}, 1.0, backend)
    check({"x": wide[:, :20].clone(), "bias": bias, "residual": wide[:, 20:]}, 1.0, backend)


def test_add_for_all_samples(backend, seed):
    given = operands((3, 10, 4, 5), torch.float32)
    row = given["add"][1]
    expected = check({**given, "add": row.expand(3, 10)}, 1.0, backend)
    assert_same_bits(check({**given, "add": row}, 1.0, backend), expected)
    assert_same_bits(check({**given, "add": row[None]}, 1.0, backend), expected)


def test_the_walk_follows_the_output():
    x = torch.zeros(2, 8, 3, 5)
    assert walk_of(x) == Walk(False, 8, 15)
    assert walk_of(x.contiguous(memory_format=torch.channels_last)) == Walk(True, 15, 8)
    assert walk_of(x[:, :1].contiguous(memory_format=torch.channels_last)) == Walk(False, 1, 15)
    assert walk_of(torch.zeros(2, 8)) == Walk(True, 1, 8)


def test_threads(backend, seed):
    """More than a thread's share, in both orders, with a length that no vector divides."""
    for layout in ("contiguous", "channels_last"):
        check(operands((3, 67, 61, 33), torch.bfloat16, layout), 0.5, backend)


def test_extreme_values(backend):
    values = torch.tensor([math.inf, -math.inf, math.nan, 3e38, -3e38, 1e-40, -0.0, 0.0, 65504.0])
    for dtype in DTYPES:
        x = values.to(dtype).expand(2, 3, 9)
        for bias, scale in ((None, 1.0), (torch.tensor([3e38, -0.0, 1.0]), 2.0)):
            y = conv_epilogue(x, bias=bias, residual=x, scale=scale, backend=backend)
            shifted = x.float() if bias is None else x.float() + bias[:, None]
            assert_same_bits(y, ((shifted + x.float()) * scale).to(dtype))


def test_rounded_once(backend, seed):
    """A sum that bfloat16 loses at the first of two additions."""
    x = torch.full((1, 2, 3), 256.0, dtype=torch.bfloat16)
    y = conv_epilogue(x, bias=torch.tensor([1.0, 1.0]), residual=torch.ones_like(x), backend=backend)
    assert y.eq(258).all()


def test_far_addresses(simd, seed):
    """Samples and rows 2³¹ elements apart; only the pages that hold an element are touched."""
    far = (1 << 31) + 40
    memory = torch.empty(far + 100, dtype=torch.float16)
    for stride in ((far, 40, 5, 1), (40, far, 5, 1)):
        x = torch.as_strided(memory, (2, 2, 3, 5), stride).copy_(torch.randn(2, 2, 3, 5))
        out = conv_epilogue(x, bias=torch.ones(2), backend="native")
        assert_same_bits(out, conv_epilogue(x.clone(), bias=torch.ones(2), backend="reference"))


def test_a_new_tensor_though_nothing_changes(backend):
    x = torch.ones(2, 3)
    y = conv_epilogue(x, backend=backend)
    assert_same_bits(x, y)
    assert y.data_ptr() != x.data_ptr()


# ---- gradients, torch.compile, opcheck


@pytest.mark.parametrize("add_shape", [(3, 4), (1, 4), (4,)])
@pytest.mark.parametrize("shape", [(3, 4), (3, 4, 2, 5)])
def test_gradients(backend, seed, shape, add_shape):
    given = {"x": torch.randn(shape), "bias": torch.randn(4), "add": torch.randn(add_shape)}
    given["residual"] = torch.randn(shape)
    upstream = torch.randn(shape)
    leaves = {name: t.clone().requires_grad_() for name, t in given.items()}
    conv_epilogue(**leaves, scale=0.7, backend=backend).backward(upstream)
    wide = {name: t.double().requires_grad_() for name, t in given.items()}
    textbook(wide, 0.7).backward(upstream.double())
    for name, leaf in leaves.items():
        torch.testing.assert_close(leaf.grad.double(), wide[name].grad, rtol=1e-5, atol=1e-5, msg=name)


def test_gradients_in_half_and_to_some(backend, seed):
    given = operands((2, 5, 3, 4), torch.bfloat16, "channels_last")
    given["bias"] = given["bias"].float().requires_grad_()
    given["residual"].requires_grad_()
    y = conv_epilogue(**given, scale=2.0, backend=backend)
    y.backward(torch.ones_like(y))
    assert given["bias"].grad.dtype == torch.float32
    assert given["bias"].grad.eq(2 * 2 * 12).all()
    assert given["residual"].grad.dtype == torch.bfloat16
    assert given["residual"].grad.eq(2).all()
    assert given["x"].grad is None
    with torch.no_grad():
        assert not conv_epilogue(**given, backend=backend).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("parts", [PARTS[0], PARTS[3], PARTS[-1]])
@pytest.mark.parametrize("dtype", DTYPES[:2])
def test_opcheck(backend, seed, dtype, parts):
    given = operands((2, 3, 4, 5), dtype, "channels_last")
    tensors = [given[name].requires_grad_() if name in ("x", *parts) else None for name in given]
    torch.library.opcheck(torch.ops.fastdiff.conv_epilogue.default, (*tensors, 0.5, backend))


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
@pytest.mark.parametrize("engine", ["aot_eager", "inductor"])
@pytest.mark.slow
def test_compiled(seed, engine):
    given = operands((2, 6, 5, 5), torch.bfloat16, "channels_last")

    def block(x, bias, add, residual):
        y = conv_epilogue(x, bias=bias, add=add, residual=residual, scale=0.7)
        return conv_epilogue(y, residual=y, scale=0.5)

    torch._dynamo.reset()
    y = torch.compile(block, fullgraph=True, backend=engine)(**given)
    assert_same_bits(y, block(**given))
    assert y.stride() == block(**given).stride()


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "error", "names"),
    [
        ({"x": [1.0]}, TypeError, "x must"),
        ({"x": torch.zeros(2, 3, 4, dtype=torch.float64)}, TypeError, "x must"),
        ({"x": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "x must"),
        ({"x": torch.zeros(3)}, ValueError, "x must"),
        ({"bias": torch.zeros(4)}, ValueError, "bias must"),
        ({"bias": torch.zeros(1, 3)}, ValueError, "bias must"),
        ({"bias": torch.zeros(3, dtype=torch.float16)}, TypeError, "bias must"),
        ({"bias": torch.zeros(3, device="meta")}, ValueError, "bias must"),
        ({"bias": 1.0}, TypeError, "bias must"),
        ({"add": torch.zeros(3, 3)}, ValueError, "add must"),
        ({"add": torch.zeros(2, 3, 1)}, ValueError, "add must"),
        ({"add": torch.zeros(2, 3, dtype=torch.bfloat16)}, TypeError, "add must"),
        ({"residual": torch.zeros(2, 3, 1)}, ValueError, "residual must"),
        ({"residual": torch.zeros(2, 3, 4, dtype=torch.bfloat16)}, TypeError, "residual must"),
        ({"residual": torch.zeros(2, 3, 4).to_sparse()}, TypeError, "residual must"),
        ({"scale": math.inf}, ValueError, "scale must"),
        ({"scale": math.nan}, ValueError, "scale must"),
        ({"scale": 1e39}, ValueError, "scale must"),
        ({"scale": torch.ones(())}, TypeError, "scale must"),
        ({"scale": True}, TypeError, "scale must"),
        ({"backend": "fast"}, ValueError, "backend"),
        ({"x": torch.zeros(2, 3, 4, device="meta")}, RuntimeError, "meta tensors"),
    ],
)
def test_refuses(change, error, names):
    with pytest.raises(error, match=names):
        conv_epilogue(**{"x": torch.zeros(2, 3, 4), **change})


def test_no_native_kernel_on_a_gpu(monkeypatch):
    """The choice falls to Triton there, and says why native was not taken."""
    from fastdiff.ops import backend, native, triton_support

    class Built:
        with_cuda = True
        randn_cuda = conv_epilogue_cpu = None

        @staticmethod
        def cuda_device_count() -> int:
            return 1

    monkeypatch.setattr(native, "extension", Built)
    monkeypatch.setattr(triton_support, "why_missing", lambda device_type: None)
    monkeypatch.delenv(backend.VARIABLE, raising=False)
    for cached in (native.missing, backend._choose):
        monkeypatch.setattr(f"{cached.__module__}.{cached.__name__}", cached.__wrapped__)
    assert choose("auto", "cuda", "conv_epilogue") == "triton"
    assert choose("auto", "cuda", "randn") == "native"
    with pytest.raises(RuntimeError, match="conv_epilogue has no native kernel"):
        choose("native", "cuda", "conv_epilogue")


def test_an_embedding_of_any_strides(backend, seed):
    """Transposed, expanded and overlapping rows, with and without a bias."""
    x, memory = torch.randn(3, 4, 5, 5), torch.randn(10)
    for add in (torch.randn(4, 3).T, torch.randn(1, 4).expand(3, 4), memory.as_strided((3, 4), (1, 1))):
        for bias in (None, torch.randn(8)[::2]):
            shift = add if bias is None else bias + add.clone(memory_format=torch.contiguous_format)
            got = conv_epilogue(x, bias=bias, add=add, backend=backend)
            torch.testing.assert_close(got, x + shift[:, :, None, None])
