"""guided-diffusion's loops: against a float64 formula, and against the library where it is installed."""

import enum
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff.integrations import guided_diffusion

SHAPE = (2, 3, 5, 4)
Mean = enum.Enum("Mean", "PREVIOUS_X START_X EPSILON")
Variance = enum.Enum("Variance", "LEARNED FIXED_SMALL FIXED_LARGE LEARNED_RANGE")
BETAS = np.linspace(1e-3, 0.1, 60)
KEPT = [0, 3, 11, 12, 30, 44, 59]


def diffusion(mean="EPSILON", variance="FIXED_SMALL", kept=None, rescale=False):
    """A GaussianDiffusion, or a SpacedDiffusion, as the adapter sees it."""
    bar = np.cumprod(1 - BETAS)
    given = SimpleNamespace(
        model_mean_type=Mean[mean], model_var_type=Variance[variance], rescale_timesteps=rescale, alphas_cumprod=bar
    )
    if kept:
        given.alphas_cumprod, given.timestep_map, given.original_num_steps = bar[kept], kept, len(bar)
    return given


def times(kept, rescale):
    return [t * (1000 / 60 if rescale else 1) for t in (kept or range(60))][::-1]


def network(variance="FIXED_SMALL", rescale=False):
    """Smooth, aware of t and y; log σ² near −5 where that is what the second half of its channels says."""

    def model(x, t, y):
        assert t.dtype == (torch.float32 if rescale else torch.int64) or x.dtype == torch.float64
        t, y = t.view(-1, 1, 1, 1).to(x.dtype), y.view(-1, 1, 1, 1).to(x.dtype)
        out = torch.tanh(x * (0.4 + t / 2000) + 0.3 * y)
        if variance.startswith("FIXED"):
            return out
        return torch.cat([out, 0.7 * torch.cos(x) - (5 if variance == "LEARNED" else 0.2)], dim=1)

    return model


def classifier(x, t, y):
    t, y = t.view(-1, 1, 1, 1).to(x.dtype), y.view(-1, 1, 1, 1).to(x.dtype)
    return torch.sin(x + y) * (0.5 + t / 3000)


Y = torch.tensor([0, 1])


def formula(given, noise, *, eta=None, clip=True, denoised_fn=None, cond_fn=None):
    """[(x, x̂_0)] after every step in float64, from the definitions of the papers."""
    rescale = given.rescale_timesteps
    kept = getattr(given, "timestep_map", None)
    bars = given.alphas_cumprod
    variance = given.model_var_type.name
    model = network(variance, rescale)
    x, found = noise[0].double(), []
    for number, (i, t) in enumerate(zip(range(len(bars))[::-1], times(kept, rescale), strict=True)):
        bar, bar_p = bars[i], bars[i - 1] if i else 1.0
        beta, t = 1 - bar / bar_p, torch.full(SHAPE[:1], t, dtype=torch.float64)
        out = model(x, t, Y)
        m, v = out[:, :3], out[:, 3:]
        x0 = m if given.model_mean_type.name == "START_X" else (x - math.sqrt(1 - bar) * m) / math.sqrt(bar)
        x0 = x0 if denoised_fn is None else denoised_fn(x0)
        x0 = x0.clamp(-1, 1) if clip else x0
        g = 0.0 if cond_fn is None else cond_fn(x, t, Y)
        z = noise[number + 1].double() if i and len(noise) > 1 else torch.zeros(SHAPE, dtype=torch.float64)
        if eta is None:
            small = [b * (1 - p) / (1 - a) for a, p, b in posterior(bars)]
            floor = small[i] if i else small[1]
            square = {"FIXED_SMALL": small[i], "FIXED_LARGE": beta if i else floor}.get(variance)
            if variance == "LEARNED":
                square = v.exp()
            if variance == "LEARNED_RANGE":
                square = ((v + 1) / 2 * math.log(beta) + (1 - v) / 2 * math.log(floor)).exp()
            mean = math.sqrt(bar_p) * beta * x0 + math.sqrt(1 - beta) * (1 - bar_p) * x
            root = torch.as_tensor(square, dtype=torch.float64).sqrt() if i else 0.0
            x = mean / (1 - bar) + square * g + root * z
        else:
            epsilon = (x - math.sqrt(bar) * x0) / math.sqrt(1 - bar) - math.sqrt(1 - bar) * g
            x0 = (x - math.sqrt(1 - bar) * epsilon) / math.sqrt(bar)
            sigma = eta * math.sqrt((1 - bar_p) / (1 - bar) * beta)
            x = math.sqrt(bar_p) * x0 + math.sqrt(1 - bar_p - sigma**2) * epsilon + sigma * z
        found.append((x, x0))
    return found


def posterior(bars):
    before = [1.0, *bars[:-1]]
    return [(a, p, 1 - a / p) for a, p in zip(bars, before, strict=True)]


def drawn(seed, count):
    torch.manual_seed(seed)
    return [torch.randn(SHAPE) for _ in range(count)]


def compare(seed, given, eta=None, clip=True, **functions):
    """The loop and its progressive form against the formula, from torch's own noise."""
    steps = len(given.alphas_cumprod)
    exact = formula(given, drawn(seed, 1 if eta == 0 else steps), eta=eta, clip=clip, **functions)
    model = network(given.model_var_type.name, given.rescale_timesteps)
    loop, progressive = guided_diffusion.p_sample_loop, guided_diffusion.p_sample_loop_progressive
    arguments = {"clip_denoised": clip, "model_kwargs": {"y": Y}, "device": "cpu", **functions}
    if eta is not None:
        loop, progressive, arguments["eta"] = (
            guided_diffusion.ddim_sample_loop,
            guided_diffusion.ddim_sample_loop_progressive,
            eta,
        )
    torch.manual_seed(seed)
    ours = list(progressive(given, model, SHAPE, **arguments))
    for mine, (x, x0) in zip(ours, exact, strict=True):
        assert set(mine) == {"sample", "pred_xstart"}
        close(mine["sample"], x)
        close(mine["pred_xstart"], x0)
    noise = drawn(seed, 1)[0]
    assert torch.equal(loop(given, model, SHAPE, noise=noise, **arguments), ours[-1]["sample"])


def close(ours, exact):
    assert ours.dtype == torch.float32
    assert float((ours - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "respaced"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
def test_ddpm(seed, variance, mean, clip, kept, rescale):
    compare(seed, diffusion(mean, variance, kept, rescale), clip=clip)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kept", [None, KEPT], ids=["all", "respaced"])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("mean", "variance"), [("EPSILON", "LEARNED_RANGE"), ("START_X", "FIXED_SMALL")])
def test_ddim(seed, mean, variance, clip, kept, eta):
    compare(seed, diffusion(mean, variance, kept), eta=eta, clip=clip)


@pytest.mark.parametrize("eta", [None, 0.0, 0.5])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("rescale", [False, True])
def test_cond_fn(seed, rescale, variance, eta):
    compare(seed, diffusion("EPSILON", variance, KEPT, rescale), eta=eta, cond_fn=classifier)


@pytest.mark.parametrize("eta", [None, 0.5])
@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize(("mean", "variance"), [("EPSILON", "LEARNED_RANGE"), ("START_X", "FIXED_SMALL")])
def test_denoised_fn(seed, mean, variance, clip, eta):
    given = diffusion(mean, variance, KEPT)
    compare(
        seed, given, eta=eta, clip=clip, denoised_fn=lambda x0: 0.8 * x0 + 0.1 * x0.mean(dim=(1, 2, 3), keepdim=True)
    )


def test_sources_of_noise(seed):
    model, kwargs = network(), {"device": "cpu", "model_kwargs": {"y": Y}}
    images = guided_diffusion.p_sample_loop(diffusion(), model, SHAPE, seed=9, **kwargs)
    one = {"device": "cpu", "model_kwargs": {"y": Y[:1]}}
    assert torch.equal(images[:1], guided_diffusion.p_sample_loop(diffusion(), model, (1, *SHAPE[1:]), seed=9, **one))
    noise = fastdiff.randn(SHAPE, seed=9)
    assert torch.equal(
        images, guided_diffusion.p_sample_loop(diffusion(), model, SHAPE, noise, seed=9, model_kwargs={"y": Y})
    )
    generator = torch.Generator().manual_seed(seed)
    images = guided_diffusion.ddim_sample_loop(diffusion(), model, SHAPE, eta=1.0, generator=generator, **kwargs)
    torch.manual_seed(seed)
    assert torch.equal(images, guided_diffusion.ddim_sample_loop(diffusion(), model, SHAPE, eta=1.0, **kwargs))


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"diffusion": diffusion("PREVIOUS_X")}, "PREVIOUS_X"),
        ({"eta": 1.5}, "eta"),
        ({"noise": torch.zeros(1, 3, 5, 4)}, "shape"),
        ({"seed": 1, "noise_fn": lambda *a: torch.zeros(SHAPE)}, "noise_fn"),
    ],
)
def test_bad_input(change, what):
    arguments = {
        "diffusion": diffusion(),
        "model": network(),
        "shape": SHAPE,
        "model_kwargs": {"y": Y},
        "device": "cpu",
    }
    for loop in (guided_diffusion.ddim_sample_loop, guided_diffusion.ddim_sample_loop_progressive):
        with pytest.raises(ValueError, match=what):
            loop(**{**arguments, **change})
    for clash in ({"sampler": "ddpm"}, {"resume": None}, {"cuda_graph": True, "denoised_fn": torch.tanh}):
        with pytest.raises(TypeError, match=next(iter(clash))):
            guided_diffusion.p_sample_loop(**arguments, **clash)


LIBRARIES = ("guided_diffusion", "improved_diffusion_for_SMLM.improved_diffusion")  # the modules of the peers extra


@pytest.mark.parametrize("name", LIBRARIES)
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("variance", ["FIXED_SMALL", "FIXED_LARGE", "LEARNED", "LEARNED_RANGE"])
@pytest.mark.parametrize("mean", ["EPSILON", "START_X"])
@pytest.mark.parametrize("eta", [None, 0.0, 0.7])
def test_library(seed, eta, mean, variance, rescale, name):
    library = pytest.importorskip(f"{name}.gaussian_diffusion")
    respace = pytest.importorskip(f"{name}.respace")
    options = {
        "betas": BETAS, "model_mean_type": library.ModelMeanType[mean], "rescale_timesteps": rescale,
        "model_var_type": library.ModelVarType[variance], "loss_type": library.LossType.MSE,
    }  # fmt: skip
    model = network(variance, rescale)
    for given in (library.GaussianDiffusion(**options), respace.SpacedDiffusion(KEPT, **options)):
        for functions in ({}, {"denoised_fn": torch.tanh}, {"cond_fn": classifier}):
            if "cond_fn" in functions and "guided" not in name:
                continue
            arguments = {"model_kwargs": {"y": Y}, "device": "cpu", **functions}
            loop = "p_sample_loop_progressive"
            if eta is not None:
                loop, arguments["eta"] = "ddim_sample_loop_progressive", eta
            torch.manual_seed(seed)
            theirs = list(getattr(given, loop)(model, SHAPE, **arguments))
            torch.manual_seed(seed)
            ours = list(getattr(guided_diffusion, loop)(given, model, SHAPE, **arguments))
            for a, b in zip(ours, theirs, strict=True):
                close(a["sample"], b["sample"])
                if eta is None or "cond_fn" not in functions or not hasattr(given, "plms_sample"):
                    # The packaged guided_diffusion is a fork (it has PLMS). Its DDIM returns x̂_0 as it was before the
                    # classifier's gradient, the original as it is after; the next state has the gradient in both.
                    close(a["pred_xstart"], b["pred_xstart"])
