"""``sample`` and ``sample_iter``: your network, a plan and a seed make images.

The arguments are checked here; fastdiff/run.py holds the loop.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.draws import Draws, resolve_draws
from fastdiff.guidance import resolve_guidance
from fastdiff.noise import INITIAL, check_int
from fastdiff.ops.backend import choose
from fastdiff.ops.randn import DTYPES, check_device, check_shape
from fastdiff.plan import Plan
from fastdiff.run import Network, Run, State
from fastdiff.samplers import SAMPLERS
from fastdiff.samplers.spacing import Schedule, levels, nearest, resolve_any_schedule


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
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | None = None,
    guidance_scale: float = 1.0,
    guidance_rescale: float = 0.0,
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
        sampler: "ddpm", "ddim" or a ``Plan``; a Plan fixes the next eight arguments, which must then be left out.
        steps: network calls; None visits every timestep.
        schedule: a NoiseSchedule or a name; None is "linear", β from 1e-4 to 0.02 over T = 1000.
        prediction: what the network predicts: "epsilon" (the default), "v_prediction" or "sample".
        variance: DDPM's: "fixed_small" (the default), "fixed_large" or "learned_range".
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
        resume: a ``State`` of an earlier run of the same plan, to go on from.
        model_kwargs: keywords of every network call. uncond_kwargs: those that the unconditional call has otherwise;
            tensors of B entries are concatenated [uncond, cond] for one call, others must be equal.
        guidance_scale: s in u + s·(c − u); 1, or no uncond_kwargs, is one plain call.
        guidance_rescale: φ of Lin et al. 2024, Equation 16; 0 is none.
        device, model_dtype: where the network is and what it takes; read from its parameters by default.
        backend: "auto", "native", "triton" or "reference".
        cuda_graph: "auto", True or False: replay the whole step as one CUDA graph (fastdiff.graph).
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
    return _prepare(**arguments, keeps_x0=callback is not None).finish(callback, cuda_graph)


def sample_iter(model: Callable[..., Any], shape: Sequence[int], **arguments: Any) -> Iterator[State]:
    """``sample``, yielding a ``State`` of fresh tensors after every row; takes the same arguments.

    Any of the states can be given to ``resume=`` later, to the bit. Arguments are checked by this call, not at the
    first row. Rows run eagerly.
    """
    bound = inspect.signature(sample).bind(model, shape, **arguments)
    bound.apply_defaults()
    return _prepare(**bound.arguments, keeps_x0=True).states(bound.arguments["callback"])


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
    model_kwargs: Mapping[str, Any] | None,
    uncond_kwargs: Mapping[str, Any] | None,
    guidance_scale: float,
    guidance_rescale: float,
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
    if callback is not None and not callable(callback):
        raise TypeError(f"callback must be callable; got {type(callback).__name__}")
    shape = check_shape("shape", shape)
    plan = resolve_plan(**plan_arguments)
    network = describe(model, shape, device, model_dtype)
    draws = resolve_draws(shape, network.device, network.dtype, seed, seeds, sample_offset, generator, noise_fn)
    guidance = resolve_guidance(shape[0], model_kwargs, uncond_kwargs, guidance_scale, guidance_rescale)
    _check_graph(cuda_graph, network.device, draws, callback)
    backend = choose(backend, network.device.type)
    start, x = _start(plan, shape, network.device, draws, x_init, start_step, resume, backend)
    run = Run(network, plan, x, start, draws, guidance, backend, keeps_x0=keeps_x0, progress=bool(progress))
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


def describe(
    model: Callable[..., Any],
    shape: tuple[int, ...],
    device: torch.device | str | None,
    model_dtype: torch.dtype | None,
) -> Network:
    """Where a network is, what dtype it takes, and in which memory format, as its parameters have it."""
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    floating = [p for p in parameters if p.is_floating_point()]
    if device is not None:
        where = check_device(device)
    else:
        where = parameters[0].device if parameters else torch.get_default_device()
    if where.type == "cuda" and where.index is None:
        where = torch.device("cuda", torch.cuda.current_device())
    if parameters and parameters[0].device != where:
        raise ValueError(f"device is {where}, but the model's parameters are on {parameters[0].device}")
    dtype = (floating[0].dtype if floating else torch.float32) if model_dtype is None else model_dtype
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:
        raise ValueError(f"model_dtype must be float32, bfloat16 or float16; got {dtype}")
    strided = (p for p in floating if p.ndim == 4 and not p.is_contiguous())
    nhwc = len(shape) == 4 and any(p.is_contiguous(memory_format=torch.channels_last) for p in strided)
    return Network(model, where, dtype, torch.channels_last if nhwc else torch.contiguous_format)


def _check_graph(cuda_graph: object, device: torch.device, draws: Draws, callback: object) -> None:
    if not isinstance(cuda_graph, bool) and not (isinstance(cuda_graph, str) and cuda_graph == "auto"):
        raise ValueError(f"cuda_graph must be 'auto', True or False; got {cuda_graph!r}")
    if cuda_graph is not True:
        return
    if device.type != "cuda":
        raise ValueError(f"cuda_graph=True needs a CUDA device; the model is on {device}")
    if not draws.from_stream or callback is not None:
        raise ValueError("cuda_graph=True goes without generator, noise_fn and callback, which run eagerly")


def _start(
    plan: Plan,
    shape: tuple[int, ...],
    device: torch.device,
    draws: Draws,
    x_init: Tensor | None,
    start_step: int,
    resume: State | None,
    backend: str,
) -> tuple[int, Tensor]:
    """The first row, and the state before it."""
    check_int("start_step", start_step, 0, len(plan) - 1)
    if resume is not None:
        if x_init is not None or start_step != 0:
            raise ValueError("resume goes without x_init and start_step")
        if not isinstance(resume, State):
            raise TypeError(f"resume must be a State; got {type(resume).__name__}")
        _check_image("resume.x", resume.x, shape, device)
        start = check_int("resume.row", resume.row, 0, len(plan))
        return start, resume.x.to(torch.float32).clone(memory_format=torch.contiguous_format)
    if x_init is None:
        if start_step != 0:
            raise ValueError(f"start_step={start_step} needs x_init, the images to start from")
        x = draws.noise(INITIAL, 0, backend)
        # The run writes to x: a tensor that noise_fn returned stays the caller's.
        return 0, x if plan.init_sigma == 1 and draws.from_stream else x * plan.init_sigma
    _check_image("x_init", x_init, shape, device)
    row = plan[start_step]
    x = x_init.detach().to(torch.float32).contiguous() * row.alpha + draws.noise(INITIAL, 0, backend) * row.sigma
    return start_step, x


def _check_image(name: str, image: object, shape: tuple[int, ...], device: torch.device) -> None:
    if not isinstance(image, Tensor):
        raise TypeError(f"{name} must be a tensor; got {type(image).__name__}")
    if not image.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor; got {image.dtype}")
    if tuple(image.shape) != shape:
        raise ValueError(f"{name} must have shape {list(shape)}; got {list(image.shape)}")
    if image.device != device:
        raise ValueError(f"{name} must be on the model's device {device}; got {image.device}")
