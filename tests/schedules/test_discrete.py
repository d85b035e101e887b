"""Noise schedules against published anchors, independent formulas and diffusers' tables."""

import json
import math

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import NoiseSchedule

NAMES = ("linear", "scaled_linear", "cosine", "sigmoid", "sigmoid_betas")


@pytest.mark.parametrize(
    ("name", "anchors"),
    [
        ("linear", (0.99989998, 0.07858723, 0.00004036)),
        ("scaled_linear", (0.99914998, 0.27766943, 0.00466010)),
        ("cosine", (0.99995869, 0.49384347, 0.0)),
    ],
)
def test_anchors(name, anchors):
    bars = getattr(NoiseSchedule, name)(1000).alphas_cumprod
    for index, anchor in zip((0, 499, 999), anchors, strict=True):
        # The anchors come from float32 products of ``index`` factors.
        assert float(bars[index]) == pytest.approx(anchor, rel=1e-6, abs=1e-8), index


@pytest.mark.parametrize("T", [2, 10, 1000])
def test_formulas(T):
    """Each β in Python floats, one at a time."""
    ramp = [i / (T - 1) for i in range(T)]

    def bar_sigmoid(u: float) -> float:
        low, high, at = (1 / (1 + math.exp(-v)) for v in (-3.0, 3.0, -3.0 + 6.0 * u))
        return (high - at) / (high - low)

    def bar_cosine(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    betas = {
        "linear": [1e-4 + r * (0.02 - 1e-4) for r in ramp],
        "scaled_linear": [(0.00085**0.5 + r * (0.012**0.5 - 0.00085**0.5)) ** 2 for r in ramp],
        "sigmoid_betas": [1e-4 + (0.02 - 1e-4) / (1 + math.exp(6 - 12 * r)) for r in ramp],
        "cosine": [min(1 - bar_cosine((i + 1) / T) / bar_cosine(i / T), 0.999) for i in range(T)],
        "sigmoid": [min(1 - bar_sigmoid((i + 1) / T) / bar_sigmoid(i / T), 0.999) for i in range(T)],
    }
    for name, expected in betas.items():
        schedule = getattr(NoiseSchedule, name)(T)
        assert len(schedule) == T
        assert schedule.alphas_cumprod.dtype == torch.float64
        np.testing.assert_allclose(
            schedule.alphas_cumprod, np.cumprod(1 - np.array(expected)), rtol=1e-11, err_msg=name
        )
        np.testing.assert_allclose(schedule.betas, expected, rtol=1e-8, atol=1e-13, err_msg=name)
        assert schedule.alphas.tolist() == [math.sqrt(bar) for bar in schedule.alphas_cumprod.tolist()]
        torch.testing.assert_close(schedule.alphas**2 + schedule.sigmas**2, torch.ones(T).double())


def test_both_ways_in():
    schedule = NoiseSchedule.linear(50)
    assert NoiseSchedule.from_betas(schedule.betas) == NoiseSchedule.from_betas(schedule.betas.tolist())
    torch.testing.assert_close(NoiseSchedule.from_betas(schedule.betas.numpy()).alphas_cumprod, schedule.alphas_cumprod)
    assert NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod.tolist()) == schedule
    assert NoiseSchedule.from_alphas_cumprod([1.0]).sigmas.tolist() == [0.0]  # T = 1 and no noise at all are allowed
    assert NoiseSchedule.from_alphas_cumprod([0.5, 0.0, 0.0]).betas.tolist() == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("name", NAMES)
def test_zero_terminal_snr(name):
    schedule = getattr(NoiseSchedule, name)(1000)
    rescaled = schedule.rescale_zero_terminal_snr()
    assert float(rescaled.alphas_cumprod[-1]) == 0
    assert float(rescaled.alphas_cumprod[0]) == pytest.approx(float(schedule.alphas_cumprod[0]), rel=1e-14)
    root, first, last = schedule.alphas, float(schedule.alphas[0]), float(schedule.alphas[-1])
    expected = [first * (float(r) - last) / (first - last) for r in root]
    np.testing.assert_allclose(rescaled.alphas, expected, atol=1e-14)


def test_zero_terminal_snr_with_a_floor():
    """diffusers' and ComfyUI's least ᾱ: only where the rescaled one is below it."""
    schedule = NoiseSchedule.scaled_linear()
    plain = schedule.rescale_zero_terminal_snr()
    for floor in (2.0**-24, 4.8973451890853435e-08):
        floored = schedule.rescale_zero_terminal_snr(floor)
        assert float(floored.alphas_cumprod[-1]) == floor
        assert floored.alphas_cumprod[:-1].tolist() == plain.alphas_cumprod[:-1].tolist()
        assert floored.sigma_max == pytest.approx(math.sqrt(1 / floor - 1))
    for bad, error in ((-1.0, ValueError), (1.0, ValueError), (0.9999, ValueError), ("0", TypeError)):
        with pytest.raises(error, match="floor"):
            schedule.rescale_zero_terminal_snr(bad)


# ---- diffusers


LINEAR_BETAS = {"beta_schedule": "linear"}
CONFIGS = [
    {},
    {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"},
    {"beta_schedule": "squaredcos_cap_v2"},
    {"beta_schedule": "sigmoid"},
    {"num_train_timesteps": 77, "beta_end": 0.3},
    {"trained_betas": [0.1, 0.2, 0.3]},
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", ["object", "config", "folder", "file", "dict"])
def test_from_diffusers(config, kind, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDPMScheduler(**config)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "scheduler_config.json"
    source = {"object": theirs, "config": theirs.config, "folder": tmp_path, "file": str(file)}
    source["dict"] = json.loads(file.read_text())
    ours = NoiseSchedule.from_diffusers(source[kind])
    assert len(ours) == theirs.config.num_train_timesteps or "trained_betas" in config
    # Theirs is a float32 cumulative product of T factors.
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=2e-5, atol=1e-8)


def test_from_diffusers_with_zero_terminal_snr():
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(rescale_betas_zero_snr=True)
    ours = NoiseSchedule.from_diffusers(theirs)
    torch.testing.assert_close(ours.alphas_cumprod.float(), theirs.alphas_cumprod, rtol=1e-3, atol=1e-6)
    assert float(ours.alphas_cumprod[-1]) == 0


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda p: {"beta_schedule": "karras"}, ValueError, "beta_schedule"),
        (lambda p: 7, TypeError, "scheduler"),
        (lambda p: p / "nothing", FileNotFoundError, "scheduler_config.json"),
        (lambda p: p, FileNotFoundError, "scheduler_config.json"),
        (lambda p: _written(p, "{"), ValueError, "scheduler_config.json"),
        (lambda p: _written(p, "[1]"), ValueError, "JSON object"),
        (lambda p: {**LINEAR_BETAS, "num_train_timesteps": 0}, ValueError, "num_train_timesteps"),
        (lambda p: {**LINEAR_BETAS, "num_train_timesteps": "many"}, (ValueError, TypeError), "num_train_timesteps"),
        (lambda p: {**LINEAR_BETAS, "beta_start": None}, (ValueError, TypeError), "beta_start"),
        (lambda p: {"trained_betas": ["x"]}, TypeError, "betas"),
    ],
)
def test_from_diffusers_refuses(make, error, names, tmp_path):
    with pytest.raises(error, match=names):
        NoiseSchedule.from_diffusers(make(tmp_path))


def _written(folder, text):
    (folder / "scheduler_config.json").write_text(text)
    return folder


# ---- a value


def test_a_steep_sigmoid():
    bars = NoiseSchedule.sigmoid(10, start=-1e4, end=1e4).alphas_cumprod
    assert bars[:4].tolist() == [1.0] * 4
    assert float(bars[5:].max()) < 1e-3


def test_roots_are_correctly_rounded():
    schedule = NoiseSchedule.linear()
    for root, square in ((schedule.alphas, schedule.alphas_cumprod), (schedule.sigmas, 1 - schedule.alphas_cumprod)):
        assert root.tolist() == [math.sqrt(value) for value in square.tolist()]


def test_it_is_a_value():
    a, b = NoiseSchedule.linear(20), NoiseSchedule.linear(20)
    assert a == b
    assert hash(a) == hash(b)
    assert a != NoiseSchedule.linear(21)
    assert a != NoiseSchedule.linear(20, 1e-4, 0.03)
    assert a != "linear"
    assert "T=20" in repr(a)
    with pytest.raises(AttributeError):
        a.alphas_cumprod = b.alphas_cumprod


@pytest.mark.parametrize("how", ["torch", "numpy"])
def test_a_table_edited_in_place_is_seen(how):
    """Nothing that was made of the old numbers, a plan or a table on the device, is found for the new ones."""
    schedule, seen = NoiseSchedule.linear(30), []

    def network(x, t):
        seen.append(int(t[0]))
        return x * 0.1

    arguments = {"sampler": "ddim", "steps": 7, "schedule": schedule, "seed": 3}
    image, (noised, _) = torch.ones(2, 3), fastdiff.add_noise(torch.ones(2, 3), 20, schedule, seed=1)
    before = fastdiff.sample(network, (2, 3), **arguments)
    if how == "torch":
        schedule.alphas_cumprod.mul_(0.7)
    else:
        schedule.alphas_cumprod.numpy()[:] *= 0.7
    fresh = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
    after = fastdiff.sample(network, (2, 3), **arguments)
    assert after.tolist() == fastdiff.sample(network, (2, 3), **{**arguments, "schedule": fresh}).tolist()
    assert after.tolist() != before.tolist()
    again, _ = fastdiff.add_noise(image, 20, schedule, seed=1)
    assert again.tolist() == fastdiff.add_noise(image, 20, fresh, seed=1)[0].tolist() != noised.tolist()
    assert schedule == fresh
    assert hash(schedule) == hash(fresh)
    old = NoiseSchedule.linear(30)
    assert fastdiff.sample(network, (2, 3), **{**arguments, "schedule": old}).tolist() == before.tolist()


def test_it_keeps_its_own_numbers():
    betas = torch.full((5,), 0.1, dtype=torch.float64)
    bars = torch.linspace(0.9, 0.1, 5, dtype=torch.float64)
    a, b = NoiseSchedule.from_betas(betas), NoiseSchedule.from_alphas_cumprod(bars)
    before = hash(a), hash(b)
    betas.zero_()
    bars.zero_()
    assert (hash(a), hash(b)) == before


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: NoiseSchedule.linear(0), ValueError, "T must"),
        (lambda: NoiseSchedule.linear(-3), ValueError, "T must"),
        (lambda: NoiseSchedule.linear(10.0), TypeError, "T must"),
        (lambda: NoiseSchedule.linear(True), TypeError, "T must"),
        (lambda: NoiseSchedule.linear(10, -0.1), ValueError, "beta"),
        (lambda: NoiseSchedule.linear(10, 0.1, 1.5), ValueError, "beta"),
        (lambda: NoiseSchedule.linear(10, float("nan")), ValueError, "beta"),
        (lambda: NoiseSchedule.linear(10, "a"), TypeError, "beta"),
        (lambda: NoiseSchedule.scaled_linear(10, -1.0), ValueError, "beta"),
        (lambda: NoiseSchedule.scaled_linear(10, 0.1, "a"), TypeError, "beta"),
        (lambda: NoiseSchedule.cosine(10, max_beta=0), ValueError, "max_beta"),
        (lambda: NoiseSchedule.cosine(10, s=float("nan")), ValueError, "s must"),
        (lambda: NoiseSchedule.cosine(10, s=-1.0), ValueError, "s must"),
        (lambda: NoiseSchedule.sigmoid(10, tau=0), ValueError, "tau"),
        (lambda: NoiseSchedule.sigmoid(10, tau="a"), TypeError, "tau"),
        (lambda: NoiseSchedule.sigmoid(10, start=3.0, end=3.0), ValueError, "start and end"),
        (lambda: NoiseSchedule.from_betas([]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas([[0.1]]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas(0.1), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas("0.1"), TypeError, "betas"),
        (lambda: NoiseSchedule.from_betas([0.1, float("nan")]), ValueError, "index 1"),
        (lambda: NoiseSchedule.from_betas([0.1, 1.1]), ValueError, "betas"),
        (lambda: NoiseSchedule.from_betas(None), TypeError, "betas"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.6]), ValueError, "index 1"),
        (lambda: NoiseSchedule.from_alphas_cumprod([1.5]), ValueError, "alphas_cumprod"),
        (lambda: NoiseSchedule.from_alphas_cumprod([float("inf")]), ValueError, "alphas_cumprod"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5]).rescale_zero_terminal_snr(), ValueError, "two or more"),
        (lambda: NoiseSchedule.from_alphas_cumprod([0.5, 0.5]).rescale_zero_terminal_snr(), ValueError, "falls"),
    ],
)
def test_refuses(make, error, names):
    with pytest.raises(error, match=names):
        make()


LINEAR = NoiseSchedule.linear()
SCALED = NoiseSchedule.scaled_linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


@pytest.mark.parametrize("schedule", [LINEAR, SCALED, NoiseSchedule.cosine(), ZERO_SNR], ids=str)
def test_round_trips(schedule):
    """Exact at every index, so that listed σ of the table give whole timesteps."""
    assert [schedule.time_at(schedule.sigma_at(t)) for t in range(1000)] == list(range(1000))
    for sigma in (0.05, 0.5, 1.0, 7.0):
        t = schedule.time_at(sigma)
        low = int(t)
        a, b = schedule.sigma_at(low), schedule.sigma_at(low + 1)
        assert a <= sigma <= b
        assert a ** (1 - t + low) * b ** (t - low) == pytest.approx(sigma, rel=1e-12)
        assert schedule.at(sigma).ratio == pytest.approx(sigma, rel=1e-12)
        assert schedule.as_ve().at(sigma).sigma == sigma
    assert (schedule.time_at(0), schedule.time_at(1e-9), schedule.time_at(1e12)) in ((0, 0, 999), (0, 0, 998))
