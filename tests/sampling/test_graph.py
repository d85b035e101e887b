"""CUDA graphs of whole steps without a GPU: why there is none on a CPU, and the buffers that replays would work on."""

from dataclasses import replace

import pytest
import torch
from helpers import Affine, TwoParts, assert_same_bits, prepared

import fastdiff
from fastdiff.sampling import graph

SHAPE = (4, 3, 8, 8)
gpu = pytest.mark.gpu


# ---- on any machine


def test_no_graph_on_the_cpu():
    assert graph.why_eager(prepared(Affine(), SHAPE)) == "the device is no CUDA device"
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
        ({"model_kwargs": {"y": [{1}]}}, "hashable"),
        ({"shape": (0, 3, 8, 8)}, "empty"),
        ({"model": lambda x, t: x}, "torch.nn.Module"),
        ({"cond_fn": lambda x, t: x}, "cond_fn"),
    ],
)
def test_why_eager(options, reason, monkeypatch):
    """The reasons beside the device, with a run that claims to be on a GPU."""
    options = dict(options)
    made = prepared(options.pop("model", None) or Affine(), options.pop("shape", SHAPE), steps=3,
               **{"backend": "auto", **options})  # fmt: skip
    if "backend" not in options:
        made.request = replace(made.request, backend="native")
    object.__setattr__(made.network, "device", torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert reason in graph.why_eager(made)


# ---- the graph's buffers, with steps that run again in place of replays


class Labelled(Affine):
    def forward(self, x, t, y=None, more=None):
        out = super().forward(x, t) * (1 + t.view(-1, 1, 1, 1) / 1000)
        out = out if y is None else out + y.view(-1, 1, 1, 1)
        return out if more is None else out * more["a"][0].view(-1, 1, 1, 1) + more["b"]


class Again:
    """What a replay does: the captured step once more, on the same buffers."""

    def __init__(self, captured, kind):
        self.captured, self.kind, self.model, self.deep = captured, kind, captured.run.network.model, captured.run.deep

    def replay(self):
        run = self.captured.run
        run.network, run.deep = replace(run.network, model=self.model), self.deep
        self.captured._step(*self.kind)


@pytest.fixture
def emulated(monkeypatch):
    pytest.importorskip("fastdiff._C", reason="the extension is not built")
    monkeypatch.setattr(graph.Captured, "_capture", lambda self, run, kind, check: Again(self, kind))
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
    [{"model_kwargs": {"y": Y + k}, "uncond_kwargs": {"y": None}, "guidance_scale": [1, 2 + k, 3, 4, 5, 6, 7]}
     for k in range(2)],
    [{"model_kwargs": {"more": {"a": [Y + k], "b": 0.5}}, "uncond_kwargs": {"more": {"a": [Y * 0]}},
      "guidance_scale": 2.0, "seed": k} for k in range(2)],
]  # fmt: skip


@pytest.mark.parametrize("several", BUFFERED)
def test_the_buffers_serve_runs_of_their_kind(emulated, several):
    """Masks, known images, weights and both kinds of keywords are copied in: a graph serves the next run too."""
    model, captured, key = Labelled(), None, None
    for options in several:
        options = {"steps": 7, "backend": "native", **options}
        made = prepared(model, SHAPE, **options)
        if captured is None:
            key = graph._key(made)
            captured = graph.Captured(made, key, check=False)
            assert list(captured.graphs) == graph.kinds(made)
        assert graph._key(made) == key
        assert_same_bits(through(captured, made), fastdiff.sample(model, SHAPE, **options))
    state = list(fastdiff.sample_iter(model, SHAPE, **options))[2]
    resumed = prepared(model, SHAPE, resume=state, **options)
    if graph._key(resumed) == key:
        assert_same_bits(through(captured, resumed), made.x)


@pytest.mark.parametrize("kind", ["output", "deep"])
def test_rows_that_reuse_a_call(emulated, seed, kind):
    """Outputs and deep features are buffers: a graph serves the next run, from its first row or resumed."""
    model = TwoParts()
    guided = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0, "backend": "native"}
    captured = None
    for every in (3, 2):
        plan = fastdiff.samplers.dpmpp_2m(fastdiff.NoiseSchedule.linear(), 8).reuse(every=every, kind=kind)
        options = {**guided, "sampler": plan, "seed": seed + every}
        made = prepared(model, SHAPE, **options)
        if captured is None:
            key = graph._key(made)
            captured = graph.Captured(made, key, check=False)
        assert graph._key(made) == key
        assert list(captured.graphs) == [(2, None), (2, "deep")][: 1 + (kind == "deep")]
        assert_same_bits(through(captured, made), fastdiff.sample(model, SHAPE, **options))
        captured.run.deep = None  # which a replay brought back
    for state in list(fastdiff.sample_iter(model, SHAPE, **options))[1:-1]:
        resumed = prepared(model, SHAPE, resume=state, **options)
        if graph.kinds(resumed):
            assert_same_bits(through(graph.Captured(resumed, graph._key(resumed), check=False), resumed), made.x)


def test_an_accelerated_networks_embeddings_are_buffers_too(emulated, seed):
    """A graph serves another plan of as many rows; a weight that was written to makes another graph."""
    torch.manual_seed(seed)
    model = fastdiff.models.UNet(
        sample_size=8, block_out_channels=(8, 16), norm_num_groups=4, layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval().requires_grad_(False)  # fmt: skip
    fastdiff.accelerate(model, dtype=torch.float32)
    captured, key = None, None
    for spacing in ("leading", "trailing", "linspace"):
        options = {"steps": 5, "spacing": spacing, "backend": "native", "seed": seed}
        made = prepared(model, SHAPE, **options)
        key = key or graph._key(made)
        captured = captured or graph.Captured(made, key, check=False)
        assert graph._key(made) == key
        assert_same_bits(through(captured, made), fastdiff.sample(model, SHAPE, **options))
    with torch.no_grad():
        model.conv_in.weight.mul_(2)
    assert graph._key(prepared(model, SHAPE, **options)) != key
    fastdiff.restore(model)
    assert graph._key(prepared(model, SHAPE, **options)) != key


def test_what_a_graph_is_kept_by():
    """What is baked into the captured kernels, and not in a buffer, makes another graph."""
    mask = {"mask": torch.ones(SHAPE), "known": torch.zeros(SHAPE)}
    guided = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0}
    model = Labelled()
    options = [
        {}, mask, {"thresholding": 0.9}, {"thresholding": 0.8}, {"thresholding": (0.9, 2.0)}, guided,
        {**guided, "guidance_rescale": 0.5}, {**guided, "guidance_interval": (0.3, 2.0)},
        {**guided, "guidance_scale": (2.0, 3.0), "uncond_kwargs": [{}, {}]}, {**guided, "uncond_kwargs": {"y": None}},
        {"model_kwargs": {"more": {"a": [Y], "b": 0.5}}}, {"model_kwargs": {"more": {"a": [Y], "b": 0.25}}},
        {"model_kwargs": {"more": {"a": (Y,), "b": 0.25}}},
    ]  # fmt: skip
    keys = [graph._key(prepared(model, SHAPE, steps=7, **each)) for each in options]
    assert len(set(keys)) == len(keys)


class Wrapper(torch.nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, t):
        return self.network(x, t) * 0.5


def test_a_wrapped_network_that_is_accelerated(emulated, seed):
    """Its packed weights are kept by the wrapper's graph, and what changes them makes another."""
    torch.manual_seed(seed)
    inner = torch.nn.Sequential(torch.nn.Conv2d(3, 32, 3, padding=1), torch.nn.Conv2d(32, 3, 1)).eval()

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x, t):
            return self.inner(x)

    model = Wrapper(Network()).eval().requires_grad_(False)
    fastdiff.accelerate(inner, dtype=torch.float32)
    options = {"steps": 3, "backend": "native", "seed": seed}
    made = prepared(model, SHAPE, **options)
    key = graph._key(made)
    assert_same_bits(through(graph.Captured(made, key, check=False), made), fastdiff.sample(model, SHAPE, **options))
    kept = graph.Captured(made, key, check=False).weights
    assert [len(weights) > 0 for weights in kept] == [True]
    assert graph._key(prepared(model, SHAPE, **options)) == key
    with torch.no_grad():
        inner[0].weight.mul_(2)
    changed = graph._key(prepared(model, SHAPE, **options))
    assert changed != key
    fastdiff.restore(inner)
    assert graph._key(prepared(model, SHAPE, **options)) not in (key, changed)


def test_numbers_on_the_host_are_part_of_a_graph():
    """A tensor there that a kernel takes by value is baked in; on the run's own device it is a buffer."""
    keys = []
    for weight in (1.0, 5.0):
        made = prepared(Labelled(), SHAPE, steps=3, model_kwargs={"y": torch.full((4,), weight)})
        keys.append([made.buffers.signature(torch.device(device)) for device in ("cpu", "cuda")])
    assert keys[0][0] == keys[1][0]
    assert keys[0][1] != keys[1][1]


@pytest.fixture
def precision():
    backends = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [backend.fp32_precision for backend in backends]
    yield
    for backend, value in zip(backends, before, strict=True):
        backend.fp32_precision = value


def test_tf32_by_either_of_torchs_switches(precision):
    keys = set()
    for value in ("ieee", "tf32"):
        torch.backends.cuda.matmul.fp32_precision = value
        keys.add(graph._key(prepared(Labelled(), SHAPE, steps=3)))
        torch.backends.cudnn.conv.fp32_precision = value
        keys.add(graph._key(prepared(Labelled(), SHAPE, steps=3)))
    assert len(keys) == 4


def test_where_a_warning_points(emulated, monkeypatch):
    """To the caller's line."""

    def fails(self, run, kind, check):
        raise RuntimeError("no")

    monkeypatch.setattr(graph.Captured, "_capture", fails)
    monkeypatch.setattr(graph, "why_eager", lambda run: None)
    with pytest.warns(UserWarning, match="without a CUDA graph: no") as seen:
        fastdiff.sample(Affine(), SHAPE, steps=2, backend="native")
    assert seen[0].filename == __file__
