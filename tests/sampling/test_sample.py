"""sample and sample_iter: signatures, devices and modes around a run, interruptions and threads."""

import importlib
import inspect
import re
import threading

import pytest
import torch
from helpers import Affine, assert_same_bits, half

import fastdiff
from fastdiff.samplers.ddpm import VARIANCES
from fastdiff.schedules.level import PREDICTIONS
from fastdiff.schedules.resolve import NAMED
from fastdiff.schedules.spacing import NAMES

BACKENDS = ("auto", "native", "triton", "reference")
SHAPE = (4, 3, 8, 8)


@pytest.mark.parametrize("sampler", ["ddpm", "dpmpp_2m", "heun"])
def test_a_default_device_is_for_networks(seed, sampler):
    """A plan is the host's, wherever torch.set_default_device puts new tensors: "meta" would lose its numbers."""
    expected = fastdiff.sample(half, SHAPE, sampler=sampler, steps=5, seed=seed)
    with torch.device("meta"):
        schedule = fastdiff.NoiseSchedule.linear()
        got = fastdiff.sample(half, SHAPE, sampler=sampler, schedule=schedule, steps=5, seed=seed, device="cpu")
        assert len(fastdiff.NoiseSchedule.from_betas([0.1, 0.2])) == 2
    assert_same_bits(got, expected)


@pytest.mark.parametrize("options", [{}, {"sampler": "dpmpp_2m"}, {"model_kwargs": {"y": torch.ones(4)}}])
def test_inference_mode(seed, options):
    """Within it and without, the same; what comes out is a plain tensor, which can be written to anywhere."""
    model = torch.nn.Conv2d(3, 3, 3, padding=1)

    def network(x, t, y=None):
        return model(x) if y is None else model(x) * y.view(-1, 1, 1, 1)

    options = {"steps": 5, "seed": seed, "x_init": torch.randn(SHAPE), **options}
    expected = fastdiff.sample(network, SHAPE, **options)
    with torch.inference_mode():
        options["x_init"] = options["x_init"].clone()
        got = fastdiff.sample(network, SHAPE, **options)
        states = list(fastdiff.sample_iter(network, SHAPE, **options))
        resumed = fastdiff.sample(network, SHAPE, resume=states[1], **{**options, "x_init": None})
    for images in (got, states[-1].x, resumed):
        assert_same_bits(images, expected)
        assert not images.is_inference()


def test_interrupted():
    """Ctrl-C inside the network: modes come back, and the next run has its bits."""
    model = Affine()
    expected = fastdiff.sample(model, SHAPE, steps=5)
    calls = []

    def hook(module, arguments):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(hook)
    with pytest.raises(KeyboardInterrupt):
        fastdiff.sample(model, SHAPE, steps=5, progress=True)
    handle.remove()
    assert model.training
    assert torch.is_grad_enabled()
    assert_same_bits(fastdiff.sample(model, SHAPE, steps=5), expected)


def test_two_runs_at_once():
    shape = (2, 3, 32, 32)
    expected = [fastdiff.sample(half, shape, steps=20, seed=k) for k in range(4)]
    got: dict[int, torch.Tensor] = {}
    gate = threading.Barrier(4)

    def work(k):
        gate.wait()
        got[k] = fastdiff.sample(half, shape, steps=20, seed=k)

    workers = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=60)
    for k in range(4):
        assert_same_bits(got[k], expected[k])


# ---- signatures, a sampler's function, and whose fault NaN is


def test_signatures():
    assert inspect.signature(fastdiff.sample_iter) == inspect.signature(fastdiff.sample)
    for name in ("sample", "interpolate", "stepper", "graph"):
        assert inspect.ismodule(importlib.import_module(f"fastdiff.sampling.{name}"))
        assert inspect.ismodule(getattr(fastdiff.sampling, name))
    for name, sampler in fastdiff.samplers.SAMPLERS.items():
        parameters = inspect.signature(sampler).parameters.values()
        assert not any(p.kind == p.VAR_KEYWORD for p in parameters), name
        assert "Args:" in sampler.__doc__
        assert all(p.name in sampler.__doc__ for p in parameters), name
        assert "spacing" in {p.name for p in parameters}
    with pytest.raises(TypeError, match=r"heun\(\).*spaceing"):
        fastdiff.samplers.heun(fastdiff.NoiseSchedule.linear(), 5, spaceing="karras")


@pytest.mark.parametrize("run", [fastdiff.sample, fastdiff.sample_iter, fastdiff.Recipe.of])
def test_keywords_that_sample_has_not(run):
    """A sampler's options are told where they belong; of another name the nearest is told."""
    for given, told in (
        ({"order": 3}, 'a sampler\'s options are given as sampler_options={"order": 3}'),
        ({"timesteps": [9, 5], "colour": 1, "tau": 0.5}, 'sampler_options={"timesteps": [9, 5], "tau": 0.5}'),
        ({"step": 3}, "unexpected keyword argument 'step'; did you mean 'steps'?"),
        ({"unknown": 3}, "unexpected keyword argument 'unknown'; "),
    ):
        with pytest.raises(TypeError, match=re.escape(told)):
            run(half, SHAPE, sampler="dpmpp_2m", **given)


def test_gradients_are_off_only_inside():
    weight = torch.ones(1, requires_grad=True)
    for state in fastdiff.sample_iter(lambda x, t: x * weight, SHAPE, steps=3):
        assert torch.is_grad_enabled()
        assert not state.x.requires_grad
    assert not fastdiff.sample(lambda x, t: x * weight, SHAPE, steps=3).requires_grad


def test_an_empty_batch(backend):
    got = fastdiff.sample(half, (0, 3, 8, 8), steps=3, backend=backend)
    assert got.shape == (0, 3, 8, 8)
    assert got.dtype == torch.float32


def test_a_progress_bar(capsys):
    fastdiff.sample(half, (1, 4), steps=5, progress=True)
    assert "5/5" in capsys.readouterr().err
    fastdiff.sample(half, (1, 4), steps=5)
    assert capsys.readouterr().err == ""


def test_help_names_everything():
    """Predictions, schedules, spacings, variances, backends; and the calls that ``steps`` makes."""
    text = " ".join(fastdiff.sample.__doc__.split())
    for name in (*PREDICTIONS, *NAMED, *NAMES, *VARIANCES, *BACKENDS):
        assert f'"{name}"' in text, name
    for name in ("NoiseSchedule", "EDMSchedule", "FlowSchedule", *inspect.signature(fastdiff.sample).parameters):
        assert name in text, name
    samplers, told = fastdiff.samplers.SAMPLERS, {}
    several = text[text.index("A step is one network call") : text.index("``print(plan)`` counts")]
    for words, calls in re.findall(r"(.*?)(2n − 1|3n − 2|n \+ 1)", several):
        told |= {word: calls for word in re.findall(r"\w+", words) if word in samplers}
    assert len(told) == 9
    for name in sorted(set(samplers) - {"repaint", "restart"}):
        for n in (5, 12):
            plan = samplers[name](fastdiff.NoiseSchedule.linear(), n)
            counts = {"2n − 1": 2 * n - 1, "3n − 2": 3 * n - 2, "n + 1": n + 1, "n": n}
            assert sum(row.calls_model for row in plan) == counts[told.get(name, "n")], name
