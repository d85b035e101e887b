"""lucidrains' diffusions: against a float64 formula, and against the library where it is installed."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.integrations import denoising_diffusion

SHAPE = (2, 3, 6, 4)


def network(x, t, x_self_cond=None):
    """smooth, aware of t, and of x_self_cond where there is one."""
    t = t.view(-1, *[1] * (x.ndim - 1)).to(x.dtype)
    out = torch.tanh(x * (0.3 + t / 50) + 0.2)
    return out if x_self_cond is None else out + 0.4 * x_self_cond


class Model:
    """The network with the attributes that the library and the adapter read."""

    channels = out_dim = 3
    random_or_learned_sinusoidal_cond = False

    def __init__(self, self_condition=False):
        self.self_condition = self_condition

    def __call__(self, x, t, x_self_cond=None):
        assert t.dtype == torch.int64
        return network(x, t, x_self_cond)


def betas(T):
    return torch.linspace(1e-3, 0.15, T, dtype=torch.float64)


def diffusion(T=40, model=None, **attributes):
    """A GaussianDiffusion as the adapter sees it."""
    defaults = {
        "model": model or Model(), "betas": betas(T).float(), "objective": "pred_v", "image_size": SHAPE[2:],
        "channels": 3, "self_condition": False, "unnormalize": lambda x: (x + 1) / 2, "is_ddim_sampling": False,
        "sampling_timesteps": T, "ddim_sampling_eta": 0.0,
    }  # fmt: skip
    return SimpleNamespace(**{**defaults, **attributes})


def formula(T, objective, steps, eta, noise, conditions=False, keeps=False, learned=False):
    """All states in float64, x_T first; ``steps`` None is DDPM; ``keeps`` a network's own ε beside a clipped x̂_0."""
    bar = torch.cumprod(1 - betas(T), 0)
    times = list(range(T))[::-1]
    if steps is not None:
        times = [int(t) for t in torch.linspace(-1, T - 1, steps + 1)[1:].flip(0)]
    x, states, before = noise[0].double(), [noise[0].double()], None
    for i, t in enumerate(times):
        a, s = bar[t].sqrt(), (1 - bar[t]).sqrt()
        m = network(x, torch.full(SHAPE[:1], t), before)
        if learned:
            m, fraction = learned_network(x, torch.full(SHAPE[:1], t)).chunk(2, dim=1)
        x0 = {"pred_noise": (x - s * m) / a, "pred_x0": m, "pred_v": a * x - s * m}[objective].clamp(-1, 1)
        before = x0 if conditions else None
        last = i + 1 == len(times)
        p = torch.ones((), dtype=torch.float64) if last else bar[times[i + 1]]
        z = torch.zeros(()) if last or len(noise) == 1 else noise[i + 1].double()
        if steps is None:
            beta = betas(T)[t]
            mean = beta * p.sqrt() / (1 - bar[t]) * x0 + (1 - p) * (1 - beta).sqrt() / (1 - bar[t]) * x
            variance = beta * (1 - p) / (1 - bar[t])
            if learned and not last:
                share = (fraction + 1) / 2
                variance = (share * beta.log() + (1 - share) * variance.log()).exp()
            x = mean + variance.sqrt() * z
        else:
            sigma = eta * ((1 - bar[t] / p) * (1 - p) / (1 - bar[t])).sqrt()
            x = p.sqrt() * x0 + (1 - p - sigma**2).sqrt() * (m if keeps else (x - a * x0) / s) + sigma * z
        states.append(x)
    return states


def learned_network(x, t):
    return torch.cat([network(x, t), torch.sin(2 * x + t.view(-1, 1, 1, 1).to(x.dtype))], dim=1)


def close(ours, exact):
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max()) <= 1e-5


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("objective", denoising_diffusion.PREDICTIONS)
@pytest.mark.parametrize(("steps", "eta"), [(None, 0.0), (7, 0.0), (13, 0.6), (13, 1.0), (1, 1.0)])
def test_formula(seed, objective, steps, eta, conditions):
    given = diffusion(objective=objective, self_condition=conditions, ddim_sampling_eta=eta)
    if steps is not None:
        given.is_ddim_sampling, given.sampling_timesteps = True, steps
    torch.manual_seed(seed)
    draws = [torch.randn(SHAPE) for _ in range(1 if steps and not eta else (steps or 40))]
    exact = formula(40, objective, steps, eta, draws, conditions)
    torch.manual_seed(seed)
    every = denoising_diffusion.sample(given, 2, return_all_timesteps=True)
    assert every.shape == (2, (steps or 40) + 1, *SHAPE[1:])
    for i, state in enumerate(exact):
        close(every[:, i], (state + 1) / 2)
    torch.manual_seed(seed)
    assert torch.equal(denoising_diffusion.sample(given, batch_size=2), every[:, -1])


def test_output_range_and_square_images(seed):
    raw = denoising_diffusion.sample(diffusion(unnormalize=lambda x: x, image_size=5), 2, seed=3)
    assert raw.shape == (2, 3, 5, 5)
    assert float(raw.min()) < 0
    torch.testing.assert_close(denoising_diffusion.sample(diffusion(image_size=5), 2, seed=3), (raw + 1) / 2)


def test_sources_of_noise(seed):
    two, four = (denoising_diffusion.sample(diffusion(), n, seed=7) for n in (2, 4))
    assert torch.equal(two, four[:2])
    every = denoising_diffusion.sample(diffusion(), 2, True, seed=7)
    torch.testing.assert_close(every[:, 0], (fastdiff.randn(SHAPE, seed=7) + 1) / 2)
    assert torch.equal(every[:, -1], two)
    one, same = (
        denoising_diffusion.sample(diffusion(), 2, generator=torch.Generator().manual_seed(seed)) for _ in range(2)
    )
    torch.manual_seed(seed)
    assert torch.equal(one, same)
    assert torch.equal(one, denoising_diffusion.sample(diffusion(), 2))


# ---- sequences, learned variances, elucidated


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("objective", denoising_diffusion.PREDICTIONS)
@pytest.mark.parametrize(("steps", "eta"), [(None, 0.0), (13, 0.6)])
@pytest.mark.parametrize("first", [True, False])
def test_sequences(seed, objective, steps, eta, conditions, first):
    def model(x, t, shift=None, **more):
        assert shift == 3
        assert more.keys() <= {"x_self_cond"}
        assert conditions or not more
        return network(x, t, **more)

    given = diffusion(objective=objective, model=model, self_condition=conditions, ddim_sampling_eta=eta, seq_length=11)
    given.channel_first = first
    del given.image_size
    if steps is not None:
        given.is_ddim_sampling, given.sampling_timesteps = True, steps
    shape = (2, 3, 11) if first else (2, 11, 3)
    torch.manual_seed(seed)
    draws = [torch.randn(shape) for _ in range(steps or 40)]
    exact = formula(40, objective, steps, eta, draws, conditions, keeps=objective == "pred_noise")
    torch.manual_seed(seed)
    ours = denoising_diffusion.sample(given, 2, model_kwargs={"shift": 3})
    assert ours.shape == shape
    close(ours, (exact[-1] + 1) / 2)


@pytest.mark.parametrize(("steps", "eta"), [(None, 0.0), (13, 0.6)])
def test_learned_variances(seed, steps, eta):
    class Learned(Model):
        out_dim = 6

        def __call__(self, x, t):
            return learned_network(x, t)

    given = diffusion(model=Learned(), objective="pred_noise", ddim_sampling_eta=eta, vb_loss_weight=0.001)
    if steps is not None:
        given.is_ddim_sampling, given.sampling_timesteps = True, steps
    torch.manual_seed(seed)
    draws = [torch.randn(SHAPE) for _ in range(steps or 40)]
    exact = formula(40, "pred_noise", steps, eta, draws, keeps=True, learned=True)
    torch.manual_seed(seed)
    close(denoising_diffusion.sample(given, 2), (exact[-1] + 1) / 2)
    given.objective = "pred_x0"
    with pytest.raises(ValueError, match="must be 'pred_noise'"):
        denoising_diffusion.sample(given, 2)


class Net(torch.nn.Module):
    """An F-network in EDM's preconditioning, told ¼ ln σ."""

    random_or_learned_sinusoidal_cond = True
    channels = out_dim = 3

    def __init__(self, self_condition=False):
        super().__init__()
        self.self_condition = self_condition
        self.weight = torch.nn.Parameter(torch.tensor(0.2))

    def forward(self, x, t, x_self_cond=None):
        out = torch.tanh(x * (0.6 + t.view(-1, 1, 1, 1)) + self.weight.to(x.dtype))
        return out if x_self_cond is None else out + 0.4 * x_self_cond


def elucidated(net, **more):
    return SimpleNamespace(**{
        "net": net, "image_size": 5, "channels": 3, "self_condition": net.self_condition, "num_sample_steps": 9,
        "sigma_min": 0.01, "sigma_max": 20.0, "sigma_data": 0.5, "rho": 7, "S_churn": 4.0, "S_tmin": 0.1, "S_tmax": 6.0,
        "S_noise": 1.003, **more,
    })  # fmt: skip


def elucidated_formula(given, noise):
    n, rho = given.num_sample_steps, given.rho
    high, low = (s ** (1 / rho) for s in (given.sigma_max, given.sigma_min))
    sigmas = [(high + i / (n - 1) * (low - high)) ** rho for i in range(n)] + [0.0]
    x, before = sigmas[0] * noise[0].double(), None

    def denoised(y, s):
        size = math.hypot(s, given.sigma_data)
        t = torch.full((len(y),), math.log(s) / 4, dtype=torch.float64)
        f = given.net(y / size, t, before if given.self_condition else None)
        return ((given.sigma_data / size) ** 2 * y + s * given.sigma_data / size * f).clamp(-1, 1)

    for i, (s, t) in enumerate(pairwise(sigmas)):
        gamma = min(given.S_churn / n, math.sqrt(2) - 1) if given.S_tmin <= s <= given.S_tmax else 0.0
        hat = s * (1 + gamma)
        x = x + given.S_noise * math.sqrt(hat**2 - s**2) * noise[i + 1].double()
        before = denoised(x, hat)
        slope = (x - before) / hat
        end = x + (t - hat) * slope
        if t:
            before = denoised(end, t)
            end = x + (t - hat) * (slope + (end - before) / t) / 2
        x = end
    return (x.clamp(-1, 1) + 1) / 2


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("churn", [0.0, 4.0, 80.0])
def test_elucidated(seed, conditions, churn):
    given = elucidated(Net(conditions), S_churn=churn)
    torch.manual_seed(seed)
    noise = [torch.randn(2, 3, 5, 5) for _ in range(10)]
    with torch.no_grad():
        exact = elucidated_formula(given, noise)
    torch.manual_seed(seed)
    close(denoising_diffusion.sample(given, 2), exact)
    assert torch.equal(*(denoising_diffusion.sample(given, n, seed=3)[:1] for n in (1, 2)))
    with pytest.raises(ValueError, match="not for an ElucidatedDiffusion"):
        denoising_diffusion.sample(given, 2, return_all_timesteps=True)


def test_what_is_not_served_is_named():
    class ContinuousTimeGaussianDiffusion:
        log_snr = image_size = channels = num_sample_steps = None

    with pytest.raises(ValueError, match=r"are not served\); this ContinuousTimeGaussianDiffusion has"):
        denoising_diffusion.sample(ContinuousTimeGaussianDiffusion(), 2)


def test_bad_input():
    class Learned(Model):
        out_dim = 6

    lacking = diffusion()
    del lacking.image_size
    for bad, what in (
        (lacking, "image_size"),
        (diffusion(objective="pred_score"), "objective"),
        (diffusion(model=Learned()), "6 output channels for 3"),
        (diffusion(ddim_sampling_eta=1.5, is_ddim_sampling=True, sampling_timesteps=3), "eta"),
    ):
        with pytest.raises(ValueError, match=what):
            denoising_diffusion.sample(bad, 2)
    with pytest.raises(ValueError, match="generator"):
        denoising_diffusion.sample(diffusion(), 2, seed=1, generator=torch.Generator())
    with pytest.raises(TypeError, match="sampler"):
        denoising_diffusion.sample(diffusion(), 2, sampler="ddim")


# Where the network predicts ε, float32 knows x̂_0 to |x|·6e-8/√ᾱ: 1e-5 needs a schedule that ends with some signal left
# in each step, and a network that is not shown x̂_0 itself. Predictions of x_0 and v never divide.
CASES = [("linear", "pred_noise", False)]
CASES += [(b, o, c) for b in ("linear", "cosine", "sigmoid") for o in ("pred_x0", "pred_v") for c in (False, True)]


@pytest.mark.parametrize(("beta_schedule", "objective", "conditions"), CASES)
@pytest.mark.parametrize(("steps", "eta"), [(None, 0.0), (25, 0.0), (25, 0.7)])
def test_library(seed, beta_schedule, objective, steps, eta, conditions):
    library = pytest.importorskip("denoising_diffusion_pytorch")
    module = torch.nn.Module()
    module.__dict__.update(channels=3, out_dim=3, self_condition=conditions)
    module.forward = Model(conditions)
    given = library.GaussianDiffusion(
        module, image_size=SHAPE[2:], timesteps=50, sampling_timesteps=steps, objective=objective,
        beta_schedule=beta_schedule, ddim_sampling_eta=eta, auto_normalize=eta == 0,
    )  # fmt: skip
    torch.manual_seed(seed)
    theirs = given.sample(2, return_all_timesteps=True)
    torch.manual_seed(seed)
    ours = denoising_diffusion.sample(given, 2, return_all_timesteps=True)
    close(ours, theirs)


@pytest.mark.parametrize("objective", ["pred_x0", "pred_v"])
@pytest.mark.parametrize(("steps", "eta"), [(None, 0.0), (25, 0.7)])
@pytest.mark.parametrize("conditions", [False, True])
def test_library_of_sequences(seed, objective, steps, eta, conditions):
    library = pytest.importorskip("denoising_diffusion_pytorch")
    module = torch.nn.Module()
    module.__dict__.update(channels=3, self_condition=conditions)
    module.forward = lambda x, t, x_self_cond=None: network(x, t, x_self_cond)
    given = library.GaussianDiffusion1D(
        module, seq_length=12, timesteps=50, sampling_timesteps=steps, objective=objective, ddim_sampling_eta=eta
    )
    results = []
    for run in (given.sample, lambda n: denoising_diffusion.sample(given, n)):
        torch.manual_seed(seed)
        results.append(run(2))
    assert results[0].shape == (2, 3, 12)
    close(results[1], results[0])


def test_library_of_learned_variances(seed):
    """DDPM: the library's DDIM of these lacks an import, and raises."""
    pytest.importorskip("denoising_diffusion_pytorch")
    from denoising_diffusion_pytorch.learned_gaussian_diffusion import LearnedGaussianDiffusion

    module = torch.nn.Module()
    module.__dict__.update(
        channels=3, out_dim=6, self_condition=False, random_or_learned_sinusoidal_cond=False, forward=learned_network
    )
    given = LearnedGaussianDiffusion(
        module, image_size=SHAPE[2:], timesteps=50, objective="pred_noise", beta_schedule="linear"
    )
    results = []
    for run in (given.sample, lambda n: denoising_diffusion.sample(given, n)):
        torch.manual_seed(seed)
        results.append(run(2))
    close(results[1], results[0])


@pytest.mark.parametrize("conditions", [False, True])
@pytest.mark.parametrize("churn", [0.0, 80.0])
def test_library_of_elucidated(seed, conditions, churn):
    library = pytest.importorskip("denoising_diffusion_pytorch")
    given = library.ElucidatedDiffusion(Net(conditions), image_size=5, num_sample_steps=9, S_churn=churn, sigma_max=20)
    results = []
    for run in (given.sample, lambda n: denoising_diffusion.sample(given, n)):
        torch.manual_seed(seed)
        results.append(run(2))
    assert float((results[1] - results[0]).abs().max()) <= 2e-5
