"""One step of each of diffusers' sixteen schedulers: ours beside diffusers' own, in the middle of a run of 50 steps.

Both are given the same outputs of a network and walk to the step that is timed; each of their steps must agree. Then
that step is taken again and again (for a method of two stages, its two steps, a time being given for one of them).
What a step must move are the tensors that the plan's row reads and writes, and the second result, where a scheduler
returns one. Schedulers that draw noise are timed with our own, drawn inside the update, and apart with a torch
generator, which is how they agree with diffusers'.
"""

import ctypes
import inspect

import pytest
import torch
from gates import close
from torch.utils._python_dispatch import TorchDispatchMode

import fastdiff
from fastdiff.noise import SAMPLER

SIZES = [(1, 4, 64, 64), (16, 4, 64, 64), (1, 3, 256, 256), (16, 3, 256, 256)]
STEPS, TIMED = 50, 6
SECONDS = 1.0  # for the rounds of one contest
TWO_STAGES = ("HeunDiscreteScheduler", "DPMSolverSinglestepScheduler")
NAMES = (
    "DDPMScheduler", "DDIMScheduler", "DDIMInverseScheduler", "PNDMScheduler", "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "EDMEulerScheduler",
    "FlowMatchEulerDiscreteScheduler", "LCMScheduler", "TCDScheduler",
)  # fmt: skip
OPTIONS = {"PNDMScheduler": {"skip_prk_steps": True}}
STOCHASTIC = ("DDPMScheduler", "EulerAncestralDiscreteScheduler", "LCMScheduler", "TCDScheduler")


@pytest.fixture(scope="module", autouse=True)
def keep_freed_memory():
    """Have glibc's allocator keep up to 1 GiB of freed memory, blocks of up to 32 MiB among it.

    A step returns new tensors. By default their memory comes from the kernel, page by page, after some calls and not
    after others, which takes longer than the work that is compared. It cannot be undone: this file's turn is the last.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        trim_threshold, mmap_threshold = -1, -3
        libc.mallopt(trim_threshold, 1 << 30)
        libc.mallopt(mmap_threshold, 32 << 20)


class Walk:
    """A scheduler, the tensors of its run, and the steps that are timed."""

    def __init__(self, module, name, outputs):
        self.scheduler = getattr(module, name)(**OPTIONS.get(name, {}))
        self.scheduler.set_timesteps(STEPS, device=outputs[0].device)
        self.takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        self.outputs, self.stages = outputs, 2 if name in TWO_STAGES else 1

    def step(self, number, x, generator=None):
        """Step ``number`` from x."""
        t = self.scheduler.timesteps[number]
        if hasattr(self.scheduler, "scale_model_input"):
            self.scheduler.scale_model_input(x, t)  # some warn where it was not called
        given = {"generator": generator} if self.takes_generator else {}
        return self.scheduler.step(self.outputs[number], t, x, **given).prev_sample

    def go_to(self, number):
        """Make ``number`` the next step, as schedulers that count their steps see it."""
        own = vars(self.scheduler)
        for name in ("_step_index", "counter"):
            if name in own:
                own[name] = number

    def timed(self, x, generator=None):
        """What is timed: the step, or two, from x, as often as it is called."""
        step = self.scheduler.step
        calls = [(self.outputs[k], self.scheduler.timesteps[k]) for k in range(TIMED, TIMED + self.stages)]
        given = {"generator": generator} if self.takes_generator else {}

        def turn():
            self.go_to(TIMED)
            for output, t in calls:
                step(output, t, x, **given)

        return turn


class Counter(TorchDispatchMode):
    """Counts tensor operations."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
        self.count += 1
        return function(*arguments, **(kwargs or {}))


def operations(walk, turn):
    """Tensor operations a step."""
    with Counter() as counter:
        turn()
    return counter.count / walk.stages


def moved(walk, x, own_noise):
    """Bytes a step that the rows must move."""
    rows, total = walk.scheduler._steps.bound_rows, 0
    for k in range(TIMED, TIMED + walk.stages):
        row = rows.plan[k - rows.start]
        terms = [term for term in ("x", "anchor", "m", "slot0", "slot1", "slot2", "z") if row.uses(term)]
        reads = set(terms) - ({"z"} if own_noise else set())
        if row.uses("x0") or rows.second == "x0":
            reads |= {name for name, value in (("x", row.p), ("m", row.q)) if value}
        writes = (
            1 + (rows.second is not None) + (row.write is not None) + (row.anchor is not None and rows.reads_anchor)
        )
        total += (len(reads) + writes) * x.nbytes
    return total // walk.stages


def seeded(device, seed):
    return torch.Generator(device).manual_seed(seed)


def agree(ours, theirs, own, x):
    """Walk to the timed steps, all from the same x: the same numbers, but for the noise where it is our own."""
    for k in range(TIMED + ours.stages):
        a, b = (walk.step(k, x, seeded(x.device, k)) for walk in (ours, theirs))
        close(a, b)
        if own is not None:
            theirs.go_to(k)
            again = theirs.step(k, x, seeded(x.device, k + 1000))
            z, other = (torch.randn(x.shape, generator=seeded(x.device, n), device=x.device) for n in (k, k + 1000))
            sigma = float(((b - again) * (z - other)).sum() / ((z - other) ** 2).sum())
            noise = fastdiff.randn(tuple(x.shape), seed=1, draw=k, stream=SAMPLER, device=x.device)
            close(own.step(k, x), b + sigma * (noise - z))
        x = b
    return x


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", SIZES, ids=lambda size: "x".join(map(str, size)))
@pytest.mark.parametrize("name", NAMES)
def test_step(contest, benchmark, device, diffusers, name, size):
    if diffusers is None:
        pytest.skip("diffusers is not installed: its schedulers are what ours subclass")
    from fastdiff.integrations import diffusers as ours_module

    torch.manual_seed(0)
    stochastic = name in STOCHASTIC
    outputs = [torch.randn(size, device=device) for _ in range(TIMED + 2)]
    ours, theirs = (Walk(module, name, outputs) for module in (ours_module, diffusers))
    own = Walk(ours_module, name, outputs) if stochastic else None
    x = torch.randn(size, device=device) * float(getattr(theirs.scheduler, "init_noise_sigma", 1.0))
    if own is not None:
        own.scheduler.use_fastdiff_noise(1)
    with torch.no_grad():
        x = agree(ours, theirs, own, x)
        turns = {"fastdiff": (own or ours).timed(x)}
        if stochastic:
            turns["fastdiff, torch generator"] = ours.timed(x, seeded(device, 0))
        turns["diffusers"] = theirs.timed(x, seeded(device, 0))
        counts = {key: operations(ours, turn) for key, turn in turns.items()}
        benchmark.extra_info["operations"] = counts
        targets = []
        if device.type == "cpu" and size == SIZES[0]:
            targets = [{"kind": "ratio", "contestant": "diffusers", "goal": 5, "or_under": 12e-6}]
        if device.type == "cpu" and size == SIZES[-1]:
            targets = [{"kind": "of_copy", "contestant": "fastdiff", "goal": 0.7}]
            if stochastic:
                targets = [{"kind": "ratio", "contestant": "diffusers", "goal": 6, "stretch": 8}]
        contest(
            "samplers", name, turns, shape=size, moved=moved(ours, x, own is not None), targets=targets,
            steps=ours.stages, warm=True, seconds=SECONDS,
        )  # fmt: skip
