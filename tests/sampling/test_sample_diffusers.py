"""sample against diffusers' schedulers: single steps from the same x, its noise bit for bit, and whole runs."""

import itertools
import math

import pytest
import torch
from helpers import assert_same_bits, dummy, dummy_sample

import fastdiff

diffusers = pytest.importorskip("diffusers")
SHAPE = (3, 3, 8, 8)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def step(x, output, row, generator=None, **arguments):
    """Row ``row`` alone, from x, with a network that returns ``output``."""
    states = fastdiff.sample_iter(lambda x, t: output, x.shape, x_T=x, start_step=row, generator=generator, **arguments)
    next(states)
    return next(states)


def close(ours, theirs, x, output, tolerance, alpha):
    """x' to the tolerance of what it is a sum of, and x̂_0, which divides by √ᾱ, to as much of what is divided."""
    scale = max(1.0, *(float(t.abs().max()) for t in (x, output, theirs.prev_sample)))
    assert float((ours.x - theirs.prev_sample).abs().max()) <= tolerance * scale
    assert float((ours.x0 - theirs.pred_original_sample).abs().max()) <= tolerance * scale / alpha


def widened(scheduler):
    """diffusers' scheduler with its table in float64: what is left is the arithmetic."""
    scheduler.alphas_cumprod = fastdiff.NoiseSchedule.from_diffusers(scheduler).alphas_cumprod
    for name in ("one", "final_alpha_cumprod"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, getattr(scheduler, name).double())
    return scheduler


def tolerance(t, prediction, stock):
    """1e-5; 1e-6 with a float64 table. √(1 − ᾱ) of the stock float32 table is 3e-4 off at t = 1 and 1e-5 at t = 20,
    which shows where ε is derived from x̂_0: there the stock scheduler is only near."""
    loose = int(t) == 1 or (prediction == "sample" and int(t) < 50)
    return (1e-4 if loose else 1e-5) if stock else 1e-6


def rows(steps):
    return sorted({0, 1, steps // 3, steps // 2, steps - 2, steps - 1} & set(range(steps)))


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_ddpm_steps(seed, variance, steps, clip, stock):
    for prediction in PREDICTIONS:
        scheduler = diffusers.DDPMScheduler(variance_type=variance, clip_sample=clip, prediction_type=prediction)
        scheduler = scheduler if stock else widened(scheduler)
        scheduler.set_timesteps(steps)
        for row in rows(steps):
            if variance == "learned_range" and row == steps - 1 and steps == 1:
                continue
            x, output = torch.randn(SHAPE), torch.randn(SHAPE)
            if variance == "learned_range":
                output = torch.cat([output, torch.rand(SHAPE) * 2 - 1], dim=1)
            theirs = scheduler.step(output, scheduler.timesteps[row], x, generator=torch.manual_seed(seed))
            ours = step(
                x, output, row, torch.manual_seed(seed), sampler="ddpm", steps=None if steps == 1000 else steps,
                prediction=prediction, variance=variance, clip=1.0 if clip else None,
            )  # fmt: skip
            t = scheduler.timesteps[row]
            close(ours, theirs, x, output, tolerance(t, prediction, stock), math.sqrt(scheduler.alphas_cumprod[t]))


@pytest.mark.parametrize("stock", [True, False])
@pytest.mark.parametrize("clip", [True, False])
@pytest.mark.parametrize("steps", [1, 2, 7, 50, 1000])
@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
def test_ddim_steps(seed, eta, steps, clip, stock):
    for prediction, from_clipped in itertools.product(PREDICTIONS, (False, True)):
        scheduler = diffusers.DDIMScheduler(clip_sample=clip, prediction_type=prediction)
        scheduler = scheduler if stock else widened(scheduler)
        scheduler.set_timesteps(steps)
        for row in rows(steps):
            x, output = torch.randn(SHAPE), torch.randn(SHAPE)
            theirs = scheduler.step(
                output, int(scheduler.timesteps[row]), x, eta=eta, use_clipped_model_output=from_clipped,
                generator=torch.manual_seed(seed),
            )  # fmt: skip
            ours = step(
                x, output, row, torch.manual_seed(seed), sampler="ddim", steps=steps, prediction=prediction, eta=eta,
                clip=1.0 if clip else None, sampler_options={"use_clipped_model_output": from_clipped},
            )  # fmt: skip
            t = scheduler.timesteps[row]
            close(ours, theirs, x, output, tolerance(t, prediction, stock), math.sqrt(scheduler.alphas_cumprod[t]))


# ---- noise, drawn as a pipeline draws it


def pipeline_noise(scheduler, steps, shape, generator, dtype, eta=None):
    """The noise that diffusers draws in a run: x_T, then each step's, by watching its own calls."""
    from diffusers.schedulers import scheduling_ddim, scheduling_ddpm
    from diffusers.utils.torch_utils import randn_tensor

    module = scheduling_ddim if eta is not None else scheduling_ddpm
    drawn = [randn_tensor(shape, generator=generator, dtype=dtype)]
    original = module.randn_tensor

    def watched(*arguments, **keywords):
        drawn.append(original(*arguments, **keywords))
        return drawn[-1]

    module.randn_tensor = watched
    try:
        scheduler.set_timesteps(steps)
        x = drawn[0]
        for t in scheduler.timesteps:
            options = {} if eta is None else {"eta": eta}
            x = scheduler.step(x * 0.5, int(t), x, generator=generator, **options).prev_sample
    finally:
        module.randn_tensor = original
    return drawn


def generators(kind, batch):
    if kind == "one":
        return torch.Generator().manual_seed(7)
    return [torch.Generator().manual_seed(70 + k) for k in range(batch)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["one", "several"])
@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
@pytest.mark.parametrize("shape", [(3, 3, 8, 8), (2, 1, 3, 3)])
def test_the_noise_is_diffusers_own(monkeypatch, sampler, kind, dtype, shape):
    eta = 0.7 if sampler == "ddim" else None
    scheduler = diffusers.DDIMScheduler() if eta else diffusers.DDPMScheduler()
    theirs = pipeline_noise(scheduler, 6, shape, generators(kind, shape[0]), dtype, eta)
    ours = []
    noise = fastdiff.sampling.noise_source.NoiseSource.noise

    def watched(self, stream, draw, backend):
        z = noise(self, stream, draw, backend)
        ours.append(z.clone())  # x_T becomes the state
        return z

    monkeypatch.setattr(fastdiff.sampling.noise_source.NoiseSource, "noise", watched)
    fastdiff.sample(
        lambda x, t: x * 0.5, shape, sampler=sampler, steps=6, eta=eta, model_dtype=dtype,
        generator=generators(kind, shape[0]),
    )  # fmt: skip
    # x_T and five rows: DDIM in diffusers draws once more in its last step, whose noise has the coefficient 0.
    assert len(ours) == 6
    assert len(theirs) == (7 if eta else 6)
    for a, b in zip(ours, theirs, strict=False):
        assert_same_bits(a, b.float())


# ---- whole runs


@pytest.mark.parametrize(
    ("name", "steps", "options"),
    [("DDPM", 1000, {}), ("DDPM", 100, {"variance": "fixed_large"}), ("DDIM", 50, {}), ("DDIM", 50, {"eta": 1.0})],
)
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_whole_runs_of_the_dummy_model(name, steps, options, prediction):
    eta = {"eta": options["eta"]} if "eta" in options else {}
    config = {"variance_type": options["variance"]} if "variance" in options else {}
    scheduler = getattr(diffusers, f"{name}Scheduler")(prediction_type=prediction, **config)
    scheduler.set_timesteps(steps)
    x, generator = dummy_sample(), torch.manual_seed(0)
    for t in scheduler.timesteps:
        x = scheduler.step(dummy(x, t.view(1)), int(t), x, generator=generator, **eta).prev_sample
    ours = fastdiff.sample(
        dummy, x.shape, sampler=name.lower(), steps=steps, prediction=prediction, clip=1.0,
        x_T=dummy_sample(), generator=torch.manual_seed(0), **options,
    )  # fmt: skip
    assert float((ours - x).abs().max()) <= 1e-4 * max(1.0, float(x.abs().max()))
