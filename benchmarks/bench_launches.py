"""Kernels that a step runs and the memory that it needs, on a GPU: fastdiff's captured step, and diffusers' eager call.

Memory is the most that is allocated during the first call, in which fastdiff captures the step, beyond what was there
before the network was made: weights, their packed copies and activations. Nothing is timed here but for form, since the
profiler may slow down what comes after it.
"""

import gc

import pytest
import torch
from bench_unet import BFLOAT16, CASES, STEPS, accelerated, formed, inputs, network, turns
from gates import GPU, kernels
from stepping import steps

CONTESTS = [("CIFAR-10", 1), ("CIFAR-10", 64), ("CelebA-HQ 256", 16), ("Stable Diffusion 1.5", 2)]


@pytest.mark.skipif(not GPU, reason="counts what a GPU runs")
@pytest.mark.parametrize(("name", "batch"), CONTESTS, ids=[f"{n}-{b}" for n, b in CONTESTS])
def test_launches(contest, benchmark, device, diffusers, name, batch):
    if diffusers is None:
        pytest.skip("diffusers is not installed")
    x, t, more = inputs(name, batch, device)
    shape = (batch, *CASES[name][1])

    def captured():
        return steps(accelerated(network(name, device)), shape, STEPS, more)

    def eager(dtype, layout):
        return turns({"it": formed(network(name, device), dtype, layout)}, x, t, more)["it"]

    makers = {
        BFLOAT16: captured,
        "diffusers' default: float32": lambda: eager(torch.float32, torch.contiguous_format),
        "bfloat16, channels_last": lambda: eager(torch.bfloat16, torch.channels_last),
    }
    calls, counts = {}, {}
    for key, make in makers.items():
        before = torch.cuda.memory_allocated()
        call = calls[key] = make()
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        counts[key] = {"kernels": kernels(calls[key]), "memory": peak}
        assert counts[key]["kernels"] > 0
    benchmark.extra_info["counts"] = counts
    contest("launches", name, calls, shape=shape, seconds=0, warm=False, calls=1)
