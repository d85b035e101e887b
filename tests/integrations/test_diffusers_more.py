"""Random configurations of the schedulers beyond the first sixteen, beside diffusers' own: lists, and whole runs."""

import copy
import importlib.util
import inspect
import math
import random
import sys
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from diffusers.utils.torch_utils import randn_tensor
from schedulers import SHAPE, begin, beside, given, times_of

import fastdiff
import fastdiff.integrations.diffusers as ours
from fastdiff.integrations.diffusers import base
from fastdiff.integrations.diffusers.left import REASONS

PREDICTIONS = ("epsilon", "v_prediction")
LISTS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas")


def chosen(draw: random.Random, **fields) -> dict:
    """Each field at one of its values, or left at its default."""
    return {name: draw.choice(values) for name, values in fields.items() if draw.random() < 0.6}


def betas(draw: random.Random) -> dict:
    config = {"num_train_timesteps": 120} | chosen(
        draw, num_train_timesteps=(40, 100, 250), beta_schedule=("linear", "scaled_linear"),
        timestep_spacing=("leading", "trailing", "linspace"), steps_offset=(0, 1, 3),
    )  # fmt: skip
    if draw.random() < 0.3:
        config |= {"beta_start": draw.uniform(1e-4, 1e-3), "beta_end": draw.uniform(0.01, 0.02)}
    return config


def steps_of(draw: random.Random) -> dict:
    return {"num_inference_steps": draw.choice((1, 2, 3, 4, 7, 10, 20, 31))}


def two_calls(draw: random.Random):
    config = betas(draw) | chosen(draw, prediction_type=PREDICTIONS)
    if draw.random() < 0.5:
        config[draw.choice(LISTS)] = True
    return config, steps_of(draw), {}


def sde(draw: random.Random):
    config, steps, _ = two_calls(draw)
    config["noise_sampler_seed"] = draw.choice((0, 5, [3, 4]))
    return config, steps, chosen(draw, s_noise=(0.5, 1.003))


def edm_solver(draw: random.Random):
    config = chosen(
        draw, sigma_min=(0.002, 0.03), sigma_max=(80.0, 14.0), sigma_data=(0.5, 1.0), rho=(5.0, 7.0),
        sigma_schedule=("karras", "exponential"), prediction_type=PREDICTIONS, solver_order=(1, 2, 3),
        algorithm_type=("dpmsolver++", "sde-dpmsolver++"), solver_type=("midpoint", "heun"),
        lower_order_final=(True, False), euler_at_final=(True, False), thresholding=(True,),
        sample_max_value=(1.0, 3.0), final_sigmas_type=("zero", "sigma_min"),
    )  # fmt: skip
    return config, steps_of(draw), {}


def cosine(draw: random.Random):
    config, steps, _ = edm_solver(draw)
    for name in ("algorithm_type", "thresholding", "sample_max_value"):
        config.pop(name, None)
    if steps["num_inference_steps"] == 1:
        config.pop("final_sigmas_type", None)  # torchsde has no step over the whole path
    return config, steps, {}


def flow_heun(draw: random.Random):
    config = chosen(draw, num_train_timesteps=(50, 1000), shift=(0.5, 3.0, 6.0))
    churn = {"s_churn": draw.choice((1.0, 40.0)), "s_tmin": 0.05, "s_tmax": 0.9, "s_noise": 1.01}
    return config, steps_of(draw), draw.choice(({}, churn))


def flow_lcm(draw: random.Random):
    config = chosen(
        draw, num_train_timesteps=(50, 1000), shift=(0.5, 3.0), use_dynamic_shifting=(True,), invert_sigmas=(True,),
        shift_terminal=(0.1,), time_shift_type=("exponential", "linear"), upscale_mode=("nearest", "bicubic"),
    )  # fmt: skip
    if draw.random() < 0.4:
        config[draw.choice(LISTS)] = True
    steps = steps_of(draw)
    if draw.random() < 0.3:
        steps = {"sigmas": [1.0, 0.7, 0.5, 0.2][: draw.choice((2, 4))]}
    elif draw.random() < 0.2:
        steps = {"timesteps": [900.0, 700.0, 100.0]}
    if config.get("use_dynamic_shifting"):
        steps["mu"] = draw.uniform(0.5, 1.2)
    return config, steps, {}


def cogvideox(draw: random.Random):
    """Lists on which T // steps is the distance of their entries: elsewhere diffusers leaves its own list."""
    config = {"num_train_timesteps": 240, "timestep_spacing": draw.choice(("leading", "trailing"))} | chosen(
        draw, beta_schedule=("linear", "scaled_linear", "squaredcos_cap_v2"), set_alpha_to_one=(True, False),
        prediction_type=(*PREDICTIONS, "sample"), snr_shift_scale=(1.0, 3.0), clip_sample=(False,),
    )  # fmt: skip
    if config["timestep_spacing"] == "leading":
        config |= chosen(draw, steps_offset=(0, 1))
    if config.get("prediction_type") == "v_prediction":
        config |= chosen(draw, rescale_betas_zero_snr=(True,))
    return (
        config,
        {"num_inference_steps": draw.choice((1, 2, 3, 5, 8, 20, 30))},
        chosen(draw, return_dict=(True, False)),
    )


def unclip(draw: random.Random):
    config = {"num_train_timesteps": 200} | chosen(
        draw, variance_type=("fixed_small_log", "learned_range"), clip_sample=(False,), clip_sample_range=(0.5, 5.0),
        prediction_type=("epsilon", "sample"),
    )  # fmt: skip
    return config, {"num_inference_steps": draw.choice((2, 3, 7, 25, 200))}, {}


def wuerstchen(draw: random.Random):
    config = chosen(draw, scaler=(0.5, 2.0), s=(0.008, 0.02))
    steps = {"num_inference_steps": draw.choice((1, 2, 7, 20, 60))}
    return config, draw.choice((steps, {"timesteps": [1.0, 0.8, 0.55, 0.2, 0.0]})), {}


def scm(draw: random.Random):
    steps = {"num_inference_steps": draw.choice((1, 2, 3, 8)), "intermediate_timesteps": None}
    if steps["num_inference_steps"] == 2:
        steps["intermediate_timesteps"] = draw.choice((1.3, 0.9, None))
    if steps["num_inference_steps"] == 3:
        steps |= {"max_timesteps": None, "timesteps": [1.5708, 1.2, 0.4, 0.0]}
    return chosen(draw, sigma_data=(0.5, 1.0)), steps, {}


def ipndm(draw: random.Random):
    steps = draw.choice((1, 2, 3, 5, 10, 40))
    # The constructor's list, of num_train_timesteps, is of these numbers too.
    betas = [math.sin(math.pi / 2 * (1 - i / steps)) for i in range(steps + 1)]
    config = {"trained_betas": betas, "num_train_timesteps": steps} if draw.random() < 0.3 else {}
    return {"num_train_timesteps": 50} | config, {"num_inference_steps": steps}, {}


def sa_solver(draw: random.Random):
    config = betas(draw) | chosen(
        draw, predictor_order=(1, 2, 3, 4), corrector_order=(1, 2, 3, 4), prediction_type=(*PREDICTIONS, "sample"),
        algorithm_type=("data_prediction", "noise_prediction"), lower_order_final=(False,), thresholding=(True,),
    )  # fmt: skip
    if draw.random() < 0.3:
        config[draw.choice(LISTS)] = True
    # More steps than that visit one timestep twice.
    return {"num_train_timesteps": 1000} | config, {"num_inference_steps": draw.choice((1, 2, 3, 5, 8, 17))}, {}


def inverse(draw: random.Random):
    config, steps, _ = sa_solver(draw)
    config = {key: value for key, value in config.items() if not key.endswith("_order")}
    config["algorithm_type"] = draw.choice(("dpmsolver++", "dpmsolver"))
    return config | chosen(draw, solver_order=(1, 2, 3), solver_type=("midpoint", "heun")), steps, {}


CONFIGS = {
    "KDPM2DiscreteScheduler": two_calls,
    "KDPM2AncestralDiscreteScheduler": two_calls,
    "DPMSolverSDEScheduler": sde,
    "EDMDPMSolverMultistepScheduler": edm_solver,
    "CosineDPMSolverMultistepScheduler": cosine,
    "FlowMatchHeunDiscreteScheduler": flow_heun,
    "FlowMatchLCMScheduler": flow_lcm,
    "CogVideoXDDIMScheduler": cogvideox,
    "CogVideoXDPMScheduler": cogvideox,
    "UnCLIPScheduler": unclip,
    "DDPMWuerstchenScheduler": wuerstchen,
    "SCMScheduler": scm,
    "IPNDMScheduler": ipndm,
    "SASolverScheduler": sa_solver,
    "DPMSolverMultistepInverseScheduler": inverse,
}
NEW = [name for name in CONFIGS if name in ours.SCHEDULERS]
BROWNIAN = {"DPMSolverSDEScheduler", "CosineDPMSolverMultistepScheduler"}
EVEN = (
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
    "FlowMatchHeunDiscreteScheduler",
)  # fmt: skip


def small(name: str) -> dict:
    """A config whose constructor takes no second: those of two calls make a list of all timesteps."""
    return {"num_train_timesteps": 120} if name in EVEN else {}


def both(name: str, config: dict, steps: dict):
    pair = [getattr(module, name)(**config) for module in (diffusers, ours)]
    for scheduler in pair:
        scheduler.set_timesteps(**steps)
    return pair


def walked(scheduler, seed: int, options: dict, start: int = 0, dtype: torch.dtype = torch.float32, own=None):
    """Each step's results, of a network that looks at what it is shown; the generator's state at the end."""
    normals, generator = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    torch.manual_seed(seed + 2)
    begin([scheduler], start)
    x = (torch.randn(SHAPE, generator=normals) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    results = []
    times = times_of(scheduler)[start:]
    for i, t in enumerate(times):
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = (torch.tanh(shown.double()) + torch.randn(SHAPE, generator=normals)).to(own or dtype)
        more = given(scheduler, options, generator)
        more |= beside(scheduler, times, i, results[-1].get("b") if i else None)
        if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
            more["timestep"] = more["timestep"].to(dtype)  # as pipelines
        if scheduler.config.get("variance_type") == "learned_range":
            output = torch.cat([output, torch.rand(SHAPE, generator=normals).to(output) * 2 - 1], dim=1)
        done = scheduler.step(model_output=output, sample=x, **more)
        done = dict(zip("ab", done.values() if isinstance(done, dict) else done, strict=False))
        results.append(done)
        x = next(iter(done.values()))
    return results, generator.get_state()


def apart(a: list[dict], b: list[dict]) -> float:
    """The largest difference of any result over its largest entry."""
    worst = 0.0
    for i, (theirs, mine) in enumerate(zip(a, b, strict=True)):
        assert theirs.keys() == mine.keys()
        for key in theirs:
            assert theirs[key].dtype == mine[key].dtype, (i, key)
            size = float(theirs[key].abs().max().clamp(min=1e-3))
            error = float((theirs[key].double() - mine[key].double()).abs().max()) / size
            worst = max(worst, math.inf if math.isnan(error) else error)
    return worst


def lists_of(scheduler) -> dict:
    return {
        name: value for name, value in vars(scheduler).items() if torch.is_tensor(value) and not name.startswith("_")
    }


def test_every_scheduler_is_served_or_left_with_a_reason():
    """None of diffusers' schedulers is forgotten: those that are not drop-ins are named in ``left.REASONS``."""
    without_torchsde = BROWNIAN if importlib.util.find_spec("torchsde") is None else set()
    names = {name for name in dir(diffusers) if name.endswith("Scheduler") and not name.startswith("Flax")}
    assert names == set(ours.SCHEDULERS) | set(REASONS) | without_torchsde
    assert not set(ours.SCHEDULERS) & set(REASONS)
    assert set(CONFIGS) <= set(ours.SCHEDULERS) | without_torchsde


def test_a_scheduler_that_is_left_is_named_with_its_reason():
    class Mine(diffusers.DDPMScheduler):
        pass

    assert "not served yet" in ours.reason(diffusers.CMStochasticIterativeScheduler())
    assert ours.like(Mine()) is None
    assert "a class of its own" in ours.reason(Mine())


@pytest.mark.parametrize("count", [4, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", NEW)
def test_random_configurations(seed, name, count):
    """Lists equal to the bit, each state of a run to 1e-4 of its largest entry; also from the middle of the list.

    diffusers computes in float32, which is not accurate to 1e-4 everywhere: a run that is further apart is compared
    with diffusers' own formulas in float64.
    """
    draw, wrong, compared = random.Random(seed), [], 0
    for _ in range(count):
        config, steps, options = CONFIGS[name](draw)
        try:
            theirs, mine = both(name, config, steps)
            start = draw.choice((0, 0, len(theirs.timesteps) // 2))
            start -= start % 2 if name in EVEN else 0
            expected, source = walked(copy.deepcopy(theirs), seed, options, start)
        except Exception:  # what theirs does not serve
            continue
        if any(not value.isfinite().all() for done in expected for value in done.values()) or -1 in theirs.timesteps:
            continue
        compared += 1
        for key, value in lists_of(theirs).items():
            assert torch.equal(value.nan_to_num(-7), getattr(mine, key).nan_to_num(-7)), key
        found, ours_source = walked(mine, seed, options, start)
        assert torch.equal(source, ours_source), "noise was drawn otherwise"
        error = apart(expected, found)
        if error > 1e-4 and not BROWNIAN & {name}:
            with (
                patch.multiple(base, randn_tensor=drawn),
                patch.multiple(module_of(theirs), randn_tensor=drawn, create=True),
            ):
                wide = [widened(scheduler) for scheduler in both(name, config, steps)]
                error = apart(*(walked(scheduler, seed, options, start, torch.float64)[0] for scheduler in wide))
        if not error <= 1e-4:
            wrong.append((config, steps, options, start, error))
    assert not wrong
    assert compared >= count // 4


def drawn(shape, generator=None, device=None, dtype=None, layout=None):
    """diffusers' normals, of float32 whatever the dtype."""
    return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32).to(dtype)


def module_of(scheduler):
    return sys.modules[type(scheduler).__module__]


def widened(scheduler):
    for name, value in lists_of(scheduler).items():
        if value.dtype == torch.float32 and name != "timesteps":
            setattr(scheduler, name, value.double())
    return scheduler


# Without the inverse solver, whose first steps multiply x's rounding: test_diffusers_use.py has its half precision.
@pytest.mark.parametrize("name", [name for name in NEW if name != "DPMSolverMultistepInverseScheduler"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(seed, name, dtype):
    """diffusers' dtypes, also where the output's is another; the numbers to the dtype's rounding."""
    config = small(name) | ({"noise_sampler_seed": 1} if "SDE" in name else {})
    for own in (None, torch.float32):
        steps = {"num_inference_steps": 5} | ({"intermediate_timesteps": None} if name == "SCMScheduler" else {})
        theirs, mine = both(name, config, steps)
        expected, found = (walked(s, seed, {}, dtype=dtype, own=own)[0] for s in (theirs, mine))
        assert apart(expected[:2], found[:2]) <= 30 * torch.finfo(dtype).eps


@pytest.mark.parametrize("name", NEW)
def test_signatures_and_configs(tmp_path, name):
    theirs, mine = getattr(diffusers, name), getattr(ours, name)
    for method in ("__init__", "step", "set_timesteps"):
        parameters = (inspect.signature(getattr(cls, method)).parameters.values() for cls in (theirs, mine))
        assert len({tuple((p.name, p.default) for p in ps) for ps in parameters}) == 1
    made = mine.from_config(theirs(**small(name)).config)
    made.save_pretrained(tmp_path)
    assert type(theirs.from_pretrained(tmp_path)) is theirs
    assert type(mine.from_pretrained(tmp_path)) is mine
    like = ours.like(theirs(**small(name)))
    assert type(like) is mine


@pytest.mark.parametrize("name", EVEN)
def test_two_call_runs_begin_with_a_first_call(name):
    if name not in NEW:
        pytest.skip("needs torchsde")
    mine = both(name, small(name), {"num_inference_steps": 5})[1]
    mine.set_begin_index(3)
    x = torch.zeros(SHAPE)
    with pytest.raises(ValueError, match="an even number; got step 3"):
        mine.step(x, mine.timesteps[3], x)


@pytest.mark.parametrize("name", sorted(BROWNIAN))
def test_steps_of_a_brownian_path_with_fastdiffs_noise(seed, name):
    """use_fastdiff_noise: the increments are the stream's normals, and no path is made."""
    pytest.importorskip("torchsde")
    inside, outside = (both(name, small(name), {"num_inference_steps": 4})[1] for _ in range(2))
    inside.use_fastdiff_noise(seed)
    outside.noise_sampler = lambda *_: fastdiff.randn(SHAPE, seed=seed, draw=outside.step_index or 0, stream=1)
    a, b = (walked(scheduler, seed, {})[0] for scheduler in (inside, outside))
    assert apart(a, b) == 0
    assert inside.noise_sampler is None


@pytest.mark.parametrize("mode", ["nearest", "bicubic"])
def test_flow_lcm_enlarges(seed, mode):
    """scale_factors: x̂_0 grows between the steps, and the generator is drawn from as diffusers draws."""
    theirs, mine = both(
        "FlowMatchLCMScheduler", {"scale_factors": [1.5, 2.0], "upscale_mode": mode}, {"num_inference_steps": 3}
    )
    results = []
    for scheduler in (theirs, mine):
        x, generator = torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed)), torch.manual_seed(seed)
        for t in scheduler.timesteps:
            x = scheduler.step(torch.tanh(x), t, x, generator=generator).prev_sample
            results.append({"x": x})
    assert results[-1]["x"].shape == (2, 3, 16, 16)
    assert apart(results[:3], results[3:]) <= 1e-5
    mine.set_scale_factors([2.0], mode)
    mine.set_timesteps(3)
    with pytest.raises(ValueError, match="one entry less than timesteps; got 1 and 3"):
        mine.step(x, mine.timesteps[0], x)


def test_flow_heun_noises_as_diffusers(seed):
    theirs, mine = both("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}, {"num_inference_steps": 6})
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    for scheduler in (theirs, mine):
        scheduler.set_begin_index(4)
    a, b = (s.scale_noise(x, s.timesteps[4:5], noise) for s in (theirs, mine))
    assert float((a - b).abs().max()) <= 1e-6


@pytest.mark.parametrize("name", [name for name in EVEN if name in NEW and "Flow" not in name])
def test_the_timestep_before_the_first_is_dropped_with_its_call(seed, name):
    """diffusers' trailing list of some numbers of steps ends at −1: ours is that of the levels before it."""
    config = {"timestep_spacing": "trailing", "num_train_timesteps": 103}
    theirs, mine = both(
        name, config | ({"noise_sampler_seed": 1} if "SDE" in name else {}), {"num_inference_steps": 61}
    )
    if theirs.timesteps[-1] != -1:
        pytest.skip("this list does not end at -1")
    assert torch.equal(mine.timesteps, theirs.timesteps[:-2])
    results = walked(mine, seed, {})[0]
    last = results[-1]
    assert len(results) % 2 == 1
    assert torch.equal(last["a"], last["b"])


def test_cogvideox_goes_on_with_the_callers_own_x0(seed):
    """A kept x̂_0 that is not what the last step returned, or was edited since, is taken; also by a new scheduler."""
    config, steps = {"num_train_timesteps": 240}, {"num_inference_steps": 8}
    theirs, mine = both("CogVideoXDPMScheduler", config, steps)
    x, other, output = (torch.randn(SHAPE) for _ in range(3))
    times = mine.timesteps

    def stepped(scheduler, old, i, **more):
        back = times[i - 1] if i else None
        return scheduler.step(output, old, times[i], back, x, generator=torch.manual_seed(seed), **more)

    for scheduler in (mine, both("CogVideoXDPMScheduler", config, steps)[1]):
        kept = stepped(scheduler, None, 2)[1]
        for old in (other, kept, kept.add_(1.0), kept.clone()):
            for i in (3, 4):
                expected, found = (stepped(s, old, i) for s in (theirs, scheduler))
                assert apart([dict(enumerate(expected))], [dict(enumerate(found))]) <= 1e-5
    fresh = both("CogVideoXDPMScheduler", config, steps)[1]
    expected, found = (stepped(s, other, 4, return_dict=True) for s in (theirs, fresh))
    assert type(expected) is type(found)
    assert apart([dict(expected)], [dict(found)]) <= 1e-5
    with pytest.raises(ValueError, match="timestep_back must be the entry"):
        fresh.step(output, other, times[4], times[2], x)
    with pytest.raises(ValueError, match="timestep 5 is not one of"):
        fresh.step(output, None, 5, None, x)


def test_unclip_steps_between_any_two_timesteps(seed):
    """prev_timestep None is the timestep before; another pair need not be in the list."""
    theirs, mine = both("UnCLIPScheduler", {"num_train_timesteps": 200}, {"num_inference_steps": 7})
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    for t, previous in ((33, 0), (33, None), (7, 2), (199, 4), (1, None), (0, None), (66, 65), (5, -1)):
        expected, found = (s.step(output, t, x, previous, generator=torch.manual_seed(seed)) for s in (theirs, mine))
        # The image is (x - σ ε) / α. Where it is not clipped at 199, α is 2.5e-4 and x is nearly σ ε, so that the
        # difference is exact: what counts is that both round σ and its product with ε, by half an eps each.
        rounding = 2 * torch.finfo(x.dtype).eps * float(output.abs().max())
        bound = 1e-5 + rounding / float(theirs.alphas_cumprod[t]) ** 0.5
        assert apart([dict(expected)], [dict(found)]) <= bound, (t, previous)


def test_wuerstchen_reads_a_rounded_timestep(seed):
    """A timestep rounded to bfloat16 has diffusers' numbers, those of the rounded one; more than one is refused."""
    theirs, mine = both("DDPMWuerstchenScheduler", {}, {"num_inference_steps": 20})
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    rounded = theirs.timesteps[7].expand(2).to(torch.bfloat16)
    assert float(rounded[0]) != float(theirs.timesteps[7])
    expected, found = (s.step(output, rounded, x, torch.manual_seed(seed)).prev_sample for s in (theirs, mine))
    assert float((expected - found).abs().max()) <= 1e-5
    noised = [s.add_noise(x, output, torch.tensor([0.3, 0.9])) for s in (theirs, mine)]
    assert float((noised[0] - noised[1]).abs().max()) <= 1e-6
    with pytest.raises(ValueError, match="one number for the whole batch"):
        mine.step(output, theirs.timesteps[3:5], x)
    with pytest.raises(IndexError, match="there is no step after the list's last timestep"):
        mine.step(output, theirs.timesteps[-1:], x)


def test_options_that_are_refused_by_name():
    for name, config, message in (
        ("EDMDPMSolverMultistepScheduler", {"solver_order": 4}, "solver_order=4 of EDMDPM.* must be 1, 2 or 3"),
        ("EDMDPMSolverMultistepScheduler", {"prediction_type": "sample"}, "prediction_type='sample'"),
        ("SASolverScheduler", {"predictor_order": 5}, "predictor_order=5 of SASolverScheduler must be 1, 2, 3 or 4"),
        ("SCMScheduler", {"prediction_type": "epsilon"}, "prediction_type='epsilon'"),
        ("UnCLIPScheduler", {"prediction_type": "v_prediction"}, "prediction_type='v_prediction'"),
        (
            "DPMSolverMultistepInverseScheduler", {"algorithm_type": "sde-dpmsolver++"},
            "algorithm_type='sde-dpmsolver[+][+]' of .* negative variance",
        ),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            getattr(ours, name)(**config)
    mine = both("IPNDMScheduler", {"trained_betas": [0.5] * 6, "num_train_timesteps": 5}, {"num_inference_steps": 5})[1]
    mine.betas, mine.alphas = mine.betas[:4], mine.alphas[:4]
    with pytest.raises(ValueError, match="a number for each timestep and one more; got 4"):
        mine.step(torch.zeros(SHAPE), mine.timesteps[0], torch.zeros(SHAPE))
    mine = both("DDPMWuerstchenScheduler", {}, {"timesteps": [0.2, 0.9, 0.0]})[1]
    with pytest.raises(ValueError, match="timesteps must fall from 1 to 0"):
        mine.step(torch.zeros(SHAPE), mine.timesteps[:1], torch.zeros(SHAPE))
