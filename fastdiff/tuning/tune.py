"""``tune``: learn a plan for one network and one number of calls.

Read in this order: plans.py (the plans that are asked for), start.py (how a sampler's numbers follow its levels),
learned.py (the parameters), teacher.py (what is aimed at), walk.py (a run with gradients), this file (the loop).
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import check_int, check_number, check_shape
from fastdiff.pictures.network import environment, identify
from fastdiff.plan.plan import Plan
from fastdiff.plan.provenance import Provenance
from fastdiff.samplers.resolve import Sampler
from fastdiff.sampling.belongs import as_told, sha256_of
from fastdiff.sampling.guidance import Scale
from fastdiff.sampling.model import check_model, eval_mode, inspect
from fastdiff.schedules.level import Schedule
from fastdiff.schedules.resolve import resolve_schedule
from fastdiff.schedules.spacing import Spacing
from fastdiff.tuning.gradient_free import optimiser, search
from fastdiff.tuning.learned import Learned
from fastdiff.tuning.plans import Walked, calls_of, check_learnable, check_teacher, ratios_of, taught_by
from fastdiff.tuning.runs import Runs, frozen, probe, takes_floats
from fastdiff.tuning.task import Task
from fastdiff.tuning.teacher import targets
from fastdiff.tuning.teacher_file import teacher_file as of_run
from fastdiff.tuning.units import units
from fastdiff.tuning.walk import measured, walk

BESIDE = ("ddim", "euler", "dpmpp_2m", "unipc", "deis")  # samplers that the report has beside the plan
RATE = 0.02  # Adam's, of every parameter (``units``); it rises over 10 iterations and falls to 0 along a cosine
POWER = 1.5  # of a sample's distance in the loss: with 1 the worst samples have too little say, with 2 too much
TINY = 1e-12  # beside a squared distance, whose root has no slope at 0
LOOKS = 24  # how often the held-out error is looked at
WORSE = 1.5  # of the least error: where a look finds as much, learning goes back to the least one, at half the rate


def tune(
    model: Callable[..., Any],
    shape: Sequence[int],
    *,
    steps: int,
    start: Sampler = "dpmpp_2m",
    teacher: Sampler = "dpmpp_2m",
    teacher_steps: int | None = None,
    teacher_file: str | os.PathLike[str] | None = None,
    schedule: Schedule | str | None = None,
    prediction: str | None = None,
    variance: str | None = None,
    spacing: str | Spacing | None = None,
    clip: float | None = None,
    sampler_options: Mapping[str, Any] | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    uncond_kwargs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
    guidance_scale: Scale = 1.0,
    guidance_rescale: float = 0.0,
    guidance_interval: tuple[float, float] | None = None,
    thresholding: float | tuple[float, float] | None = None,
    features: Callable[[Tensor], Tensor] | None = None,
    gradient_free: bool = False,
    iterations: int = 160,
    batch: int = 32,
    held_out: float = 0.25,
    seed: int = 0,
    device: torch.device | str | None = None,
    model_dtype: torch.dtype | None = None,
    progress: bool = False,
) -> Plan:
    """Learn the plan of ``steps`` steps whose last state lies nearest to what a fine solver reaches from the same x_T.

    The network stays as it is. Learned are the levels, ordered by construction; the t that the network is told; and
    each row's coefficients of x, of x̂_0 and of the last three outputs: all that a row can express. The plan costs what
    the start costs, runs on the same kernel, and is never worse on the samples held out, since the start is among those
    it is chosen from. After bespoke non-stationary solvers (Shaul et al. 2024), LD3 (Tong et al. 2024) and S4S (Frankel
    et al. 2025).

    Args:
        model: the network, as ``fastdiff.sample`` takes it. It must be differentiable by x, unless gradient_free.
        shape: [N, …]: N samples in all, some hundreds, each with a noise of its own.
        steps: the sampler's steps, n.
        start: the sampler to start from, a name, a function or a Plan; one without noise. A Plan's levels, and those of
            a sampler that cannot be told its σ, stay; the rest is learned.
        teacher: the fine solver, likewise. teacher_steps: None doubles them until that changes nothing that matters.
            Its levels are Karras's between the start's first and last ones; a flow's, its own.
        teacher_file: a .safetensors where the teacher's ends are kept. A file that is there is read, so that tuning for
            another number of steps costs no teacher calls; one of another network, seed, shape, schedule, guidance or
            teacher is refused.
        schedule, prediction, variance, clip, sampler_options: of the start, as ``fastdiff.sample`` has them.
        spacing: the start's levels; None is Karras's from σ = 80, or the schedule's largest, down; a flow's, its own.
        model_kwargs, uncond_kwargs: tensors of N entries hold one a sample. These, the guidance and the thresholding
            are as for ``fastdiff.sample``: what the plan is learned for.
        features: features(x) -> [B, …], differentiable: distances are measured in these rather than in x.
        gradient_free: learn the levels alone, from the network's outputs, by CMA-ES (the extra "tune").
        iterations: of Adam, or evaluations of CMA-ES. batch: samples at a time.
        held_out: the share of the samples, the last, that nothing is learned from and that the plan is chosen on.
        seed: of the noise. The same seed gives the same plan on a CPU of the same kind.
        device, model_dtype: as for ``fastdiff.sample``. progress: show a bar.

    Returns:
        The plan; ``plan.provenance`` says where it comes from, and ``print(plan.provenance)`` how it compares. Ctrl-C
        ends the iterations, with a warning, and gives the best plan so far.

    Raises:
        TypeError, ValueError: before any work, naming the argument: a start with noise, a model without gradients, …
        OSError: teacher_file cannot be written.
        FloatingPointError: in the teacher's run something was not finite; names the row.
        ImportError: gradient_free without cma; names the extra.
    """
    check_model(model)
    shape = check_shape("shape", shape)
    check_int("steps", steps, 1, 1 << 20)
    check_int("iterations", iterations, 1, 1 << 31)
    check_int("batch", batch, 1, 1 << 24)
    check_number("held_out", held_out, 0, 1)
    if gradient_free:
        optimiser()
    if features is not None and not callable(features):
        raise TypeError(f"features must be callable; got {type(features).__name__}")
    apart = max(1, round(held_out * shape[0]))
    if shape[0] - apart < 1:
        raise ValueError(f"shape is {list(shape)}: its N samples must leave some to learn from beside {apart} held out")
    resolved = resolve_schedule("linear" if schedule is None else schedule)
    options = {"schedule": resolved, "prediction": prediction, "variance": variance, "clip": clip}
    if resolved.table_length is not None and steps > resolved.table_length:
        raise ValueError(f"steps must be at most {resolved.table_length}, the schedule's timesteps; got {steps}")
    walked = Walked(resolved, options)
    begins = walked.start(start, steps, spacing, sampler_options)
    check_learnable(begins.plan)
    check_teacher(walked, teacher, teacher_steps, begins.plan)
    how = {"model_kwargs": model_kwargs, "uncond_kwargs": uncond_kwargs, "guidance_scale": guidance_scale,
           "guidance_rescale": guidance_rescale, "guidance_interval": guidance_interval, "thresholding": thresholding,
           "device": device, "model_dtype": model_dtype}  # fmt: skip
    runs = Runs(model, shape, batch, seed, how, features)
    file = None if teacher_file is None else of_run(teacher_file, model, shape, seed, options, how)
    where = inspect(model, shape, device, model_dtype).device
    with torch.inference_mode(False), eval_mode(model), frozen(model):
        if resolved.table_length is not None and not isinstance(start, Plan) and not takes_floats(runs, begins.plan):
            walked = replace(walked, whole=True)
            spacing = None if spacing is None else replace(Spacing.of(spacing), quantize=True)
            begins = walked.start(start, steps, spacing, sampler_options)
        probed = probe(runs, begins.plan)
        if not gradient_free and not probed.differentiable:
            raise ValueError(
                "model has no gradient by x, so that nothing can be learned through it; gradient_free=True learns the "
                "levels from its outputs alone"
            )
        if gradient_free and not begins.gaps:
            raise ValueError(f"gradient_free learns the levels, and those of start={begins.plan.name!r} are fixed")
        known = None if file is None else file.read(partial(walked.teacher, teacher, begins.plan), teacher_steps)
        if features is not None:
            x = runs.request(begins.plan, 0, min(batch, shape[0])).x
            runs.squares(x, x)  # what it returns is looked at
        if known is None:
            taught = taught_by(runs, walked, teacher, teacher_steps, begins.plan, apart, where)
            ends = targets(runs, taught)
            if file is not None:
                file.write(taught, ends)
        else:
            taught, ends = known
        task = Task(runs, begins, resolved, ends, apart, where, probed, iterations, progress)
        plan, learned = search(task) if gradient_free else descend(task)
        errors = compare(task, plan, steps, walked)
    kept = errors["tuned"][str(calls_of(plan))]
    if taught.moved is not None and taught.moved > 0.1 * kept:
        warnings.warn(
            f"doubling the teacher's steps moved its result by {taught.moved:.2g}, more than a tenth of the tuned "
            f"plan's error {kept:.2g}: give teacher_steps",
            stacklevel=2,
        )
    scale = 1.0 if uncond_kwargs is None else guidance_scale
    told = Provenance(
        model=identify(model).name, model_sha256=sha256_of(model), shape=list(shape[1:]), guidance_scale=as_told(scale),
        start=begins.plan.name, start_levels=ratios_of(begins.plan), steps=steps, learned=learned,
        teacher=taught.plan.name, teacher_calls=calls_of(taught.plan), teacher_error=taught.moved, seed=seed,
        iterations=iterations, images=shape[0] - apart, held_out=apart,
        measured_in="x" if features is None else "features", errors=errors, made_with=environment(where),
    )  # fmt: skip
    return replace(plan, provenance=told)


def descend(task: Task) -> tuple[Plan, str]:
    """Adam on a mean of distances over batches of the samples; the best plan on held-out noise.

    The mean is that of the power ``POWER``. From some x_T the least change leads to another image; in the mean of the
    squares these have nearly all, and little to teach.
    """
    start, runs = task.start, task.runs
    learns_t = task.probed.learns_t
    spread = float(task.ends[: task.images].float().std()) or 1.0
    of_numbers = units(start.plan, spread, learns_t, task.schedule)
    learned = Learned(start, of_numbers, learns_t)
    with torch.no_grad():
        table = learned.table()
    moments = measured(runs.request(learned.wide(table), 0, min(runs.batch, task.images)), table, of_numbers)
    learned = Learned(start, of_numbers, learns_t, moments)
    parameters = learned.parameters()
    optimizer = torch.optim.Adam(parameters, betas=(0.9, 0.95))
    best, least, slowed = start.plan, task.error(start.plan), 1.0
    at_least = [parameter.detach().clone() for parameter in parameters]
    parts = list(runs.parts(0, task.images))
    every = max(1, task.iterations // LOOKS)
    try:
        for i in task.bar():
            first, count = parts[i % len(parts)]
            rate = RATE * min(1.0, (i + 1) / 10) * 0.5 * (1 + math.cos(math.pi * i / task.iterations))
            optimizer.param_groups[0]["lr"] = slowed * rate
            with torch.enable_grad():
                table = learned.table()
                x = walk(runs.request(learned.wide(table), first, count), table)
                squares = runs.squares(x, task.ends[first : first + count].to(x.device)) + TINY
                loss = (squares ** (POWER / 2)).mean() ** (1 / POWER)
                grads = torch.autograd.grad(loss, parameters)
            finite = all(bool(grad.isfinite().all()) for grad in grads)
            if finite:
                for parameter, grad in zip(parameters, grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                if (i + 1) % every and i + 1 != task.iterations:
                    continue
                plan = learned.plan()
                if (error := task.error(plan)) < least:
                    best, least = plan, error
                    at_least = [parameter.detach().clone() for parameter in parameters]
            if not finite or error > WORSE * least:
                slowed *= 0.5
                optimizer.state.clear()
                with torch.no_grad():
                    for parameter, kept in zip(parameters, at_least, strict=True):
                        parameter.copy_(kept)
    except KeyboardInterrupt:
        told = f"interrupted: the plan is the best of the iterations up to then, error {least:.3g}"
        warnings.warn(told, stacklevel=3)
    parts_learned = ["levels"] * (learned.shares is not None) + ["t"] * learns_t + ["coefficients"]
    return best, ", ".join(parts_learned)


def compare(task: Task, plan: Plan, steps: int, walked: Walked) -> dict[str, dict[str, float]]:
    """Held-out errors by name and network calls: the plan's, the start's, and samplers' at n, 2n and 4n steps."""
    start = task.start.plan
    errors = {"tuned": {str(calls_of(plan)): task.error(plan)}, "start": {str(calls_of(start)): task.error(start)}}
    for name in BESIDE:
        for count in (steps, 2 * steps, 4 * steps):
            try:
                other = walked.fine(name, start, count)
                errors.setdefault(name, {})[str(calls_of(other))] = task.error(other)
            except (TypeError, ValueError):
                continue  # it does not walk this schedule, or not in so many steps
    return {name: {count: error for count, error in of_name.items() if math.isfinite(error)}
            for name, of_name in errors.items()}  # fmt: skip
