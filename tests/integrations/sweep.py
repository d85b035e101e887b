"""Random configurations of every scheduler that fastdiff has for diffusers', run beside diffusers' own.

``python tests/peers.py --sweep N --seed S`` runs N a class: every field of the constructor, lists, timesteps and σ of
one's own, runs from the middle and a step's options. The lists are compared bit for bit, then every state; where one
differs, both run again in float64. What differs is counted by kind: those in ``KINDS`` are known, each with who is
right and why; any other makes the run fail.
"""

import contextlib
import inspect
import random
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from schedulers import beside, times_of

import fastdiff.integrations.diffusers as ours
from fastdiff.integrations.diffusers import base

SHAPE = (2, 3, 4, 4)
APART = 1e-4  # of a state's largest entry: those that differ by less are equal
OUTCOMES = ("equal", "differ", "only ours raises", "only theirs raises", "theirs NaN", "both raise")

# ---- what is drawn

VALUES: dict[str, tuple[Any, ...]] = {
    "num_train_timesteps": (10, 50, 100, 1000, 1000, 4000),
    "beta_start": (1e-5, 1e-4, 8.5e-4, 1e-3),
    "beta_end": (0.012, 0.02, 0.05),
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2"),
    "trained_betas": (None,),
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
    "steps_offset": (0, 1, 2),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range", "learned", "fixed_large_log"),
    "clip_sample_range": (0.5, 1.0, 3.0),
    "sample_max_value": (1.0, 2.0, 10.0),
    "dynamic_thresholding_ratio": (0.9, 0.995),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete", "continuous"),
    "final_sigmas_type": ("zero", "sigma_min"),
    "solver_order": (1, 2, 3),
    "lambda_min_clipped": (-float("inf"), -5.1),
    "flow_shift": (1.0, 3.0, 7.0),
    "time_shift_type": ("exponential", "linear"),
    "disable_corrector": ([], [0], [1, 2]),
    "shift_terminal": (None, 0.1),
    "sigma_min": (None, 0.002, 0.05),
    "sigma_max": (None, 80.0, 10.0),
    "sigma_data": (0.5, 1.0),
    "sigma_schedule": ("karras", "exponential"),
    "rho": (7.0, 3.0),
    "shift": (1.0, 3.0),
    "snr_shift_scale": (1.0, 3.0),
    "scaler": (1.0, 0.5, 2.0),
    "timestep_scaling": (10.0, 3.0),
    "original_inference_steps": (50, 20),
    "s_churn": (0.0, 5.0, 50.0), "s_tmin": (0.0, 0.5), "s_tmax": (float("inf"), 10.0), "s_noise": (1.0, 1.003),
    "eta": (0.0, 0.3, 1.0), "order": (1, 2, 3, 4),
}  # fmt: skip
BY_CLASS: dict[tuple[str, str], tuple[Any, ...]] = {
    ("DDPMScheduler", "beta_schedule"): ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    ("DDIMInverseScheduler", "timestep_spacing"): ("leading", "trailing"),
    ("PNDMScheduler", "prediction_type"): ("epsilon", "v_prediction"),
    ("DPMSolverMultistepScheduler", "algorithm_type"):
        ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    ("DPMSolverSinglestepScheduler", "algorithm_type"): ("dpmsolver++", "dpmsolver", "sde-dpmsolver++"),
    **{(f"{name}Scheduler", "num_train_timesteps"): (100, 1000, 4000) for name in ("LCM", "TCD")},
    **{(f"{name}Scheduler", "original_inference_steps"): (50, 25) for name in ("LCM", "TCD")},
    **{(f"DPMSolver{kind}Scheduler", "solver_type"): ("midpoint", "heun") for kind in ("Multistep", "Singlestep")},
    ("UniPCMultistepScheduler", "solver_type"): ("bh1", "bh2"),
    ("SASolverScheduler", "predictor_order"): (1, 2, 3, 4),
    ("SASolverScheduler", "corrector_order"): (1, 2, 3, 4),
    ("SASolverScheduler", "algorithm_type"): ("data_prediction", "noise_prediction"),
    ("DPMSolverMultistepInverseScheduler", "algorithm_type"): ("dpmsolver++", "dpmsolver"),
    **{(f"{name}Scheduler", "solver_type"): ("midpoint", "heun")
       for name in ("EDMDPMSolverMultistep", "DPMSolverMultistepInverse")},
    ("EDMDPMSolverMultistepScheduler", "algorithm_type"): ("dpmsolver++", "sde-dpmsolver++"),
    **{(f"{name}Scheduler", "variance_type"): (None,) for name in ("SASolver", "DPMSolverMultistepInverse")},
    ("EDMDPMSolverMultistepScheduler", "prediction_type"): ("epsilon", "v_prediction"),
    **{(f"{name}Scheduler", "variance_type"): (None, None, "learned_range")
       for name in ("DPMSolverMultistep", "DPMSolverSinglestep")},
}  # fmt: skip
LISTS = ("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "use_lu_lambdas", "use_flow_sigmas")


@dataclass
class Case:
    """One configuration, and what came of it."""

    name: str
    number: int
    config: dict[str, Any]
    lists: dict[str, Any]
    begin: int
    options: dict[str, Any]
    seed: int
    outcome: str = "equal"
    message: str = ""  # of the error
    list_kind: str | None = None
    repeats: bool = False  # the list's first timestep stands twice
    first: int = -1  # the first state that differs
    steps: int = 0
    gaps: list[float] = field(default_factory=list)  # between the list's timesteps
    last: float = 0.0  # the least of them
    rounding: str | None = None  # whose float32 run is the nearer to its float64 one, where those two agree

    def __str__(self) -> str:
        where = f", state {self.first} of {self.steps}" if self.first >= 0 else ""
        return (
            f"{self.name}(**{self.config}).set_timesteps(**{self.lists}), begin {self.begin}, step(**{self.options})"
            f"{where}{': ' + self.message if self.message else ''}"
        )


def draw(name: str, number: int, seed: int) -> Case:
    """Case ``number`` of a class."""
    rng = random.Random(f"{seed} {name} {number}")
    theirs = getattr(diffusers, name)
    fields = inspect.signature(theirs.__init__).parameters
    config: dict[str, Any] = {}
    for key, parameter in fields.items():
        if key in ("self", "kwargs") or rng.random() > 0.4:
            continue
        if key == "trained_betas" and rng.random() < 0.2:
            top = rng.choice((0.01, 0.05))
            config[key] = [1e-4 + (top - 1e-4) * i / 199 for i in range(200)]
            config["num_train_timesteps"] = 200
        elif key == "solver_p":
            if rng.random() < 0.1:
                config[key] = "DPMSolverMultistepScheduler"
        elif (name, key) in BY_CLASS:
            config[key] = rng.choice(BY_CLASS[name, key])
        elif key in VALUES:
            if not (key == "num_train_timesteps" and "trained_betas" in config):
                config[key] = rng.choice(VALUES[key])
        elif isinstance(parameter.default, bool):
            config[key] = rng.random() < 0.5
        elif isinstance(parameter.default, float):
            config[key] = parameter.default * rng.choice((0.5, 1.0, 1.5))
    if config.get("num_train_timesteps") == 4000 and "beta_end" in fields:
        config["beta_end"] = config.get("beta_end", 0.02) / 4  # or σ is beyond what float64 resolves
    chosen = [key for key in LISTS if config.get(key)]
    if len(chosen) > 1 and rng.random() < 0.95:  # one at most, mostly
        kept = {rng.choice(chosen), "use_flow_sigmas" if rng.random() < 0.1 else ""}
        config = {key: value for key, value in config.items() if key not in chosen or key in kept}
    if config.get("algorithm_type") in ("dpmsolver", "sde-dpmsolver"):
        config["final_sigmas_type"] = "sigma_min"
    if config.get("shift_terminal") and name == "UniPCMultistepScheduler" and not config.get("use_flow_sigmas"):
        del config["shift_terminal"]
    if config.get("use_flow_sigmas") and rng.random() < 0.9:
        config["prediction_type"] = "flow_prediction"
    if name == "EDMEulerScheduler" and config.get("prediction_type") == "sample":
        del config["prediction_type"]
    if config.get("sigma_min", 0) is None:
        del config["sigma_min"]
    if config.get("sigma_max", 0) is None:
        del config["sigma_max"]
    if name == "DPMSolverSDEScheduler":  # or it is random
        config["noise_sampler_seed"] = rng.choice((0, [3, 4]))
    steps, lists = _lists(name, config, rng)
    begin = rng.choice((0, 0, 0, 1, 2, 3)) if steps > 6 else 0
    return Case(name, number, config, lists, begin, _options(name, rng), rng.randrange(1 << 30))


def _lists(name: str, config: dict[str, Any], rng: random.Random) -> tuple[int, dict[str, Any]]:
    takes = inspect.signature(getattr(diffusers, name).set_timesteps).parameters
    T = config.get("num_train_timesteps", 1000)
    slow = name.startswith(("LMS", "DEIS", "KDPM", "SASolver", "LCM", "TCD"))  # or short by themselves
    steps = min(rng.randint(1, 10) if slow else rng.choice((*range(1, 13), rng.randint(1, 25), 61)), T)
    lists: dict[str, Any] = {"num_inference_steps": steps}
    kind = rng.random()
    bare = not any(config.get(key) for key in LISTS)
    if name == "DDPMWuerstchenScheduler" and kind < 0.3:
        lists = {"timesteps": [1.0, *sorted((rng.uniform(0.02, 0.98) for _ in range(steps - 1)), reverse=True), 0.0]}
    elif name in ("DDPMWuerstchenScheduler", "SCMScheduler"):
        pass
    elif "timesteps" in takes and kind < 0.15 and bare and not name.startswith("FlowMatch"):
        lists = {"timesteps": sorted(rng.sample(range(T), min(steps, T)), reverse=True)}
    elif "sigmas" in takes and kind < 0.25:
        if name.startswith("FlowMatch") or config.get("use_flow_sigmas"):
            own = sorted((rng.uniform(0.02, 1.0) for _ in range(steps)), reverse=True)
            lists |= {"sigmas": own}
        elif name.startswith("Euler"):
            lists = {"sigmas": [*sorted((rng.uniform(0.05, 14.0) for _ in range(steps)), reverse=True), 0.0]}
    if name == "SCMScheduler":
        lists["intermediate_timesteps"] = 1.3 if steps == 2 else None
    if "mu" in takes and config.get("use_dynamic_shifting"):
        if not name.startswith(("FlowMatch", "UniPC")):
            config.pop("time_shift_type", None)
        lists["mu"] = rng.choice((0.5, 1.15))
    return steps, lists


def _options(name: str, rng: random.Random) -> dict[str, Any]:
    options = {}
    for key in inspect.signature(getattr(diffusers, name).step).parameters:
        if key == "use_clipped_model_output":
            options[key] = rng.random() < 0.5
        elif (key in ("s_churn", "eta", "order") and rng.random() < 0.5) or (
            key[:2] == "s_" and options.get("s_churn")
        ):
            options[key] = rng.choice(VALUES[key])
    return options


# ---- what is run


def states(scheduler: Any, case: Case, wide: bool) -> list[dict[str, torch.Tensor]]:
    """Every result of a free run of a smooth network."""
    generator, noise = (torch.Generator().manual_seed(case.seed + i) for i in range(2))
    dtype = torch.float64 if wide else torch.float32
    x = (torch.randn(SHAPE, generator=generator) * float(getattr(scheduler, "init_noise_sigma", 1.0))).to(dtype)
    begin = case.begin * getattr(scheduler, "order", 1)
    if begin and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(begin)
    options = dict(case.options)
    if "generator" in inspect.signature(scheduler.step).parameters:
        options["generator"] = noise
    learned = str(scheduler.config.get("variance_type")).startswith("learned")
    found: list[dict[str, torch.Tensor]] = []
    T = scheduler.config.get("num_train_timesteps", 1)
    times = times_of(scheduler)[begin:]
    for i, t in enumerate(times):
        shown = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        output = torch.tanh(shown.to(dtype) * (0.6 + 0.3 * float(t) / T))
        if learned:
            output = torch.cat([output, torch.sin(3 * output)], dim=1)
        given = beside(scheduler, times, i, found[-1].get("pred_original_sample") if found else None)
        done = scheduler.step(model_output=output, sample=x, **given, **options)
        if isinstance(done, tuple):
            done = dict(zip(("prev_sample", "pred_original_sample"), done, strict=False))
        found.append({key: value for key, value in done.items() if value is not None})
        x = done["prev_sample"].to(dtype)
        if not bool(x.isfinite().all()):
            break
    return found


class _Wide:
    """torch, but that float32 is float64 in it."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64(theirs: Any) -> Iterator[None]:
    """Let diffusers' arithmetic be float64, on its float32 tables and noise, which is drawn as it is in float32."""
    from diffusers.utils.torch_utils import randn_tensor

    def drawn(*arguments: Any, dtype: Any = None, **more: Any) -> torch.Tensor:
        return randn_tensor(*arguments, dtype=torch.float32, **more).to(torch.float64)

    module = sys.modules[next(c for c in type(theirs).__mro__ if c.__module__.startswith("diffusers.")).__module__]
    kept = {(m, key): m.__dict__[key] for m in (module, base) for key in ("torch", "randn_tensor") if key in m.__dict__}
    for key, value in theirs.__dict__.items():
        if isinstance(value, torch.Tensor) and value.dtype == torch.float32 and key != "timesteps":
            theirs.__dict__[key] = value.double()
    try:
        for m, key in kept:
            if key == "randn_tensor":
                m.__dict__[key] = drawn
            elif m is module:
                m.__dict__[key] = _Wide()
        yield
    finally:
        for (m, key), value in kept.items():
            m.__dict__[key] = value


def apart(a: list[dict[str, torch.Tensor]], b: list[dict[str, torch.Tensor]], bound: float) -> tuple[int, float]:
    """The first state that differs by more than ``bound``, −1 for none, and the largest difference; NaN are skipped."""
    first, worst = -1, 0.0
    for i, (p, q) in enumerate(zip(a, b, strict=False)):
        for key in p.keys() & q.keys():
            if not bool(p[key].isfinite().all()):
                continue
            scale = max(1.0, float(p[key].abs().max()))
            error = float((p[key].double() - q[key].double()).abs().max()) / scale
            worst = max(worst, error)
            if not error <= bound and first < 0:
                first = i
    return first, worst


def finite(state: dict[str, torch.Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in state.values())


def made(module: Any, case: Case) -> Any:
    config = dict(case.config)
    if config.get("solver_p") is not None:
        config["solver_p"] = getattr(diffusers, config["solver_p"])()
    scheduler = getattr(module, case.name)(**config)
    scheduler.set_timesteps(**case.lists)
    return scheduler


def attempt(run: Callable[[], Any]) -> tuple[Any, str]:
    try:
        return run(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"


def same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a.nan_to_num(-7e7), b.nan_to_num(-7e7)))


def pair_of(case: Case) -> tuple[Any, Any, str, str]:
    """Both schedulers with their lists set, and the errors; theirs takes our list where that is another."""
    theirs, their_error = attempt(lambda: made(diffusers, case))
    mine, error = attempt(lambda: made(ours, case))
    if theirs is not None and mine is not None:
        lists = [(getattr(theirs, key, None), getattr(mine, key, None)) for key in ("timesteps", "sigmas")]
        if not all(same(*each) for each in lists):
            case.list_kind = "new"
            case.list_kind = next((k.name for k in KINDS if k.outcome == "list" and k.matches(case, lists)), "new")
            theirs.timesteps, theirs.sigmas = mine.timesteps.clone(), getattr(mine, "sigmas", None)
            theirs.num_inference_steps = mine.num_inference_steps
        times = mine.timesteps
        if not case.begin and bool((times[1:] == times[0]).any()) and hasattr(theirs, "set_begin_index"):
            case.repeats = True  # theirs would begin with the second
            theirs.set_begin_index(0)
        begin = case.begin * getattr(mine, "order", 1)
        counted = hasattr(theirs, "step_index") and not hasattr(theirs, "set_begin_index")
        if counted and begin < len(times) and int((times == times[begin]).sum()) > 1:
            case.repeats = True  # theirs would begin with the second, wherever the run begins
            theirs._step_index = begin
    return theirs, mine, their_error, error


def run(case: Case) -> Case:
    """The case with what came of it."""
    theirs, mine, their_error, error = pair_of(case)
    a = b = None
    if theirs is not None:
        a, their_error = attempt(lambda: states(theirs, case, False))
    if mine is not None:
        case.steps = len(times_of(mine)) - case.begin * getattr(mine, "order", 1)
        case.gaps = (mine.timesteps[:-1] - mine.timesteps[1:]).tolist()
        case.last = float(mine.timesteps.min())
        b, error = attempt(lambda: states(mine, case, False))
    case.message = error or their_error
    if b is None or a is None:
        case.outcome = "both raise" if a is b is None else "only ours raises" if b is None else "only theirs raises"
        return case
    broken = next((i for i, (p, q) in enumerate(zip(a, b, strict=False)) if finite(p) and not finite(q)), -1)
    first, _ = apart(a, b, APART)
    if broken >= 0 or first >= 0:
        case.outcome, case.first = "differ", first
        if broken >= 0:
            case.message = f"NaN in ours at state {broken}"
            return case
        again = pair_of(case)
        with float64(again[0]):
            wide, _ = attempt(lambda: states(again[0], case, True))
        with float64(again[0]):
            own, _ = attempt(lambda: states(again[1], case, True))
        if wide is not None and own is not None:
            here = slice(first, first + 1)
            narrow, exact, ours_error, their_error = (
                apart(p[here], q[here], 0)[1] for p, q in ((a, b), (wide, own), (own, b), (wide, a))
            )
            if exact <= 1e-3 * narrow:
                case.rounding = "ours" if ours_error <= their_error else "theirs"
    elif not all(map(finite, a)):
        case.outcome = "theirs NaN"
    return case


# ---- kinds that are known


@dataclass(frozen=True)
class Kind:
    """A kind of difference.

    Args:
        outcome: "list", "differ" or "only ours raises".
        matches: whether a case (and, of a list, the pairs of timesteps and of σ) is of this kind.
        right: "ours", "theirs" or "both".
    """

    outcome: str
    name: str
    right: str
    why: str
    matches: Callable[..., bool]


def _says(pattern: str) -> Callable[..., bool]:
    return lambda case: re.search(pattern, case.message) is not None


def _is(*names: str) -> Callable[[Case], bool]:
    return lambda case: case.name in {f"{name}Scheduler" for name in names}


def _minus_one(case: Case, lists: list[tuple[Any, Any]]) -> bool:
    """Whether ours lacks the −1, at an inverse list's head or at a list's end, there with the call before it."""
    theirs, mine = lists[0]
    if not bool((theirs == -1).any()) or len(theirs) - len(mine) > 2:
        return False
    return torch.equal(theirs[theirs != -1], mine) or torch.equal(theirs[: len(mine)], mine)


def _ends_at_0(case: Case, lists: list[tuple[Any, Any]]) -> bool:
    (times, own), (theirs, mine) = lists
    return same(times, own) and same(theirs[:-1], mine[:-1]) and float(mine[-1]) == 0


def _previous(case: Case) -> bool:
    """Whether timestep − T // steps is not the list's next one, or does not lead out of it at its end."""
    step = case.config.get("num_train_timesteps", 1000) // case.lists["num_inference_steps"]
    return any(abs(gap) != step for gap in case.gaps) or case.last >= step


REPEATED = "the first timestep twice"
KINDS = (
    Kind(
        "list", REPEATED, "ours", "theirs begins with the second and ends a step short: here set_begin_index(0)",
        lambda case, lists: False,
    ),
    Kind("list", "timestep −1 dropped", "ours", "one step too many, at a timestep that is none", _minus_one),
    Kind(
        "list", "ends at 0, not with one σ twice", "ours", "their last call does nothing",
        lambda case, lists: _is("DEISMultistep")(case) and _ends_at_0(case, lists),
    ),
    Kind(
        "list", "one step with shift_terminal", "ours", "theirs is 0/0",
        lambda case, lists: bool(case.config.get("shift_terminal")) and len(lists[0][1]) == 1,
    ),
    Kind("differ", "float32's rounding, ours the nearer", "ours", "float64 runs agree", lambda c: c.rounding == "ours"),
    Kind("differ", "float32's rounding, theirs the nearer", "both", "float64 runs agree",
         lambda c: c.rounding == "theirs"),
    Kind(
        "differ", "σ_down of the cosine's first steps", "ours", "float32 cancels; a path of float64 would be another",
        lambda c: _is("DPMSolverSDE")(c) and c.config.get("beta_schedule") == "squaredcos_cap_v2",
    ),
    Kind(
        "differ", "the last step of a list without its timestep −1", "ours", "theirs ends half-way to it",
        lambda c: _is("KDPM2Discrete", "KDPM2AncestralDiscrete")(c) and c.list_kind == "timestep −1 dropped",
    ),
    Kind(
        "differ", "previous timestep", "ours", "the list's next one, not timestep − T // steps",
        lambda c: _is("DDIM", "DDIMInverse", "CogVideoXDDIM", "CogVideoXDPM")(c) and _previous(c),
    ),
    Kind(
        "differ", "PNDM: previous timestep, or from the middle", "ours", "as DDIM; a multistep method's start",
        lambda c: _is("PNDM")(c) and (_previous(c) or c.begin > 0),
    ),
    Kind("differ", "LMS: from the middle, or its coefficients", "ours", "order 1 first; integrated exactly",
         _is("LMSDiscrete")),
    Kind(
        "differ", "DDPM: noise in the last step", "ours", "Ho et al. 2020, Algorithm 2, has none",
        lambda c: _is("DDPM")(c) and c.first == c.steps - 1
        and c.config.get("variance_type") in ("fixed_large", "learned_range"),
    ),
    Kind(
        "differ", "third-order SDE", "ours", "the second difference weighs +½, not −½",
        lambda c: _is("DPMSolverMultistep", "DPMSolverSinglestep")(c) and c.config.get("solver_order") == 3
        and c.config.get("algorithm_type") == "sde-dpmsolver++",
    ),
    Kind(
        "only ours raises", "flow σ with another list", "ours", "σ beyond a flow's 1",
        _says("does not go with use_flow_sigmas=True: its σ"),
    ),
    Kind(
        "only ours raises", "v of a flow, or a flow's prediction of other σ", "ours", "not what the state is made of",
        _says("does not go with use_flow_sigmas=True$|needs use_flow_sigmas=True"),
    ),
    Kind("only ours raises", "ε where ᾱ is 0", "ours", "says nothing of x_0", _says("epsilon says nothing of x_0")),
    Kind("only ours raises", "σ that rise or stand still", "ours", "diffusers goes up, or divides by 0",
         _says("walks down: σ must fall")),
    Kind("only ours raises", "σ that are infinite", "ours", "ᾱ is 0 in float32", 
         _says("(sigmas|alphas_cumprod) must be finite")),
    Kind("only ours raises", "σ half-way that are NaN in float32", "ours", "theirs is NaN too",
         _says("is nan in float32")),
    Kind("only ours raises", "Runge–Kutta from the middle", "ours", "theirs reads the wrong timesteps",
         _says("with skip_prk_steps=False a run must begin")),
    Kind("only ours raises", "x̂_0 of a clean image", "ours", "theirs divides by 0", _says("cannot leave the clean")),
    Kind("only ours raises", "variances that are roots of what is negative", "ours", "theirs is NaN, but by luck",
         _says("variance_type=.* is the square root of")),
    Kind("only ours raises", "a timestep twice, or beyond the table", "ours", "no step", _says(
        r"timesteps must fall|same timestep|t must be in \[0, |fall strictly|timesteps\[\d+\]")),
)  # fmt: skip


def kind_of(case: Case) -> Kind | None:
    return next((kind for kind in KINDS if kind.outcome == case.outcome and kind.matches(case)), None)


def sweep(count: int, seed: int, names: list[str] | None = None) -> int:
    """Run ``count`` configurations of each class and print the tables; 1 where a kind is new, else 0."""
    warnings.filterwarnings("ignore")
    diffusers.utils.logging.set_verbosity(diffusers.utils.logging.CRITICAL)
    print(f"sweep of {count} configurations a class, seed {seed}; diffusers {diffusers.__version__}")
    width = max(map(len, ours.SCHEDULERS))
    print(f"{'class':{width}}", *(f"{outcome:>18}" for outcome in OUTCOMES))
    kinds, new, total = Counter[Kind](), list[Case](), Counter[str]()
    by_name = {kind.name: kind for kind in KINDS}
    for name in names or list(ours.SCHEDULERS):
        outcomes = Counter[str]()
        for number in range(count):
            case = run(draw(name, number, seed))
            outcomes[case.outcome] += 1
            unknown = case.list_kind == "new"
            for found in (None if unknown else case.list_kind, REPEATED if case.repeats else None):
                if found is not None:
                    kinds[by_name[found]] += 1
            if case.outcome in ("differ", "only ours raises"):
                kind = kind_of(case)
                unknown = unknown or kind is None
                if kind is not None:
                    kinds[kind] += 1
            if unknown:
                new.append(case)
        total += outcomes
        print(f"{name:{width}}", *(f"{outcomes[outcome]:18}" for outcome in OUTCOMES), flush=True)
    print(f"{'all':{width}}", *(f"{total[outcome]:18}" for outcome in OUTCOMES))
    print("\nkinds that are known:")
    for kind in KINDS:
        if kinds[kind]:
            print(f"{kinds[kind]:6}  {kind.outcome}: {kind.name}. Right: {kind.right} ({kind.why})")
    for case in new:
        what = "list" if case.list_kind == "new" else case.outcome
        print(f"NEW KIND: {what}: case {case.number} of {case}")
    return 1 if new else 0
