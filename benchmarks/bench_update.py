"""``ops.update`` at t = 500 beside one step of the textbook and of diffusers' schedulers.

The network's output is a random tensor. Where noise is drawn, everyone draws its own; the gate compares fastdiff with
the float64 formula on its own noise, and looks at the rivals' noise by its moments.
"""

import pytest
import torch
from gates import SCHEDULE, TextbookSchedule, close, gpu_targets, graphed, only_noise

import fastdiff
from fastdiff.noise import SAMPLER, NoiseKey
from fastdiff.ops.update import bind
from fastdiff.ops.update.deviance import blocks, log_probs
from fastdiff.ops.update.operands import Operands

T, STEPS = 500, 50


@pytest.fixture
def state(device, shape):
    return torch.randn(shape, device=device), torch.randn(shape, device=device)


def contestants(ours, x, output, plan, row, rivals):
    """fastdiff's and the rivals: on the CPU as the sampling loop calls it, whose tensors are named and checked once a
    run, and as a function that checks and allocates; on a GPU as a node of a graph, and eager."""
    if x.device.type != "cpu":
        return {**graphed(ours, x.device), **rivals}
    table = plan.table().to(torch.float32)
    update = bind(Operands(x, torch.empty_like(x), table, NoiseKey(seed=1), (output,)), "native")
    update(row)
    assert torch.equal(update.operands.x_out, ours())
    return {"fastdiff": lambda: update(row), "fastdiff, the function": ours, **rivals}


def ratios(contestant, goal, stretch=None):
    """The same goal for the update as the loop calls it and for the function."""
    goals = {"kind": "ratio", "contestant": contestant, "goal": goal, "stretch": stretch}
    return [goals, {**goals, "ours": "fastdiff, the function"}]


@pytest.mark.parametrize("output_dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_ddpm(contest, device, diffusers, shape, state, output_dtype):
    x, output = state[0], state[1].to(output_dtype)
    plan, schedule = fastdiff.samplers.ddpm(SCHEDULE, clip=1.0), TextbookSchedule(device)
    exact = TextbookSchedule(device, torch.float64)
    row = plan.timesteps.index(T)

    def ours():
        return fastdiff.ops.update(x, output, plan, row, seed=1).x

    def textbook():
        return fastdiff.textbook.ddpm_step(x, output, T, schedule, clip=1.0)

    noise = fastdiff.randn(shape, seed=1, draw=row, stream=SAMPLER, device=device)
    mean = fastdiff.textbook.ddpm_step(x.double(), output.double(), T, exact, torch.zeros_like(x).double(), clip=1.0)
    sigma = plan[row].x["z"]
    close(ours().double(), mean + sigma * noise.double())

    rivals = {"textbook": textbook}
    targets = gpu_targets(shape)
    if output_dtype == torch.float32:
        rivals["torch.compile"] = torch.compile(textbook, fullgraph=True)
        scheduler = diffusers and diffusers.DDPMScheduler(beta_schedule="linear", variance_type="fixed_small")
        rivals["diffusers"] = diffusers and (lambda: scheduler.step(output, T, x).prev_sample)
        if device.type == "cpu":
            small = shape == (64, 3, 32, 32)
            targets = [
                *ratios("textbook", 8, 12),
                *ratios("torch.compile", 4),
                *ratios("diffusers", 10 if small else 7, 10),
            ]
    else:
        targets = []
    for rival in filter(None, rivals.values()):
        only_noise(rival(), mean, sigma)

    case = f"DDPM, clip, noise; output {str(output_dtype).removeprefix('torch.')}"
    moved = 2 * x.nbytes + output.nbytes
    contest("update", case, contestants(ours, x, output, plan, row, rivals), shape=shape, moved=moved, targets=targets)


def test_ddim(contest, device, diffusers, shape, state):
    x, output = state
    plan, schedule = fastdiff.samplers.ddim(SCHEDULE, STEPS, clip=1.0), TextbookSchedule(device)
    row, following = plan.timesteps.index(T), T - len(SCHEDULE) // STEPS

    def ours():
        return fastdiff.ops.update(x, output, plan, row).x

    def textbook():
        return fastdiff.textbook.ddim_step(x, output, T, following, schedule, clip=1.0)

    compiled = torch.compile(textbook, fullgraph=True)
    theirs = None
    if diffusers:
        scheduler = diffusers.DDIMScheduler(beta_schedule="linear")
        scheduler.set_timesteps(STEPS)
        theirs = lambda: scheduler.step(output, T, x).prev_sample  # noqa: E731
    exact = TextbookSchedule(device, torch.float64)
    right = fastdiff.textbook.ddim_step(x.double(), output.double(), T, following, exact, clip=1.0)
    rivals = {"textbook": textbook, "torch.compile": compiled, "diffusers": theirs}
    for contestant in (ours, *filter(None, rivals.values())):
        close(contestant().double(), right)

    targets = [*ratios("textbook", 5), *ratios("torch.compile", 1)] if device.type == "cpu" else gpu_targets(shape)
    contest(
        "update",
        "DDIM, η = 0, clip",
        contestants(ours, x, output, plan, row, rivals),
        shape=shape,
        moved=3 * x.nbytes,
        targets=targets,
    )


def test_ddpm_with_log_prob(contest, device, shape, state):
    """What ``return_log_prob`` adds to a row's update: at most 15%."""
    x, output = state
    plan, schedule = fastdiff.samplers.ddpm(SCHEDULE, clip=1.0), TextbookSchedule(device)
    row, elements = plan.timesteps.index(T), x[0].numel()
    table = plan.table()
    deviance = torch.zeros(len(plan), len(x), blocks(elements), device=device)

    def bound(backend, **more):
        where = table.to(device, torch.float32)
        o = Operands(x, torch.empty_like(x), where, NoiseKey(seed=1), (output,), host_table=table, **more)
        return bind(o, backend)

    plain, ours = bound("native"), bound("native", deviance=deviance)
    for update in (plain, ours):
        update(row)
    assert torch.equal(plain.operands.x_out, ours.operands.x_out)
    reference = bound("reference", deviance=torch.zeros_like(deviance))
    reference(row)
    assert torch.equal(deviance, reference.operands.deviance)
    sigma = plan[row].x["z"]
    noise = fastdiff.randn(shape, seed=1, draw=row, stream=SAMPLER, device=device).double()
    exact = torch.distributions.Normal(0.0, sigma).log_prob(noise * sigma).flatten(1).sum(1)
    close(log_probs(deviance[row : row + 1], [sigma], elements)[0].double(), exact, 1e-6)

    def by_hand():
        z = torch.randn_like(x)
        mean = fastdiff.textbook.ddpm_step(x, output, T, schedule, torch.zeros_like(x), clip=1.0)
        following = mean + sigma * z
        return following, torch.distributions.Normal(mean, sigma).log_prob(following).flatten(1).sum(1)

    contestants = {"fastdiff": lambda: ours(row), "without it": lambda: plain(row), "textbook": by_hand}
    targets = [{"kind": "ratio", "contestant": "without it", "goal": 1 / 1.15}] if device.type == "cpu" else []
    contest(
        "update", "DDPM, clip, noise, log-probability", contestants, shape=shape, moved=3 * x.nbytes, targets=targets
    )
