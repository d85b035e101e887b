"""``ops.add_noise`` with its noise drawn, beside the textbook and diffusers' ``add_noise``."""

import torch
from gates import SCHEDULE, TextbookSchedule, close, gpu_targets, graphed, only_noise

import fastdiff


def test_add_noise(contest, device, diffusers, shape):
    x0 = torch.rand(shape, device=device) * 2 - 1
    t = torch.randint(0, len(SCHEDULE), (shape[0],), device=device)
    schedule = TextbookSchedule(device)

    def ours():
        return fastdiff.add_noise(x0, t, SCHEDULE, seed=1)

    def textbook():
        noise = torch.randn_like(x0)
        return textbook.add_noise(x0, t, schedule, noise), noise

    compiled = torch.compile(textbook, fullgraph=True)
    scheduler = diffusers and diffusers.DDPMScheduler(beta_schedule="linear")

    def theirs():
        noise = torch.randn_like(x0)
        return scheduler.add_noise(x0, noise, t), noise

    exact = TextbookSchedule(device, torch.float64)
    rivals = {"textbook": textbook, "torch.compile": compiled, "diffusers": theirs if diffusers else None}
    for contestant in (ours, *filter(None, rivals.values())):
        x_t, noise = contestant()
        only_noise(noise, torch.zeros((), device=device), 1.0)
        close(x_t.double(), textbook.add_noise(x0.double(), t, exact, noise.double()))

    cpu_targets = [{"kind": "ratio", "contestant": "textbook", "goal": 6}]
    contest(
        "add_noise",
        "float32, noise drawn",
        {**graphed(ours, device), **rivals},
        shape=shape,
        moved=3 * x0.nbytes,
        targets=cpu_targets if device.type == "cpu" else gpu_targets(shape),
    )
