"""Where a walk stops: every spacing and list, the last level, and what is refused, in float64."""

import itertools
import math

import pytest
import torch
from helpers import spaced

from fastdiff import NoiseSchedule
from fastdiff.schedules.continuous import EDMSchedule, FlowSchedule
from fastdiff.schedules.level import Level
from fastdiff.schedules.spacing import SIGMA_SPACINGS

LINEAR = NoiseSchedule.linear()
SCALED = NoiseSchedule.scaled_linear()
EDM = EDMSchedule()
FLOW = FlowSchedule()


def sigma_of(schedule: NoiseSchedule, t: int) -> float:
    bar = schedule.alphas_cumprod.tolist()[t]
    return math.sqrt(1 / bar - 1)


def sigmas(chosen: list[Level]) -> list[float]:
    return [level.sigma for level in chosen]


# ---- sigma spacings


def test_karras_anchors():
    """n = 5, (0.002, 80), ρ = 7, and 0 after them."""
    first, *rest = sigmas(spaced(EDM, 5))
    assert first == pytest.approx(79.99998, rel=3e-7)  # float32's 80
    assert [round(sigma, 5) for sigma in rest] == [17.52783, 2.51522, 0.16975, 0.002, 0]
    assert sigmas(spaced(EDM, 5, spacing="karras", rho=7)) == sigmas(spaced(EDM, 5))
    assert sigmas(spaced(EDM, 3, rho=1)) == pytest.approx([80, 40.001, 0.002, 0])


def test_ends_are_exact():
    for schedule, spacing, n in itertools.product((LINEAR, EDM, FlowSchedule(3.0)), SIGMA_SPACINGS, (1, 2, 7)):
        if spacing == "beta":
            pytest.importorskip("scipy")
        chosen = sigmas(spaced(schedule, n, spacing=spacing, ve=True))
        assert len(chosen) == n + 1
        assert chosen[0] == schedule.sigma_max
        assert chosen[-1] == 0
        assert n == 1 or chosen[-2] == schedule.sigma_min


def test_exponential_is_even_in_log_snr():
    for schedule, name in itertools.product((SCALED, EDM), ("exponential", "logsnr")):
        logs = [math.log(s) for s in sigmas(spaced(schedule, 9, spacing=name, ve=True))[:-1]]
        gaps = [b - a for a, b in itertools.pairwise(logs)]
        assert gaps == pytest.approx([gaps[0]] * 8, rel=1e-9)
        assert gaps[0] == pytest.approx(math.log(schedule.sigma_min / schedule.sigma_max) / 8)


def test_polyexponential():
    """ln σ falls as (1 − i/(n−1))^ρ; ρ = 1 is exponential."""
    low, high = math.log(0.002), math.log(80)
    for rho in (0.5, 2.0, 3.0):
        got = sigmas(spaced(EDM, 6, spacing="polyexponential", rho=rho))[:-1]
        assert got == pytest.approx([math.exp(low + (1 - i / 5) ** rho * (high - low)) for i in range(6)])
    plain = sigmas(spaced(EDM, 6, spacing="polyexponential"))
    assert plain == pytest.approx(sigmas(spaced(EDM, 6, spacing="exponential")))


def test_beta():
    """The quantiles of Beta(0.6, 0.6): Simpson's rule on the density, the substitution u = s⁵ taking off its pole."""
    pytest.importorskip("scipy")
    got = sigmas(spaced(EDM, 5, spacing="beta"))[:-1]
    assert got[2] == pytest.approx((80 + 0.002) / 2)  # symmetric
    assert got[1] + got[3] == pytest.approx(80.002)

    def mass(share: float) -> float:
        n, top = 20000, share ** (1 / 5)
        f = [5 * (s := top * i / n) ** 2 * (1 - s**5) ** -0.4 for i in range(n + 1)]  # u^-0.4 du = 5 s² ds
        return (f[0] + f[-1] + 4 * sum(f[1:-1:2]) + 2 * sum(f[2:-1:2])) * top / n / 3

    total = math.gamma(0.6) ** 2 / math.gamma(1.2)
    assert mass((got[3] - 0.002) / (80 - 0.002)) / total == pytest.approx(0.25, rel=1e-6)


@pytest.mark.parametrize("spacing", SIGMA_SPACINGS)
def test_a_noise_schedule_interpolates_its_timesteps(spacing):
    if spacing == "beta":
        pytest.importorskip("scipy")
    chosen = spaced(SCALED, 12, spacing=spacing, ve=True)
    table = [math.log(sigma_of(SCALED, i)) for i in range(1000)]
    for level in chosen[:-1]:
        low = min(int(level.t), 998)
        share = level.t - low
        assert math.log(level.sigma) == pytest.approx(table[low] * (1 - share) + table[low + 1] * share, abs=1e-9)
    assert [level.t for level in chosen][::11] == [999, 0]
    whole = spaced(SCALED, 12, spacing=spacing, ve=True, quantize=True)
    assert [level.t for level in whole] == [round(level.t) for level in chosen]
    assert sigmas(whole) == sigmas(chosen)
    # VP states at the same σ/α.
    for a, b in zip(chosen, spaced(SCALED, 12, spacing=spacing), strict=True):
        assert (b.t, b.alpha**2 + b.sigma**2, b.c_in) == pytest.approx((a.t, 1, 1))
        assert b.sigma / b.alpha == pytest.approx(a.sigma)


# ---- index spacings


def test_quadratic():
    """Song et al. 2021, Appendix D.2: t_i = ⌊c i²⌋; here the ends are 0 and T − 1, and places are rounded."""
    got = [level.t for level in spaced(LINEAR, 5, spacing="quadratic")][:-1]
    assert got == [round(999 * (i / 4) ** 2) for i in (4, 3, 2, 1, 0)] == [999, 562, 250, 62, 0]


def test_steps_offset():
    got = [level.t for level in spaced(LINEAR, 50, spacing="leading", steps_offset=1)]
    assert got[:3] == [981, 961, 941]
    assert got[-2] == 1
    assert [t - 1 for t in got[:-1]] == [level.t for level in spaced(LINEAR, 50, spacing="leading")][:-1]


# ---- the last level


def test_final_sigma_min():
    """Every spacing ends at the schedule's least σ, and no call is made there."""
    for schedule, spacing in ((LINEAR, "trailing"), (LINEAR, "linspace"), (LINEAR, "quadratic"), (LINEAR, "karras"),
                              (EDM, "karras"), (EDM, "exponential"), (FlowSchedule(2.0), "trailing"),
                              (FlowSchedule(2.0), "linspace"), (FLOW, "karras")):  # fmt: skip
        chosen = spaced(schedule, 6, spacing=spacing, final="sigma_min")
        assert len(chosen) == 7
        assert chosen[-1].ratio == pytest.approx(spaced(schedule, sigmas=(0.5, schedule.sigma_min))[-1].ratio)
        assert chosen[-2].ratio > chosen[-1].ratio > 0
    chosen = spaced(LINEAR, 10, spacing="leading", steps_offset=1, final="sigma_min")
    assert [level.t for level in chosen][-2:] == [1, 0]
    assert [level.t for level in spaced(LINEAR, timesteps=[5, 3], final="sigma_min")] == [5, 3, 0]
    assert sigmas(spaced(EDM, 4, final="sigma_min"))[:-1] == sigmas(spaced(EDM, 5))[:4]


def test_lists():
    both = spaced(SCALED, sigmas=[10.0, 2.0, 0.5], timesteps=[900, 500.5], ve=True)
    assert [(level.t, level.sigma) for level in both[:-1]] == [(900, 10), (500.5, 2)]
    assert both[-1].sigma == 0.5
    for values in (torch.tensor([10.0, 2.0, 0.0], dtype=torch.float64), (10, 2, 0)):
        alone = spaced(SCALED, 2, sigmas=values, ve=True)
        assert sigmas(alone) == [10, 2, 0]
        assert alone[0].t == SCALED.time_at(10)
    assert [level.t for level in spaced(LINEAR, timesteps=torch.tensor([7, 3]))] == [7, 3, 0]
    assert [level.t for level in spaced(LINEAR, timesteps=[7.4, 3.0], quantize=True)] == [7, 3, 0]
    # A karras walk listed is the walk.
    walk = spaced(SCALED, 8, spacing="karras", ve=True)
    assert spaced(SCALED, sigmas=sigmas(walk), ve=True) == walk


def test_skip_leaves_out_the_first_spaced():
    whole = spaced(LINEAR, 10)
    for skip in (0, 3, 9):
        assert spaced(LINEAR, 10, skip=skip) == whole[skip:]
    for bad, error in ((10, ValueError), (-1, ValueError), (1.0, TypeError)):
        with pytest.raises(error, match="skip"):
            spaced(LINEAR, 10, skip=bad)


def test_listed_minus_one_is_the_image():
    """diffusers' trailing lists may end with −1, where no call is made."""
    told = spaced(LINEAR, timesteps=[7, 3, -1])
    assert told == spaced(LINEAR, timesteps=[7, 3])
    assert told == spaced(LINEAR, 3, timesteps=torch.tensor([7, 3, -1])) == spaced(LINEAR, 2, timesteps=[7, 3, -1, -1])
    told = spaced(LINEAR, 3, timesteps=[7, 3, -1], final="sigma_min")
    assert [level.t for level in told] == [7, 3, 0]


def test_sigmas_that_rise_by_rounding_are_equal():
    """As float32 has it; the step between them is of no length, and later ones of several are, too."""
    low = 0.00642711
    chosen = sigmas(spaced(EDM, sigmas=[2.0, low, low * (1 + 2.0**-23), low * (1 + 3e-7)]))
    assert chosen == pytest.approx([2.0, low, low, low], rel=1e-11)
    assert all(a > b for a, b in itertools.pairwise(chosen))
    with pytest.raises(ValueError, match="σ must fall"):
        spaced(EDM, sigmas=[2.0, low, low * 1.00001])


def test_quantize_merges():
    """Of levels that are rounded to one timestep the first stays; all remain within half an index of their t."""
    whole, merged = (spaced(LINEAR, 400, spacing="karras", quantize=quantize) for quantize in (False, True))
    times = [level.t for level in merged[:-1]]
    assert len(set(times)) == len(times) == len({round(level.t) for level in whole[:-1]}) < 400
    assert all(type(t) is int for t in times)
    first = {}
    for level in whole[:-1]:
        first.setdefault(round(level.t), level.ratio)
    assert [level.ratio for level in merged[:-1]] == list(first.values())


def test_kl_optimal():
    """ComfyUI's kl_optimal_scheduler(n, σ_min, σ_max): evenly in arctan σ."""
    got = sigmas(spaced(EDM, 5, spacing="kl_optimal"))
    low, high = math.atan(0.002), math.atan(80.0)
    assert got == pytest.approx([*(math.tan(i / 4 * low + (1 - i / 4) * high) for i in range(5)), 0])
    assert [math.atan(s) for s in got[:-1]] == pytest.approx([high + i / 4 * (low - high) for i in range(5)])


def test_sgm_uniform_and_simple():
    """ComfyUI's: the former evenly in t without its end, ln σ interpolated; the latter entries of a table."""
    ratios = [sigma_of(SCALED, i) for i in range(1000)]
    for steps in (1, 7, 20):
        times = [999 - i * 999 / steps for i in range(steps)]
        logs = [math.log(r) for r in ratios]
        exact = [math.exp((1 - t % 1) * logs[int(t)] + t % 1 * logs[min(int(t) + 1, 999)]) for t in times]
        for ve in (True, False):
            got = spaced(SCALED, steps, spacing="sgm_uniform", ve=ve)
            assert [level.ratio for level in got] == pytest.approx([*exact, 0], rel=1e-9)
            assert [level.t for level in got[:-1]] == pytest.approx(times, rel=1e-9)
            assert not any(isinstance(level.t, int) for level in got[:-1])
        exact = [ratios[-(1 + int(x * (1000 / steps)))] for x in range(steps)]
        assert [level.ratio for level in spaced(SCALED, steps, spacing="simple")] == pytest.approx([*exact, 0])
        # A flow's: 1000 entries of the shifted i/1000; and linspace in t, whose end is shifted, shifted once more.
        flow = FlowSchedule(3.0)
        table = [3 * i / 1000 / (1 + 2 * i / 1000) for i in range(1, 1001)]
        exact = [table[-(1 + int(x * (1000 / steps)))] for x in range(steps)]
        assert sigmas(spaced(flow, steps, spacing="simple")) == pytest.approx([*exact, 0])
        unshifted = [1 + i / steps * (table[0] - 1) for i in range(steps)]
        exact = [3 * u / (1 + 2 * u) for u in unshifted]
        assert sigmas(spaced(flow, steps, spacing="sgm_uniform")) == pytest.approx([*exact, 0])
        # EDM's: 1000 σ even in ln σ, and t = ¼ ln σ evenly.
        table = [math.exp(math.log(0.002) + i / 999 * math.log(80 / 0.002)) for i in range(1000)]
        exact = [table[-(1 + int(x * (1000 / steps)))] for x in range(steps)]
        assert sigmas(spaced(EDM, steps, spacing="simple")) == pytest.approx([*exact, 0])
        exact = [80 * (0.002 / 80) ** (i / steps) for i in range(steps)]
        assert sigmas(spaced(EDM, steps, spacing="sgm_uniform")) == pytest.approx([*exact, 0])


def test_align_your_steps():
    """NVIDIA's σ, which are diffusers' published timesteps on the schedules of their models, and ln σ between them."""
    video = EDMSchedule(0.002, 700.0, 1.0)
    published = {
        "ays": [999, 850, 736, 645, 545, 455, 343, 233, 124, 24],
        "ays_sdxl": [999, 845, 730, 587, 443, 310, 193, 116, 53, 13],
    }
    for name, times in published.items():
        chosen = spaced(SCALED, 10, spacing=name)
        assert [level.t for level in chosen[:-1]] == pytest.approx(times, abs=0.05)
        assert [level.t for level in spaced(SCALED, 10, spacing=name, quantize=True)[:-1]] == times
        assert (chosen[-1].sigma, chosen[-1].alpha) == (0, 1)
        assert spaced(SCALED, 10, spacing=name, final="sigma_min")[-1].ratio == pytest.approx(0.0291671582)
    got = sigmas(spaced(video, 10, spacing="ays_svd"))
    assert got == pytest.approx([700.00, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034, 0.0])
    got = sigmas(spaced(SCALED, 20, spacing="ays", ve=True, final="sigma_min"))
    assert got[::2] == pytest.approx(sigmas(spaced(SCALED, 10, spacing="ays", ve=True, final="sigma_min")))
    assert got[1] == pytest.approx(math.sqrt(14.6146412293 * 6.4745760956))
    assert len(spaced(SCALED, 1, spacing="ays")) == 2


ZERO_SNR = LINEAR.rescale_zero_terminal_snr()


# ---- bad input


@pytest.mark.parametrize(
    ("schedule", "arguments", "error", "names"),
    [
        (LINEAR, {"timesteps": [5, 5]}, ValueError, "timesteps must fall"),
        (LINEAR, {"timesteps": [5, 6]}, ValueError, "timesteps must fall"),
        (FLOW, {"timesteps": [5, 6]}, ValueError, "σ must fall"),
        (LINEAR, {"timesteps": [1000]}, ValueError, r"timesteps\[0\].*999"),
        (LINEAR, {"timesteps": []}, ValueError, "timesteps"),
        (LINEAR, {"timesteps": [True]}, TypeError, "timesteps.*bool"),
        (LINEAR, {"timesteps": ["5"]}, TypeError, "timesteps.*str"),
        (LINEAR, {"timesteps": "5"}, TypeError, "timesteps"),
        (LINEAR, {"timesteps": [math.nan]}, ValueError, "timesteps.*nan"),
        (LINEAR, {"timesteps": [5, 3], "steps": 3}, ValueError, "steps is 3"),
        (EDM, {"timesteps": [0.5, 0.1], "steps": 3}, ValueError, "steps is 3"),
        (LINEAR, {"sigmas": [1.0, 2.0, 0.0]}, ValueError, "σ must fall"),
        (LINEAR, {"sigmas": [1.0, 1.0, 0.0]}, ValueError, "σ must fall"),
        (LINEAR, {"sigmas": [1.0, 0.0, 0.0]}, ValueError, "σ must fall"),
        (LINEAR, {"sigmas": [1.0, -1.0]}, ValueError, "sigmas.*negative"),
        (LINEAR, {"sigmas": [1.0]}, ValueError, "sigmas.*two or more"),
        (LINEAR, {"sigmas": [1.0, math.inf]}, ValueError, "sigmas.*finite"),
        (LINEAR, {"sigmas": [1.0, "0"]}, TypeError, "sigmas"),
        (LINEAR, {"sigmas": [1.0, 0.0], "steps": 2}, ValueError, "steps is 2"),
        (LINEAR, {"sigmas": [1.0, 0.0], "steps": True}, TypeError, "steps"),
        (LINEAR, {"sigmas": [1.0, 0.0], "timesteps": [2, 1]}, ValueError, "timesteps"),
        (LINEAR, {"sigmas": [2.0, 1.0, 0.0], "timesteps": [5, 5]}, ValueError, "same timestep"),
        (LINEAR, {"sigmas": [2.0, 1.0, 0.0], "timesteps": [5, 6]}, ValueError, "timesteps must fall"),
        (LINEAR, {"sigmas": [1.0, 0.0], "final": "sigma_min"}, ValueError, "final"),
        (FLOW, {"sigmas": [1.5, 0.0]}, ValueError, r"\[0, 1\]"),
        # Two σ beyond the table have one timestep; so have two that are rounded to one.
        (LINEAR, {"sigmas": [300.0, 200.0, 0.0]}, ValueError, "same timestep"),
        (LINEAR, {"sigmas": [2.0, 1.0, 1.0]}, ValueError, "end it with 0"),
        (LINEAR, {"steps": 5, "spacing": "sd3"}, ValueError, "sd3.*FlowSchedule"),
        (LINEAR, {"steps": 5, "spacing": "ays"}, ValueError, "ays.*14.6"),
        (EDM, {"steps": 5, "spacing": "ays_svd"}, ValueError, "ays_svd.*700"),
        (EDM, {"steps": 5, "spacing": "ddim_quadratic"}, ValueError, "ddim_quadratic.*table"),
        (FLOW, {"steps": 5, "spacing": "quadratic"}, ValueError, "quadratic"),
        (LINEAR, {"steps": 1001}, ValueError, "steps.*1000"),
        (LINEAR, {"steps": 1001, "spacing": "karras"}, ValueError, "steps.*1000"),
        (LINEAR, {"steps": 0}, ValueError, "steps"),
        (EDM, {"steps": None}, ValueError, "steps must be given"),
        (EDM, {"steps": 2.0}, TypeError, "steps"),
        (EDM, {"steps": 5, "spacing": "leading"}, ValueError, "leading.*table"),
        (EDM, {"steps": 5, "quantize": True}, ValueError, "quantize"),
        (FLOW, {"steps": 5, "spacing": "leading"}, ValueError, "leading"),
        (LINEAR, {"steps": 5, "spacing": "karas"}, ValueError, "spacing.*did you mean 'karras'"),
        (LINEAR, {"steps": 5, "spacing": 7}, ValueError, "spacing is 7"),
        (LINEAR, {"steps": 5, "final": "sigma_mni"}, ValueError, "final.*did you mean 'sigma_min'"),
        (LINEAR, {"steps": 5, "rho": 7.0}, ValueError, "rho"),
        (EDM, {"steps": 5, "rho": 0.0}, ValueError, "rho"),
        (EDM, {"steps": 5, "rho": "7"}, TypeError, "rho"),
        (LINEAR, {"steps": 5, "steps_offset": 1}, ValueError, "steps_offset"),
        (LINEAR, {"steps": 5, "steps_offset": 200, "spacing": "leading"}, ValueError, "steps_offset"),
        (LINEAR, {"timesteps": [3], "steps_offset": 1, "spacing": "leading"}, ValueError, "steps_offset"),
        (LINEAR, {"steps": 10, "spacing": "leading", "final": "sigma_min"}, ValueError, "σ must fall"),
        (ZERO_SNR, {"steps": 5, "spacing": "karras"}, ValueError, "σ_max"),
        ("linear", {"steps": 5}, TypeError, "schedule"),
    ],
)
def test_refuses(schedule, arguments, error, names):
    with pytest.raises(error, match=names):
        spaced(schedule, **arguments)
