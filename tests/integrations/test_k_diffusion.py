"""k-diffusion's samplers: against float64 formulas, and against the library where it is installed."""

import math

import pytest
import torch
from k_diffusion_formulas import SHAPE, Exact, down_and_up, dpm_adaptive, dpm_fast, dpm_steps, model

import fastdiff
from fastdiff.integrations import k_diffusion

SIGMAS = (14.0, 6.5, 3.0, 1.3, 0.6, 0.25, 0.08)
ENDS = ((*SIGMAS, 0.0), SIGMAS)
CHURN = [{}, {"s_churn": 3.0}, {"s_churn": 3.0, "s_tmin": 0.5, "s_tmax": 4.0, "s_noise": 1.01}]
ANCESTRAL = [{}, {"eta": 0.4, "s_noise": 0.9}, {"eta": 0.0}]
CASES = [
    *[(name, own) for name in ("sample_euler", "sample_heun", "sample_dpm_2") for own in CHURN],
    *[(name, own) for name in ("sample_euler_ancestral", "sample_dpm_2_ancestral") for own in ANCESTRAL],
    *[(name, own) for name in ("sample_dpmpp_2s_ancestral", "sample_dpmpp_3m_sde") for own in ANCESTRAL],
    *[("sample_dpmpp_sde", own) for own in (*ANCESTRAL, {"r": 0.3}, {"r": 0.8, "eta": 0.7})],
    *[("sample_dpmpp_2m_sde", {**own, "solver_type": s}) for own in ANCESTRAL for s in ("midpoint", "heun")],
    *[("sample_lms", own) for own in ({}, {"order": 1}, {"order": 2}, {"order": 3})],
    ("sample_dpmpp_2m", {}),
]


def close(ours, exact):
    assert float((ours - exact).abs().max()) <= 1e-5 * max(1.0, float(exact.abs().max()))


@pytest.mark.parametrize("sigmas", ENDS, ids=["to 0", "to 0.08"])
@pytest.mark.parametrize(("name", "own"), CASES)
def test_formula(seed, name, own, sigmas):
    x = torch.randn(SHAPE) * sigmas[0]
    noise = {}

    def drawn(key):
        return noise.setdefault(key, torch.randn(SHAPE)).double()

    def injected(sigma, sigma_next):  # found again by the σ that it leads to
        i = sigmas.index(pytest.approx(float(sigma)))
        if float(sigma_next) == pytest.approx(sigmas[i + 1]):
            return noise[i]
        (key,) = [key for key in noise if isinstance(key, tuple) and key[0] == i]
        assert float(sigma_next) == pytest.approx(key[1])
        return noise[key]

    formula = Exact(x, sigmas, drawn, own)
    exact = formula.run(getattr(formula, name))
    sampler, arguments = getattr(k_diffusion, name), dict(own)
    if "s_churn" in own:
        plan_rows = churn_rows(own, len(sigmas) - 1)
        arguments["noise_fn"] = lambda stream, row, shape: noise[plan_rows[name][row]]
    elif noise:
        arguments["noise_sampler"] = injected
    ours = sampler(model, x, torch.tensor(sigmas), disable=True, **arguments)
    assert ours.dtype == torch.float32
    close(ours, exact)


def churn_rows(own, steps):
    """For each sampler, the step of each row that adds noise."""
    rows = {"sample_euler": {}, "sample_heun": {}, "sample_dpm_2": {}}
    for name, found in rows.items():
        row = 0
        for i, s in enumerate(SIGMAS[:steps]):
            if own.get("s_tmin", 0.0) <= s <= own.get("s_tmax", math.inf):
                found[row] = i
                row += 1
            last = steps == len(SIGMAS) and i == steps - 1  # to 0: one call
            row += 1 if name == "sample_euler" or last else 2
    return rows


@pytest.mark.parametrize("name", sorted({name for name, _ in CASES}))
def test_callback(seed, name):
    """Every step once, with the state that the network saw first, what it returned, and how it went on from there."""
    x, sigmas = torch.randn(SHAPE) * SIGMAS[0], torch.tensor(ENDS[0])
    churn = {"s_churn": 3.0, "s_tmax": 4.0} if name in ("sample_euler", "sample_heun", "sample_dpm_2") else {}
    calls, seen = [], []

    def watched(x, sigma, shift):
        seen.append((x.clone(), float(sigma[0])))
        return model(x, sigma, shift)

    def callback(info):
        calls.append({**info, "x": info["x"].clone()})
        info["x"].zero_()

    given = {"extra_args": {"shift": 0.4}, "disable": True, "seed": 1, **churn}
    sampler = getattr(k_diffusion, name)
    result = sampler(watched, x.clone(), sigmas, callback=callback, **given)
    assert torch.equal(result, sampler(model, x, sigmas, **given))
    assert [call["i"] for call in calls] == list(range(len(SIGMAS)))
    assert set(calls[0]) == {"x", "i", "sigma", "sigma_hat", "denoised"}
    for call in calls:
        shown = [k for k, (state, _) in enumerate(seen) if torch.equal(state, call["x"])]
        assert len(shown) == 1
        assert seen[shown[0]][1] == float(call["sigma_hat"])
        churned = bool(churn) and 0 < float(call["sigma"]) <= 4
        assert (float(call["sigma_hat"]) > float(call["sigma"])) == churned
        assert torch.equal(call["sigma"], sigmas[call["i"]])
        exact = model(call["x"], call["sigma_hat"].expand(SHAPE[0]), 0.4)
        torch.testing.assert_close(call["denoised"], exact)


def test_torch_noise_as_the_library_draws_it(seed):
    """Euler with churn in some steps draws in all of them; ancestral samplers once a step."""
    x, sigmas = torch.randn(SHAPE) * SIGMAS[0], torch.tensor(ENDS[0])
    own = {"s_churn": 3.0, "s_tmin": 0.2, "s_tmax": 4.0}
    torch.manual_seed(seed)
    noise = [torch.randn(SHAPE).double() for _ in SIGMAS]
    formula = Exact(x, ENDS[0], noise.__getitem__, own)
    torch.manual_seed(seed)
    close(k_diffusion.sample_euler(model, x, sigmas, disable=True, **own), formula.run(formula.sample_euler))
    formula = Exact(x, ENDS[0], noise.__getitem__, {})
    torch.manual_seed(seed)
    close(
        k_diffusion.sample_dpm_2_ancestral(model, x, sigmas, disable=True), formula.run(formula.sample_dpm_2_ancestral)
    )


def test_brownian_correlation():
    """With torch's noise the two draws of a DPM-Solver++ SDE step are increments of one Brownian path in σ."""
    torch.manual_seed(1)
    start, end = 5.0, 2.0
    middle = math.sqrt(start * end)
    calls = []

    def linear(x, sigma):
        calls.append(float(sigma[0]))
        return torch.zeros_like(x) if len(calls) == 1 else x

    x = k_diffusion.sample_dpmpp_sde(linear, torch.zeros(1, 400_000), torch.tensor([start, end]), disable=True)
    assert calls == pytest.approx([start, middle])

    def split(a, b):
        up = b * math.sqrt(1 - (b / a) ** 2)
        return math.sqrt(b**2 - up**2), up

    first = (1 - split(start, end)[0] / start) * split(start, middle)[1]
    second = split(start, end)[1]
    correlation = math.sqrt((start - middle) / (start - end))
    exact = first**2 + second**2 + 2 * correlation * first * second
    assert float(x.var()) == pytest.approx(exact, rel=6 * math.sqrt(2 / x.numel()))


def test_half_precision_and_sources_of_noise(seed):
    x, sigmas = torch.randn(SHAPE) * SIGMAS[0], torch.tensor(ENDS[0])
    seen = []

    def watched(x, sigma):
        seen.append((x.dtype, sigma.dtype))
        return model(x, sigma)

    half = k_diffusion.sample_dpmpp_2m(watched, x.bfloat16(), sigmas, disable=True)
    assert half.dtype == torch.bfloat16
    assert set(seen) == {(torch.bfloat16, torch.bfloat16)}
    full = k_diffusion.sample_euler_ancestral(model, x, sigmas, disable=True, seed=3)
    one = k_diffusion.sample_euler_ancestral(model, x[:1], sigmas, disable=True, seed=3)
    assert torch.equal(full[:1], one)
    plan = fastdiff.samplers.euler(
        fastdiff.EDMSchedule(), prediction="sample", spacing=fastdiff.Spacing(sigmas=ENDS[0])
    )

    def scaled(y, t):
        sigma = torch.exp(4 * t)
        return model(y * (sigma**2 + 0.25).sqrt().view(-1, 1, 1, 1), sigma)

    torch.testing.assert_close(
        k_diffusion.sample_euler(model, x, sigmas, disable=True),
        fastdiff.sample(scaled, SHAPE, sampler=plan, resume=fastdiff.State(x, None, None, (None,) * 4, 0)),
    )


@pytest.mark.parametrize(
    ("name", "arguments", "what"),
    [
        ("sample_lms", {"sigmas": torch.tensor([1.0, 2.0, 0.0])}, "must fall for lms, where those of sample_euler"),
        ("sample_dpmpp_2m", {"sigmas": torch.tensor([2.0, 2.0, 0.0])}, "must fall for dpmpp_2m"),
        ("sample_euler", {"sigmas": torch.tensor([0.0, 2.0, 3.0])}, "positive but for the last"),
        ("sample_heun", {"sigmas": torch.tensor([3.0, 0.0, 0.0])}, "positive but for the last"),
        ("sample_dpm_2", {"sigmas": torch.tensor([3.0, math.nan, 0.0])}, "finite"),
        ("sample_euler", {"sigmas": torch.tensor([3.0])}, "two or more"),
        ("sample_euler", {"s_churn": -1.0}, "s_churn"),
        ("sample_heun", {"s_tmin": 2.0, "s_tmax": 1.0}, "s_tmax"),
        ("sample_euler_ancestral", {"eta": 1.5}, "eta"),
        ("sample_dpm_2_ancestral", {"s_noise": -1.0}, "s_noise"),
        ("sample_lms", {"order": 5}, "order"),
        ("sample_dpmpp_sde", {"r": 1.0}, "r must"),
        ("sample_dpmpp_2m_sde", {"solver_type": "hoin"}, "solver_type"),
        ("sample_dpmpp_3m_sde", {"noise_sampler": lambda s, t: torch.zeros(SHAPE), "seed": 1}, "noise_sampler"),
        ("sample_dpmpp_2m", {"seed": 1, "generator": torch.Generator()}, "generator"),
    ],
)
def test_bad_input(name, arguments, what):
    given = {"model": model, "x": torch.zeros(SHAPE), "sigmas": torch.tensor(ENDS[0]), "disable": True}
    sampler = getattr(k_diffusion, name)
    with pytest.raises(ValueError, match=what):
        sampler(**{**given, **arguments})
    for wrong in ({"x": torch.zeros(SHAPE, dtype=torch.float64)}, {"sigmas": [1.0, 0.0]}, {"model": None}):
        with pytest.raises(TypeError):
            sampler(**{**given, **wrong})
    for clash in ({"sampler": "ddim"}, {"resume": None}):
        with pytest.raises(TypeError, match=next(iter(clash))):
            sampler(**given, **clash)


# ---- σ in any order; runs of mixed order and of adapted steps

WALKS = {"rising": SIGMAS[::-1], "repeated": (3.0, 3.0, 1.3, 1.3, 0.0), "both": (0.5, 2.0, 2.0, 0.7, 0.2, 0.0)}
FAST = [
    (n, ends, own)
    for n in (1, 2, 3, 5, 6, 7)
    for ends, own in (((0.05, 9.0), {}), ((0.05, 9.0), {"eta": 0.8, "s_noise": 0.9}), ((9.0, 0.05), {}))
]
ADAPTIVE = [
    (ends, own)
    for order in (2, 3)
    for ends, own in (
        ((0.05, 9.0), {"order": order}), ((9.0, 0.05), {"order": order, "h_init": 0.3}),
        ((0.05, 9.0), {"order": order, "eta": 0.7, "h_init": 2.0, "pcoeff": 0.1, "dcoeff": 0.05}),
        ((0.05, 9.0), {"order": order, "rtol": 0.01, "atol": 0.001, "h_init": 1.0}),
    )
]  # fmt: skip


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
@pytest.mark.parametrize("own", [{}, {"s_churn": 2.0, "s_tmin": 0.3, "s_tmax": 2.5}])
def test_sigmas_in_any_order(seed, walk, name, own):
    sigmas = WALKS[walk]
    x, noise = torch.randn(SHAPE) * sigmas[0], [torch.randn(SHAPE) for _ in sigmas]
    formula = Exact(x, sigmas, lambda i: noise[i].double(), own)
    exact = formula.run(getattr(formula, name))
    calls = []
    ours = getattr(k_diffusion, name)(
        model, x, torch.tensor(sigmas), disable=True, callback=calls.append, **own,
        **({"noise_fn": in_order([noise[i] for i, s in enumerate(sigmas[:-1]) if 0.3 <= s <= 2.5])} if own else {}),
    )  # fmt: skip
    close(ours, exact)
    assert [call["i"] for call in calls] == list(range(len(sigmas) - 1))


def in_order(noise):
    left = iter(noise)
    return lambda stream, row, shape: next(left)


def test_there_and_back(seed):
    """Up to σ = 9 and down again: an image comes back, more nearly the finer the steps, with order 2."""
    x, errors = torch.randn(SHAPE), []
    for steps in (20, 40):
        down = torch.linspace(math.log(9.0), math.log(0.1), steps + 1).exp()
        noised = k_diffusion.sample_heun(model, x, down.flip(0), disable=True)
        errors.append(float((k_diffusion.sample_heun(model, noised, down, disable=True) - x).abs().max()))
    assert errors[0] / errors[1] > 2.5
    assert errors[1] < 0.02


@pytest.mark.parametrize(("n", "ends", "own"), FAST)
def test_fast(seed, n, ends, own):
    x, noise = torch.randn(SHAPE) * ends[1], [torch.randn(SHAPE) for _ in range(n)]
    exact, calls = dpm_fast(x.double(), *ends, n, noise, own)
    seen = []

    def watched(y, sigma):
        seen.append(float(sigma[0]))
        return model(y, sigma)

    ours = k_diffusion.sample_dpm_fast(watched, x, *ends, n, disable=True, noise_fn=in_order(noise), **own)
    close(ours, exact)
    assert seen == pytest.approx(calls, rel=1e-5)
    assert len(seen) == n


@pytest.mark.parametrize(("ends", "own"), ADAPTIVE)
def test_adaptive(seed, ends, own):
    x, noise = torch.randn(SHAPE) * ends[1], [torch.randn(SHAPE) for _ in range(200)]
    exact, info, sigmas = dpm_adaptive(x.double(), *ends, noise, own)
    left, calls = iter(noise), []
    ours, counts = k_diffusion.sample_dpm_adaptive(
        model, x, *ends, disable=True, return_info=True, callback=calls.append,
        noise_sampler=lambda a, b: next(left), **own,
    )  # fmt: skip
    assert counts["n_reject"] == info["n_reject"]
    # Of a first step's error float32 knows little, which moves the later ones by thousandths of their size: a hundredth
    # of what a step may err, and where they end that near the last σ, a step of next to nothing more, or less.
    allowed = max(own.get("atol", 0.0078), own.get("rtol", 0.05) * float(exact.abs().max()))
    assert float((ours - exact).abs().max()) <= 0.01 * allowed
    replayed, here, accepted, taken = x.double(), ends[1], 0, [ends[1]]  # the steps that it took, exactly
    for call in calls:
        if call["n_accept"] > accepted:
            there = float(call["sigma"])
            down, up = down_and_up(here, there, ends[0], own.get("eta", 0.0))
            replayed = dpm_steps(replayed, here, down, own["order"], []) + up * noise[accepted].double()
            here, accepted = there, call["n_accept"]
            taken.append(there)
    close(ours, replayed)
    longer, shorter = sorted((taken, sigmas), key=len, reverse=True)
    assert len(longer) - len(shorter) <= (abs(math.log(longer[-2] / longer[-1])) < 0.01)
    assert len(calls) == counts["steps"]
    assert float(calls[-1]["sigma"]) == pytest.approx(ends[0], rel=1e-5)
    assert torch.equal(calls[-1]["x"], ours)
    assert counts["nfe"] == own["order"] * counts["steps"]
    if own.get("h_init", 0) >= 1:
        assert counts["n_reject"] > 0


def test_adaptive_steps_and_their_sources_of_noise(seed):
    x = torch.randn(SHAPE) * 9.0
    full = k_diffusion.sample_dpm_adaptive(model, x, 0.1, 9.0, disable=True, eta=0.5, seed=3)
    assert torch.equal(full, k_diffusion.sample_dpm_adaptive(model, x, 0.1, 9.0, disable=True, eta=0.5, seed=3))
    assert not torch.equal(full, k_diffusion.sample_dpm_adaptive(model, x, 0.1, 9.0, disable=True, eta=0.5, seed=4))
    half = k_diffusion.sample_dpm_adaptive(model, x.bfloat16(), 0.1, 9.0, disable=True)
    assert half.dtype == torch.bfloat16
    torch.manual_seed(seed)
    one = k_diffusion.sample_dpm_fast(model, x, 0.1, 9.0, 7, disable=True, eta=0.5)
    torch.manual_seed(seed)
    drawn = [torch.randn(SHAPE) for _ in range(3)]
    two = k_diffusion.sample_dpm_fast(model, x, 0.1, 9.0, 7, disable=True, eta=0.5, noise_fn=in_order(drawn))
    assert torch.equal(one, two)


@pytest.mark.parametrize("name", ["sample_dpm_fast", "sample_dpm_adaptive"])
def test_bad_input_of_runs_between_two_sigmas(name):
    given = {"model": model, "x": torch.zeros(SHAPE), "sigma_min": 0.1, "sigma_max": 9.0, "disable": True}
    given |= {"n": 5} if name == "sample_dpm_fast" else {}
    wrong = [
        ({"sigma_min": 0.0}, "sigma_min"), ({"sigma_max": -1.0}, "sigma_max"), ({"sigma_min": 9.0}, "must differ"),
        ({"sigma_min": 10.0, "eta": 0.5}, "eta must be 0"), ({"eta": 1.5}, "eta"),
        ({"noise_sampler": lambda a, b: None, "seed": 1}, "noise_sampler"),
        ({"n": 0}, "n must") if name == "sample_dpm_fast" else ({"order": 4}, "order"),
    ]  # fmt: skip
    for arguments, what in wrong:
        with pytest.raises(ValueError, match=what):
            getattr(k_diffusion, name)(**{**given, **arguments})
    for arguments in ({"model": None}, {"x": torch.zeros(SHAPE, dtype=torch.float64)}, {"resume": None}):
        with pytest.raises(TypeError):
            getattr(k_diffusion, name)(**{**given, **arguments})


@pytest.mark.parametrize("walk", WALKS)
@pytest.mark.parametrize("name", ["sample_euler", "sample_heun", "sample_dpm_2"])
def test_library_in_any_order(seed, walk, name):
    library = pytest.importorskip("k_diffusion.sampling")
    sigmas = torch.tensor(WALKS[walk])
    x = torch.randn(SHAPE) * sigmas[0]
    theirs, ours = (getattr(module, name)(model, x, sigmas, disable=True) for module in (library, k_diffusion))
    close(ours, theirs)


@pytest.mark.parametrize(("n", "ends", "own"), FAST)
def test_library_fast(seed, n, ends, own):
    library = pytest.importorskip("k_diffusion.sampling")
    x, results, infos = torch.randn(SHAPE) * ends[1], [], []
    for module in (library, k_diffusion):
        found = []
        torch.manual_seed(seed)
        results.append(module.sample_dpm_fast(model, x, *ends, n, disable=True, callback=found.append, **own))
        infos.append(found)
    close(results[1], results[0])
    for a, b in zip(*infos, strict=True):
        assert a.keys() == b.keys()
        for key in ("x", "sigma", "sigma_hat", "denoised", "t", "t_up"):
            close(b[key], a[key])


@pytest.mark.parametrize(("ends", "own"), ADAPTIVE)
def test_library_adaptive(seed, ends, own):
    library = pytest.importorskip("k_diffusion.sampling")
    x, results, infos = torch.randn(SHAPE) * ends[1], [], []
    for module in (library, k_diffusion):
        found = []
        torch.manual_seed(seed)
        given = {"disable": True, "callback": found.append, "return_info": True, **own}
        results.append(module.sample_dpm_adaptive(model, x, *ends, **given))
        infos.append(found)
    assert results[1][1] == results[0][1]
    assert float((results[1][0] - results[0][0]).abs().max()) <= 1e-4 * float(results[0][0].abs().max())
    assert all(a.keys() == b.keys() for a, b in zip(*infos, strict=True))


@pytest.mark.parametrize("sigmas", ENDS, ids=["to 0", "to 0.08"])
@pytest.mark.parametrize(("name", "own"), CASES)
def test_library(seed, name, own, sigmas):
    library = pytest.importorskip("k_diffusion.sampling")
    x, sigmas = torch.randn(SHAPE) * sigmas[0], torch.tensor(sigmas)
    results, infos = [], []
    for module in (library, k_diffusion):
        arguments, found = dict(own), []
        if "_sde" in name:
            generator = torch.Generator().manual_seed(seed)
            arguments["noise_sampler"] = lambda s, t: torch.randn(SHAPE, generator=generator)  # noqa: B023
        torch.manual_seed(seed)
        results.append(getattr(module, name)(model, x, sigmas, disable=True, callback=found.append, **arguments))
        infos.append(found)
    theirs, ours = results
    close(ours, theirs)
    for a, b in zip(*infos, strict=True):
        assert a["i"] == b["i"]
        for key in ("x", "sigma", "sigma_hat", "denoised"):
            close(b[key], a[key])
