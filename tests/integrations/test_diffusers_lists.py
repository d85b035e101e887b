"""Lists of σ and tables of ᾱ: changed by their user in place or by another, and mended where diffusers is mistaken."""

import copy
import math

import pytest
import torch

pytest.importorskip("diffusers")
import diffusers
from schedulers import APART, CHURN, FLOW, SHAPE, difference, pair, start_of

import fastdiff.integrations.diffusers as ours

diffusers.utils.logging.set_verbosity_error()
NAMES = [name for name in ours.SCHEDULERS if name not in APART]
SIGMAS = [name for name in NAMES if hasattr(getattr(ours, name)(), "sigmas")]
TABLES = [name for name in NAMES if name not in SIGMAS]
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}


def states(scheduler, seed: int, edit=None, at: int = 0, copied: bool = False):
    """Every x of a run of a smooth network, the list (or table) edited before step ``at``."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.Generator().manual_seed(seed + 1)
    x, found = start_of(scheduler, generator), []
    for i, t in enumerate(scheduler.timesteps):
        if edit is not None and i == at:
            edit(scheduler)
        t = t.clone() if copied else t
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        options = {"generator": source} if "generator" in scheduler.step.__code__.co_varnames else {}
        x = scheduler.step(torch.tanh(shown), t, x, **options).prev_sample.float()
        found.append(x)
    return found


def apart(a, b) -> float:
    return max(float((x - y).abs().max()) / max(1.0, float(x.abs().max())) for x, y in zip(a, b, strict=True))


# ---- edited in place


def shrink(scheduler):
    scheduler.sigmas *= 0.9


def end_higher(scheduler):  # as Cosmos2's pipelines do
    scheduler.sigmas[-1] = scheduler.sigmas[-2]


def replace(scheduler):
    scheduler.sigmas = scheduler.sigmas * 0.9


@pytest.mark.parametrize("name", SIGMAS)
@pytest.mark.parametrize("edit", [shrink, replace, end_higher])
@pytest.mark.parametrize("at", [0, 4])
def test_sigmas_that_are_changed(seed, name, edit, at):
    """Before a run and in its midst, where a multistep method keeps its history: diffusers' numbers."""
    theirs, mine = pair(name, widen=False)
    if edit is end_higher and name in ("DEISMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        pytest.skip("NaN in diffusers")
    if at and edit is not end_higher and name == "SASolverScheduler":
        pytest.skip("corrects its last step with the σ that it was predicted with")
    if edit is end_higher and name.startswith("KDPM2"):
        pytest.skip("its list ends with three σ of 0")
    kept, plain = copy.deepcopy(mine), copy.deepcopy(mine)
    a, b = (states(scheduler, seed, edit, at) for scheduler in (theirs, mine))
    error = apart(a, b)
    assert error <= 1e-5
    assert apart(states(plain, seed)[-1:], b[-1:]) > max(2 * error, 1e-6)  # a last σ of 0.03 changes little
    with torch.inference_mode():  # whose tensors have no versions
        kept.set_timesteps(10)
        assert kept.sigmas.is_inference()
        assert apart(states(kept, seed, edit, at), b) == 0


@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("at", [0, 3])
def test_tables_that_are_edited(seed, name, at):
    def edit(scheduler):
        scheduler.alphas_cumprod *= 0.9
        for end in ("final_alpha_cumprod", "initial_alpha_cumprod"):
            if end in scheduler.__dict__:
                setattr(scheduler, end, scheduler.alphas_cumprod[0].clone())

    theirs, mine = pair(name, {"set_alpha_to_one": False} if "set_alpha_to_one" in pair(name)[0].config else {}, 10)
    plain = copy.deepcopy(mine)
    a, b = (states(scheduler, seed, edit, at) for scheduler in (theirs, mine))
    assert apart(a, b) <= 2e-4
    assert apart(states(plain, seed), b) > 1e-3
    t = torch.tensor([3, 500])
    x, noise = torch.randn(SHAPE), torch.randn(SHAPE)
    if hasattr(theirs, "add_noise"):
        a, b = (scheduler.add_noise(x, noise, t) for scheduler in (theirs, mine))
        assert float((a - b).abs().max()) <= 1e-6


def test_timesteps_that_are_edited(seed):
    mine = pair("DDIMScheduler")[1]
    mine.timesteps[4] = 490
    plain = pair("DDIMScheduler")[1]
    plain.timesteps = mine.timesteps.clone()
    assert apart(states(mine, seed), states(plain, seed)) == 0


def test_a_history_that_new_rows_cannot_read_is_dropped(seed):
    """The order of a list's steps changed in mid-run: the rest is a run of its own, from its first step on."""
    mine, rest = (pair("DPMSolverMultistepScheduler", {"solver_order": 2, "lower_order_final": False})[1] for _ in "ab")
    mine.config["solver_order"] = rest.config["solver_order"] = 2
    x, outputs = torch.randn(SHAPE), [torch.randn(SHAPE) for _ in range(10)]
    for t, output in zip(mine.timesteps[:4], outputs, strict=False):
        x = mine.step(output, t, x).prev_sample
    for scheduler in (mine, rest):
        scheduler.register_to_config(solver_order=3)
        scheduler.sigmas *= 1.01
    rest.set_begin_index(4)
    y = x
    for t, output in zip(mine.timesteps[4:], outputs[4:], strict=True):
        x, y = (s.step(output, t, z).prev_sample for s, z in ((mine, x), (rest, y)))
    assert torch.equal(x, y)


# ---- tokens with a σ of their own, and UniPC with another predictor


@pytest.mark.parametrize("config", [{}, {"stochastic_sampling": True}])
def test_per_token_timesteps(seed, config):
    """A token goes to the largest σ of the list below its own; LTX's conditioning pipeline passes them in each step."""
    both = pair("FlowMatchEulerDiscreteScheduler", config, 4, widen=False)
    x = torch.randn(2, 5, 3)
    frozen = torch.rand(2, 5) < 0.4
    for t in both[0].timesteps.tolist():
        per = torch.where(frozen, 0.0, torch.tensor(t))
        output = torch.randn(2, 5, 3)
        a, b = (
            s.step(output, t, x, per_token_timesteps=per, generator=torch.manual_seed(seed)).prev_sample for s in both
        )
        assert torch.equal(a, b)
        if not config:
            assert torch.equal(b[frozen], x[frozen])
        x = b
    assert both[1].step_index == 4
    both[1].use_fastdiff_noise(seed)
    both[1].register_to_config(stochastic_sampling=True)
    with pytest.raises(ValueError, match="torch's noise"):
        both[1].step(x, 1000.0, x, per_token_timesteps=torch.full((2, 5), 1000.0))


@pytest.mark.parametrize("module", [diffusers, ours])
def test_unipc_with_another_predictor(seed, module):
    found = []
    for cls in (diffusers.UniPCMultistepScheduler, ours.UniPCMultistepScheduler):
        scheduler = cls(**STABLE, solver_p=module.DPMSolverMultistepScheduler(**STABLE))
        scheduler.set_timesteps(10)
        found.append(states(scheduler, seed))
    assert apart(*found) == 0
    plain = ours.UniPCMultistepScheduler(**STABLE)
    plain.set_timesteps(10)
    assert apart(states(plain, seed), found[1]) > 1e-5
    assert type(ours.like(scheduler.from_config(scheduler.config))) is type(None)  # ours is what like() is to make
    theirs = diffusers.UniPCMultistepScheduler(**STABLE, solver_p=diffusers.DPMSolverMultistepScheduler(**STABLE))
    assert ours.like(theirs).solver_p is theirs.solver_p


# ---- lists that diffusers gets wrong


@pytest.mark.parametrize(
    "config",
    [
        FLOW | {"flow_shift": 5.0}, {"use_karras_sigmas": True}, {"use_exponential_sigmas": True},
        {"use_beta_sigmas": True},
    ],
)  # fmt: skip
def test_deis_ends_at_0(seed, config):
    """Its last call denoises; theirs makes it for nothing, which was mended in DPMSolverMultistepScheduler alone."""
    if "use_beta_sigmas" in config:
        pytest.importorskip("scipy")
    theirs, mine = pair("DEISMultistepScheduler", config, widen=False)
    assert theirs.sigmas[-1] == theirs.sigmas[-2] > 0
    assert mine.sigmas[-1] == 0
    assert torch.equal(mine.sigmas[:-1], theirs.sigmas[:-1])
    assert torch.equal(mine.timesteps, theirs.timesteps)
    a, b = states(theirs, seed), states(mine, seed)
    assert apart(a[:-2], b[:-2]) <= 1e-4
    assert torch.equal(a[-1], a[-2])
    sigma = float(mine.sigmas[-2])
    x, output = b[-2].double(), torch.tanh(b[-2]).double()
    scale = 1 if "use_flow_sigmas" in config else math.hypot(1, sigma)  # x = (x_0 + σ ε)/√(1 + σ²)
    assert float((b[-1] - (x * scale - sigma * output)).abs().max()) <= 1e-4


LU = {"beta_schedule": "squaredcos_cap_v2", "use_lu_lambdas": True, "final_sigmas_type": "sigma_min"}
LOG = {"beta_schedule": "squaredcos_cap_v2", "interpolation_type": "log_linear", "final_sigmas_type": "sigma_min"}


@pytest.mark.parametrize(
    ("name", "config", "steps"),
    [
        ("DPMSolverMultistepScheduler", LU, 14), ("DPMSolverMultistepScheduler", LU | {"solver_order": 3}, 9),
        ("DPMSolverMultistepScheduler", LU | {"algorithm_type": "sde-dpmsolver++"}, 20),
        ("EulerDiscreteScheduler", LOG, 12), ("EulerDiscreteScheduler", LOG | {"use_karras_sigmas": True}, 12),
        ("EulerDiscreteScheduler", LOG | {"use_exponential_sigmas": True}, 7),
        ("EulerDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 1000),
        ("HeunDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 1000),
        ("EulerAncestralDiscreteScheduler", {"timestep_spacing": "leading", "steps_offset": 1}, 1000),
        ("EulerDiscreteScheduler", {"num_train_timesteps": 10}, 11),
    ],
)  # fmt: skip
def test_sigmas_that_are_equal_but_for_rounding(seed, name, config, steps):
    """They fall by less than float32 tells, or rise: a step of next to nothing, as in diffusers."""
    if "num_train_timesteps" in config:
        config = config | {"timestep_spacing": "linspace"}
    theirs, mine = pair(name, config, steps, widen=steps == 1000)
    if steps < 1000:
        assert any(b >= a for a, b in zip(mine.sigmas, mine.sigmas[1:], strict=False)) or steps == 11
        assert apart(states(theirs, seed), states(mine, seed)) <= 1e-4
    else:
        x = torch.randn(SHAPE)
        for t, u in zip(theirs.timesteps[:3], mine.timesteps[:3], strict=True):
            a, b = (
                s.step(torch.tanh(s.scale_model_input(x, v)), v, x, **more).prev_sample
                for s, v, more in ((theirs, t, noise(name)), (mine, u, noise(name)))
            )
            assert float((a - b).abs().max()) <= 1e-5 * float(x.abs().max())


def noise(name):
    return {"generator": torch.Generator().manual_seed(5)} if "Ancestral" in name else {}


@pytest.mark.parametrize("name", ["FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_one_step_to_a_terminal_shift(seed, name):
    """σ = [1, 0], where diffusers' stretch of a list that never leaves 1 divides 0 by 0."""
    config = {"shift_terminal": 0.1, **({} if name.startswith("Flow") else FLOW)}
    mine = pair(name, config, 1)[1]
    assert mine.sigmas.tolist() == pytest.approx([1, 0], abs=2e-6)
    x, output = torch.randn(SHAPE), torch.randn(SHAPE)
    done = mine.step(output, mine.timesteps[0], x).prev_sample
    assert float((done - (x - output)).abs().max()) <= 1e-5
    lists = [s.sigmas for s in pair(name, config, 4)]
    assert torch.equal(lists[0].float(), lists[1])


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"])
def test_repeated_timesteps_given_as_copies(seed, name):
    """Rounding makes the first timesteps of Karras' σ on the cosine table one number; a run begins with the first."""
    config = {"beta_schedule": "squaredcos_cap_v2", "use_karras_sigmas": True}
    runs = []
    for copied in (False, True):
        mine = pair(name, config, 20)[1]
        if name != "EulerDiscreteScheduler":
            assert mine.timesteps[0] == mine.timesteps[1]
        runs.append(states(mine, seed, copied=copied))
    assert apart(*runs) == 0


def test_heun_begins_with_the_first_of_two_steps(seed):
    theirs, mine = pair("HeunDiscreteScheduler")
    runs = []
    for scheduler in (theirs, mine):
        torch.manual_seed(seed)
        x = torch.randn(SHAPE)
        for t in scheduler.timesteps[5:].clone():  # 5 is the second step to a level, and 6 the first from there
            x = scheduler.step(torch.tanh(scheduler.scale_model_input(x, t)), t, x).prev_sample
            runs.append(x)
            if len(runs) % 4 == 0:
                break
    assert mine.step_index == theirs.step_index == 10
    assert apart(runs[:4], runs[4:]) <= 1e-5


@pytest.mark.parametrize("steps", [61, 103, 122, 201])
def test_trailing_lists_end_before_minus_1(seed, steps):
    for name in NAMES:
        config = getattr(ours, name)().config
        if "timestep_spacing" not in config or name in ("LCMScheduler", "TCDScheduler"):
            continue
        if name.startswith("KDPM2"):  # whose call before it goes, too: test_diffusers_more.py
            continue
        theirs, mine = pair(name, {"timestep_spacing": "trailing"}, steps, widen=False)
        kept = theirs.timesteps >= 0
        extra = len(kept) - int(kept.sum())
        assert extra, name
        assert torch.equal(mine.timesteps, theirs.timesteps[kept])
        if "sigmas" in mine.__dict__:
            assert len(mine.sigmas) == len(theirs.sigmas) - extra
            assert mine.sigmas[-1] == theirs.sigmas[-1]
            assert torch.equal(mine.sigmas[:-1], theirs.sigmas[: -1 - extra])
        x = states(mine, seed)[-1]
        assert bool(x.isfinite().all())


def test_heun_loses_no_digits_in_float32(seed):
    """(x − x̂_0)/σ is a network's ε itself: one step in float32 is within float32's rounding of x and of ε."""
    for steps in (7, 20):
        narrow, wide = (pair("HeunDiscreteScheduler", {"beta_schedule": "squaredcos_cap_v2"}, steps)[1] for _ in "ab")
        x = start_of(narrow, torch.Generator().manual_seed(seed))
        for t in narrow.timesteps:
            output = torch.tanh(narrow.scale_model_input(x, t))
            wide.scale_model_input(x, t)
            y = wide.step(output.double(), t, x.double()).prev_sample
            x = narrow.step(output, t, x).prev_sample
            assert float((x - y).abs().max()) <= 4e-7 * max(1.0, float(x.abs().max()))


def test_churn_of_an_edited_list(seed):
    theirs, mine = pair("EulerDiscreteScheduler", widen=False)
    for scheduler in (theirs, mine):
        scheduler.sigmas[3] = 1.01 * scheduler.sigmas[3]
    assert difference(theirs, mine, CHURN, seed=seed) <= 1e-5
