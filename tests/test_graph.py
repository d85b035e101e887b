"""CUDA graphs of whole steps: the bits of eager on a GPU, and on a CPU why there is none."""

import threading
import warnings
from dataclasses import replace

import pytest
import torch
from helpers import Affine, assert_same_bits
from torch import nn

import fastdiff
from fastdiff import graph
from fastdiff.run import Run
from fastdiff.sample import _prepare

SHAPE = (4, 3, 8, 8)
gpu = pytest.mark.gpu


def run(model, shape=SHAPE, **options) -> Run:
    """The Run that ``sample`` would make, not started."""
    import inspect

    bound = inspect.signature(fastdiff.sample).bind(model, shape, **options)
    bound.apply_defaults()
    return _prepare(**bound.arguments, keeps_x0=False)


# ---- on any machine


def test_no_graph_on_the_cpu():
    assert graph.why_eager(run(Affine())) == "the device is no CUDA device"
    model = Affine()
    for cuda_graph in ("auto", False):
        fastdiff.sample(model, SHAPE, steps=3, cuda_graph=cuda_graph)
    assert len(model.seen) == 6
    assert model not in graph._graphs


def test_true_raises_before_the_network_is_called():
    model = Affine()
    with pytest.raises(ValueError, match="cuda_graph=True needs a CUDA device"):
        fastdiff.sample(model, SHAPE, steps=3, cuda_graph=True, device="cpu")
    for bad in ("always", 1.5, None):
        with pytest.raises(ValueError, match="cuda_graph"):
            fastdiff.sample(model, SHAPE, steps=3, cuda_graph=bad)
    assert model.seen == []


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"generator": torch.Generator()}, "draw on the host"),
        ({"noise_fn": lambda stream, draw, shape: torch.zeros(shape)}, "draw on the host"),
        ({"backend": "reference"}, "reference"),
        ({"model_kwargs": {"y": [1]}}, "hashable"),
        ({"shape": (0, 3, 8, 8)}, "empty"),
        ({"model": lambda x, t: x}, "torch.nn.Module"),
        ({"cond_fn": lambda x, t: x}, "cond_fn"),
    ],
)
def test_why_eager(options, reason, monkeypatch):
    """The reasons beside the device, with a run that claims to be on a GPU."""
    options = dict(options)
    made = run(options.pop("model", None) or Affine(), options.pop("shape", SHAPE), steps=3,
               **{"backend": "auto", **options})  # fmt: skip
    if "backend" not in options:
        made.backend = "native"
    object.__setattr__(made.network, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert reason in graph.why_eager(made)


# ---- the graph's buffers, with steps that run again in place of replays


class Labelled(Affine):
    def forward(self, x, t, y=None):
        out = super().forward(x, t) * (1 + t.view(-1, 1, 1, 1) / 1000)
        return out if y is None else out + y.view(-1, 1, 1, 1)


class Again:
    """What a replay does: the captured step once more, on the same buffers."""

    def __init__(self, captured, calls):
        self.captured, self.calls, self.model = captured, calls, captured.run.network.model

    def replay(self):
        run = self.captured.run
        run.network = replace(run.network, model=self.model)
        self.captured._step(self.calls)


@pytest.fixture
def emulated(monkeypatch):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    monkeypatch.setattr(graph.Captured, "_capture", lambda self, run, calls, check: Again(self, calls))
    monkeypatch.setattr(torch.cuda, "Event", lambda: None)
    stream = type("Stream", (), {"wait_event": lambda self, event: None})()
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)


@torch.no_grad()
def through(captured, made) -> torch.Tensor:
    """A run's result by a graph's buffers."""
    captured.load(made)
    for index in range(made.start, len(made.plan)):
        captured.step(index)
    captured.unload(made)
    return made.x


Y = torch.tensor([0.1, 0.2, 0.3, 0.4])
BUFFERED = [
    [{"seed": k, "clip": (None, 0.5)[k]} for k in range(2)],
    [{"seed": k, "mask": torch.full(SHAPE, 0.25 + k / 2), "known": torch.full(SHAPE, 0.5 * k)} for k in range(2)],
    [{"seed": k, "thresholding": 0.9, "sampler": ("ddim", "ddpm")[k]} for k in range(2)],
    [{"sampler": "repaint", "sampler_options": {"jump_length": 2, "jump_n_sample": 2}, "seed": k, "eta": 0.5 * k,
      "mask": torch.full((8, 8), 0.5 * k), "known": torch.zeros(SHAPE)} for k in range(2)],
    [{"model_kwargs": {"y": Y + k}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0 + k, "guidance_rescale": 0.5,
      "thresholding": 0.8, "guidance_interval": (0.3 * k, 2.0)} for k in range(2)],
    [{"model_kwargs": {"y": Y + k}, "uncond_kwargs": [{"y": Y * 0}, {"y": Y * 0.5}], "guidance_scale": (2.0 + k, 1.5),
      "guidance_interval": (0.3, 1.0 + k)} for k in range(2)],
]  # fmt: skip


@pytest.mark.parametrize("several", BUFFERED)
def test_the_buffers_serve_runs_of_their_kind(emulated, several):
    """Masks, known images, weights and both kinds of keywords are copied in: a graph serves the next run too."""
    model, captured, key = Labelled(), None, None
    for options in several:
        options = {"steps": 7, "backend": "native", **options}
        made = run(model, **options)
        if captured is None:
            key = graph._key(made)
            captured = graph.Captured(made, key, check=False)
            assert sorted(captured.graphs) == graph.kinds(made)
        assert graph._key(made) == key
        assert_same_bits(through(captured, made), fastdiff.sample(model, SHAPE, **options))
    state = list(fastdiff.sample_iter(model, SHAPE, **options))[2]
    resumed = run(model, resume=state, **options)
    if graph._key(resumed) == key:
        assert_same_bits(through(captured, resumed), made.x)


def test_what_a_graph_is_kept_by():
    """What is baked into the captured kernels, and not in a buffer, makes another graph."""
    mask = {"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE)}
    guided = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0}
    model = Labelled()
    options = [
        {}, mask, {"thresholding": 0.9}, {"thresholding": 0.8}, {"thresholding": (0.9, 2.0)}, guided,
        {**guided, "guidance_rescale": 0.5}, {**guided, "guidance_interval": (0.3, 2.0)},
        {**guided, "guidance_scale": (2.0, 3.0), "uncond_kwargs": [{}, {}]},
    ]  # fmt: skip
    keys = [graph._key(run(model, steps=7, **each)) for each in options]
    assert len(set(keys)) == len(keys)


# ---- on a GPU


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.SiLU(), nn.Conv2d(16, 3, 3, padding=1))

    def forward(self, x, t, y=None):
        out = self.body(x) * (t.view(-1, 1, 1, 1) / 1000).to(x.dtype)
        return out if y is None else out + y.view(-1, 1, 1, 1)


@pytest.fixture
def network(seed):
    return Network().cuda().eval()


def both(model, shape=SHAPE, **options):
    eager = fastdiff.sample(model, shape, cuda_graph=False, **options)
    return eager, fastdiff.sample(model, shape, cuda_graph=True, **options)


@gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim", "eta": 0.5}, {"clip": 1.0, "variance": "fixed_large"}, {"seeds": [4, 3, 2, 1]}]
)
def test_captured_is_eager_to_the_bit(network, dtype, options):
    model = network.to(dtype).to(memory_format=torch.channels_last)
    assert_same_bits(*(t.cpu() for t in both(model, steps=9, **options)))


@gpu
def test_guided(network):
    y = torch.randn(4, device="cuda")
    for scale in (3.0, 5.0):
        options = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": y * 0}, "guidance_scale": scale}
        assert_same_bits(*(t.cpu() for t in both(network, steps=5, **options)))
        assert_same_bits(*(t.cpu() for t in both(network, steps=5, guidance_rescale=0.5, **options)))


@gpu
def test_loop_options(network):
    y, mask = torch.randn(4, device="cuda"), torch.rand(8, 8, device="cuda").round()
    guided = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": y * 0}, "guidance_scale": 3.0}
    known = torch.rand(SHAPE, device="cuda")
    repaint = {"sampler": "repaint", "sampler_options": {"jump_length": 2, "jump_n_sample": 3}}
    for options in (
        {"thresholding": 0.9}, {"mask": mask, "known": known}, {"mask": mask, "known": known, **repaint},
        {**guided, "guidance_interval": (0.3, 2.0)},
        {**guided, "guidance_interval": (0.3, 2.0), "guidance_rescale": 0.7, "thresholding": (0.95, 3.0)},
        {**guided, "guidance_scale": (3.0, 1.5), "uncond_kwargs": [{"y": y * 0}, {"y": y * 0.5}]},
    ):  # fmt: skip
        assert_same_bits(*(t.cpu() for t in both(network, steps=7, **options)), str(options))


@gpu
def test_nothing_waits_for_the_device(network):
    y = torch.randn(4, device="cuda")
    made = run(network, steps=5, thresholding=0.9, model_kwargs={"y": y}, uncond_kwargs={"y": y * 0},
               guidance_scale=3.0, guidance_rescale=0.5, guidance_interval=(0.3, 2.0),
               mask=torch.ones(8, 8, device="cuda"), known=torch.zeros(SHAPE, device="cuda"))  # fmt: skip
    with torch.no_grad():
        made.first_input()
        made.step(0)  # libraries make their handles
        torch.cuda.set_sync_debug_mode("error")
        try:
            for index in range(1, 5):
                made.step(index)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_a_graph_is_reused(network):
    for k in range(4):  # seeds, plans of equal length and keywords' values are numbers in the graph's buffers
        options = {"steps": 6, "seed": k, "sampler": ("ddpm", "ddim")[k % 2]}
        assert_same_bits(*(t.cpu() for t in both(network, **options)), f"run {k}")
    assert len(graph._graphs[network]) == 1
    assert_same_bits(*(t.cpu() for t in both(network, steps=6, x_init=torch.zeros(SHAPE, device="cuda"),
                                             start_step=2)))  # fmt: skip


@gpu
def test_many_shapes(network):
    for k in range(graph.LIMIT + 3):
        assert_same_bits(*(t.cpu() for t in both(network, (k + 1, 3, 8, 8), steps=3)), f"batch {k + 1}")
        assert len(graph._graphs[network]) <= graph.LIMIT


@gpu
def test_results_are_the_callers(network):
    a = fastdiff.sample(network, SHAPE, steps=3, seed=1, cuda_graph=True)
    kept = a.clone()
    fastdiff.sample(network, SHAPE, steps=3, seed=2, cuda_graph=True)
    assert_same_bits(a.cpu(), kept.cpu())


@gpu
def test_changed_weights_are_seen(network):
    fastdiff.sample(network, SHAPE, steps=3, cuda_graph=True)
    with torch.no_grad():
        network.body[0].weight.mul_(1.5)  # in place: the same graph
    assert_same_bits(*(t.cpu() for t in both(network, steps=3)))
    network.body[0].weight = nn.Parameter(network.body[0].weight * 0.5)  # elsewhere: another one
    assert_same_bits(*(t.cpu() for t in both(network, steps=3)))


@gpu
def test_two_streams_at_once(network):
    expected = [fastdiff.sample(network, SHAPE, steps=20, seed=k, cuda_graph=False).cpu() for k in range(3)]
    got, gate = {}, threading.Barrier(3)

    def work(k):
        with torch.cuda.stream(torch.cuda.Stream()):
            gate.wait()
            got[k] = fastdiff.sample(network, SHAPE, steps=20, seed=k).cpu()

    fastdiff.sample(network, SHAPE, steps=20, cuda_graph=True)
    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
    for k in range(3):
        assert_same_bits(got[k], expected[k], f"seed {k}")


class Reading(Network):
    """A network that reads its input back, which no graph can hold."""

    def forward(self, x, t):
        return super().forward(x, t) * float(x.abs().max().clamp(max=1))


@gpu
def test_a_network_that_synchronises_runs_eagerly(seed):
    model = Reading().cuda().eval()
    eager = fastdiff.sample(model, SHAPE, steps=4, cuda_graph=False)
    with pytest.warns(UserWarning, match="without a CUDA graph"):
        assert_same_bits(fastdiff.sample(model, SHAPE, steps=4).cpu(), eager.cpu())
    with warnings.catch_warnings():  # it says so once
        warnings.simplefilter("error")
        assert_same_bits(fastdiff.sample(model, SHAPE, steps=4).cpu(), eager.cpu())
    with pytest.raises(RuntimeError, match="could not be captured"):
        fastdiff.sample(model, SHAPE, steps=4, cuda_graph=True)
    assert_same_bits(fastdiff.sample(model, SHAPE, steps=4).cpu(), eager.cpu())


@gpu
def test_true_says_why_it_cannot(network):
    for options, reason in (
        ({"generator": torch.Generator()}, "generator"),
        ({"callback": lambda state: None}, "callback"),
        ({"cond_fn": lambda x, t: x}, "cond_fn"),
        ({"backend": "reference"}, "reference"),
        ({"model_kwargs": {"y": [1]}}, "hashable"),
    ):
        with pytest.raises(ValueError, match=reason):
            fastdiff.sample(network, SHAPE, steps=3, cuda_graph=True, **options)


@gpu
def test_nan_names_its_row(network):
    class Failing(Network):
        def forward(self, x, t):
            return super().forward(x, t) + torch.where(t == 300, float("nan"), 0.0).view(-1, 1, 1, 1)

    for cuda_graph in (True, False):
        with pytest.raises(FloatingPointError, match=r"row 6 of 10 \(t = 300\)"):
            fastdiff.sample(Failing().cuda(), SHAPE, steps=10, cuda_graph=cuda_graph)


@gpu
def test_the_gpu_has_the_cpus_noise(network):
    a = fastdiff.randn((3, 3, 33, 31), seed=7, draw=2, stream=1, device="cuda")
    assert_same_bits(a.cpu(), fastdiff.randn((3, 3, 33, 31), seed=7, draw=2, stream=1, device="cpu"))
