"""Levels: what each prediction type says at one, in float64, and what schedules refuse."""

import math

import pytest

from fastdiff import NoiseSchedule
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.level import PREDICTIONS, Level, epsilon_terms, x0_terms
from fastdiff.schedules.resolve import resolve_schedule

LINEAR = NoiseSchedule.linear()
SCALED = NoiseSchedule.scaled_linear()
ZERO_SNR = LINEAR.rescale_zero_terminal_snr()
EDM = EDMSchedule()
FLOW = FlowSchedule()


def sigma_of(schedule: NoiseSchedule, t: int) -> float:
    bar = schedule.alphas_cumprod.tolist()[t]
    return math.sqrt(1 / bar - 1)


def test_a_level_is_the_table(seed):
    for t in (0, 1, 499, 998, 999):
        bar = LINEAR.alphas_cumprod.tolist()[t]
        vp, ve = LINEAR.level(t), LINEAR.as_ve().level(t)
        assert (vp.t, vp.alpha, vp.sigma, vp.c_in) == (t, math.sqrt(bar), math.sqrt(1 - bar), 1)
        assert (ve.t, ve.alpha, ve.sigma) == (t, 1, pytest.approx(sigma_of(LINEAR, t)))
        assert ve.c_in == pytest.approx(math.sqrt(bar))  # 1/√(1 + σ²) = √ᾱ
        assert vp.ratio == pytest.approx(ve.sigma)
        assert vp.log_snr == pytest.approx(math.log(bar / (1 - bar)) / 2)
    between = LINEAR.as_ve().level(37.25)
    assert between.sigma == pytest.approx(0.75 * sigma_of(LINEAR, 37) + 0.25 * sigma_of(LINEAR, 38))


def output(prediction: str, x0: float, noise: float, level: Level) -> float:
    """What a perfect network of the type returns, from the definitions."""
    alpha, sigma = level.alpha, level.sigma
    x = alpha * x0 + sigma * noise
    norm = math.sqrt(alpha**2 + sigma**2)
    r, data = sigma / alpha if alpha else math.inf, level.sigma_data
    if prediction == "edm":  # Karras et al. 2022, Equation 7 and Table 1, solved for F, on the VE state x/α
        c_skip, c_out = data**2 / (r**2 + data**2), r * data / math.sqrt(r**2 + data**2)
        return (x0 - c_skip * x / alpha) / c_out
    # The density of x given x0 has d ln p/dx = −(x − α x0)/σ²; of the input u = c x, dx/du = 1/c of that.
    return {
        "epsilon": lambda: noise,
        "sample": lambda: x0,
        "v_prediction": lambda: (alpha * noise - sigma * x0) / norm,
        "flow_prediction": lambda: noise - x0,
        "score": lambda: -(x - alpha * x0) / sigma**2 / level.c_in,
    }[prediction]()


EVERY = {
    "vp": [LINEAR.level(t) for t in (0, 300, 999)] + [SCALED.at(2.5)],
    "ve": [LINEAR.as_ve().level(t) for t in (0, 300, 999)] + [SCALED.as_ve().at(2.5)],
    "edm": [EDM.at(s) for s in (0.002, 0.7, 80.0)],
    "flow": [FLOW.at(s) for s in (0.001, 0.4, 0.999)],
}


@pytest.mark.parametrize("states", EVERY)
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_predictions(rng, states, prediction):
    for level in EVERY[states]:
        x0, noise = rng.gauss(0, 1), rng.gauss(0, 1)
        x, m = level.alpha * x0 + level.sigma * noise, output(prediction, x0, noise, level)
        p, q = x0_terms(prediction, level)
        assert p * x + q * m == pytest.approx(x0, rel=1e-9, abs=1e-8 * (abs(p * x) + 1))
        terms = epsilon_terms(prediction, level)
        parts = [{"x": x, "m": m}[term] * value for term, value in terms.items()]
        assert sum(parts) == pytest.approx(noise, rel=1e-9, abs=1e-9 * (sum(map(abs, parts)) + 1))


def test_predictions_at_the_ends():
    noise_alone = ZERO_SNR.level(999)
    assert noise_alone == Level(999, 0.0, 1.0)
    assert noise_alone.ratio == math.inf
    assert noise_alone.log_snr == -math.inf
    assert x0_terms("v_prediction", noise_alone) == (0, -1)
    assert x0_terms("flow_prediction", FLOW.at(1.0)) == (1, -1)
    assert x0_terms("sample", noise_alone) == (0, 1)
    for prediction in ("epsilon", "edm", "score"):
        with pytest.raises(ValueError, match="ᾱ"):
            x0_terms(prediction, noise_alone)
    clean = LINEAR.at(0.0)
    assert (clean.alpha, clean.sigma, clean.log_snr) == (1, 0, math.inf)
    for prediction in PREDICTIONS:
        p, q = x0_terms(prediction, clean)
        assert (p, q) == ((0, 1) if prediction == "sample" else (1, pytest.approx(0)))
    assert epsilon_terms("epsilon", clean) == {"m": 1}
    assert epsilon_terms("sample", clean) == epsilon_terms("edm", clean) == {}
    with pytest.raises(ValueError, match=r"prediction.*did you mean 'epsilon'"):
        x0_terms("epsilom", clean)


@pytest.mark.parametrize(
    ("make", "error", "names"),
    [
        (lambda: EDMSchedule(sigma_min=0.0), ValueError, "sigma_min"),
        (lambda: EDMSchedule(sigma_min=81.0), ValueError, "sigma_min must be below"),
        (lambda: EDMSchedule(sigma_data="1"), TypeError, "sigma_data"),
        (lambda: EDM.at(-1.0), ValueError, "sigma"),
        (lambda: FlowSchedule(0.0), ValueError, "shift"),
        (lambda: FlowSchedule(math.inf), ValueError, "shift"),
        (lambda: FLOW.at(-0.1), ValueError, "sigma"),
        (lambda: FlowSchedule.for_tokens(0), ValueError, "tokens"),
        (lambda: FlowSchedule.for_tokens(64, base_tokens=9, max_tokens=9), ValueError, "base_tokens and max_tokens"),
        (lambda: FlowSchedule.for_tokens(64, max_shift="1"), TypeError, "max_shift"),
        (lambda: LINEAR.level(-1), ValueError, "t must be in"),
        (lambda: LINEAR.level(999.5), ValueError, "t must be in"),
        (lambda: LINEAR.sigma_at(1000), ValueError, "t must be in"),
        (lambda: LINEAR.at(-1.0), ValueError, "sigma"),
        (lambda: LINEAR.time_at(math.nan), ValueError, "sigma"),
        (lambda: resolve_schedule("flo"), ValueError, "schedule.*did you mean 'flow'"),
        (lambda: resolve_schedule(3), TypeError, "schedule"),
    ],
)
def test_schedules_refuse(make, error, names):
    with pytest.raises(error, match=names):
        make()
