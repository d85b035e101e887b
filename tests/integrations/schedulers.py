"""The sixteen schedulers beside diffusers' own: configs, and one stepping of both."""

import inspect
import math

import diffusers
import torch
from torch import Tensor

import fastdiff.integrations.diffusers as ours

diffusers.utils.logging.set_verbosity_error()
SHAPE = (2, 3, 8, 8)
PREDICTIONS = ("epsilon", "v_prediction", "sample")
SPACINGS = ("leading", "trailing", "linspace")
LISTS = ({}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True}, {"use_beta_sigmas": True})
FLOW = {"use_flow_sigmas": True, "prediction_type": "flow_prediction", "flow_shift": 3.0}
# Those of diffusers that draw no noise and keep float64: their arithmetic is shown float64 as well.
EXACT = {
    f"{name}Scheduler"
    for name in ("DDIMInverse", "PNDM", "HeunDiscrete", "LMSDiscrete", "DEISMultistep", "UniPCMultistep")
}
# Random of themselves, or called otherwise than the rest: they have tests of their own (test_diffusers_more.py).
APART = {
    "DPMSolverSDEScheduler",
    "CosineDPMSolverMultistepScheduler",
    "CogVideoXDPMScheduler",
    "UnCLIPScheduler",
    "DDPMWuerstchenScheduler",
    "SCMScheduler",
    "IPNDMScheduler",
}
CHURN = {"s_churn": 8.0, "s_tmin": 0.2, "s_tmax": 30.0, "s_noise": 1.003}


def pair(name: str, config: dict | None = None, steps: int | dict = 10, widen: bool = True):
    """diffusers' scheduler and ours, their lists set; theirs with its tables and lists in float64.

    Those are float32 numbers that theirs computes with in float32; ours takes the same numbers for float64.
    """
    both = [getattr(module, name)(**config or {}) for module in (diffusers, ours)]
    for scheduler in both:
        scheduler.set_timesteps(**steps if isinstance(steps, dict) else {"num_inference_steps": steps})
    if widen:
        if name == "DEISMultistepScheduler":  # whose list may end before 0
            both[0].sigmas = both[1].sigmas
        for attribute in ("alphas_cumprod", "final_alpha_cumprod", "initial_alpha_cumprod", "one", "sigmas"):
            if attribute in both[0].__dict__:
                setattr(both[0], attribute, getattr(both[0], attribute).double())
    return both


def begin(schedulers, start: int) -> None:
    for scheduler in schedulers:
        if start and hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(start)


def start_of(scheduler, generator: torch.Generator, shape=SHAPE) -> Tensor:
    return torch.randn(shape, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))


def difference(theirs, mine, options: dict | None = None, start: int = 0, seed: int = 0, network=None) -> float:
    """The largest difference of any result, over max(1, max |x|): of single steps from the same x, or of a run."""
    generator = torch.Generator().manual_seed(seed)
    sources = [torch.Generator().manual_seed(seed + 1) for _ in range(2)]
    x = y = start_of(theirs, generator)
    begin((theirs, mine), start)
    worst = 0.0
    for t, u in zip(theirs.timesteps[start:], mine.timesteps[start:], strict=True):
        shown, ours_shown = x, y
        if hasattr(theirs, "scale_model_input"):
            shown, ours_shown = theirs.scale_model_input(x, t).float(), mine.scale_model_input(y, u)
        if network is None:
            output = ours_output = torch.randn(SHAPE, generator=generator)
            assert worst_of({"x": shown}, {"x": ours_shown}, x) < 1e-6
        else:
            output, ours_output = network(shown, t.view(1)), network(ours_shown, u.view(1))
        if getattr(theirs, "variance_type", None) == "learned_range":
            output = ours_output = torch.cat([output, torch.rand(SHAPE, generator=generator) * 2 - 1], dim=1)
        wide = torch.float64 if type(theirs).__name__ in EXACT else torch.float32
        a = theirs.step(output.to(wide), t, x.to(wide), **given(theirs, options, sources[0]))
        b = mine.step(ours_output, u, y, **given(mine, options, sources[1]))
        assert type(a) is type(b)
        worst = max(worst, worst_of(a, b, x))
        x = a.prev_sample.float()
        y = b.prev_sample if network is not None else x
    assert torch.equal(*(source.get_state() for source in sources)), "noise was drawn otherwise"
    return worst


def given(scheduler, options: dict | None, generator: torch.Generator) -> dict:
    takes = "generator" in inspect.signature(scheduler.step).parameters
    return {**(options or {}), **({"generator": generator} if takes else {})}


def times_of(scheduler) -> Tensor:
    """The timesteps that a run steps from: SCM's and Würstchen's lists have the last level too."""
    beyond = type(scheduler).__name__ in ("DDPMWuerstchenScheduler", "SCMScheduler")
    return scheduler.timesteps[: -1 if beyond else None]


def beside(scheduler, times: Tensor, i: int, x0: Tensor | None) -> dict:
    """What a pipeline gives step ``i`` of ``times`` beside a network's output, x and the generator.

    ``x0`` is the second result of the step before.
    """
    name = type(scheduler).__name__
    if name == "CogVideoXDPMScheduler":
        back = times[i - 1] if i else None
        return {"timestep": times[i], "old_pred_original_sample": x0, "timestep_back": back}
    if name == "UnCLIPScheduler":
        return {"timestep": times[i], "prev_timestep": times[i + 1] if i + 1 < len(times) else None}
    return {"timestep": times[i].expand(SHAPE[0]) if name == "DDPMWuerstchenScheduler" else times[i]}


def worst_of(a, b, x: Tensor) -> float:
    assert list(a) == list(b)
    worst = 0.0
    for key in a:
        scale = max(1.0, float(x.abs().max()), float(b[key].abs().max()))
        if bool(a[key].isnan().all()):  # some last steps to σ = 0, where λ is infinite
            assert bool(b[key].isfinite().all())
            continue
        error = float((a[key].double() - b[key].double()).abs().max()) / scale
        worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def cases():
    """(name, config, steps, options of a step): the main options of every class."""
    for prediction in PREDICTIONS:
        p = {"prediction_type": prediction}
        for spacing in SPACINGS:
            s = p | {"timestep_spacing": spacing}
            yield "DDPMScheduler", s, 10, {}
            for more in (*LISTS, {"final_sigmas_type": "sigma_min"}, {"rescale_betas_zero_snr": True}):
                yield "EulerDiscreteScheduler", s | more, 10, {}
            yield "EulerDiscreteScheduler", s | {"interpolation_type": "log_linear"}, 10, {}
            yield "EulerDiscreteScheduler", s | {"timestep_type": "continuous"}, 10, {}
            if prediction != "sample":
                yield "EulerAncestralDiscreteScheduler", s, 10, {}
            for more in (*LISTS, {"clip_sample": True}):
                yield "HeunDiscreteScheduler", s | more, 6, {}
            for more in LISTS:
                yield "LMSDiscreteScheduler", s | more, 8, {"order": 3}
            for name in ("DPMSolverMultistep", "UniPCMultistep", "DEISMultistep"):
                yield f"{name}Scheduler", s | {"solver_order": 3}, 8, {}
        yield "EulerDiscreteScheduler", p, 10, CHURN
        for eta, clipped in ((0.0, True), (0.5, False), (1.0, True)):
            yield "DDIMScheduler", p, 10, {"eta": eta, "use_clipped_model_output": clipped}
        for offset, one in ((0, False), (1, False), (1, True)):
            yield "DDIMScheduler", p | {"set_alpha_to_one": one, "steps_offset": offset}, 10, {"eta": 0.3}
            if prediction != "sample" or not one:
                c = {"set_alpha_to_one": one, "steps_offset": offset, "clip_sample": False}
                yield "DDIMInverseScheduler", p | c, 10, {}
            if prediction != "sample":
                for skip in (True, False):
                    c = {"set_alpha_to_one": one, "steps_offset": offset, "skip_prk_steps": skip}
                    yield "PNDMScheduler", p | c, 10, {}
        for more in ({}, {"clip_sample": True}, {"thresholding": True, "sample_max_value": 2.0}):
            for steps in (1, 4):
                yield "LCMScheduler", p | more, steps, {}
                for eta in (0.0, 0.3, 1.0):
                    yield "TCDScheduler", p | more, steps, {"eta": eta}
    zero = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction", "timestep_spacing": "trailing"}
    for name in ("DDPM", "DDIM", "LCM", "TCD", "DPMSolverMultistep", "UniPCMultistep"):
        yield f"{name}Scheduler", zero, 10, {}
    for more in ({"thresholding": True, "sample_max_value": 2.0}, {"clip_sample": False}, {"clip_sample_range": 0.5}):
        yield "DDPMScheduler", more, 10, {}
        yield "DDIMScheduler", more, 10, {}
    for variance in ("fixed_small_log", "fixed_large", "learned_range"):
        yield "DDPMScheduler", {"variance_type": variance}, 10, {}
    yield from solver_cases()
    for more in ({}, {"sigma_schedule": "exponential"}, {"final_sigmas_type": "sigma_min"}, {"sigma_data": 1.0}):
        for prediction in PREDICTIONS[:2]:
            yield "EDMEulerScheduler", more | {"prediction_type": prediction}, 10, {}
            yield "EDMEulerScheduler", more | {"prediction_type": prediction}, 10, CHURN
    yield "EDMEulerScheduler", {}, 10, {"pred_original_sample": torch.full(SHAPE, 0.25)}
    for more in (
        *LISTS,
        {"shift": 3.0},
        {"shift_terminal": 0.1},
        {"invert_sigmas": True},
        {"stochastic_sampling": True},
    ):
        yield "FlowMatchEulerDiscreteScheduler", more, 10, {}
    for kind in ("exponential", "linear"):
        more = {"use_dynamic_shifting": True, "time_shift_type": kind}
        yield "FlowMatchEulerDiscreteScheduler", more, {"num_inference_steps": 7, "mu": 0.9}, {}


def solver_cases():
    multi, single = "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"
    for order in (1, 2, 3):
        for algorithm in ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"):
            final = "zero" if algorithm.endswith("++") else "sigma_min"
            for solver in ("midpoint", "heun"):
                c = {"algorithm_type": algorithm, "solver_type": solver, "solver_order": order}
                c["final_sigmas_type"] = final
                sde = algorithm.startswith("sde")
                if not (sde and order == 3):  # wrong in diffusers: tested apart
                    yield multi, c, 8, {}
                    yield multi, c, 17, {}
                if algorithm != "sde-dpmsolver" and not (sde and order == 3 and solver == "heun"):
                    for steps in (6, 7, 8):
                        yield single, c | {"lower_order_final": steps != 6}, steps, {}
        for more in (
            *LISTS, FLOW, {"euler_at_final": True}, {"lower_order_final": False}, {"lambda_min_clipped": -5.1},
            {"use_lu_lambdas": True}, {"thresholding": True}, {"final_sigmas_type": "sigma_min"},
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True}, {"variance_type": "learned"},
        ):  # fmt: skip
            for steps in (8, 17):
                yield multi, more | {"solver_order": order}, steps, {}
        for more in (*LISTS, FLOW, {"thresholding": True}, *({"prediction_type": p} for p in PREDICTIONS)):
            yield single, more | {"solver_order": order}, 8, {}
            yield "DEISMultistepScheduler", more | {"solver_order": order}, 8, {}
            yield "DEISMultistepScheduler", more | {"solver_order": order}, 17, {}
            for solver in ("bh1", "bh2"):
                yield "UniPCMultistepScheduler", more | {"solver_order": order, "solver_type": solver}, 8, {}
        for more in (
            {"lower_order_final": False, "final_sigmas_type": "sigma_min"},
            {"disable_corrector": [0, 2]},
            {"final_sigmas_type": "sigma_min", "use_karras_sigmas": True},
        ):
            yield "UniPCMultistepScheduler", more | {"solver_order": order}, 8, {}
        for prediction in PREDICTIONS:
            # From t = 888 on: from 999 the first step multiplies x by 100, and its rounding.
            more = {"predict_x0": False, "final_sigmas_type": "sigma_min", "timestep_spacing": "leading"}
            more |= {"solver_order": order, "prediction_type": prediction}
            yield "UniPCMultistepScheduler", more, 8, {}
    yield multi, {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "thresholding": True}, 8, {}
