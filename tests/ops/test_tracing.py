"""What records or transforms operations sees ours: jit.trace, make_fx, fake tensors, torch.func, forward-mode AD."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.ops.add_noise import add_noise
from fastdiff.ops.attention import attention
from fastdiff.ops.conv2d import conv2d
from fastdiff.ops.conv_epilogue import conv_epilogue
from fastdiff.ops.group_norm_silu import group_norm_silu
from fastdiff.ops.randn import randn
from fastdiff.ops.update import update

pytestmark = pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
SHAPE = (2, 4, 6, 6)
PLAN = fastdiff.samplers.ddim(fastdiff.NoiseSchedule.linear(), 3)


def functions():
    torch.manual_seed(5)
    shift, weight = torch.randn(4), torch.randn(8, 4, 3, 3)
    return {
        "group_norm_silu": lambda x: group_norm_silu(x, shift, shift, 2, add=shift),
        "conv_epilogue": lambda x: conv_epilogue(x, bias=shift, residual=x, scale=0.7),
        "attention": lambda x: attention(x, x, x),
        "conv2d": lambda x: conv2d(x, weight, padding=1),
        "add_noise": lambda x: add_noise(x, 5, "linear")[0],
        "update": lambda x: update(x, x * 0.5, PLAN, 0).x,
        "randn": lambda x: x + randn(SHAPE, seed=3),
    }


NAMES = list(functions())


@pytest.fixture(params=NAMES)
def f(request, seed):
    return functions()[request.param]


def agree(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_jit_trace(f, request):
    x, other = torch.randn(SHAPE), torch.randn(SHAPE)
    if "update" in request.node.name:
        with pytest.raises(RuntimeError, match="cannot be recorded by torch"):
            torch.jit.trace(f, x, check_trace=False)
        return
    with torch.no_grad():
        traced = torch.jit.trace(f, x, check_trace=False)
    torch.full((4096,), float("nan"))
    agree(traced(other), f(other))


def test_make_fx(f):
    x, other = torch.randn(SHAPE), torch.randn(SHAPE)
    agree(make_fx(f)(x)(other), f(other))
    fake = make_fx(f, tracing_mode="fake", _allow_non_fake_inputs=True)(x)
    agree(fake(other), f(other))


def test_fake_tensors(f):
    x = torch.randn(SHAPE)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = f(mode.from_tensor(x))
    assert y.shape == f(x).shape
    assert y.stride() == f(x).stride()


def test_a_dispatch_mode_sees_the_operation(f):
    names: list[str] = []

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(str(function))
            return function(*args, **(kwargs or {}))

    with Seen():
        f(torch.randn(SHAPE))
    assert any(name.startswith(("fastdiff.", "aten.convolution")) for name in names), names


def test_vmap(f):
    xs = torch.randn(3, *SHAPE)
    agree(torch.func.vmap(f)(xs), torch.stack([f(x) for x in xs]))


def test_jvp(f):
    x, tangent, step = torch.randn(SHAPE), torch.randn(SHAPE), 1e-2
    y, derivative = torch.func.jvp(f, (x,), (tangent,))
    agree(y, f(x))
    difference = (f(x + step * tangent) - f(x - step * tangent)) / (2 * step)
    torch.testing.assert_close(derivative, difference, rtol=0.02, atol=0.02)
    with forward_ad.dual_level():
        dual = f(forward_ad.make_dual(x, tangent))
        agree(forward_ad.unpack_dual(dual).tangent, derivative)


def test_func_grad(f):
    x = torch.randn(SHAPE)
    leaf = x.clone().requires_grad_()
    f(leaf).square().sum().backward()
    torch.testing.assert_close(torch.func.grad(lambda x: f(x).square().sum())(x), leaf.grad, rtol=1e-4, atol=1e-4)


def test_inference_mode(f):
    x = torch.randn(SHAPE)
    with torch.inference_mode():
        y = f(x)
    agree(y.clone(), f(x))
