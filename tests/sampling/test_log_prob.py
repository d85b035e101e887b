"""Log-densities of what a run draws: against torch.distributions in float64, the same bits however it was run, and with
gradients from ``fastdiff.log_prob``."""

import dataclasses
import math
from itertools import pairwise

import pytest
import torch
from helpers import Affine, assert_same_bits, history_plan
from torch import nn

import fastdiff
from fastdiff.ops import native
from fastdiff.plan.plan import Plan, Row

SHAPE = (3, 2, 24, 25)  # 1200 elements: two blocks, of which one is not full
ELEMENTS = 1200
LINEAR, FLOW = fastdiff.NoiseSchedule.linear(), fastdiff.FlowSchedule()
SAMPLERS = {
    "ddpm": {"clip": 1.0},
    "ddim": {"eta": 0.7},
    "euler_ancestral": {},
    "dpm2_ancestral": {},
    "dpmpp_sde": {},
    "dpmpp_2m_sde": {},
    "dpmpp_3m_sde": {},
    "sa_solver": {},
    "flow_sde": {},
}


class Network(nn.Module):
    """A convolution, with a learned variance beside its output where ``out`` is twice the channels."""

    def __init__(self, out=2):
        super().__init__()
        self.conv = nn.Conv2d(2, out, 3, padding=1)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x, t, y=None):
        shift = 0 if y is None else y.view(-1, 1, 1, 1)
        return self.dropout(torch.tanh(self.conv(x) + shift) * (0.9 + t.to(x.dtype).view(-1, 1, 1, 1) / 5000))


def plan_of(sampler, schedule=LINEAR, **options):
    options = {**SAMPLERS.get(sampler, {}), **options}
    return getattr(fastdiff.samplers, sampler)(schedule, 5, **options)


def normal(x, mean, sigma):
    return torch.distributions.Normal(mean, sigma).log_prob(x.double()).flatten(1).sum(1)


def mean_of(model, plan, before):
    """x' without its noise, in float64 but for the network."""
    row = plan[before.row]
    outputs = ()
    if row.calls_model:
        t = torch.full((len(before.x),), row.t)
        outputs = model(before.x * row.c_in, t if plan.integer_timesteps else t.float())
    slots = [None if slot is None else slot.double() for slot in before.slots]
    return fastdiff.ops.update(
        before.x.double(), outputs, plan, before.row, slots=slots, noise=torch.zeros_like(before.x).double(),
        anchor=None if before.anchor is None else before.anchor.double(),
    ).x  # fmt: skip


@pytest.mark.parametrize("sampler", list(SAMPLERS))
@torch.no_grad()
def test_every_row_is_normal(seed, sampler):
    plan, model = plan_of(sampler), Network().eval()
    images, got = fastdiff.sample(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True)
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True))
    assert (got.dtype, got.shape) == (torch.float32, (len(plan), 3))
    assert_same_bits(images, fastdiff.sample(model, SHAPE, sampler=plan, seed=seed))
    assert_same_bits(images, states[-1].x)
    for before, after in pairwise(states):
        assert_same_bits(after.log_prob, got[: after.row])
        row = plan[before.row]
        if before.row not in plan.noisy_rows:
            assert_same_bits(got[before.row], torch.zeros(3))
            continue
        exact = normal(after.x, mean_of(model, plan, before), abs(row.x["z"]))
        # x' is rounded to float32, an error of eps·|x'|/σ in each z; the sums are of float32's precision.
        allowed = 1e-6 * ELEMENTS + 1e-7 * float(after.x.abs().max()) / abs(row.x["z"]) * ELEMENTS
        assert float((got[before.row].double() - exact).abs().max()) <= allowed
        again = fastdiff.log_prob(model, before, after, plan)
        assert float((again - got[before.row]).abs().max()) <= max(1e-5 * ELEMENTS, allowed)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m_sde", "learned"])
def test_the_bits_of_any_run(backend, seed, sampler):
    """Of the reference's, of a batch's part, of two threads, channels_last networks and half precision's own."""
    learned = {"variance": "learned_range"} if sampler == "learned" else {}
    plan = plan_of("ddpm" if learned else sampler, **learned)
    arguments = {"sampler": plan, "seed": seed, "return_log_prob": True}
    for model in (
        Network(4 if learned else 2),
        Network(4 if learned else 2).to(memory_format=torch.channels_last),
        Network(4 if learned else 2).to(torch.bfloat16),
    ):
        images, whole = fastdiff.sample(model, SHAPE, backend="reference", **arguments)
        again, got = fastdiff.sample(model, SHAPE, backend=backend, **arguments)
        assert_same_bits(again, images)
        assert_same_bits(got, whole)
        with native.cpu_threads(2):
            assert_same_bits(fastdiff.sample(model, SHAPE, backend=backend, **arguments)[1], whole)
    if not learned:  # a network's own bits depend on its batch; this one's do not
        whole = fastdiff.sample(Affine(), SHAPE, backend=backend, **arguments)[1]
        part = fastdiff.sample(Affine(), (1, *SHAPE[1:]), backend=backend, sample_offset=2, **arguments)[1]
        assert_same_bits(part, whole[:, 2:])


def test_learned_variance(seed):
    """σ is each element's own, and so are its gradients."""
    plan, model = plan_of("ddpm", variance="learned_range"), Network(4)
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True))
    for before, after in pairwise(states[:-1]):
        row = plan[before.row]
        with torch.no_grad():
            out = model.eval()(before.x, torch.full((3,), row.t)).double()
        model.train()
        fraction, (low, high) = (out[:, 2:] + 1) / 2, row.log_variance
        sigma = (0.5 * (fraction * high + (1 - fraction) * low)).exp()
        bare = dataclasses.replace(row, log_variance=None)
        mean = fastdiff.ops.update(
            before.x.double(), out[:, :2], Plan((bare,)), 0, noise=torch.zeros_like(out[:, :2])
        ).x
        exact = normal(after.x, mean, sigma)
        assert float((states[-1].log_prob[before.row] - exact).abs().max()) < 1e-5 * ELEMENTS
        got = fastdiff.log_prob(model, before, after, plan)
        assert float((got.detach() - exact).abs().max()) < 1e-5 * ELEMENTS
        got.sum().backward()
    assert all(bool(p.grad.abs().max() > 0) for p in model.parameters())


def away_from_clip(model, row, x):
    """Whether no element of x̂_0 is so near to its bound, where the slope jumps, that rounding decides its side."""
    with torch.no_grad():
        out = model(x * row.c_in, torch.full((len(x),), row.t))[:, :2]
    bound = math.inf if row.clip is None else row.clip
    return bool(((row.p * x + row.q * out).abs() - bound).abs().min() > 1e-4)


@pytest.mark.parametrize("sampler", [*SAMPLERS, "learned"])
def test_gradients(seed, sampler):
    """Along a random direction in the parameters, against the float64 difference of the oracle's."""
    learned = {"variance": "learned_range"} if sampler == "learned" else {}
    plan, model = plan_of("ddpm" if learned else sampler, **learned), Network(4 if learned else 2)
    row = plan.noisy_rows[1]
    for tried in range(8):
        states = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed + tried))
        before, after = states[row], states[row + 1]
        if not plan[row].calls_model or away_from_clip(model, plan[row], before.x):
            break
    fastdiff.log_prob(model, before, after, plan).sum().backward()
    if not plan[row].calls_model:
        return
    direction = [torch.randn_like(p) for p in model.parameters()]
    slope = sum(float((p.grad.double() * d).sum()) for p, d in zip(model.parameters(), direction, strict=True))
    double = Network(4 if learned else 2).double().eval()

    def value(step):
        double.load_state_dict(
            {n: p.double() + step * d for (n, p), d in zip(model.named_parameters(), direction, strict=True)}
        )
        with torch.no_grad():
            out = double(before.x.double() * plan[row].c_in, torch.full((3,), plan[row].t))
        sigma, bare = torch.tensor(abs(plan[row].x["z"])), plan[row]
        if learned:
            fraction, (low, high) = (out[:, 2:] + 1) / 2, plan[row].log_variance
            out, sigma = out[:, :2], (0.5 * (fraction * high + (1 - fraction) * low)).exp()
            bare = dataclasses.replace(bare, log_variance=None)
        slots = [None if slot is None else slot.double() for slot in before.slots]
        mean = fastdiff.ops.update(
            before.x.double(), out, Plan((bare,)), 0, slots=slots, noise=torch.zeros_like(out),
            anchor=None if before.anchor is None else before.anchor.double(),
        ).x  # fmt: skip
        return float(normal(after.x, mean, sigma).sum())

    step = 1e-8  # within a longer one an element of x̂_0 may reach the clip
    difference = (value(step) - value(-step)) / (2 * step)
    size = sum(float((p.grad.double() * d).abs().sum()) for p, d in zip(model.parameters(), direction, strict=True))
    assert abs(slope - difference) < 1e-3 * size


def test_gradients_are_the_plain_network_s_after_accelerate(seed):
    digits = fastdiff.models.digits()
    arguments = {"class_labels": torch.tensor([3, 5])}
    plan = fastdiff.samplers.ddpm(digits.sampling["schedule"], 5, clip=1.0)
    x, x_prev = torch.randn(2, 1, 8, 8), torch.randn(2, 1, 8, 8)

    def gradient():
        digits.unet.zero_grad()
        got = fastdiff.log_prob(digits.unet, x, x_prev, plan, 2, model_kwargs=arguments)
        got.sum().backward()
        return got.detach(), [p.grad.clone() for p in digits.unet.parameters()]

    plain = gradient()
    fastdiff.accelerate(digits.unet)
    got = gradient()
    fastdiff.restore(digits.unet)
    assert_same_bits(got[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(got[1], plain[1], strict=True))


def test_guidance(seed):
    """The same keywords as sample's give the same numbers, and gradients of both calls."""
    plan, model, y = plan_of("ddpm"), Network(), torch.tensor([0.3, -0.2, 0.5])
    guided = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": 0 * y}, "guidance_scale": 3.0}
    for more in ({}, {"guidance_interval": (0.5, 2.0)}, {"cond_fn": lambda x, t, y: -0.1 * x},
                 {"guidance_rescale": 0.5}, {"thresholding": 0.9}):  # fmt: skip
        run = plan_of("ddpm", clip=None) if "thresholding" in more else plan
        told = {**guided, **more}
        states = list(fastdiff.sample_iter(model, SHAPE, sampler=run, seed=seed, return_log_prob=True, **told))
        for row in run.noisy_rows:
            with torch.no_grad():
                got = fastdiff.log_prob(model, states[row], states[row + 1], run, **told)
            assert float((got - states[-1].log_prob[row]).abs().max()) < 1e-5 * ELEMENTS
        without_gradient = {"guidance_rescale", "thresholding"} & set(more)
        if without_gradient:
            with pytest.raises(ValueError, match=f"{without_gradient.pop()} has no gradient here"):
                fastdiff.log_prob(model, states[0], states[1], run, **told)
        else:
            fastdiff.log_prob(model, states[row], states[row + 1], run, **told).sum().backward()


def test_noise_of_any_source(seed):
    """torch's generators, a function's and seeds of one's own: the densities are of the noise that was drawn."""
    model, plan, z = Network(), plan_of("ddpm"), torch.randn(SHAPE)
    generator, some = torch.Generator().manual_seed(1), {"noise_fn": lambda stream, draw, shape: z * (draw + 1)}
    for source in ({"generator": generator}, some, {"seeds": [5, 2**64 - 1, 5]}):
        _, got = fastdiff.sample(model, SHAPE, sampler=plan, return_log_prob=True, **source)
        if "noise_fn" in source:
            for row in plan.noisy_rows:
                exact = normal(z * (row + 1) * plan[row].x["z"], 0.0, plan[row].x["z"])
                torch.testing.assert_close(got[row].double(), exact, rtol=1e-6, atol=1e-3)
    _, same = fastdiff.sample(model, SHAPE, sampler=plan, return_log_prob=True, seeds=[5] * 3)
    assert_same_bits(got[:, 0], same[:, 2])


@pytest.mark.parametrize("sampler", ["ddpm", "history", "sa_solver"])
def test_a_run_that_goes_on(seed, tmp_path, sampler):
    """From a state or its file; the rows before are those of the first run."""
    plan = history_plan() if sampler == "history" else plan_of(sampler)
    arguments = {"sampler": plan, "seed": seed, "return_log_prob": True}
    model = Network()
    images, whole = fastdiff.sample(model, SHAPE, **arguments)
    for state in fastdiff.sample_iter(model, SHAPE, **arguments):
        again = fastdiff.State.load(state.save(tmp_path / "state.safetensors"))
        assert_same_bits(again.log_prob, whole[: state.row])
        if state.row <= max(plan.noisy_rows):
            got = fastdiff.sample(model, SHAPE, resume=again, **arguments)
            assert_same_bits(got[0], images)
            assert_same_bits(got[1], whole)
    forgetful = next(iter(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed)))
    with pytest.raises(ValueError, match="resume has no log_prob"):
        fastdiff.sample(model, SHAPE, resume=forgetful, **arguments)
    short = dataclasses.replace(again, row=2, log_prob=torch.zeros(1, 3))
    with pytest.raises(ValueError, match=r"resume.log_prob must be a tensor of shape \[2, 3\]; got|shape \[2, 3\]"):
        fastdiff.sample(model, SHAPE, resume=short, **arguments)


def test_callbacks_and_beginnings(seed):
    model, plan, seen = Network(), plan_of("ddpm"), []
    options = {"sampler": plan, "seed": seed, "return_log_prob": True}
    images, whole = fastdiff.sample(model, SHAPE, callback=lambda state: seen.append(state.log_prob), **options)
    for row, log_prob in enumerate(seen):
        assert_same_bits(log_prob, whole[: row + 1])

    def stop(state):
        if state.row == 3:
            raise StopIteration

    _, part = fastdiff.sample(model, SHAPE, callback=stop, **options)
    assert_same_bits(part, whole[:3])
    # Rows before start_step were not run.
    _, late = fastdiff.sample(model, SHAPE, x_init=images.clamp(-1, 1), start_step=2, **options)
    assert not late[:2].any()
    assert_same_bits(late[2:], whole[2:])  # the same noise
    assert fastdiff.sample(model, SHAPE, sampler=plan, seed=seed).shape == SHAPE
    empty = fastdiff.sample(model, (0, *SHAPE[1:]), **options)
    assert (tuple(empty[0].shape), tuple(empty[1].shape)) == ((0, *SHAPE[1:]), (5, 0))


def test_a_row_without_a_call(seed):
    """Noise alone: its density is that of the noise, and needs no network."""
    plan = Plan((Row(t=3, alpha=1, sigma=1, x={"x": 0.5, "z": -0.25}, calls_model=False), *plan_of("ddpm").rows[1:]))
    model = Network()
    states = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True))
    exact = normal(states[1].x, states[0].x.double() * 0.5, 0.25)
    torch.testing.assert_close(states[1].log_prob[0].double(), exact, rtol=1e-6, atol=1e-3)
    got = fastdiff.log_prob(lambda x, t: 1 / 0, states[0].x, states[1].x, plan, 0)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=1e-3)


# ---- what is refused


def test_what_sample_refuses(seed):
    model, plan = Network(), plan_of("ddpm")
    hides = Plan((dataclasses.replace(plan[0], anchor={"z": 1.0}, x={"x": 1.0}), *plan.rows[1:]))
    state = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed, return_log_prob=True))[4]
    for options, error, names in (
        ({"sampler": "ddim"}, ValueError, "the plan 'ddim' is deterministic from row 0 on"),
        ({"sampler": "heun", "steps": 3}, ValueError, "the plan 'heun' is deterministic"),
        ({"sampler": plan, "resume": state, "seed": seed}, ValueError, "is deterministic from row 4 on"),
        ({"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE)}, ValueError, "goes without mask"),
        ({"return_log_prob": 1}, TypeError, "return_log_prob must be a bool; got int"),
        ({"sampler": hides}, ValueError, "row 0 of the plan 'custom' draws noise into its history alone"),
    ):
        with pytest.raises(error, match=names):
            fastdiff.sample(model, SHAPE, **{"return_log_prob": True, **options})


def test_what_log_prob_refuses(seed):
    model, plan, x = Network(), plan_of("ddpm"), torch.randn(SHAPE)
    multistep = plan_of("dpmpp_2m_sde")
    state = list(fastdiff.sample_iter(model, SHAPE, sampler=plan, seed=seed))[1]
    for arguments, error, names in (
        ((x, x, plan, 4), ValueError, r"row 4 of the plan 'ddpm' is deterministic.*those that draw, 0, 1, 2 … 3"),
        ((x, x, plan.reuse([1]), 1), ValueError, "row 1 of the plan 'ddpm' reuses what an earlier call made"),
        ((x, x, plan_of("ddim", eta=0.0), 0), ValueError, "row 0 of the plan 'ddim' is deterministic.*draw, none"),
        ((x, x, plan), ValueError, "row must say which row"),
        ((x, x, plan, 5), ValueError, "row must be"),
        ((state, x, plan, 2), ValueError, "row is 2, but the state stands before row 1"),
        ((state, x, multistep), ValueError, "its plan is 'ddpm"),
        ((x, x, multistep, 1), ValueError, "row 1 of the plan 'dpmpp_2m_sde' reads slot 0: give the State"),
        ((x, x[:2], plan, 1), ValueError, r"x_prev must be like the state, \[3, 2, 24, 25\]"),
        ((x, x.clone().requires_grad_(), plan, 1), ValueError, r"x_prev requires a gradient.*x_prev.detach\(\)"),
        ((x, x * math.nan, plan, 1), ValueError, "x_prev must be finite"),
        ((x.long(), x, plan, 1), TypeError, "state must be a floating-point tensor or a State"),
        (("x", x, plan, 1), TypeError, "state must be a floating-point tensor or a State; got str"),
        ((x, x, "ddpm", 1), TypeError, "plan must be a Plan"),
    ):
        with pytest.raises(error, match=names):
            fastdiff.log_prob(model, *arguments)
    with pytest.raises(TypeError):
        fastdiff.log_prob(model, x, x, plan, 1, mask=x)
    assert model.training
