"""lucidrains' GaussianDiffusion: against a float64 formula, and against the library where it is installed."""

from types import SimpleNamespace

import pytest
import torch

import fastdiff
from fastdiff.integrations import denoising_diffusion

SHAPE = (2, 3, 6, 4)


def network(x, t, x_self_cond=None):
    """smooth, aware of t, and of x_self_cond where there is one."""
    t = t.view(-1, 1, 1, 1).to(x.dtype)
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


def formula(T, objective, steps, eta, noise, conditions=False):
    """All states in float64, x_T first; ``steps`` None is DDPM."""
    bar = torch.cumprod(1 - betas(T), 0)
    times = list(range(T))[::-1]
    if steps is not None:
        times = [int(t) for t in torch.linspace(-1, T - 1, steps + 1)[1:].flip(0)]
    x, states, before = noise[0].double(), [noise[0].double()], None
    for i, t in enumerate(times):
        a, s = bar[t].sqrt(), (1 - bar[t]).sqrt()
        m = network(x, torch.full(SHAPE[:1], t), before)
        x0 = {"pred_noise": (x - s * m) / a, "pred_x0": m, "pred_v": a * x - s * m}[objective].clamp(-1, 1)
        before = x0 if conditions else None
        last = i + 1 == len(times)
        p = torch.ones((), dtype=torch.float64) if last else bar[times[i + 1]]
        z = torch.zeros(()) if last or len(noise) == 1 else noise[i + 1].double()
        if steps is None:
            beta = betas(T)[t]
            mean = beta * p.sqrt() / (1 - bar[t]) * x0 + (1 - p) * (1 - beta).sqrt() / (1 - bar[t]) * x
            x = mean + (beta * (1 - p) / (1 - bar[t])).sqrt() * z
        else:
            sigma = eta * ((1 - bar[t] / p) * (1 - p) / (1 - bar[t])).sqrt()
            x = p.sqrt() * x0 + (1 - p - sigma**2).sqrt() * (x - a * x0) / s + sigma * z
        states.append(x)
    return states


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
