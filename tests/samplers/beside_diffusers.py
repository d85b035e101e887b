"""Multistep samplers beside the installed diffusers, with its lists and the same noise.

diffusers is given float64 tensors and its σ as float64, since its float32 coefficients err by 1e-5 and more.
"""

import math

import torch
from samplers_multistep import walk
from torch import Tensor

from fastdiff import NoiseSchedule

BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
SCHEDULE = NoiseSchedule.scaled_linear()
SHAPE = (2, 3, 4, 4)
PREDICTIONS = ("epsilon", "v_prediction", "sample")


def network(prediction, seed, vp=None):
    """A network's output whose x̂_0 is bounded, given α and σ of the state."""
    y = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))

    def model(x: Tensor, alpha: float, sigma: float) -> Tensor:
        x0 = torch.tanh(y + 0.3 * x * alpha / (alpha**2 + sigma**2))
        epsilon = (x - alpha * x0) / sigma
        if prediction == "v_prediction":
            out = (alpha * epsilon - sigma * x0) if vp is None else (epsilon - sigma * x0) / math.hypot(1, sigma)
        else:
            out = {"epsilon": epsilon, "sample": x0, "flow_prediction": epsilon - x0}[prediction]
        return out

    return model


def compare(scheduler, plan, model, levels, seed, *, stochastic=False, mend=None, **extra):
    """Both walk from the same noise; after every row they agree to 1e-5 of the state's size."""
    generator = torch.Generator().manual_seed(seed)
    theirs = torch.randn(SHAPE, generator=generator, dtype=torch.float64) * plan.init_sigma
    noises = None
    if stochastic:
        extra["generator"] = torch.Generator().manual_seed(seed)
        dtype = torch.float32 if "Multistep" in type(scheduler).__name__ else torch.float64
        noises = [torch.randn(SHAPE, generator=generator.manual_seed(seed), dtype=dtype)]
        noises += [torch.randn(SHAPE, generator=generator, dtype=dtype) for _ in plan.rows[1:]]
    assert len(scheduler.timesteps) == len(plan)
    ours_from = walk(plan, theirs, lambda x, row, i: model(x / row.c_in, *levels[i]), noises)
    for i, (t, ours) in enumerate(zip(scheduler.timesteps, ours_from, strict=True)):
        assert plan[i].t == float(t)
        scheduler.scale_model_input(theirs, t)
        theirs = scheduler.step(model(theirs, *levels[i]), t, theirs, **extra).prev_sample
        if mend is not None:
            theirs = theirs + mend(i)
        error, size = float((ours - theirs).abs().max()), float(theirs.abs().max())
        assert error <= 1e-5 * max(1.0, size), f"row {i} of {len(plan)}: {error} at {size}"


def listed(scheduler, steps, *, flow=False):
    scheduler.set_timesteps(steps)
    scheduler.sigmas = scheduler.sigmas.double()
    sigmas = scheduler.sigmas.tolist()
    if sigmas[-1] == sigmas[-2]:  # a last step of no length, which a walk does not have
        sigmas[-1] *= 1 - 1e-9
    if flow:
        return {"timesteps": scheduler.timesteps.tolist(), "sigmas": sigmas}, [(1 - s, s) for s in sigmas]
    levels = [(1 / math.hypot(1, s), s / math.hypot(1, s)) for s in sigmas]
    return {"timesteps": scheduler.timesteps.tolist(), "sigmas": sigmas}, levels
