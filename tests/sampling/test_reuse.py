"""Rows that reuse a call: float64 by hand, a network that says the same again, states, backends, refusals."""

import pytest
import torch
from helpers import TwoParts, assert_same_bits

import fastdiff
from fastdiff import NoiseSchedule, samplers

SHAPE = (3, 2, 4, 4)
LINEAR = NoiseSchedule.linear()
Y = torch.tensor([0.1, 0.2, 0.3])


class Again(torch.nn.Module):
    """A network that is called in every row, and in some says what it said before: what reuse means, by other means.

    ``reuse`` is that of the row to come. Unconditional outputs are known by labels of zeros or by their absence.
    """

    def __init__(self, network):
        super().__init__()
        self.network, self.reuse, self.said = network, None, {}

    def forward(self, x, t, y=None):
        parts = []
        for k in range(len(x) // len(Y)):
            part = slice(k * len(Y), (k + 1) * len(Y))
            label = None if y is None else y[part]
            conditional = label is not None and bool((label != 0).any())
            if self.reuse != "output":
                deep = self.said[conditional][1] if self.reuse == "deep" else None
                self.said[conditional] = self.network.forward_deep(x[part], t[part], deep, 0, label)
            parts.append(self.said[conditional][0])
        return torch.cat(parts)


class Learned(TwoParts):
    """The same with a second half of the channels: a learned variance."""

    def forward_deep(self, x, t, deep, branch, y=None):
        out, deep = super().forward_deep(x, t, deep, branch, y)
        return torch.cat([out, out.tanh()], dim=1), deep


def gradient(x, t, y=None):
    return -x * 0.1


MASK = {"mask": torch.full((4, 4), 0.25), "known": torch.full(SHAPE, 0.5)}
GUIDED = {"model_kwargs": {"y": Y}, "uncond_kwargs": {"y": Y * 0}, "guidance_scale": 2.0}
FEATURES = {
    "plain": {},
    "guided": GUIDED,
    "guided in two calls": {**GUIDED, "uncond_kwargs": {"y": None}},
    "rescaled, thresholded": {**GUIDED, "guidance_rescale": 0.5, "thresholding": 0.8},
    "a scale a row": {**GUIDED, "guidance_scale": lambda level: 1.5 + level.t / 1000},
    "guided early": {**GUIDED, "guidance_interval": (0.5, 1000.0)},
    "inpainting": MASK,
    "a classifier": {"cond_fn": gradient},
    "torch's noise": {"noise_fn": lambda stream, draw, shape: torch.full(shape, 0.1 * (stream + draw))},
}  # fmt: skip
PLANS = {
    "ddim": samplers.ddim(LINEAR, 9, eta=0.5),
    "dpmpp_2m": samplers.dpmpp_2m(LINEAR, 7),
    "heun": samplers.heun(LINEAR, 4),
    "repaint": samplers.repaint(LINEAR, 4, jump_length=2, jump_n_sample=2),
    "learned": samplers.ddpm(LINEAR, 7, variance="learned_range"),
}


def thinned(plan, rng, kind):
    """Some of a plan's rows, at random; of "mixed", outputs and deep features."""
    calling = [i for i, row in enumerate(plan) if row.calls_model][1:]
    rows = sorted(rng.sample(calling, len(calling) // 2))
    if kind != "mixed":
        return plan.reuse(rows, kind=kind)
    return plan.reuse(rows[::2], kind="deep").reuse(rows[1::2])


# ---- what reuse means


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("features", FEATURES)
def test_a_network_that_says_the_same_again(rng, seed, features, plan):
    """To the bit: with every sampler's history, guidance, masks, thresholds, gradients and learned variances."""
    options, chosen = {**FEATURES[features], "backend": "reference"}, PLANS[plan]
    network = Learned() if plan == "learned" else TwoParts()
    if "noise_fn" not in options:
        options["seed"] = seed
    several = thinned(chosen, rng, rng.choice(("output", "deep", "mixed")))
    model = Again(network)
    for state in fastdiff.sample_iter(model, SHAPE, sampler=chosen, **options):
        model.reuse = several[state.row].reuse if state.row < len(several) else None
    network.calls.clear()
    assert_same_bits(fastdiff.sample(network, SHAPE, sampler=several, **options), state.x)
    calls_a_row = 2 if features == "guided in two calls" else 1
    assert network.calls.count("whole") == several.calls * calls_a_row
    assert network.calls.count("shallow") == sum(row.reuse == "deep" for row in several) * calls_a_row


def test_the_arithmetic_in_float64(rng, seed):
    """Of DDIM, DDPM and the multistep 2M, each row's formula with the last m."""
    for name, clip in (("ddim", None), ("ddim", 0.5), ("ddpm", 1.0), ("dpmpp_2m", None)):
        plan = samplers.SAMPLERS[name](LINEAR, 9, clip=clip)
        plan = plan.reuse(sorted(rng.sample(range(1, 9), 5)))
        x, m, slots = fastdiff.randn(SHAPE, seed=seed).double(), None, {}
        for i, row in enumerate(plan):
            if row.reuse is None:
                m = 0.25 * x + row.t / 1000
            x0 = row.scale * (row.p * x + row.q * m).clamp(-row.clip, row.clip)
            z = fastdiff.randn(SHAPE, seed=seed, stream=row.stream, draw=i).double()
            read = {f"slot{k}": slots.get(slot) for k, slot in enumerate(row.reads)}
            terms = {"x": x, "x0": x0, "m": m, "z": z, **read}
            of = lambda c, terms=terms: sum(v * terms[name] for name, v in c.items() if v)  # noqa: E731
            x, kept = of(row.x), None if row.slot is None else of(row.slot)
            if row.write is not None:
                slots[row.write] = kept
        got = fastdiff.sample(TwoParts(), SHAPE, sampler=plan, seed=seed)
        torch.testing.assert_close(got.double(), x, rtol=1e-5, atol=1e-5 * float(x.abs().max()))


@pytest.mark.parametrize("kind", ["output", "deep"])
def test_every_call_is_the_plan_itself(seed, kind):
    for plan in PLANS.values():
        network = Learned() if plan.learned_variance else TwoParts()
        runs = [fastdiff.sample(network, SHAPE, sampler=p, seed=seed) for p in (plan, plan.reuse(every=1, kind=kind))]
        assert_same_bits(*runs)
        assert "shallow" not in network.calls


@pytest.mark.parametrize("plan", PLANS)
def test_backends_agree(rng, seed, backend, plan):
    several = thinned(PLANS[plan], rng, "mixed")
    network = Learned() if plan == "learned" else TwoParts()
    options = {**GUIDED, **MASK, "guidance_rescale": 0.3, "sampler": several, "seed": seed}
    want = fastdiff.sample(network, SHAPE, backend="reference", **options)
    assert_same_bits(fastdiff.sample(network, SHAPE, backend=backend, **options), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_network_of_another_dtype(rng, seed, dtype):
    """Outputs are kept in float32, which holds what it returns; deep features in its own dtype."""
    network = TwoParts().to(dtype)
    several = thinned(PLANS["ddim"], rng, "mixed")
    model = Again(network)
    for state in fastdiff.sample_iter(model, SHAPE, sampler=PLANS["ddim"], seed=seed, **GUIDED):
        model.reuse = several[state.row].reuse if state.row < len(several) else None
    states = list(fastdiff.sample_iter(network, SHAPE, sampler=several, seed=seed, **GUIDED))
    assert_same_bits(states[-1].x, state.x)
    assert (states[-1].output.dtype, states[-1].deep.dtype) == (torch.float32, dtype)


def test_an_empty_batch_and_a_network_that_uses_its_memory_again(seed):
    assert fastdiff.sample(TwoParts(), (0, 2, 4, 4), sampler=PLANS["ddim"].reuse(every=2)).shape == (0, 2, 4, 4)

    class Reusing(TwoParts):
        memory = torch.empty(2, *SHAPE)

        def forward_deep(self, x, t, deep, branch, y=None):
            for mine, new in zip(self.memory, super().forward_deep(x, t, deep, branch, y), strict=True):
                mine.copy_(new)
            return tuple(self.memory)

    for kind in ("output", "deep"):
        options = {"sampler": PLANS["ddim"].reuse(every=3, kind=kind), "seed": seed}
        assert_same_bits(fastdiff.sample(Reusing(), SHAPE, **options), fastdiff.sample(TwoParts(), SHAPE, **options))


# ---- states


@pytest.mark.parametrize("features", ["plain", "guided", "guided in two calls"])
def test_a_run_goes_on_from_every_state(rng, seed, tmp_path, features):
    plan = thinned(PLANS["dpmpp_2m"], rng, rng.choice(("output", "deep", "mixed")))
    options = {"sampler": plan, "seed": seed, **FEATURES[features]}
    states = list(fastdiff.sample_iter(TwoParts(), SHAPE, **options))
    for state in states:
        again = fastdiff.State.load(state.save(tmp_path / "state.safetensors"))
        for name in ("output", "deep"):
            mine, saved = getattr(state, name), getattr(again, name)
            assert (mine is None) == (saved is None)
            assert mine is None or not assert_same_bits(mine, saved)
        assert_same_bits(fastdiff.sample(TwoParts(), SHAPE, resume=again, **options), states[-1].x)
    for resumed in fastdiff.sample_iter(TwoParts(), SHAPE, resume=states[3], **options):
        assert resumed.row >= 3


def test_image_to_image_begins_at_an_entry(seed):
    plan = PLANS["ddim"].reuse(every=3)
    options = {"sampler": plan, "x_init": torch.rand(SHAPE), "seed": seed}
    for start in range(len(plan)):
        if start in (0, 3, 6):
            network = TwoParts()
            fastdiff.sample(network, SHAPE, start_step=start, **options)
            assert len(network.calls) == 3 - start // 3
        else:
            with pytest.raises(ValueError, match=f"start_step is {start}, but from that row on .* reads a history"):
                fastdiff.sample(TwoParts(), SHAPE, start_step=start, **options)
    with pytest.raises(ValueError, match="strength cannot tell the steps of the plan 'ddim' apart"):
        fastdiff.sample(TwoParts(), SHAPE, strength=0.5, **options)


# ---- what is refused


def test_what_is_refused(seed):
    plan, deep = PLANS["ddim"].reuse(every=3), PLANS["ddim"].reuse(every=3, kind="deep")
    network, calls = TwoParts(), []

    def function(x, t):
        calls.append(t)
        return x

    with pytest.raises(ValueError, match=r"after fastdiff\.accelerate\(model\).*; this function is not accelerated"):
        fastdiff.sample(function, SHAPE, sampler=deep)
    with pytest.raises(ValueError, match="this Identity is not accelerated"):
        fastdiff.sample(torch.nn.Identity(), SHAPE, sampler=deep)
    for several in (plan, deep):  # guided in rows 1 … 8, alone in its first
        scales = [1.0] + [2.0] * 8
        with pytest.raises(ValueError, match="row 1 is guided and reuses row 0, which is not"):
            fastdiff.sample(network, SHAPE, sampler=several, **{**GUIDED, "guidance_scale": scales})
    assert not calls
    assert not network.calls
    for result in (torch.zeros(SHAPE), (torch.zeros(SHAPE), None)):
        network.forward_deep = lambda *args, result=result: result
        with pytest.raises(TypeError, match="forward_deep must return a pair"):
            fastdiff.sample(network, SHAPE, sampler=deep)
    network.forward_deep = lambda *args: (torch.zeros(SHAPE), torch.zeros(2, 1))
    with pytest.raises(ValueError, match=r"deep features must be \[3, …\], an entry a sample; got \[2, 1\]"):
        fastdiff.sample(network, SHAPE, sampler=deep)
    network.forward_deep = lambda *args: (torch.zeros(SHAPE), torch.zeros(3, calls.append(0) or len(calls)))
    with pytest.raises(ValueError, match=r"must be torch.float32 \[3, 1\], as in .*; got torch.float32 \[3, 4\]"):
        fastdiff.sample(network, SHAPE, sampler=deep)


def test_features_that_a_network_writes_to(seed):
    class Writing(TwoParts):
        def forward_deep(self, x, t, deep, branch, y=None):
            return super().forward_deep(x, t, None if deep is None else deep.mul_(2), branch, y)

    with pytest.raises(ValueError, match="model changed its deep features in place"):
        fastdiff.sample(Writing(), SHAPE, sampler=PLANS["ddim"].reuse(every=3, kind="deep"), seed=seed)


def test_states_of_other_runs_are_refused(seed):
    from dataclasses import replace

    options = {"seed": seed, "sampler": PLANS["ddim"].reuse(every=3)}
    states = list(fastdiff.sample_iter(TwoParts(), SHAPE, **options))
    with pytest.raises(ValueError, match="its plan is"):
        fastdiff.sample(TwoParts(), SHAPE, resume=states[2], **{**options, "sampler": PLANS["ddim"]})
    lacking = replace(states[2], output=None)
    with pytest.raises(ValueError, match=r"resume.output must be a tensor of shape \[3, 2, 4, 4\]"):
        fastdiff.sample(TwoParts(), SHAPE, resume=lacking, **options)
    with pytest.raises(ValueError, match=r"resume.output must be a tensor of shape \[6, 2, 4, 4\]"):
        fastdiff.sample(TwoParts(), SHAPE, resume=states[2], **options, **GUIDED)
    options["sampler"] = PLANS["ddim"].reuse(every=3, kind="deep")
    states = list(fastdiff.sample_iter(TwoParts(), SHAPE, **options))
    with pytest.raises(ValueError, match=r"resume.deep must be a tensor of shape \[3, …\]"):
        fastdiff.sample(TwoParts(), SHAPE, resume=replace(states[2], deep=None), **options)
    with pytest.raises(ValueError, match=r"resume.deep must be a tensor of shape \[6, …\]"):
        fastdiff.sample(TwoParts(), SHAPE, resume=states[2], **options, **GUIDED)
    fastdiff.sample(TwoParts(), SHAPE, resume=replace(states[3], deep=None), **options)  # row 3 calls the whole network


def test_nan_is_the_rows_that_called(seed):
    plan = PLANS["ddim"].reuse(every=3)

    class Breaking(TwoParts):
        def forward(self, x, t, y=None):
            return super().forward(x, t) * (float("nan") if t[0] == plan[3].t else 1)

    with pytest.raises(FloatingPointError, match="the model returned NaN or infinity at row 3 of 9"):
        fastdiff.sample(Breaking(), SHAPE, sampler=plan, seed=seed)


def test_what_people_read(seed):
    plan = PLANS["ddim"].reuse(every=3)
    assert "in 3 network calls" in str(fastdiff.Recipe.of(TwoParts(), SHAPE, sampler=plan))
    states = list(fastdiff.sample_iter(TwoParts(), SHAPE, sampler=plan, seed=seed))
    assert "output" in repr(states[2])
    recipe = fastdiff.Recipe.of(TwoParts(), SHAPE, sampler=plan, seed=seed)
    assert_same_bits(recipe.sample(TwoParts()), states[-1].x)


def test_two_threads_at_once(seed):
    from concurrent.futures import ThreadPoolExecutor

    network = TwoParts()
    plans = [PLANS["ddim"].reuse(every=n, kind=kind) for n in (2, 3) for kind in ("output", "deep")]
    want = [fastdiff.sample(network, SHAPE, sampler=plan, seed=seed) for plan in plans]
    with ThreadPoolExecutor(4) as pool:
        got = list(pool.map(lambda plan: fastdiff.sample(network, SHAPE, sampler=plan, seed=seed), plans * 4))
    for a, b in zip(got, want * 4, strict=True):
        assert_same_bits(a, b)
