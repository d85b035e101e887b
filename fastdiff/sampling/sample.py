"""``sample`` and ``sample_iter``: your network, a plan and a seed make images.

fastdiff/sampling/request.py checks the arguments, stepper.py runs a row, fastdiff/ops/update/ is its kernel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NoReturn, ParamSpec, cast

import torch
from torch import Tensor

from fastdiff.samplers.resolve import Sampler, unknown_arguments
from fastdiff.sampling.graph import stepping
from fastdiff.sampling.guidance import Scale
from fastdiff.sampling.model import eval_mode
from fastdiff.sampling.request import Request
from fastdiff.sampling.state import State
from fastdiff.sampling.stepper import Stepper, plain_tensors
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.spacing import Spacing


def sample(
    model: Callable[..., Any],
    shape: Sequence[int],
    *,
    sampler: Sampler = "ddpm",
    steps: int | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    spacing: str | Spacing | None = None,
    eta: float | None = None,
    clip: float | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    seed: int | None = None,
    seeds: Sequence[int] | None = None,
    sample_offset: int | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    noise_fn: Callable[[int, int, tuple[int, ...]], Tensor] | None = None,
    x_T: Tensor | None = None,
    x_init: Tensor | None = None,
    start_step: int = 0,
    resume: State | None = None,
    strength: float | None = None,
    mask: Tensor | None = None,
    known: Tensor | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    guidance_scale: Scale = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    thresholding: float | tuple[float, float] | None = None,
    cond_fn: Callable[..., Tensor] | None = None,
    device: torch.device | str | None = None,
    model_dtype: torch.dtype | None = None,
    backend: str = "auto",
    cuda_graph: bool | str = "auto",
    return_log_prob: bool = False,
    callback: Callable[[State], Any] | None = None,
    progress: bool = False,
    **unknown: NoReturn,
) -> Tensor:
    """Draw images from a diffusion model.

    ``model(x, t)`` is your network: x is [B, …] in its own dtype, t is [B], int64 where every timestep of the plan is
    an index and float32 otherwise; it returns a tensor, a tuple that starts with one, or an object with ``.sample``.
    A module in training mode is put in eval mode for the run. No gradients are recorded.

    Args:
        model: the network.
        shape: [B, …] of the images.
        sampler: a name of ``fastdiff.samplers``, also as other programs spell it ("Euler a", "DPM++ 2M Karras", which
            says the spacing too); a function of (schedule, steps, **options) that returns a ``Plan``,
            given those of the options below that were given; or a Plan, which fixes the next eight arguments, which
            must then be left out. ``Plan.reuse`` makes rows that take an earlier call's output or deep features.
        steps: the sampler's steps, n; None visits every timestep. A step is one network call; but heun, dpm2,
            dpm2_ancestral, dpm_solver_2, dpmpp_2s, dpmpp_2s_ancestral and dpmpp_sde make 2n − 1 calls, dpm_solver_3
            3n − 2 and pndm n + 1, and repaint and restart go back for more. ``print(plan)`` counts them.
        schedule: how the network was trained: a ``NoiseSchedule`` (a table of ᾱ), ``EDMSchedule`` or ``FlowSchedule``,
            or one of them with its default numbers: "linear" (None; β from 1e-4 to 0.02 over T = 1000),
            "scaled_linear", "cosine", "sigmoid", "sigmoid_betas", "edm" or "flow".
        prediction: what the network predicts: "epsilon" (the default), "v_prediction", "sample", "flow_prediction",
            "edm" or "score".
        variance: DDPM's: "fixed_small" (the default), "fixed_large", "learned" or "learned_range". The last two say
            that the network returns 2C channels, the second half a learned variance; samplers without use for it
            leave that half unread, as guided-diffusion and diffusers do. Without them such a network is refused,
            since nothing else tells a variance from any other second half.
        spacing: which levels the sampler stops at: "leading", "trailing", "linspace", "quadratic", "ddim_quadratic",
            "simple", "sgm_uniform" or "sd3" by timesteps; "karras", "exponential" ("logsnr" is the same),
            "polyexponential", "beta" or "kl_optimal" by σ; "ays", "ays_sdxl" or "ays_svd" (Align Your Steps); or a
            ``fastdiff.Spacing``, which explains them and may list levels. None is the sampler's own or else the
            schedule's.
        eta: DDIM's η in [0, 1], by default 0.
        clip: the bound of |x̂_0|, None for none; 1.0 is usual for images in [−1, 1].
        sampler_options: further keywords of the sampler's function, such as ``order``, or fields of its ``Spacing``,
            such as ``timesteps``.
        seed: by default 0. Image i of seed s is the same image whatever the batch, the device or the backend.
        seeds: one seed an image instead. sample_offset: the first image's number.
        generator: a torch.Generator, or one an image: torch's own noise, drawn as diffusers draws it.
        noise_fn: noise_fn(stream, draw, shape) -> floating-point tensor, in place of all noise.
        x_T: the state [B, …] at the plan's first row, or at row ``start_step``, in place of noise: used as it is, and
            stream 0 is not drawn. DDIM's inverse gives one (``samplers.ddim_inverse``).
        x_init: clean images [B, …] to start from, noised to row ``start_step`` (image-to-image).
        start_step: the first row to run, with x_init or x_T: one of ``Plan.entries``, which read no earlier row's
            history.
        resume: a ``State`` of an earlier run of the same plan and arguments, to go on from; one of another plan, seed
            or shape is refused. It goes without x_T, x_init and start_step; ``strength`` is as it was.
        strength: in place of start_step, in [0, 1]: the last int(steps·strength) steps are run, as diffusers counts
            them; 1 starts from noise at x_T's level, 0 returns x_init.
        mask, known: inpainting. After each network call x' ← mask·(known, noised to the level reached) +
            (1 − mask)·x'; 1 is known. mask: bool, or numbers in [0, 1], that broadcasts to [B, …]; known: [B, …].
            sampler="repaint" resamples (Lugmayr et al. 2022).
        model_kwargs: keywords of every network call. uncond_kwargs: those that the unconditional call has otherwise,
            such as a negative prompt's. Both are merged at any depth of dicts, lists and tuples: tensors of B entries
            are concatenated [uncond, cond] for one call, those of one entry beside them expanded, and equal values
            are left alone. Where that cannot be (prompts of different lengths, None beside a tensor, other numbers)
            the two calls are made one after the other.
        guidance_scale: s in u + s·(c − u); 1, or no uncond_kwargs, is one plain call. A pair (s_T, s_I) is
            InstructPix2Pix's (``plan.guidance_weights``), uncond_kwargs then two: of e(∅, ∅) and of e(I, ∅). Also one
            for each network call of the plan (reused ones, too), or for each step: a sequence, array or function of the
            level (its t, alpha, sigma and ratio σ/α).
        guidance_rescale: φ of Lin et al. 2024, Equation 16; 0 is none.
        guidance_interval: (low, high): guide where low < σ/α ≤ high (Kynkäänniemi et al. 2024); elsewhere the network
            is called once, with model_kwargs. ``schedule.sigma_at(t)`` is a timestep's σ/α.
        thresholding: dynamic thresholding's ratio, 0.995 in Imagen, or (ratio, maximum): each image's |x̂_0| is clamped
            to its quantile s, 1 ≤ s ≤ maximum, and divided by s; in place of clip.
        cond_fn: cond_fn(x, t, **model_kwargs) -> ∇ log p(y | x_t), like x: classifier guidance
            (``classifier_guidance``). x is the float32 state itself, not scaled by c_in, t as the network has it;
            gradients are on. Runs eagerly.
        device, model_dtype: where the network is and what it takes; read from its parameters by default.
        backend: "auto", "native", "triton" or "reference".
        cuda_graph: "auto", True or False: replay the whole step as one CUDA graph (``sampling.graph``).
        return_log_prob: also return log p(x' | x) of every row, which states have as ``State.log_prob``; it is added up
            by the update that draws x', and its bits are those of every backend (docs/logprob.md). The plan must draw
            in some row; goes without mask, and runs eagerly.
        callback: called with a ``State`` of fresh tensors after every row; what it returns is ignored. It may raise
            StopIteration to end the run there: the result is then that state's x̂_0.
        progress: show a tqdm bar.

    Returns:
        float32 [B, …]; with return_log_prob a pair of them and float32 [rows, B], sums over each image's elements, 0
        where a row draws nothing (``Plan.noisy_rows``) or was not run.

    Raises:
        TypeError, ValueError: before any work, naming the argument, what it is and what it should be; or from the
            network's first call, if it returns the wrong shape or dtype.
        RuntimeError: from inside the network; where it is of dtypes that do not fit, it says what was given.
        FloatingPointError: the output of the network, of cond_fn or of noise_fn was not finite; names the row (on a
            GPU, after the last one). Also where the last state is not, as a plan's numbers may lead beyond float32.
    """
    if unknown:
        raise unknown_arguments(unknown, tuple(SIGNATURE.parameters))
    with plain_tensors():
        request = Request.of(
            model, shape, sampler=sampler, steps=steps, schedule=schedule, prediction=prediction, variance=variance,
            spacing=spacing, eta=eta, clip=clip, sampler_options=sampler_options, seed=seed, seeds=seeds,
            sample_offset=sample_offset, generator=generator, noise_fn=noise_fn, x_T=x_T, x_init=x_init,
            start_step=start_step, resume=resume, strength=strength, mask=mask, known=known,
            model_kwargs=model_kwargs, uncond_kwargs=uncond_kwargs, guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale, guidance_interval=guidance_interval, thresholding=thresholding,
            cond_fn=cond_fn, device=device, model_dtype=model_dtype, backend=backend, cuda_graph=cuda_graph,
            return_log_prob=return_log_prob, callback=callback, progress=progress,
        )  # fmt: skip
        stepper = Stepper(request, keeps_x0=callback is not None)
        with eval_mode(model), stepping(stepper) as step:
            for row in _bar(stepper):
                step(row)
                if callback is not None:
                    state = stepper.state(row + 1)
                    try:
                        callback(state)
                    except StopIteration:
                        stepper.check_finite(row + 1)
                        return _returned(state.x if state.x0 is None else state.x0, state.log_prob)
        return _returned(stepper.finish(), stepper.log_prob(len(stepper.plan)) if return_log_prob else None)


def _returned(images: Tensor, log_prob: Tensor | None) -> Tensor:
    """What ``sample`` returns. To a type checker a pair of tensors unpacks as a tensor does."""
    return images if log_prob is None else cast(Tensor, (images, log_prob))


P = ParamSpec("P")


def _taken_by(_: Callable[P, Tensor]) -> Callable[[Callable[..., Iterator[State]]], Callable[P, Iterator[State]]]:
    """A function that has ``sample``'s signature, for help(), for editors and for type checkers."""

    def named(function: Callable[..., Iterator[State]]) -> Callable[P, Iterator[State]]:
        function.__signature__ = SIGNATURE  # type: ignore[attr-defined]
        return function

    return named


_with_unknown = inspect.signature(sample)
SIGNATURE = _with_unknown.replace(parameters=[p for p in _with_unknown.parameters.values() if p.name != "unknown"])
sample.__signature__ = SIGNATURE  # type: ignore[attr-defined]


def bind(*args: Any, **arguments: Any) -> inspect.BoundArguments:
    """The arguments of ``sample`` by name; TypeError for those that it does not have."""
    unknown = {name: value for name, value in arguments.items() if name not in SIGNATURE.parameters}
    if unknown:
        raise unknown_arguments(unknown, tuple(SIGNATURE.parameters))
    return SIGNATURE.bind(*args, **arguments)


@_taken_by(sample)
def sample_iter(*args: Any, **arguments: Any) -> Iterator[State]:
    """``sample`` step by step: yields a ``State`` of fresh tensors before the first row and after every row.

    The first one is x_T (its ``x0`` is None); any of them can be given to ``resume=`` later, to the bit, and kept in a
    file meanwhile (``State.save``). A loop that breaks off ends the run. Takes the arguments of ``sample``, which are
    checked by this call, not at the first row. Rows run eagerly.
    """
    bound = bind(*args, **arguments)
    bound.apply_defaults()
    with plain_tensors():
        stepper = Stepper(Request.of(*bound.args, **bound.kwargs), keeps_x0=True)
    return _states(stepper)


def _states(stepper: Stepper) -> Iterator[State]:
    """Run the rows one by one. Gradients are off only while a row runs."""
    with eval_mode(stepper.network.model):
        with plain_tensors():
            state = stepper.state(stepper.start)
        yield state
        for row in _bar(stepper):
            with plain_tensors():
                stepper.checked_step(row)
                state = stepper.state(row + 1)
            stopped = False
            if stepper.request.callback is not None:
                try:
                    stepper.request.callback(state)
                except StopIteration:
                    stopped = True
            yield state
            if stopped:
                stepper.check_finite(row + 1)
                return
    stepper.finish()


def _bar(stepper: Stepper) -> Any:
    """The rows to run, under a progress bar where one is asked for."""
    if not stepper.request.progress:
        return stepper.rows
    from tqdm.auto import tqdm

    return tqdm(stepper.rows, desc=stepper.plan.name, unit="step")
