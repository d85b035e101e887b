"""The three operators as torch sees them: opcheck, torch.compile, and gradients of the update."""

import dataclasses
import random

import pytest
import torch
from helpers import assert_same_bits
from update_cases import random_case, textbook

import fastdiff
from fastdiff.ops.update import WANTS_ANCHOR, WANTS_INPUT, WANTS_SLOT, WANTS_X0
from fastdiff.plan.plan import Plan, Row

pytestmark = pytest.mark.filterwarnings("ignore:Dynamo detected a call to a `functools.lru_cache`")
SCHEDULE = fastdiff.NoiseSchedule.linear()


def compiled(function, engine="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=engine)


# ---- opcheck


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck_randn(backend, dtype):
    seeds, samples = torch.tensor([5, -1]), torch.tensor([0, (1 << 32) - 1])
    torch.library.opcheck(torch.ops.fastdiff.randn.default, ((2, 3, 5), seeds, samples, 1, 2, dtype, backend))


@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck_add_noise(backend, seed, dtype, given):
    x0 = torch.randn(2, 3, 4, 5).to(dtype).to(memory_format=torch.channels_last).requires_grad_()
    noise = torch.randn(2, 3, 4, 5).to(dtype) if given else None
    t, numbers = torch.tensor([0, 999]), torch.tensor([0, 1])
    coefficients = torch.stack([SCHEDULE.alphas, SCHEDULE.sigmas], dim=1).float()
    arguments = (x0, t, coefficients, noise, numbers, numbers, 3, backend)
    torch.library.opcheck(torch.ops.fastdiff.add_noise.default, arguments)


@pytest.mark.parametrize("number", range(4))
def test_opcheck_update(backend, rng, number):
    rng = random.Random(rng.random() + number)
    case = random_case(rng, 2, (2, 3, 5), rng.choice([torch.float32, torch.bfloat16]), "contiguous")
    row = dataclasses.replace(case.plan[case.row], anchor={"x": 1.0}, slot={"x0": 1.0}, write=2)
    plan = Plan((*case.plan.rows[: case.row], row, *case.plan.rows[case.row + 1 :]))
    o, numbers = case.options, torch.tensor([0, 1])
    variance = torch.randn_like(case.x) if row.log_variance else None
    outputs = [t[:, :2] for t in case.outputs]
    wants = WANTS_ANCHOR + WANTS_SLOT + WANTS_X0 + WANTS_INPUT + (1 << 8)
    rest = [o.get(name) for name in ("noise", "gain", "clip", "gradient", "mask", "known", "known_noise")]
    arguments = (case.x, outputs, variance, plan.table(o.get("guidance", ())), case.row, wants, numbers, numbers,
                 o.get("anchor"), o["slots"], *rest, backend)  # fmt: skip
    torch.library.opcheck(torch.ops.fastdiff.update.default, arguments)


# ---- torch.compile gives the bits of eager


def test_compiled_randn(backend):
    def draw(x):
        return x + fastdiff.randn((3, 5, 7), seed=(1 << 63) + 5, draw=2, stream=1, backend=backend), fastdiff.randn(
            (2, 3, 4, 5), seeds=[1, 2], dtype=torch.bfloat16, memory_format=torch.channels_last, backend=backend
        )

    x = torch.zeros(3, 5, 7)
    for a, b in zip(compiled(draw)(x), draw(x), strict=True):
        assert_same_bits(a, b)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("given", [False, True])
def test_compiled_add_noise(backend, seed, given):
    x0, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    noise = torch.randn_like(x0) if given else None

    def noised(x0, t, noise):
        options = {"noise": noise} if given else {"seed": 9, "draw": 4}
        return fastdiff.add_noise(x0 * 2, t, SCHEDULE, backend=backend, **options)[0] * 2

    assert_same_bits(compiled(noised)(x0, t, noise), noised(x0, t, noise))
    assert_same_bits(compiled(lambda x: fastdiff.add_noise(x, 7, "linear", backend=backend)[0])(x0),
                     fastdiff.add_noise(x0, 7, "linear", backend=backend)[0])  # fmt: skip
    # Under autograd too: the gradient is that of eager.
    grads = []
    for function in (noised, compiled(noised)):
        leaf = x0.clone().requires_grad_()
        function(leaf, t, noise).square().sum().backward()
        grads.append(leaf.grad)
    assert_same_bits(*grads)


@pytest.mark.parametrize("number", range(3))
def test_compiled_update(backend, rng, number):
    rng = random.Random(rng.random() + number)
    case = random_case(rng, 2, (3, 8, 9), torch.bfloat16, "channels_last", number + 1)

    def step(x):
        return [t for t in dataclasses.replace(case, x=x * 2).run(backend) if t is not None]

    eager, traced = step(case.x), compiled(step)(case.x)
    assert len(eager) == len(traced) >= 3
    for a, b in zip(traced, eager, strict=True):
        assert_same_bits(a, b)


def test_compiled_update_refuses_gradients(seed):
    plan = fastdiff.samplers.ddim(SCHEDULE, 3)
    x = torch.randn(2, 3, requires_grad=True)
    step = compiled(lambda x: torch.ops.fastdiff.update(
        x, [x * 2], None, plan.table(), 0, 0, *[torch.zeros(2, dtype=torch.int64)] * 2, None, [None] * 4,
        *[None] * 7, "reference")[0])  # fmt: skip
    with pytest.raises(RuntimeError, match="eagerly for gradients"):
        step(x).sum().backward()


@pytest.mark.slow
def test_inductor_randn_and_add_noise(seed):
    def noised(x0, t):
        return fastdiff.add_noise(x0 * 2, t, SCHEDULE, draw=1)[0] + fastdiff.randn((3, 3, 8, 8), stream=5)

    x0, t = torch.randn(3, 3, 8, 8), torch.tensor([0, 500, 999])
    assert_same_bits(compiled(noised, "inductor")(x0, t), noised(x0, t))


@pytest.mark.slow
def test_inductor_update_loop(seed):
    """A loop of updates around a network without a fused operation: the bits of eager."""
    plan = fastdiff.samplers.ddpm(SCHEDULE, 3, clip=1.0)

    def loop(x):
        for row in range(3):
            x = fastdiff.ops.update(x, x * 0.5, plan, row, seed=3).x
        return x

    x = torch.randn(2, 3, 8, 8)
    assert_same_bits(compiled(loop, "inductor")(x), loop(x))


# ---- gradients of the update, through the reference


@pytest.mark.parametrize("number", range(8))
def test_gradients_of_update(rng, number):
    """float32 autograd, eager, against float64 autograd of the formula as written in the tests."""
    rng = random.Random(rng.random() + number)
    torch.manual_seed(rng.getrandbits(32))
    case = random_case(rng, 2, (2, 3, 4), outputs=number % 4)

    def leaves(dtype):
        case_ = dataclasses.replace(case, options=dict(case.options))
        found = {"x": case.x.to(dtype).requires_grad_()}
        case_.x = found["x"]
        outputs = []
        for k, output in enumerate(case.outputs):
            outputs.append(output.to(dtype).requires_grad_())
            found[f"output {k}"] = outputs[-1]
        case_.outputs = tuple(outputs)
        for name in ("noise", "gain", "clip", "known", "mask"):
            if name in case.options:
                found[name] = case.options[name].to(dtype).requires_grad_()
                case_.options[name] = found[name]
        return case_, found

    wide, exact = leaves(torch.float64)
    result = textbook(wide, torch.float64)
    torch.manual_seed(0)
    weights = {name: torch.randn(case.x.shape, dtype=torch.float64) for name in result}
    sum((result[name] * weights[name]).sum() for name in result).backward()

    case32, got = leaves(torch.float32)
    written = case32.run("auto")
    sum((getattr(written, name) * weights[name].float()).sum() for name in result).backward()
    for name, leaf in got.items():
        a, b = leaf.grad, exact[name].grad
        assert (a is None or not a.any()) == (b is None or not b.any()), name
        if a is not None and b is not None:
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-4 * (1 + float(b.abs().max())), msg=name)


def test_update_needs_the_reference_for_gradients_and_float64(seed):
    plan = Plan((Row(t=0, alpha=1, sigma=0, x={"x": 1.0}, calls_model=False),))
    for x in (torch.zeros(1, 2, requires_grad=True), torch.zeros(1, 2, dtype=torch.float64)):
        with pytest.raises(ValueError, match="backend"):
            fastdiff.ops.update(x, (), plan, 0, backend="native")
