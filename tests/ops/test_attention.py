"""attention: the CPU's backends against float64, in any layout; gradients; what it refuses."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from helpers import SIMD, assert_accurate, use_simd
from torch import Tensor

from fastdiff.ops import native
from fastdiff.ops.attention import attention, native_impl
from fastdiff.ops.attention import reference as reference_module

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAN = float("nan")


@pytest.fixture(params=("reference", "torch", *SIMD))
def backend(request):
    """A CPU's backends; native with each instruction set."""
    if request.param not in SIMD:
        yield request.param
    else:
        for _ in use_simd(request.param):
            yield "native"


@pytest.fixture(autouse=True)
def automatic(monkeypatch):
    """The environment leaves the choice open, and outputs start as NaN."""
    monkeypatch.delenv("FASTDIFF_BACKEND", raising=False)
    make = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: make(*a, **k).fill_(NAN))


def operands(B: int, H: int, N: int, M: int, D: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    return tuple(torch.randn(B, H, n, D).to(dtype) for n in (N, M, M))


def oracle(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    return torch.softmax(scale * (q.double() @ k.double().transpose(2, 3)), -1) @ v.double()


def magnitude(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Σ|terms| of the result, float64. In float32 a score's own terms count too: its rounding scales the weight."""
    scale = 1 / math.sqrt(q.shape[3]) if scale is None else scale
    weights = torch.softmax(scale * (q.double() @ k.double().mT), -1)
    if q.dtype == torch.float32:
        weights = weights * (1 + abs(scale) * (q.double().abs() @ k.double().abs().mT))
    return weights @ v.double().abs()


def check(y: Tensor, q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> None:
    """At most twice the error of PyTorch's own, and the memory that is promised."""
    assert y.shape == q.shape
    assert y.dtype == q.dtype
    assert y.transpose(1, 2).is_contiguous()
    exact = oracle(q, k, v, scale)
    assert_accurate(y, exact, F.scaled_dot_product_attention(q, k, v, scale=scale), magnitude(q, k, v, scale))


# ---- values


@pytest.mark.parametrize("dtype", DTYPES)
def test_against_the_oracle(seed, backend, dtype):
    for D, M in itertools.product((1, 3, 4, 8, 16, 40, 77, 81, 256, 512), (1, 4, 16, 77, 81)):
        q, k, v = operands(2, 3, 87, M, D, dtype)
        check(attention(q, k, v, backend=backend), q, k, v)
        # One query, five and the rest; PyTorch's error is over all, for of a few values it can be next to none.
        parts = [attention(part, k, v, backend=backend).transpose(1, 2) for part in q.split([1, 5, 81], 2)]
        check(torch.cat(parts, 1).transpose(1, 2), q, k, v)


@pytest.mark.parametrize("scale", [0, 1.5, -0.3, 2])
def test_a_scale(seed, backend, scale):
    q, k, v = operands(2, 2, 9, 7, 16)
    check(attention(q, k, v, scale, backend=backend), q, k, v, scale)


def test_scores_that_overflow_without_their_maximum(seed, backend):
    q, k, v = operands(1, 2, 9, 7, 16)
    check(attention(100 * q, 10 * k, v, backend=backend), 100 * q, 10 * k, v)


def test_one_key_is_its_value(seed, backend):
    q, k, v = operands(2, 3, 5, 1, 40)
    assert attention(q, k, v, backend=backend).equal(v.expand(2, 3, 5, 40))


@pytest.mark.parametrize("dtype", DTYPES)
def test_tiles_and_blocks(simd, seed, dtype):
    """Queries that fill one vector, two, three and their parts; keys of several blocks, the largest score in any."""
    for N, M, D in ((1, 200, 10), (16, 64, 20), (17, 65, 5), (33, 129, 40), (49, 63, 10), (101, 320, 12)):
        q, k, v = operands(2, 2, N, M, D, dtype)
        check(attention(q, k, v, backend="native"), q, k, v)
        scores = (q[0, 0].double() @ k[0, 0].double().T)[0]
        for order in (scores.argsort(), scores.argsort(descending=True)):
            keys, values = k[:, :, order], v[:, :, order]
            check(attention(3 * q, keys, values, backend="native"), 3 * q, keys, values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_depends_on_its_own_query(simd, seed, dtype):
    """The same bits alone, in any tile, in another batch, and with more threads."""
    q, k, v = operands(2, 3, 131, 150, 20, dtype)
    whole = attention(q, k, v, backend="native")
    for parts in ([131], [1, 47, 48, 35], [66, 65], [130, 1]):
        assert torch.cat([attention(part, k, v, backend="native") for part in q.split(parts, 2)], 2).equal(whole)
    assert attention(q[1:, 2:], k[1:, 2:], v[1:, 2:], backend="native").equal(whole[1:, 2:])
    with native.cpu_threads(3):
        assert attention(q, k, v, backend="native").equal(whole)


@pytest.mark.parametrize("value", [NAN, math.inf, -math.inf])
def test_what_is_not_finite_stays_so(simd, seed, value):
    for place, (b, h, row, channel) in itertools.product(range(3), ((0, 0, 0, 3), (1, 2, 68, 9))):
        tensors = operands(2, 3, 70, 70, 10)
        tensors[place][b, h, row, channel] = value
        got, exact = attention(*tensors, backend="native"), oracle(*tensors)
        assert got.isfinite().equal(exact.isfinite())  # a key of −∞ has weight 0: the others' average stays
        torch.testing.assert_close(got[exact.isfinite()].double(), exact[exact.isfinite()], rtol=1e-4, atol=1e-5)
        rest = [t.clone() for t in tensors]
        rest[place][b, h, row, channel] = 0
        others = torch.ones(2, 3, 70, dtype=torch.bool)
        others[b, h, row if place == 0 else slice(None)] = False
        assert got[others].equal(attention(*rest, backend="native")[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_too_large_to_copy(seed, monkeypatch, dtype):
    monkeypatch.setattr(native_impl, "COPIED", 8 * 7 * 8)
    q, k, v = operands(1, 1, 3, 7, 8, dtype)
    check(attention(q, k, v, backend="native"), q, k, v)
    q, k, v = operands(1, 1, 3, 8, 8, dtype)
    with pytest.raises(RuntimeError, match="cannot serve this attention on cpu: it copies a head's keys and values"):
        attention(q, k, v, backend="native")
    assert attention(q, k, v).equal(attention(q, k, v, backend="torch"))


def test_the_reference_in_blocks(seed, monkeypatch):
    """The same result and gradients, few queries at a time, and no more scores than allowed."""
    q, k, v = (t.double() for t in operands(2, 3, 23, 7, 8))
    grad = torch.randn_like(q)
    whole = reference_module.attention(q, k, v, 0.3), *reference_module.backward(grad, q, k, v, 0.3)
    monkeypatch.setattr(reference_module, "SCORES", 5 * 42)
    seen = []
    softmax = torch.softmax
    monkeypatch.setattr(torch, "softmax", lambda s, dim: seen.append(s.numel()) or softmax(s, dim))
    blocks = reference_module.attention(q, k, v, 0.3), *reference_module.backward(grad, q, k, v, 0.3)
    assert seen == 2 * [210, 210, 210, 210, 126]
    for a, b in zip(blocks, whole, strict=True):
        assert a.dtype == torch.float64
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("shape", [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0)])
def test_empty(backend, shape):
    B, H, N = shape
    q, k, v = (t.requires_grad_() for t in operands(B, H, N, 5, 8))
    y = attention(q, k, v, backend=backend)
    assert y.shape == (B, H, N, 8)
    assert y.dtype == q.dtype
    y.sum().backward()
    assert all(bool((t.grad == 0).all()) for t in (q, k, v))


def test_autocast_changes_nothing(seed, backend):
    q, k, v = operands(2, 2, 5, 7, 8)
    expected = attention(q, k, v, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        assert attention(q, k, v, backend=backend).equal(expected)


# ---- memory


def in_memory(t: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """The values of [B, H, N, D] in a view, and the NaN-filled memory around it."""
    B, H, N, D = t.shape
    memory = {
        "projection": lambda: torch.empty(B, N, 3, H, D, dtype=t.dtype),
        "offset": lambda: torch.empty(t.numel() + 5, dtype=t.dtype),
        "strided": lambda: torch.empty(2 * B, H, N + 2, 2 * D + 1, dtype=t.dtype),
        "permuted": lambda: torch.empty(D, B, N + 1, H, dtype=t.dtype),
    }[kind]()
    view = {
        "projection": lambda: memory[:, :, 1].transpose(1, 2),
        "offset": lambda: memory[3:-2].view(t.shape),
        "strided": lambda: memory[1::2, :, 1:-1, 1::2],
        "permuted": lambda: memory[:, :, 1:].permute(1, 3, 2, 0),
    }[kind]()
    view.copy_(t)
    assert int(memory.isnan().sum()) == memory.numel() - t.numel()
    return view, memory


KINDS = ("projection", "offset", "strided", "permuted")


@pytest.mark.parametrize("kinds", [*zip(KINDS, KINDS, KINDS, strict=True), ("strided", "permuted", "projection")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_views(seed, backend, dtype, kinds):
    plain = operands(2, 3, 6, 9, 40, dtype)
    views, memories = zip(*(in_memory(t, kind) for t, kind in zip(plain, kinds, strict=True)), strict=True)
    before = [memory.clone() for memory in memories]
    check(attention(*views, backend=backend), *plain)
    for memory, old in zip(memories, before, strict=True):
        torch.testing.assert_close(memory, old, rtol=0, atol=0, equal_nan=True)


# ---- gradients and torch's view


def gradient_sizes(q: Tensor, k: Tensor, v: Tensor, grad: Tensor, scale: float) -> tuple[Tensor, ...]:
    """Σ|terms| of the three gradients."""
    weights = torch.softmax(scale * (q.double() @ k.double().mT), -1)
    q, k, v, grad = (t.double().abs() for t in (q, k, v, grad))
    scores = abs(scale) * weights * (grad @ v.mT + (weights * (grad @ v.mT)).sum(-1, keepdim=True))
    return scores @ k, scores.mT @ q, weights.mT @ grad


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients(seed, backend, dtype):
    for B, H, N, M, D, scale in ((2, 3, 5, 7, 8, None), (1, 1, 1, 1, 1, 0.7), (1, 2, 16, 4, 40, -0.2)):
        tensors = operands(B, H, N, M, D, dtype)
        grad = torch.randn(B, H, N, D).to(dtype)

        def gradients(function, dtype, tensors=tensors, grad=grad, scale=scale):
            leaves = [t.to(dtype).requires_grad_() for t in tensors]
            return torch.autograd.grad(function(*leaves, scale), leaves, grad.to(dtype))

        exact = gradients(oracle, torch.float64)
        theirs = gradients(lambda q, k, v, scale: F.scaled_dot_product_attention(q, k, v, scale=scale), dtype)
        ours = gradients(lambda *a: attention(*a, backend=backend), dtype)
        sizes = gradient_sizes(*tensors, grad, D**-0.5 if scale is None else scale)
        for name, a, b, c, size in zip("qkv", ours, exact, theirs, sizes, strict=True):
            assert a.dtype == dtype
            assert_accurate(a, b, c, size, f"gradient of {name}")


def test_second_gradients(seed):
    q, k, v = (t.double().requires_grad_() for t in operands(1, 2, 3, 4, 5))
    grad = torch.randn_like(q).requires_grad_()
    assert torch.autograd.gradcheck(lambda *a: reference_module.backward(*a, 0.3), (grad, q, k, v))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(seed, backend, dtype):
    q, k, v = (in_memory(t, "projection")[0].requires_grad_() for t in operands(2, 3, 5, 7, 8, dtype))
    torch.library.opcheck(torch.ops.fastdiff.attention.default, (q, k, v, 0.3, backend))


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["auto", "reference", "torch", "native"])
def test_compiled(seed, backend):
    torch._dynamo.reset()
    q, k, v = operands(2, 3, 5, 7, 8)

    def block(q, k, v):
        return attention(2 * q, k, v, backend=backend).transpose(1, 2).flatten(2)

    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    assert compiled(q, k, v).equal(block(q, k, v))
    q.requires_grad_()
    (got,), (expected,) = (torch.autograd.grad(f(q, k, v).square().sum(), [q]) for f in (compiled, block))
    torch.testing.assert_close(got, expected)


# ---- what it refuses


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"q": [1.0]}, TypeError, "q must be a tensor; got list"),
        ({"v": None}, TypeError, "v must be a tensor; got NoneType"),
        ({"q": torch.ones(2, 3, 5, 8, dtype=torch.float64)}, TypeError, "q must be float32, bfloat16 or float16"),
        ({"k": torch.ones(2, 3, 7, 8, dtype=torch.int32)}, TypeError, "k must be float32, bfloat16 or float16"),
        ({"v": torch.ones(2, 3, 7, 8, dtype=torch.float16)}, TypeError, "v must have q's dtype"),
        ({"q": torch.ones(2, 3, 5, 8).to_sparse()}, TypeError, "q must be a dense tensor"),
        ({"q": torch.ones(2, 3, 8)}, ValueError, r"q must have shape \[B, H, N, D\]; got \[2, 3, 8\]"),
        ({"k": torch.ones(6, 7, 8)}, ValueError, r"k must have shape \[B, H, M, D\]"),
        ({"k": torch.ones(1, 3, 7, 8)}, ValueError, r"k must have shape \[2, 3, M, 8\], as q has; got \[1, 3, 7, 8\]"),
        ({"v": torch.ones(2, 1, 7, 8)}, ValueError, r"v must have shape \[2, 3, M, 8\]"),
        ({"k": torch.ones(2, 3, 7, 9)}, ValueError, r"k must have shape \[2, 3, M, 8\]"),
        ({"v": torch.ones(2, 3, 6, 8)}, ValueError, "v must have k's shape"),
        ({"k": torch.ones(2, 3, 0, 8)}, ValueError, "k must have at least one key"),
        ({"q": torch.ones(2, 3, 5, 0)}, ValueError, "q must have heads of 1 to 512 channels"),
        ({"q": torch.ones(2, 3, 5, 513)}, ValueError, "q must have heads of 1 to 512 channels"),
        ({"k": torch.ones(2, 3, 7, 8, device="meta")}, ValueError, "k must be on q's device cpu; got meta"),
        ({"scale": NAN}, ValueError, "scale must be finite; got nan"),
        ({"scale": -math.inf}, ValueError, "scale must be finite"),
        ({"scale": "1"}, TypeError, "scale must be a number or None; got str"),
        ({"scale": True}, TypeError, "scale must be a number or None; got bool"),
    ],
)
def test_refusals(change, error, message):
    q, k, v = operands(2, 3, 5, 7, 8)
    with pytest.raises(error, match=message):
        attention(**{"q": q, "k": k, "v": v} | change)


def test_meta_tensors():
    q = torch.zeros(1, 1, 2, 4, device="meta")
    with pytest.raises(RuntimeError, match="meta tensors hold no numbers"):
        attention(q, q, q)
