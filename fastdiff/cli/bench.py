"""``fastdiff bench``."""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fastdiff.checks import named_device
from fastdiff.cli.app import command
from fastdiff.cli.arguments import Device, Model, Threads, labels_of, trained_model

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[[], "Tensor"]

# Root mean squares of the difference from plain PyTorch's images beyond which a result is wrong, not rounded otherwise.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1, "float16": 0.02}


@command
def bench(
    model: Model = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Images at a time.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Steps of the sampler.")] = 10,
    rounds: Annotated[int, typer.Option(min=1, help="How often each is timed, in turns.")] = 5,
    compile: Annotated[
        bool, typer.Option("--compile", help="Also time torch.compile, which takes a minute first.")
    ] = False,
    device: Device = "auto",
    threads: Threads = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress, only the table.")] = False,
) -> None:
    """Time a model on this machine, beside plain PyTorch.

    A table of milliseconds a step, images a second, and the error: plain PyTorch, fastdiff.sample, and the accelerated
    network. All draw the same images by DDIM (Euler's method where the schedule is no table). Where some come out
    otherwise, they are named and nothing is timed (exit code 1).
    """
    import copy

    import torch
    from tqdm.auto import tqdm

    import fastdiff
    from fastdiff.ops.native import cpu_threads
    from fastdiff.pictures.network import environment

    where = named_device(device)
    trained = trained_model(model)
    network = trained.unet.to(where, torch.float32)
    shape = (batch_size, *trained.image_shape)
    labels = labels_of(trained.classes, None, batch_size, 0)
    given = None if labels is None else labels.to(where)
    if isinstance(trained.sampling["schedule"], fastdiff.NoiseSchedule):
        told = trained.arguments(given, 1.0, sampler="ddim", steps=steps, eta=0.0)
    else:
        told = trained.arguments(given, 1.0, sampler="euler", steps=steps)
    told.pop("thresholding", None)  # whose quantile is not what is timed here
    recipe = fastdiff.Recipe.of(network, shape, **told)
    noise = recipe.plan.init_sigma * fastdiff.randn(shape, device=where)
    more = told.get("model_kwargs", {})

    def plain(called: Callable[..., Tensor]) -> Run:
        return torch.no_grad()(lambda: plain_loop(called, noise, recipe.plan, more))

    contenders: dict[str, tuple[Run, str]] = {"plain PyTorch": (plain(network), "float32")}
    if compile:
        contenders["torch.compile"] = (plain(torch.compile(copy.deepcopy(network))), "float32")
    contenders["fastdiff.sample"] = (functools.partial(recipe.sample, network), "float32")
    for dtype in (torch.float32, "auto"):
        fast = copy.deepcopy(network)
        computes = fastdiff.accelerate(fast, dtype=dtype).networks[""].dtype
        name = str(computes).removeprefix("torch.")
        contenders.setdefault(f"accelerated, {name}", (functools.partial(recipe.sample, fast), name))

    bar = tqdm(total=(rounds + 1) * len(contenders), unit="run", disable=quiet)
    with bar, cpu_threads(threads):
        images = {}
        for name, (run, _) in contenders.items():
            images[name] = run()
            bar.update()
        exact = images["plain PyTorch"].double()
        errors = {name: (batch.double() - exact).square().mean().sqrt().item() for name, batch in images.items()}
        wrong = [name for name, (_, dtype) in contenders.items() if not errors[name] <= TOLERANCE[dtype]]
        if not wrong:
            times = interleaved({name: run for name, (run, _) in contenders.items()}, rounds, where, bar.update)
            machine = environment(where)
    if wrong:
        typer.echo("\n".join(f"{name}: its images differ from plain PyTorch's by {errors[name]:.2g}" for name in wrong))
        raise SystemExit(1)
    parameters = sum(p.numel() for p in network.parameters())
    told_of = f"{type(network).__name__} of {parameters:,} parameters, batch {list(shape)}"
    typer.echo(f"{told_of}, {steps} steps of {recipe.plan.name}")
    typer.echo(", ".join(f"{name} {value}" for name, value in machine.items()))
    typer.echo(table(times, errors, batch_size, steps))


def plain_loop(network: Callable[..., Any], x: Tensor, plan: Any, more: dict[str, Any]) -> Tensor:
    """A plan without history or noise, as one writes it in PyTorch."""
    import torch

    dtype = torch.int64 if plan.integer_timesteps else torch.float32
    for row in plan:
        t = torch.full((len(x),), row.t, dtype=dtype, device=x.device)
        m = network(x if row.c_in == 1 else row.c_in * x, t, **more)[:, : x.shape[1]]  # without a learned variance
        x0 = row.p * x + row.q * m
        if row.clip < math.inf:
            x0 = x0.clamp(-row.clip, row.clip)
        terms = {"x": x, "m": m, "x0": x0}
        x = torch.stack([c * terms[name] for name, c in row.x.items() if c]).sum(0)
    return x


def interleaved(runs: Mapping[str, Run], rounds: int, device: Any, done: Callable[[], Any]) -> dict[str, list[float]]:
    """Seconds of each run, one of each a round, so that what slows the machine for a while slows all of them."""
    import torch

    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times[name].append(time.perf_counter() - begun)
            done()
    return times


def table(times: Mapping[str, list[float]], errors: Mapping[str, float], batch: int, steps: int) -> str:
    """Milliseconds a step (the median, the least and the most), images a second, the ratio to the first, the error."""
    lines = [("", "ms a step", "from … to", f"images/s at {steps} steps", "times as fast", "error")]
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        a_step = [1000 * value / steps for value in (median, min(seconds), max(seconds))]
        spread = f"{a_step[1]:.3g} … {a_step[2]:.3g}"
        rate, ratio = f"{batch / median:.3g}", f"{first / median:.2f}"
        lines.append((name, f"{a_step[0]:.3g}", spread, rate, ratio, f"{errors[name]:.2g}"))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )
