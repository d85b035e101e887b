"""Classifier guidance: Dhariwal & Nichol's two algorithms as guided-diffusion writes them, and the plan's rewriting."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits
from torch import nn

import fastdiff
from fastdiff.plan.plan import Plan, Row
from fastdiff.sampling.classifier_guidance import guided_by_gradient
from fastdiff.sampling.request import check_graph

SHAPE = (3, 2, 5, 7)
LINEAR = fastdiff.NoiseSchedule.linear()
SHORT = fastdiff.NoiseSchedule.linear(12, 1e-3, 0.3)
SCALE = 3.0


class Classifier(nn.Module):
    """A small network of x and t that knows four classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(2, 8, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(8 * 35, 4))

    def forward(self, x, t):
        return self.body(x / (1 + x.abs())) * (1 + t.to(x.dtype)[:, None] / 1000)

    def gradient(self, x, t, y):
        """guided-diffusion's cond_fn."""
        x = x.detach().requires_grad_(True)
        chosen = self(x, t).log_softmax(-1)[range(len(x)), y]
        return torch.autograd.grad(chosen.sum(), x)[0] * SCALE


@pytest.fixture
def classifier(seed):
    return Classifier()


LABELS = torch.tensor([0, 3, 1])


def model(x, t, y=None):
    """ε̂, smooth in x."""
    return torch.tanh(x) * (0.9 + t.to(x.dtype).view(-1, 1, 1, 1) / 5000)


def double(classifier: Classifier) -> Classifier:
    copy = Classifier().double()
    copy.load_state_dict(classifier.state_dict())
    return copy


def close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range", "learned"])
@pytest.mark.parametrize("clip", [None, 1.0])
def test_ddpm_is_condition_mean(classifier, seed, variance, clip):
    """Algorithm 1: mean + variance·g, the variance as guided-diffusion has it, at index 0 too."""
    learned = variance.startswith("learned")

    def network(x, t, y):
        v = torch.sin(3 * x) - (2 if variance == "learned" else 0)
        return torch.cat([model(x, t), v], dim=1) if learned else model(x, t)

    got = fastdiff.sample(
        network, SHAPE, sampler="ddpm", schedule=SHORT, variance=variance, clip=clip, seed=seed,
        model_kwargs={"y": LABELS}, cond_fn=classifier.gradient,
    )  # fmt: skip
    exact = double(classifier)
    betas, bars = SHORT.betas, SHORT.alphas_cumprod
    before = torch.cat([torch.ones(1, dtype=torch.float64), bars[:-1]])
    posterior = betas * (1 - before) / (1 - bars)
    clipped = torch.cat([posterior[1:2], posterior[1:]]).log()
    x = fastdiff.randn(SHAPE, seed=seed).double()
    for i, t in enumerate(reversed(range(12))):
        ts = torch.full((3,), t)
        out = network(x, ts, LABELS)
        m, v = out.chunk(2, dim=1) if learned else (out, None)
        x0 = (x - (1 - bars[t]).sqrt() * m) / bars[t].sqrt()
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        mean = before[t].sqrt() * betas[t] / (1 - bars[t]) * x0
        mean = mean + (1 - betas[t]).sqrt() * (1 - before[t]) / (1 - bars[t]) * x
        if variance == "fixed_small":
            square, log = posterior[t], clipped[t]
        elif variance == "fixed_large":
            square = torch.cat([posterior[1:2], betas[1:]])[t]
            log = square.log()
        else:
            f = (v + 1) / 2
            log = v if variance == "learned" else f * betas[t].log() + (1 - f) * clipped[t]
            square = log.exp()
        mean = mean + square * exact.gradient(x, ts, LABELS)
        z = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        x = mean + (t != 0) * (0.5 * log).exp() * z
    close(got, x)
    plain = fastdiff.sample(network, SHAPE, schedule=SHORT, variance=variance, clip=clip, seed=seed,
                            model_kwargs={"y": LABELS})  # fmt: skip
    assert float((got - plain).abs().max()) > 1e-2


@pytest.mark.parametrize(("eta", "clip"), [(0.0, None), (0.7, None), (0.0, 1.0), (0.7, 1.0)])
def test_ddim_is_condition_score(classifier, seed, eta, clip):
    """Algorithm 2, as guided-diffusion writes it: ε from the clipped x̂_0, less σ g, and x̂_0 from that again."""
    plan = fastdiff.samplers.ddim(LINEAR, 6, eta=eta, clip=clip, use_clipped_model_output=True)
    got = fastdiff.sample(
        model, SHAPE, sampler=plan, seed=seed, model_kwargs={"y": LABELS}, cond_fn=classifier.gradient
    )
    exact = double(classifier)
    x = fastdiff.randn(SHAPE, seed=seed).double()
    bars = [float(LINEAR.alphas_cumprod[int(t)]) for t in plan.timesteps] + [1.0]
    for i, (bar, bar_p) in enumerate(itertools.pairwise(bars)):
        t = torch.full((3,), int(plan[i].t))
        x0 = (x - math.sqrt(1 - bar) * model(x, t)) / math.sqrt(bar)
        if clip is not None:
            x0 = x0.clamp(-clip, clip)
        epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar)
        epsilon = epsilon - math.sqrt(1 - bar) * exact.gradient(x, t, LABELS)
        x0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
        sigma = eta * math.sqrt((1 - bar_p) / (1 - bar) * (1 - bar / bar_p))
        z = fastdiff.randn(SHAPE, seed=seed, stream=1, draw=i).double()
        x = math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - sigma**2) * epsilon + sigma * z
    close(got, x)


# ---- the plan's rewriting


def two_step(base: Plan) -> Plan:
    """Adams–Bashforth on ε with an anchor, to have rows that read a history of every kind."""
    rows = []
    for i, row in enumerate(base):
        x = dict(row.x)
        if i:
            x |= {"slot0": -0.2, "anchor": 0.1}
        rows.append(
            Row(
                t=row.t, alpha=row.alpha, sigma=row.sigma, p=row.p, q=row.q, c_in=row.c_in, x=x,
                slot={"x0": 0.7, "m": 0.3}, write=0, reads=(0,), anchor={"x": 0.5, "x0": 0.2, "m": 0.1},
            )
        )  # fmt: skip
    return Plan(tuple(rows), init_sigma=base.init_sigma)


SCHEDULES = {"vp": LINEAR, "edm": fastdiff.EDMSchedule(), "flow": fastdiff.FlowSchedule()}


@pytest.mark.parametrize("schedule", ["vp", "edm", "flow"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample", "flow_prediction", "edm", "score"])
def test_every_combination_moves_with_epsilon(seed, schedule, prediction):
    """A guided row is the row on the output that means ε − σ g: x', the anchor and the slot alike."""
    walk = SCHEDULES[schedule]
    base = fastdiff.samplers.ddim(
        walk, prediction=prediction, eta=0.5, spacing=fastdiff.Spacing(sigmas=[0.95, 0.8, 0.5, 0.2, 0.1, 0.0])
    )
    for plan in (base, two_step(base)):
        guided = guided_by_gradient(plan)
        assert guided is guided_by_gradient(plan)  # so that tables are kept
        for i, row in enumerate(plan):
            x, m, g, z, anchor, slot = torch.randn(6, *SHAPE, dtype=torch.float64)
            m, old = m.float(), {"noise": z, "anchor": anchor, "slots": [slot, None, None, None]}
            got = fastdiff.ops.update(x, m, guided, i, gradient=g, **old)
            # x̂_0 + σ²/α·g as p x + q m': the output that says so. In float64 networks' outputs may be too.
            m_moved = m.double() + row.sigma**2 / row.alpha / row.q * g
            exact = fastdiff.ops.update(x, m_moved, plan, i, **old)
            for name in ("x", "anchor", "slot"):
                a, b = getattr(got, name), getattr(exact, name)
                if b is not None:
                    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * float(b.abs().max()))


def test_rows_without_a_call_and_without_signal():
    up = Row(t=5, alpha=0.9, sigma=0.4, x={"x": 0.5, "z": 0.8}, calls_model=False)
    call = Row(t=5, alpha=0.5, sigma=0.8, x={"x0": 1.0}, p=2.0, q=-1.6)
    plan = guided_by_gradient(Plan((up, call)))
    assert plan[0] is up
    assert plan[1].x["g"] == pytest.approx(0.8**2 / 0.5)
    flow = fastdiff.samplers.ddim(fastdiff.FlowSchedule(), 3, prediction="flow_prediction", spacing=None)
    assert [row.uses("g") for row in guided_by_gradient(flow)] == [False, True, True]
    with pytest.raises(ValueError, match="gradient already"):
        guided_by_gradient(plan)


def test_a_plan_with_its_own_gradient(seed):
    plan = Plan((Row(t=5, alpha=0.5, sigma=0.8, x={"x": 1.0, "g": 2.0}, p=1.0),))
    got = fastdiff.sample(model, SHAPE, sampler=plan, seed=seed, cond_fn=lambda x, t: x * 0.25)
    assert_same_bits(got, fastdiff.randn(SHAPE, seed=seed) * 1.5)
    with pytest.raises(ValueError, match="cond_fn"):
        fastdiff.sample(model, SHAPE, sampler=plan)


# ---- the loop


def test_what_cond_fn_is_given(seed):
    """The float32 state itself, not scaled by c_in, gradients on; t and the conditional keywords, not stacked."""
    seen, shown = [], []

    def cond_fn(x, t, y):
        assert torch.is_grad_enabled()
        seen.append((x.clone(), t.clone(), y))
        return torch.zeros_like(x, dtype=torch.float64)

    def network(x, t, y):
        shown.append((x.clone(), t.clone()))
        return x * 0.5

    plan = fastdiff.samplers.ddim(fastdiff.EDMSchedule(), 4, prediction="sample", spacing=None)
    y = torch.tensor([1.0, 2.0, 3.0])
    options = {"sampler": plan, "seed": seed, "model_dtype": torch.bfloat16, "model_kwargs": {"y": y},
               "uncond_kwargs": {"y": y * 0}, "guidance_scale": 2.0}  # fmt: skip
    states = list(fastdiff.sample_iter(network, SHAPE, cond_fn=cond_fn, **options))
    assert_same_bits(states[-1].x, fastdiff.sample(network, SHAPE, **options))
    for i, (x, t, labels) in enumerate(seen):
        assert_same_bits(x, states[i].x if i else fastdiff.randn(SHAPE, seed=seed) * plan.init_sigma)
        assert_same_bits((x * plan[i].c_in).bfloat16(), shown[i][0][:3])
        assert_same_bits(t, shown[i][1][:3])
        assert labels is y


@pytest.mark.parametrize("options", [{"sampler": "ddpm", "clip": 1.0}, {"sampler": "ddim", "eta": 0.5},
                                     {"sampler": "ddpm", "variance": "learned_range"}])  # fmt: skip
def test_backends_prefix_and_resume(simd, seed, options):
    def network(x, t):
        m = x * 0.5 + 0.1
        return torch.cat([m, x * 0.2], dim=1) if "variance" in options else m

    def cond_fn(x, t):
        return x * -0.3 + t.view(-1, 1, 1, 1) * 1e-3

    arguments = {"steps": 9, "seed": seed, "cond_fn": cond_fn, **options}
    whole = fastdiff.sample(network, SHAPE, backend="native", **arguments)
    assert_same_bits(whole, fastdiff.sample(network, SHAPE, backend="reference", **arguments))
    part = fastdiff.sample(network, (1, *SHAPE[1:]), sample_offset=2, backend="native", **arguments)
    assert_same_bits(part, whole[2:])
    for state in list(fastdiff.sample_iter(network, SHAPE, backend="native", **arguments))[2::4]:
        assert_same_bits(fastdiff.sample(network, SHAPE, resume=state, backend="native", **arguments), whole)


def test_no_graph():
    draws = type("NoiseSource", (), {"from_stream": True})()
    with pytest.raises(ValueError, match="cond_fn"):
        check_graph(True, torch.device("cuda"), draws, None, lambda x, t: x, False)


@pytest.mark.parametrize(
    ("cond_fn", "error", "names"),
    [
        (3, TypeError, "cond_fn must be callable"),
        (lambda x, t: 1.0, TypeError, "cond_fn must return a tensor"),
        (lambda x, t: x[:1], ValueError, "cond_fn must return"),
        (lambda x, t: x.long(), ValueError, "cond_fn must return"),
        (lambda x, t: x.mul_(2), ValueError, "in place"),
    ],
)
def test_refuses(cond_fn, error, names):
    with pytest.raises(error, match=names):
        fastdiff.sample(model, SHAPE, steps=3, cond_fn=cond_fn)
