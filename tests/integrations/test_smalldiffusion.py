"""smalldiffusion's samples: against a float64 formula, and against the library where it is installed."""

import itertools
import math

import pytest
import torch
from torch import nn

import fastdiff
from fastdiff.integrations.smalldiffusion import plan_of, samples

SIGMAS = (40.0, 17.5, 6.0, 2.0, 0.7, 0.11, 0.02)


class Network(nn.Module):
    """smooth, noise-predicting, with a null class 3; counts the images that it was shown."""

    input_dims = (2, 5)

    def __init__(self, dropout=0.0):
        super().__init__()
        self.cond_embed = nn.Module()
        self.cond_embed.null_cond = 3
        self.dropout = nn.Dropout(dropout)
        self.shown = []

    def rand_input(self, batchsize):
        return torch.randn(batchsize, *self.input_dims)

    def predict_eps(self, x, sigma, cond=None):
        assert sigma.shape == ()
        assert sigma.dtype == x.dtype
        self.shown.append(len(x))
        shift = 0.3 if cond is None else 0.1 * cond.to(x.dtype).view(-1, 1, 1)
        return self.dropout(torch.tanh(x / (sigma**2 + 1).sqrt() + shift))

    def predict_eps_cfg(self, x, sigma, cond, cfg_scale):  # what the library's loop calls, by its documentation
        if cond is None or cfg_scale == 0:
            return self.predict_eps(x, sigma, cond)
        uncond = self.predict_eps(x, sigma, torch.full_like(cond, self.cond_embed.null_cond))
        with_cond = self.predict_eps(x, sigma, cond)
        return with_cond + cfg_scale * (with_cond - uncond)


def formula(model, sigmas, gam, mu, noise, cond=None, w=0.0):
    """x after each step in float64; ``noise`` is z of x_T, then one tensor a step."""
    x, before, states = noise[0] * sigmas[0], None, []
    for z, (sigma, following) in zip(noise[1:], itertools.pairwise(sigmas), strict=True):
        epsilon = model.predict_eps_cfg(x, torch.tensor(sigma, dtype=torch.float64), cond, w)
        average = epsilon if before is None else gam * epsilon + (1 - gam) * before
        target = math.exp((math.log(following) - mu * math.log(sigma)) / (1 - mu)) if following else 0.0
        x = x + (target - sigma) * average + math.sqrt(max(following**2 - target**2, 0.0)) * z
        before = epsilon
        states.append(x)
    return states


def drawn(seed, count, batch=4):
    torch.manual_seed(seed)
    return [torch.randn(batch, *Network.input_dims).double() for _ in range(count)]


def close(ours, exact):
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert float((a - b).abs().max()) <= 1e-5 * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("sigmas", [SIGMAS, (*SIGMAS, 0.0)], ids=["ends noisy", "ends at 0"])
@pytest.mark.parametrize(("gam", "mu"), [(1, 0.5), (1, 0), (2, 0), (1.5, 0.3)])
def test_formula(seed, gam, mu, sigmas):
    model = Network()
    exact = formula(model, sigmas, gam, mu, drawn(seed, len(sigmas)))
    torch.manual_seed(seed)
    if mu:
        ours = list(samples(model, torch.tensor(sigmas, dtype=torch.float64), gam, mu, batchsize=4))
    else:  # nothing is drawn but x_T
        ours = list(samples(model, torch.tensor(sigmas), gam=gam, xt=model.rand_input(4) * sigmas[0]))
    close(ours, exact)


def test_guidance_scale_is_one_more_than_theirs(seed):
    model, cond = Network(), torch.tensor([0, 1, 2, 1])
    exact = formula(model, SIGMAS, 1, 0.5, drawn(seed, len(SIGMAS)), cond, w=2.5)
    model.shown.clear()
    torch.manual_seed(seed)
    close(samples(model, SIGMAS, 1, 0.5, 2.5, batchsize=4, cond=cond), exact)
    assert model.shown == [8] * (len(SIGMAS) - 1)  # both calls in one
    model.shown.clear()
    exact = formula(model, SIGMAS, 1, 0.5, drawn(seed, len(SIGMAS)), cond)
    torch.manual_seed(seed)
    close(samples(model, SIGMAS, 1, 0.5, batchsize=4, cond=cond), exact)


def test_ddim_is_ours(seed):
    """gam = 1, mu = 0 on the VE states is ``ddim`` on the VP states of the same levels, scaled."""
    x = torch.randn(3, 2, 5)
    sigmas = (*SIGMAS, 0.0)
    schedule = fastdiff.NoiseSchedule.from_alphas_cumprod([1 / (1 + s * s) for s in sigmas[-2::-1]])
    *_, ve = samples(Network(), sigmas, xt=x * sigmas[0])
    told = torch.tensor(sigmas[-2::-1])

    def vp(y, t):
        sigma = told[t[0]]
        return Network().predict_eps(y * (1 + sigma**2).sqrt(), sigma)

    first = x * sigmas[0] / math.sqrt(1 + sigmas[0] ** 2)
    state = fastdiff.State(first, None, None, (None,) * 4, 0)
    torch.testing.assert_close(ve, fastdiff.sample(vp, x.shape, sampler="ddim", schedule=schedule, resume=state))


def test_eval_mode_and_sources_of_noise(seed):
    model = Network(dropout=0.5).train()
    torch.manual_seed(seed)
    plain = [x.clone() for x in samples(model, SIGMAS, mu=0.5, batchsize=2)]
    assert model.dropout.training
    torch.manual_seed(seed)
    close(samples(Network(), SIGMAS, mu=0.5, batchsize=2), [x.double() for x in plain])
    *_, two = samples(model, SIGMAS, mu=0.5, batchsize=2, seed=5)
    *_, four = samples(model, SIGMAS, mu=0.5, batchsize=4, seed=5)
    assert torch.equal(two, four[:2])
    z = fastdiff.randn((2, *Network.input_dims), seed=5)
    assert torch.equal(next(samples(model, SIGMAS, batchsize=2, seed=5, xt=z * SIGMAS[0])), next(
        samples(model, SIGMAS, batchsize=2, seed=5)))  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "what"),
    [
        ({"sigmas": [1.0, 2.0]}, "sigmas"),
        ({"sigmas": [1.0]}, "sigmas"),
        ({"sigmas": [1.0, -1.0]}, "sigmas"),
        ({"mu": 1.0}, "mu"),
        ({"mu": -0.1}, "mu"),
        ({"gam": math.inf}, "gam"),
        ({"cfg_scale": 2.0}, "cfg_scale"),
        ({"cond": torch.tensor([1])}, "cond"),
        ({"seed": 1, "generator": torch.Generator()}, "generator"),
    ],
)
def test_bad_input(arguments, what):
    with pytest.raises(ValueError, match=what):
        samples(Network(), **{"sigmas": SIGMAS, "batchsize": 2, **arguments})
    with pytest.raises(TypeError, match="float64"):
        samples(Network(), SIGMAS, xt=torch.zeros(2, 2, 5, dtype=torch.float64))


def test_plan_rows():
    first, *rest = plan_of(SIGMAS, 2.0, 0.0)
    assert first.x["slot0"] == 0
    for row, (a, b) in zip(rest, itertools.pairwise(SIGMAS[1:]), strict=True):
        assert row.x["m"] == 2 * (b - a) == -2 * row.x["slot0"]


@pytest.mark.parametrize(("gam", "mu"), [(1, 0.5), (1, 0), (2, 0), (1.5, 0.3)])
@pytest.mark.parametrize("w", [0, 3.0])
def test_library(seed, gam, mu, w):
    library = pytest.importorskip("smalldiffusion")
    cond = torch.tensor([0, 1, 2, 1]) if w else None
    kind = library.ScheduleDDPM(1000)
    sigmas = kind.sample_sigmas(20)
    arguments = {"gam": gam, "mu": mu, "cfg_scale": w, "batchsize": 4, "cond": cond}
    model = type("Both", (Network, library.ModelMixin), {"predict_eps_cfg": library.ModelMixin.predict_eps_cfg})()
    noise = torch.Generator().manual_seed(seed)
    model.rand_input = lambda n: torch.randn(n, *model.input_dims, generator=noise)
    theirs = list(library.samples(model, sigmas, **arguments))
    noise.manual_seed(seed)
    if not mu:  # the library draws noise that it multiplies by 0
        arguments["xt"] = model.rand_input(4) * sigmas[0]
    close(samples(model, sigmas, **arguments), [x.double() for x in theirs])
