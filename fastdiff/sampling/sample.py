"""``sample`` and ``sample_iter``: your network, a plan and a seed make images.

The arguments are checked here; fastdiff/sampling/stepper.py holds the loop, fastdiff/ops/update/ the kernel of a row.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_shape
from fastdiff.ops.backend import choose
from fastdiff.plan.plan import Plan
from fastdiff.samplers import SAMPLERS
from fastdiff.sampling.classifier_guidance import Classifier, guided_by_gradient
from fastdiff.sampling.guidance import resolve_guidance
from fastdiff.sampling.model import describe
from fastdiff.sampling.noise_source import NoiseSource, resolve_noise_source
from fastdiff.sampling.start import by_strength, check_start, initial_state, resolve_mask
from fastdiff.sampling.stepper import Run, State, plain_tensors
from fastdiff.sampling.thresholding import resolve_thresholding
from fastdiff.schedules.spacing import Schedule, levels, nearest, resolve_any_schedule


def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    *,
    sampler: str | Plan = "ddpm",
    steps: int | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    clip: float | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    sample_offset: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_fn: Callable[[int, int, tuple[int, ...]], Tensor] | None = None,
    x_init: Tensor | None = None,
    start_step: int = 0,
    resume: State | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    guidance_scale: float | tuple[float, float] = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    thresholding: float | tuple[float, float] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    device: torch.device | str | None = None,
    model_dtype: torch.dtype | None = None,
    backend: str = "auto",
    cuda_graph: bool | str = "auto",
    callback: Callable[[State], Any] | None = None,
    progress: bool = False,
) -> Tensor:
    """Draw images from a diffusion model.

    ``model(x, t)`` is your network: x is [B, …] in its own dtype, t is [B], int64 where every timestep of the plan is
    an index and float32 otherwise; it returns a tensor, a tuple that starts with one, or an object with ``.sample``.
    A module in training mode is put in eval mode for the run. No gradients are recorded.

    Args:
        model: the network.
        shape: [B, …] of the images.
        sampler: a name of ``fastdiff.samplers`` or a ``Plan``; a Plan fixes the next eight arguments, which must then
            be left out.
        steps: network calls; None visits every timestep.
        schedule: a NoiseSchedule or a name; None is "linear", β from 1e-4 to 0.02 over T = 1000.
        prediction: what the network predicts: "epsilon" (the default), "v_prediction" or "sample".
        variance: DDPM's: "fixed_small" (the default), "fixed_large", "learned" or "learned_range".
        spacing: "leading" (the default), "trailing" or "linspace".
        eta: DDIM's η in [0, 1], by default 0.
        clip: the bound of |x̂_0|, None for none; 1.0 is usual for images in [−1, 1].
        sampler_options: further keywords of the sampler's function, such as ``timesteps``.
        seed: by default 0. Image i of seed s is the same image whatever the batch, the device or the backend.
        seeds: one seed an image instead. sample_offset: the first image's number.
        generator: a torch.Generator, or one an image: torch's own noise, drawn as diffusers draws it.
        noise_fn: noise_fn(stream, draw, shape) -> floating-point tensor, in place of all noise.
        x_init: clean images [B, …] to start from, noised to row ``start_step`` (image-to-image).
        start_step: the first row to run, with x_init.
        resume: a ``State`` of an earlier run of the same plan and arguments, to go on from.
        strength: in place of start_step, in [0, 1]: the last int(steps·strength) steps are run, as diffusers counts
            them; 1 starts from noise at x_T's level, 0 returns x_init.
        mask, known: inpainting. After each network call x' ← mask·(known, noised to the level reached) +
            (1 − mask)·x'; 1 is known. mask: bool, or numbers in [0, 1], that broadcasts to [B, …]; known: [B, …].
            sampler="repaint" resamples (Lugmayr et al. 2022).
        model_kwargs: keywords of every network call. uncond_kwargs: those that the unconditional call has otherwise,
            such as a negative prompt's; tensors of B entries are concatenated [uncond, cond] for one call, others must
            be equal.
        guidance_scale: s in u + s·(c − u); 1, or no uncond_kwargs, is one plain call. A pair (s_T, s_I) is
            InstructPix2Pix's (``plan.guidance_weights``), uncond_kwargs then two: of e(∅, ∅) and of e(I, ∅).
        guidance_rescale: φ of Lin et al. 2024, Equation 16; 0 is none.
        guidance_interval: (low, high): guide where low < σ/α ≤ high (Kynkäänniemi et al. 2024); elsewhere the network
            is called once, with model_kwargs. ``schedule.sigma_at(t)`` is a timestep's σ/α.
        thresholding: dynamic thresholding's ratio, 0.995 in Imagen, or (ratio, maximum): each image's |x̂_0| is clamped
            to its quantile s, 1 ≤ s ≤ maximum, and divided by s; in place of clip.
        cond_fn: cond_fn(x, t, **model_kwargs) -> ∇ log p(y | x_t), like x: classifier guidance (``classifier``). x is
            the float32 state itself, not scaled by c_in, t as the network has it; gradients are on. Runs eagerly.
        device, model_dtype: where the network is and what it takes; read from its parameters by default.
        backend: "auto", "native", "triton" or "reference".
        cuda_graph: "auto", True or False: replay the whole step as one CUDA graph (``sampling.graph``).
        callback: called with a ``State`` of fresh tensors after every row.
        progress: show a tqdm bar.

    Returns:
        float32 [B, …].

    Raises:
        TypeError, ValueError: before any work, naming the argument, what it is and what it should be; or from the
            network's first call, if it returns the wrong shape or dtype.
        FloatingPointError: the network's output was not finite; names the row (on a GPU, after the last one).
    """
    arguments = dict(locals())
    with plain_tensors():
        return _prepare(**arguments, keeps_x0=callback is not None).finish(callback, cuda_graph)


def sample_iter(model: Callable[..., Any], shape: Sequence[int], **arguments: Any) -> Iterator[State]:
    """``sample``, yielding a ``State`` of fresh tensors after every row; takes the same arguments.

    Any of the states can be given to ``resume=`` later, to the bit. Arguments are checked by this call, not at the
    first row. Rows run eagerly.
    """
    bound = inspect.signature(sample).bind(model, shape, **arguments)
    bound.apply_defaults()
    with plain_tensors():
        run = _prepare(**bound.arguments, keeps_x0=True)
    return run.states(bound.arguments["callback"])


def _prepare(
    model: Callable[..., Any],
    shape: Sequence[int],
    *,
    seed: int | None,
    seeds: Sequence[int] | None,
    sample_offset: int | None,
    generator: Any,
    noise_fn: Any,
    x_init: Tensor | None,
    start_step: int,
    resume: State | None,
    strength: float | None,
    mask: Tensor | None,
    known: Tensor | None,
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Any,
    guidance_scale: Any,
    guidance_rescale: float,
    guidance_interval: Any,
    thresholding: Any,
    cond_fn: Any,
    device: torch.device | str | None,
    model_dtype: torch.dtype | None,
    backend: str,
    cuda_graph: bool | str,
    callback: Callable[[State], Any] | None,
    progress: bool,
    keeps_x0: bool,
    **plan_arguments: Any,
) -> Run:
    """A run of checked arguments."""
    if not callable(model):
        raise TypeError(f"model must be callable; got {type(model).__name__}")
    for name, function in (("callback", callback), ("cond_fn", cond_fn)):
        if function is not None and not callable(function):
            raise TypeError(f"{name} must be callable; got {type(function).__name__}")
    shape = check_shape("shape", shape)
    plan = resolve_plan(**plan_arguments)
    check_start(plan, x_init, start_step, strength, resume)
    if strength is not None:
        plan, start_step = by_strength(plan, strength, **_rebuilding(plan_arguments))
    if cond_fn is not None and not plan.uses_gradient:
        plan = guided_by_gradient(plan)
    if cond_fn is None and plan.uses_gradient:
        raise ValueError(f"the plan {plan.name!r} reads a gradient: give cond_fn")
    network = describe(model, shape, device, model_dtype)
    draws = resolve_noise_source(shape, network.device, network.dtype, seed, seeds, sample_offset, generator, noise_fn)
    guidance = resolve_guidance(
        shape[0], model_kwargs, uncond_kwargs, guidance_scale, guidance_rescale, guidance_interval
    )
    classifier = Classifier(cond_fn, guidance.plain) if cond_fn is not None else None
    threshold = resolve_thresholding(thresholding, plan)
    mask, known = resolve_mask(mask, known, shape, network.device)
    if mask is not None and plan[-1].sigma > plan[0].sigma:
        raise ValueError(f"mask goes with a plan that leads to an image; {plan.name!r} leads to noise")
    _check_graph(cuda_graph, network.device, draws, callback, cond_fn)
    backend = choose(backend, network.device.type)
    start, x = initial_state(plan, shape, network.device, draws, x_init, start_step, resume, backend)
    run = Run(
        network, plan, x, start, draws, guidance, backend, thresholding=threshold, classifier=classifier, mask=mask,
        known=known, keeps_x0=keeps_x0, progress=bool(progress),
    )  # fmt: skip
    if resume is not None:
        run.restore(resume)
    return run


def resolve_plan(
    sampler: str | Plan,
    steps: int | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    spacing: str | None = None,
    eta: float | None = None,
    clip: float | None = None,
    sampler_options: Mapping[str, Any] | None = None,
) -> Plan:
    """The plan that ``sample``'s arguments ask for; None stands for a default."""
    given = {"prediction": prediction, "spacing": spacing, "clip": clip, "variance": variance, "eta": eta}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(sampler, Plan):
        others = {"steps": steps, "schedule": schedule, "sampler_options": sampler_options}
        extra = [*given, *(name for name, value in others.items() if value is not None)]
        if extra:
            raise ValueError(f"sampler is a Plan, which fixes {', '.join(extra)}; leave them out")
        return sampler
    if not isinstance(sampler, str):
        raise TypeError(f"sampler must be a name or a Plan; got {type(sampler).__name__}")
    if sampler not in SAMPLERS:
        raise ValueError(f"sampler is {sampler!r}" + nearest(sampler, tuple(SAMPLERS)))
    if sampler_options is not None and not isinstance(sampler_options, Mapping):
        raise TypeError(f"sampler_options must be a mapping; got {type(sampler_options).__name__}")
    options = {**given, **(sampler_options or {})}
    if len(options) < len(given) + len(sampler_options or {}):
        raise ValueError(f"sampler_options repeats {', '.join(sorted(set(given) & set(sampler_options or {})))}")
    taken = {*inspect.signature(SAMPLERS[sampler]).parameters, *inspect.signature(levels).parameters} - {"ve", "walk"}
    for name, default in (("eta", 0), ("variance", "fixed_small")):
        value = options.get(name)
        if name not in taken and isinstance(value, (int, float, str)) and value == default:
            del options[name]
    unknown = sorted(set(options) - set(taken))
    if unknown:
        raise ValueError(f"sampler={sampler!r} does not take {', '.join(unknown)}")
    resolved = resolve_any_schedule("linear" if schedule is None else schedule)
    options["steps"] = steps
    # A tensor is hashed by what it is, not by its numbers, which may change.
    options = {k: v.tolist() if isinstance(v, Tensor) and v.ndim == 1 else v for k, v in options.items()}
    frozen = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items()}
    try:
        return _plan(sampler, resolved, tuple((n, v, type(v)) for n, v in sorted(frozen.items())))
    except TypeError as error:
        if "unhashable" not in str(error):
            raise
        return SAMPLERS[sampler](resolved, **options)


@lru_cache(maxsize=32)
def _plan(sampler: str, schedule: Schedule, options: tuple[tuple[str, Any, type], ...]) -> Plan:
    # A thousand rows take as long as a hundred steps of the loop; runs that differ by seed share them. The types are
    # part of the key because 1 == True == 1.0.
    return SAMPLERS[sampler](schedule, **{name: value for name, value, _ in options})


def _rebuilding(arguments: dict[str, Any]) -> dict[str, Any]:
    """How many steps ``resolve_plan``'s arguments ask for, and the plan that leaves out the first of them."""
    if isinstance(arguments["sampler"], Plan):
        return {"steps": None, "rebuilt": None}
    options = arguments["sampler_options"] or {}
    if "skip" in options:
        raise ValueError("strength leaves out the first steps; it goes without sampler_options' skip")

    def rebuilt(skip: int) -> Plan:
        return resolve_plan(**{**arguments, "sampler_options": {**options, "skip": skip}})

    return {"steps": arguments["steps"], "rebuilt": rebuilt}


def _check_graph(
    cuda_graph: object, device: torch.device, draws: NoiseSource, callback: object, cond_fn: object
) -> None:
    if not isinstance(cuda_graph, bool) and not (isinstance(cuda_graph, str) and cuda_graph == "auto"):
        raise ValueError(f"cuda_graph must be 'auto', True or False; got {cuda_graph!r}")
    if cuda_graph is not True:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; the model is on {device}")
    if not draws.from_stream or callback is not None or cond_fn is not None:
        raise ValueError("cuda_graph=True goes without generator, noise_fn, callback and cond_fn, which run eagerly")
