"""Learning a plan of the packaged digits, batch 16 under guidance: an iteration, and what it has in memory at most.

The rival keeps every activation of every row for the gradient; fastdiff's are those of one row at a time, computed a
second time. The gate compares their gradients. Last a whole tuning, of five calls.
"""

import pytest
import torch
from gates import alike
from memory import peak

import fastdiff
from fastdiff.tuning import walk as walking
from fastdiff.tuning.folder import tune_trained
from fastdiff.tuning.learned import Learned
from fastdiff.tuning.plans import karras
from fastdiff.tuning.runs import Runs, frozen
from fastdiff.tuning.start import Start
from fastdiff.tuning.units import units

BATCH = 16


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_an_iteration(contest, device, monkeypatch, steps):
    """The rival's memory grows with the steps, ours by a state a step."""
    trained = fastdiff.models.digits()
    trained.unet.to(device)
    labels = torch.arange(BATCH, device=device) % 10
    told = trained.arguments(labels, sampler="dpmpp_2m", steps=steps)
    beside = {name: told[name] for name in ("model_kwargs", "uncond_kwargs", "guidance_scale")}
    schedule = told["schedule"]
    spacing = fastdiff.Spacing(sigmas=karras(80.0, schedule.sigma_min, steps))
    plan = fastdiff.samplers.dpmpp_2m(schedule, clip=1.0, spacing=spacing)
    learned = Learned(Start(plan), units(plan, 0.7, True, schedule), False)
    shape = (BATCH, *trained.image_shape)
    runs = Runs(trained.unet, shape, BATCH, 0, beside)
    checkpoint = walking.checkpoint

    def ours():
        with frozen(trained.unet):
            table = learned.table()
            x = walking.walk(runs.request(learned.wide(table), 0, BATCH), table)
            return torch.autograd.grad(x.square().mean(), learned.parameters())

    def keeping_all():
        monkeypatch.setattr(walking, "checkpoint", lambda step, *args, **options: step(*args))
        try:
            return ours()
        finally:
            monkeypatch.setattr(walking, "checkpoint", checkpoint)

    for grad, other in zip(ours(), keeping_all(), strict=True):
        alike(grad, other, 1e-4)
    rivals = {"fastdiff": ours, "all activations kept": keeping_all}
    memory = {name: peak(call) for name, call in rivals.items()} if device.type == "cpu" else {}
    contest("tune", f"an iteration of {steps} calls", rivals, shape=shape, memory=memory)


def test_a_tuning_of_five_calls(contest, device):
    """By the default settings, once; beside it the teacher's part and the comparison with samplers, which are as long
    as without learning.
    """
    trained = fastdiff.models.digits()
    trained.unet.to(device)
    plan = tune_trained(trained, steps=5, iterations=1, images=32)
    assert plan.provenance.error <= plan.provenance.errors["start"]["5"]
    contestants = {"fastdiff": lambda: tune_trained(trained, steps=5),
                   "one iteration": lambda: tune_trained(trained, steps=5, iterations=1)}  # fmt: skip
    contest("tune", "a whole tuning of 5 calls", contestants, warm=False, rounds=2)
