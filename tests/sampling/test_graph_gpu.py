"""CUDA graphs of whole steps on a GPU: the bits of eager, and no wait for the device."""

import threading
import warnings

import pytest
import torch
from helpers import assert_same_bits, prepared
from torch import nn

import fastdiff
from fastdiff.sampling import graph

SHAPE = (4, 3, 8, 8)
pytestmark = pytest.mark.gpu


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"sampler": "ddim", "eta": 0.5}, {"clip": 1.0, "variance": "fixed_large"}, {"seeds": [4, 3, 2, 1]}]
)
def test_captured_is_eager_to_the_bit(network, dtype, options):
    model = network.to(dtype).to(memory_format=torch.channels_last)
    assert_same_bits(*(t.cpu() for t in both(model, steps=9, **options)))


def test_guided(network):
    y = torch.randn(4, device="cuda")
    for scale in (3.0, 5.0):
        options = {"model_kwargs": {"y": y}, "uncond_kwargs": {"y": y * 0}, "guidance_scale": scale}
        assert_same_bits(*(t.cpu() for t in both(network, steps=5, **options)))
        assert_same_bits(*(t.cpu() for t in both(network, steps=5, guidance_rescale=0.5, **options)))
        options |= {"uncond_kwargs": {"y": None}, "guidance_scale": [scale, 1.0, 2.0, scale, 1.5]}  # two calls a row
        assert_same_bits(*(t.cpu() for t in both(network, steps=5, guidance_rescale=0.5, **options)))


def test_keywords_in_containers(seed):
    """Their tensors are copied in for each run; so one graph serves both."""

    class Nested(Network):
        def forward(self, x, t, more):
            return super().forward(x, t, more["y"][0])

    model = Nested().cuda().eval()
    for k in range(2):
        y = torch.randn(4, device="cuda") + k
        options = {"model_kwargs": {"more": {"y": [y]}}, "uncond_kwargs": {"more": {"y": [y * 0]}}}
        assert_same_bits(*(t.cpu() for t in both(model, steps=5, guidance_scale=3.0, **options)))
    assert len(graph._graphs[model]) == 1


def test_a_learned_variance_left_unread(seed):
    class Twice(Network):
        def forward(self, x, t):
            return torch.cat([super().forward(x, t), torch.full_like(x, float("nan"))], 1)

    model = Twice().cuda().eval()
    options = {"sampler": "euler_ancestral", "steps": 5, "variance": "learned_range"}
    assert_same_bits(*(t.cpu() for t in both(model, **options)))


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


def test_nothing_waits_for_the_device(network):
    y = torch.randn(4, device="cuda")
    made = prepared(network, SHAPE, steps=5, thresholding=0.9, model_kwargs={"y": y}, uncond_kwargs={"y": y * 0},
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


def test_a_graph_is_reused(network):
    for k in range(4):  # seeds, plans of equal length and keywords' values are numbers in the graph's buffers
        options = {"steps": 6, "seed": k, "sampler": ("ddpm", "ddim")[k % 2]}
        assert_same_bits(*(t.cpu() for t in both(network, **options)), f"run {k}")
    assert len(graph._graphs[network]) == 1
    assert_same_bits(*(t.cpu() for t in both(network, steps=6, x_init=torch.zeros(SHAPE, device="cuda"),
                                             start_step=2)))  # fmt: skip


def test_many_shapes(network):
    for k in range(graph.LIMIT + 3):
        assert_same_bits(*(t.cpu() for t in both(network, (k + 1, 3, 8, 8), steps=3)), f"batch {k + 1}")
        assert len(graph._graphs[network]) <= graph.LIMIT


def test_results_are_the_callers(network):
    a = fastdiff.sample(network, SHAPE, steps=3, seed=1, cuda_graph=True)
    kept = a.clone()
    fastdiff.sample(network, SHAPE, steps=3, seed=2, cuda_graph=True)
    assert_same_bits(a.cpu(), kept.cpu())


def test_changed_weights_are_seen(network):
    fastdiff.sample(network, SHAPE, steps=3, cuda_graph=True)
    with torch.no_grad():
        network.body[0].weight.mul_(1.5)  # in place: the same graph
    assert_same_bits(*(t.cpu() for t in both(network, steps=3)))
    network.body[0].weight = nn.Parameter(network.body[0].weight * 0.5)  # elsewhere: another one
    assert_same_bits(*(t.cpu() for t in both(network, steps=3)))


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
    assert torch.randn(3, device="cuda").isfinite().all()  # torch's generator does not wait for the capture's end
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


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


def test_nan_names_its_row(network):
    class Failing(Network):
        def forward(self, x, t):
            return super().forward(x, t) + torch.where(t == 300, float("nan"), 0.0).view(-1, 1, 1, 1)

    for cuda_graph in (True, False):
        with pytest.raises(FloatingPointError, match=r"row 6 of 10 \(t = 300\)"):
            fastdiff.sample(Failing().cuda(), SHAPE, steps=10, cuda_graph=cuda_graph)


def test_the_gpu_has_the_cpus_noise(network):
    a = fastdiff.randn((3, 3, 33, 31), seed=7, draw=2, stream=1, device="cuda")
    assert_same_bits(a.cpu(), fastdiff.randn((3, 3, 33, 31), seed=7, draw=2, stream=1, device="cpu"))
